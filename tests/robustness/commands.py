"""Command lines with any values of any settings, and how they end where real work is replaced by `Began`."""

import contextlib
import dataclasses
import functools
import importlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from starflow_jax.config import Config
from starflow_jax.io.video import write_mp4
from starflow_jax.modes import MODES
from starflow_jax.settings.listing import Described, describe
from tests.robustness.trial import LONGEST, TooLong, at_most
from tests.small_run import ROOT, command, environment, run_here

SETTINGS = {one.name: one for one in describe(Config)}
NUMBERS = ("0", "-1", "1", "2", "3", "7", "16", "255", "4096", "1000000", "2147483648", "4294967295", "4294967296",
           "9223372036854775807", "9223372036854775808", "-9223372036854775809", "1" + "0" * 30, "9" * 5_000, "0.5",
           "-0.0", "1e-320", "1e30", "1e308", "1e999", "-1e999", "nan", "inf", "0x10", "1_000", "1e3", "٣", "²", "")
WORDS = ("", " ", "\n", "\n\n ", "a red seven moves right", "x" * 5_000, "\udcff", "\x1b[2J", "\ufeff",
         "🙂" * 200, "25: a red seven moves left", "9: a; 17: b", "1:1", "16:9", "0:1", "1:0", "99999:1", ",", "a,,b",
         "none", "None", "%s", "{}", "$(touch made)", "`touch made`", "--config", "true", "[]", "(", "v5p:2x2x1",
         "gpu:80GB", "gpu:0GB", "qkv", "deep", "data", "fps", "16:9,1:1")
# In a folder of their own: `make_folder`. Nothing outside of it may be read in full, or written to.
PATHS = ("", "missing", "missing/below", "file", "file/below", "folder", "picture.png", "video.mp4", "prompts.txt",
         "noise", "noise.png", "noise.mp4", "noise.safetensors", "noise.pth", "noise.parquet", "noise.jsonl",
         "noise.csv", "noise.tar", "list.csv", ".", "x" * 300, "x" * 5_000, "a/" * 3_000, "/proc/self/status",
         "/dev/null", "/proc/none", "\udcff", "hub:", "hub:a", "gs://", "http://", "file://x", "*", "[", "🙂",
         "folder,file", "new.safetensors")
NAMES_OF_FILES = re.compile(r"(weights|directory|init_from|file|vbench|image|video|output|lora|folder|reference|"
                            r"source|target|codec|statistics|input|convert\.text|other)$")
COMMANDS = ("", " ", "cat", "false", "no_such_command", "'", "json:dumps", "json:no", "nothing:at_all", "os:", ":")
CONFIGS = ("configs/t2v.py", "configs/t2v.py", "configs/t2v.py:7b", "configs/t2i.py", "configs/ti2v.py",
           "configs/ablations.py:base-0", "configs/released.py", "configs/workdir.py:folder", "configs/workdir.py:",
           "configs/workdir.py", "configs/t2v.py:nothing", "missing.py", "file", "folder", "", ":", "broken.py",
           "configs/t2v.py:\n")
WORKDIRS = ("folder", "file", "file/below", "/proc/none", "x" * 300, "", "\udcff")


MEMORY = 12 * 2**30  # bytes of address space of a process


class Began(BaseException):
    """Real work would begin here."""


def make_folder(folder: Path) -> None:
    """What PATHS and CONFIGS name."""
    noise = np.random.default_rng(0)
    (folder / "file").touch()
    (folder / "folder").mkdir()
    frames = noise.integers(0, 255, (17, 24, 24, 3), np.uint8)
    Image.fromarray(frames[0]).save(folder / "picture.png")
    write_mp4(folder / "video.mp4", frames, 8)
    (folder / "prompts.txt").write_text("a red seven moves right\na blue three\n")
    (folder / "list.csv").write_text("path,caption\nvideo.mp4,a video\nmissing.mp4,none\n")
    (folder / "broken.py").write_text("def get_config(: pass")
    for suffix in ("", ".png", ".mp4", ".safetensors", ".pth", ".parquet", ".jsonl", ".csv", ".tar"):
        (folder / f"noise{suffix}").write_bytes(noise.bytes(2_000))


def likely(setting: Described) -> st.SearchStrategy[str]:
    """Values of a setting that mostly are allowed, the largest and smallest among them."""
    words = re.match(r"(?:one of|comma-separated parts of) (.*)", setting.allowed)
    if words:
        return st.sampled_from([*words[1].replace("(empty)", "").split(", "), words[1].replace(" ", "")])
    if setting.type == "true or false":
        return st.sampled_from(("true", "false"))
    if setting.type in ("a number", "a whole number"):
        bounds = re.findall(r"-?\d+(?:\.\d+)?", setting.allowed)
        return st.sampled_from([*bounds, "1", "2", "4", "16", "64", str(setting.default)])
    if setting.type.startswith("a tuple"):
        return st.sampled_from(("()", "(1,)", "(1,1)", "(0.5,2,4)", "(2,4,)"))
    if NAMES_OF_FILES.search(setting.name):
        return st.sampled_from(PATHS)
    return st.sampled_from(WORDS)


def hostile(setting: Described) -> st.SearchStrategy[str]:
    """Any values of a setting, but that no foreign file is written to."""
    text = st.text(st.characters(exclude_characters="/\0"), max_size=30)
    kinds = [st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.integers().map(str), st.floats().map(repr), text]
    if setting.type.startswith("a tuple"):
        parts = st.lists(st.sampled_from(("1", "0.5", "x", *NUMBERS)), max_size=4)
        kinds.append(parts.map(lambda each: f"({','.join(each)}{',' * (len(each) == 1)})"))
    return st.one_of(*kinds)


@st.composite
def commands(draw: Callable[[st.SearchStrategy[Any]], Any], modes: Sequence[str] = tuple(MODES),
             odd: Sequence[str] = ("", "", "", "", "value", "value", "config", "workdir")) -> list[str]:
    """The arguments of starflow_jax.main: a config, a mode, a workdir and some settings, often the mode's own. odd:
    what may be other than likely."""
    mode, odd_one = draw(st.sampled_from(modes)), draw(st.sampled_from(odd))
    own = [name for name in SETTINGS if name.partition(".")[0] in MODES[mode][1]]
    names = draw(st.lists(st.sampled_from(own) | st.sampled_from(sorted(SETTINGS)), max_size=6, unique=True))
    settings = []
    for name in names:
        of = hostile if odd_one == "value" and draw(st.booleans()) else likely
        value = draw(st.sampled_from(COMMANDS) if name == "sample.rewrite" else of(SETTINGS[name]))  # which is run
        settings.append(f"--config.{name}={value}")
    config = draw(st.sampled_from(CONFIGS if odd_one == "config" else CONFIGS[:5]))
    workdir = draw(st.sampled_from(WORKDIRS)) if odd_one == "workdir" else "new"
    prompt = ["--config.sample.prompt=a red seven moves right"] if draw(st.integers(0, 4)) else []
    return [f"--config={config}", f"--mode={mode}", f"--workdir={workdir}", *prompt, *settings]


# Where real work begins: {module: functions}. All that is checked before is checked.
WORK = {
    "starflow_jax.model.sources": ("data_source",),
    "starflow_jax.sampling.batches": ("make_batch",),
    "starflow_jax.sampling.stream": ("stream_clips",),
    "starflow_jax.sampling.generate": ("generate_clips",),
    "starflow_jax.sampling.calibration": ("fit_guess",),
    "starflow_jax.evaluation.likelihood": ("likelihood",),
    "starflow_jax.evaluation.split": ("split_likelihood", "prompts_to_read"),
    "starflow_jax.evaluation.networks": ("I3D", "LPIPS"),
    "starflow_jax.data.raw.tasks": ("run",),
    "starflow_jax.checkpoints.parameters": ("save_params",),
    "starflow_jax.io.tensor_files": ("write_safetensors",),
    "starflow_jax.model.store": ("save_pretrained",),
    "starflow_jax.planning.programs": ("compile_step",),
    "starflow_jax.modes.serve": ("_run",),
    "starflow_jax.benchmarks.start": ("report",),
    "starflow_jax.benchmarks.data": ("report",),
    "starflow_jax.benchmarks.decoding": ("trained_model", "lengths", "random_model"),
    "starflow_jax.benchmarks.vae": ("beside_torch",),
    "starflow_jax.benchmarks.training": ("train_step_ratio",),
}


@contextlib.contextmanager
def without_work() -> Iterator[None]:
    """Every function of WORK raises Began, wherever it was imported to; the package's weights are read once."""
    for mode in MODES:
        importlib.import_module(f"starflow_jax.modes.{mode}")
    import starflow_jax.io.arrays as arrays
    from starflow_jax.model.own_settings import PRETRAINED, PRETRAINED_WEIGHTS

    def began(*_: Any, **__: Any) -> NoReturn:
        raise Began

    read = functools.cache(arrays.import_arrays)

    def import_arrays(path: Path) -> Any:
        return (read if path == PRETRAINED / PRETRAINED_WEIGHTS else read.__wrapped__)(path)

    replaced: dict[int, Any] = {id(arrays.import_arrays): import_arrays}
    for module, names in WORK.items():
        replaced |= {id(getattr(importlib.import_module(module), name)): began for name in names}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            for attribute, value in list(vars(module).items()) if name.startswith("starflow_jax") else ():
                if id(value) in replaced:
                    patch.setattr(module, attribute, replaced[id(value)])
        yield


@dataclasses.dataclass(frozen=True)
class Result:
    """How a command ended: "work" (it would begin), "done", "one line", or a fault."""

    how: str
    said: str = ""

    @property
    def faulty(self) -> bool:
        return self.how not in ("work", "done", "one line")


def result_of(arguments: Sequence[str], folder: Path) -> Result:
    """Of a command run in this process, in a folder, within `without_work`."""
    try:
        with at_most(LONGEST):
            code, _, err = run_here(arguments, folder)
    except Began:
        return Result("work")
    except TooLong as error:
        return Result(f"silent for {LONGEST:g} s", "".join(traceback.format_exception(error)))
    except Exception as error:
        return Result(type(error).__name__, "".join(traceback.format_exception(error)))
    return judged(code, err)


def judged(code: int, err: str) -> Result:
    """Of an exit code and what was written to stderr."""
    if code == 0:
        return Result("done")
    lines = err.splitlines()
    if code == 2 and len(lines) == 1 and lines[0].startswith("starflow_jax: "):
        return Result("one line", err)
    return Result(f"exit code {code} with {len(lines)} lines", err)


def result_in_process(arguments: Sequence[str], folder: Path) -> Result:
    """Of a command run as a process of a small model with MEMORY, which is ended after a while of work."""
    shutil.rmtree(folder / "new", ignore_errors=True)
    with tempfile.TemporaryDirectory() as said:
        out, err = Path(said) / "out", Path(said) / "err"
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            process = subprocess.Popen(command(folder / "new", folder / "digits", *arguments), cwd=folder,
                                       env=environment(PYTHONPATH=str(ROOT)), stdout=stdout, stderr=stderr,
                                       start_new_session=True, preexec_fn=_limit)
            try:
                seconds = _wait(process, lambda: bool(out.stat().st_size + err.stat().st_size))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what it started, too
        text = err.read_text(errors="replace")
        if seconds >= LONGEST:
            working = out.stat().st_size + len(text)
            return Result("work" if working else f"silent for {LONGEST:g} s of CPU time", text[-2_000:])
        result = judged(process.wait(), text.splitlines()[-1] if text.strip() else "")
        return Result("Traceback", text[-2_000:]) if "Traceback (most" in text else result


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _wait(process: subprocess.Popen, speaks: Callable[[], bool]) -> float:
    """CPU seconds that it has taken when it ends, or when it has taken LONGEST. A process that takes none for long, and
    says nothing, waits for something: that counts as LONGEST."""
    taken, began = 0.0, time.monotonic()
    while process.poll() is None and taken < LONGEST:
        time.sleep(0.1)
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            taken = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        if time.monotonic() - began > 30 * LONGEST:
            return LONGEST
    return taken if process.poll() is None else 0.0
