"""Storage that fails under the command line: python -m tests.robustness.storage --tries=8

Training, preparation, a list of prompts, an evaluation and a conversion run on a folder whose storage is full,
read-only, faulty or gone from a random operation on (faulty_storage.c), or whose power is lost there, so that what was
not synced is gone. A fault is one line and exit code 2; the same command then goes on once the storage works, and ends
with the files that an undisturbed run leaves, bit for bit.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from starflow_jax.io.files import ARRIVING
from tests.robustness.faulty import Kind, Storage
from tests.robustness.forks import import_everything, run_forked
from tests.robustness.report import write_report
from tests.small_run import command, run_here

FAULTS = [kind for kind in Kind if kind != Kind.NOTHING]
# The probabilities with which changed names, and bytes that were not synced, survive a loss of power: a disk that
# forgets all, one that writes names first, one in the midst of it.
LOSSES = ((0.0, 0.0), (1.0, 0.0), (0.5, 0.5))
TIMES = ("seconds", "tokens_per_second", "seconds_to_first_frame", "timeline")


@dataclasses.dataclass(frozen=True)
class Part:
    """A command on the folder ROOT, which begins as a copy of `before`."""

    name: str
    before: Path
    run: Callable[[], tuple[int, str, str]]  # exit code, stdout, stderr
    result: Callable[[Path], dict[str, str]]  # what must be equal in the end, by name
    after_loss: Callable[[Path], str] = lambda root: ""  # what is wrong with the folder, "" where nothing is


def main() -> None:
    parser = argparse.ArgumentParser(description="Run commands on storage that fails.")
    parser.add_argument("--parts", default="train,prepare,sample,stream,evaluate,convert")
    parser.add_argument("--tries", type=int, default=8, help="of each kind of fault, for each part")
    parser.add_argument("--kinds", default=",".join(kind.name for kind in FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--report", type=Path, default=Path("runs/robustness/storage.json"))
    asked = parser.parse_args()
    if "LD_PRELOAD" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            storage = Storage(Path(folder))
            os.environ |= storage.environment
            arguments = [sys.executable, "-m", "tests.robustness.storage", *sys.argv[1:], f"--folder={folder}"]
            sys.exit(os.spawnv(os.P_WAIT, sys.executable, arguments))
    report = fail_parts(asked.folder, asked.parts.split(","), asked.tries, asked.seed,
                        [Kind[name] for name in asked.kinds.split(",")])
    write_report(asked.report, report)
    print(json.dumps(report, indent=1))
    sys.exit(1 if report["lost"] else 0)


def fail_parts(folder: Path, parts: list[str], tries: int, seed: int, kinds: list[Kind]) -> dict[str, Any]:
    """The report: how often each kind of fault was tried, and what was lost."""
    if set(parts) & {"train", "prepare", "sample", "stream", "evaluate", "convert"}:
        import_everything()
    storage, chance, tried, lost = Storage(folder), random.Random(seed), Counter[str](), list[str]()
    for name in parts:
        part = PARTS[name](folder)
        trial = Trial(storage, part, folder / "log")
        for kind in (kind for kind in kinds if trial.operations[kind]):
            for number in range(tries):
                problem = trial.run(kind, chance, number)
                tried[f"{name}: {kind.name.lower().replace('_', ' ')}"] += 1
                if problem:
                    lost.append(f"{name}, {problem}")
                    print(f"{name}, {problem}", flush=True)
            print(f"{name}: {tries} times {kind.name}", flush=True)
    return {"tries": tried.total(), "seed": seed, "lost": lost, "tried": dict(tried)}


class Trial:
    """A part's command, its result on storage that works, and on storage that does not."""

    def __init__(self, storage: Storage, part: Part, log: Path) -> None:
        self.storage, self.part, self.log = storage, part, log
        storage.fill(part.before)
        code, said = self._command()
        if code:
            raise RuntimeError(f"{part.name} fails on storage that works: {said[-2000:]}")
        self.expected = self._result()
        storage.fill(part.before)
        self._command()
        self.operations = {kind: storage.operations(kind) for kind in FAULTS}
        if self._result() != self.expected:
            raise RuntimeError(f"{part.name} gives another result the second time")

    def run(self, kind: Kind, chance: random.Random, number: int) -> str:
        """One fault at a random operation; what went wrong then, "" where nothing did."""
        storage, span = self.storage, chance.choice((0, 1)) if kind != Kind.VANISH else 1
        at = chance.randint(1, self.operations[kind] + (kind == Kind.POWER))  # power may go when all is done
        lies = chance.randint(1, at) if kind == Kind.POWER and number % 4 == 3 else 0
        storage.fill(self.part.before)
        storage.order(kind, at, span, lies)
        code, said = self._command()
        what = f"{kind.name} at operation {at} of {self.operations[kind]}, span {span}, lies from {lies}"
        failed = storage.orders.failed
        storage.order()
        problem = problem_with(code, said) if kind != Kind.POWER or not failed else ""
        if kind == Kind.POWER:
            storage.lose_power(chance, *LOSSES[number % len(LOSSES)])
            problem = problem or ("" if lies else self.part.after_loss(storage.root))
        if problem:
            return f"{what}: {problem}"
        if kind == Kind.SHORT_WRITE and not code and (differing := self._differing()):
            return f"{what}: exit code 0, and others are {differing}"
        code, said = self._command()
        if code == 2 and kind == Kind.VANISH:  # nothing can make again what is gone: it is to be put back
            if problem_with(code, said):
                return f"{what}: {problem_with(code, said)}"
            storage.fill(self.part.before)
            code, said = self._command()
        if code:
            return f"{what}: the command does not go on: {said[-1500:]}"
        differing = self._differing()
        return f"{what}: in the end others are {differing}" if differing else ""

    def _differing(self) -> list[str]:
        """Names of what is not as it is to be in the end."""
        found = self._result()
        return [name for name in {**self.expected, **found} if self.expected.get(name) != found.get(name)]

    def _command(self) -> tuple[int, str]:
        def run() -> int:
            code, out, err = self.part.run()
            os.write(2, f"{out}\n{err}".encode())
            return code

        return run_forked(run, self.log)

    def _result(self) -> dict[str, str]:
        def run() -> int:
            os.write(1, json.dumps(self.part.result(self.storage.root)).encode())
            return 0

        code, said = run_forked(run, self.log)
        if code:
            raise RuntimeError(said[-2000:])
        return json.loads(said.splitlines()[-1])


def problem_with(code: int, said: str) -> str:
    """What is wrong with how a command ended that met a fault."""
    if "Traceback" in said or "terminate called" in said:
        return f"a traceback: {said[-3000:]}"
    if code == 0:
        return ""
    last = said.strip().splitlines()[-1] if said.strip() else ""
    if code != 2 or not last.startswith("starflow_jax: "):
        return f"exit code {code}: {said[-1500:]}"
    return ""


def digest(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_times(facts: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in facts.items() if name not in TIMES})


def of_training(root: Path) -> dict[str, str]:
    """The last checkpoint's arrays, and the metrics."""
    import hashlib

    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    step = max(int(path.name) for path in (root / "checkpoints").iterdir() if path.name.isdigit())
    arrays = ocp.StandardCheckpointer().restore((root / "checkpoints" / str(step) / "state").absolute())
    found = {f"array {jax.tree_util.keystr(path)}": hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
             for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)}
    lines = map(json.loads, (root / "metrics.jsonl").read_text().splitlines())
    return {**found, "step": str(step), "metrics": "\n".join(map(without_times, lines))}


def of_preparation(root: Path) -> dict[str, str]:
    """All files."""
    files = sorted(path for path in (root / "prepared").rglob("*") if path.is_file())
    return {str(path.relative_to(root)): digest(path) for path in files}


def of_sampling(root: Path) -> dict[str, str]:
    """All files but a stream's timeline, and what a process that could not even delete it has left behind; of JSON what
    does not depend on the clock."""
    files = sorted(path for path in (root / "videos").rglob("*") if path.is_file()
                   and not path.name.endswith(".timeline.png") and ARRIVING not in str(path.relative_to(root)))
    return {path.name: without_times(json.loads(path.read_text())) if path.suffix == ".json" else digest(path)
            for path in files}


def of_workdir(root: Path) -> dict[str, str]:
    """All files but what a process that could not even delete it has left behind, and orbax's own, which say when they
    were written; of JSON what does not depend on the clock, and the checkpoint's arrays."""
    from starflow_jax.checkpoints.parameters import stored_params

    files = sorted(path for path in root.rglob("*") if path.is_file()
                   and ARRIVING not in str(path.relative_to(root)) and "checkpoints" not in path.parts)
    found = {str(path.relative_to(root)): without_times(json.loads(path.read_text())) if path.suffix == ".json"
             and path.stat().st_size else digest(path) for path in files}
    checkpoint = next(root.rglob("checkpoints")) / "0"
    return {**found, **{f"array {name}": hash_of(array) for name, array in stored_params(checkpoint).items()}}


def hash_of(array: Any) -> str:
    import hashlib

    import numpy as np

    return hashlib.sha256(np.asarray(array).tobytes()).hexdigest()


def training(folder: Path) -> Part:
    before, data, workdir = folder / "before", folder / "data", folder / "root"
    before.mkdir(exist_ok=True)
    settings = ["steps=6", "checkpoint_every=2", "evaluate_every=4", "sheet_clips=0", "validation_clips=4"]
    arguments = command(workdir, data, *(f"--config.train.{item}" for item in settings),
                        "--config.model.denoiser=none", "--config.data.train_clips=64",
                        "--config.data.image_probability=0")[3:]
    return Part("train", before, partial(run_here, arguments), of_training)


def preparation(folder: Path) -> Part:
    from tests.prepared_input import write_inputs

    before = folder / "before"
    before.mkdir(exist_ok=True)
    if not (folder / "in").exists():
        code, said = run_forked(lambda: write_inputs(folder / "in") or 0, folder / "log")
        assert code == 0, said
    settings = [f"input={folder / 'in'}", "resolution=18", "aspect_ratios=1:1,3:2", "fps=0", "frames=9",
                "min_motion=0.01", "items_per_part=4", "validation_share=0.2", "test_share=0.2", "processes=1",
                "batch_size=4", "clips_per_shard=3", "latents=true", f"output={folder / 'root' / 'prepared'}"]
    arguments = ["--config=configs/t2v.py", "--mode=prepare", f"--workdir={folder / 'elsewhere'}",
                 *(f"--config.prepare.{item}" for item in settings)]
    return Part("prepare", before, partial(run_here, arguments), of_preparation)


def sampling(folder: Path, *more: str) -> Part:
    from tests.sharded_sampling import write_workdir
    from tests.small_model import CAPTIONS

    before = folder / "before"
    before.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    if not (folder / "model").exists():
        code, said = run_forked(lambda: write_workdir(folder / "model") or 0, folder / "log")
        assert code == 0, said
    arguments = ["--config=configs/t2v.py", "--mode=sample", f"--workdir={folder / 'model'}",
                 "--config.sample.batch_size=1", f"--config.sample.prompts_file={folder / 'prompts.txt'}",
                 "--config.sample.guidance=0", f"--config.sample.output={folder / 'root' / 'videos'}", *more]
    return Part("sample", before, partial(run_here, arguments), of_sampling)


def streaming(folder: Path) -> Part:
    return sampling(folder, "--config.sample.stream=true")


def small_model(folder: Path) -> Path:
    """The workdir of a small model of moving digits, whose data are in the folder too."""
    from tests.modes.small_backbone import config_with_data, write_model

    def make() -> int:
        write_model(config_with_data(folder / "digits"), folder / "measured", seed=1)
        return 0

    if not (folder / "measured").exists():
        code, said = run_forked(make, folder / "log")
        assert code == 0, said
    return folder / "measured"


def evaluation(folder: Path) -> Part:
    """In the model's own workdir: figures, a sheet and a moving picture."""
    arguments = ["--mode=evaluate", f"--workdir={folder / 'root'}"]
    return Part("evaluate", small_model(folder), partial(run_here, arguments), of_workdir)


def conversion(folder: Path) -> Part:
    """A workdir's model into another workdir, and from there into a file under the release's names."""
    from starflow_jax.modes.convert import UNFINISHED

    before, source, workdir = folder / "nothing", small_model(folder), folder / "root" / "made"
    before.mkdir(exist_ok=True)
    there = ["--mode=convert", f"--config=configs/workdir.py:{source}", f"--workdir={workdir}",
             f"--config.convert.source={source}"]
    back = ["--mode=convert", f"--workdir={workdir}", f"--config.convert.target={folder / 'root' / 'out.safetensors'}"]

    def run() -> tuple[int, str, str]:
        finished = (workdir / "converted.json").exists() and not (workdir / UNFINISHED).exists()
        done = (0, "", "") if finished else run_here(there)
        return done if done[0] else run_here(back)

    return Part("convert", before, run, of_workdir)


OLD, NEW = "old" * 100, "new" * 100


def files(folder: Path) -> Part:
    """A file that is replaced and a folder that is made by starflow_jax.io.files."""
    from starflow_jax.io.files import atomic_path, write_text

    def write(root: Path) -> None:
        with atomic_path(root / "deep" / "made") as made:
            made.mkdir()
            (made / "part").write_text(NEW)
        write_text(root / "facts", NEW)

    return Part("files", _with_old_facts(folder), partial(_ends, write, folder / "root"), _texts, _torn)


def pictures(folder: Path) -> Part:
    """A moving picture and a sheet."""
    import numpy as np

    from starflow_jax.io.pictures import contact_sheet, write_gif

    (folder / "before").mkdir(exist_ok=True)
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 24, 24, 3), np.uint8)

    def write(root: Path) -> None:
        write_gif(root / "moving.gif", clips, ["a", "b"], 8, scale=4)
        contact_sheet(root / "sheet.png", clips, ["a", "b"], scale=4)

    return Part("pictures", folder / "before", partial(_ends, write, folder / "root"),
                lambda root: {path.name: digest(path) for path in root.iterdir() if path.is_file()})


def careless(folder: Path) -> Part:
    """The same without syncing: what these trials must find."""
    def write(root: Path) -> None:
        (root / "deep" / "made").mkdir(parents=True, exist_ok=True)
        (root / "deep" / "made" / "part").write_text(NEW)
        (root / "arriving").write_text(NEW)
        (root / "arriving").replace(root / "facts")

    return Part("careless", _with_old_facts(folder), partial(_ends, write, folder / "root"), _texts, _torn)


def _with_old_facts(folder: Path) -> Path:
    (folder / "before").mkdir(exist_ok=True)
    (folder / "before" / "facts").write_text(OLD)
    return folder / "before"


def _ends(write: Callable[[Path], None], root: Path) -> tuple[int, str, str]:
    try:
        shutil.rmtree(root / "deep", ignore_errors=True)
        write(root)
    except OSError as error:
        return 2, "", f"starflow_jax: {error}"
    return 0, "", ""


def _texts(root: Path) -> dict[str, str]:
    whole = (path for path in root.rglob("*") if path.is_file() and ARRIVING not in str(path.relative_to(root)))
    return {str(path.relative_to(root)): path.read_text() for path in whole}


def _torn(root: Path) -> str:
    """The file is the old or the new one, and the folder is whole or not there; the file is written last."""
    found, whole = _texts(root), {"facts": NEW, "deep/made/part": NEW}
    return "" if found in ({"facts": OLD}, {**whole, "facts": OLD}, whole) else f"left are {found}"


PARTS: dict[str, Callable[[Path], Part]] = {"train": training, "prepare": preparation, "sample": sampling,
                                            "stream": streaming, "evaluate": evaluation, "convert": conversion,
                                            "files": files, "pictures": pictures, "careless": careless}

if __name__ == "__main__":
    main()
