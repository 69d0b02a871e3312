"""Checkpoints: bit for bit, the newest and the best kept, damage found, a kill at any moment survived."""

import contextlib
import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from starflow_jax import main
from starflow_jax.checkpoints import training
from starflow_jax.checkpoints.checksums import first_whole
from starflow_jax.checkpoints.parameters import restore_params
from starflow_jax.checkpoints.training import BEST, Checkpoints
from starflow_jax.config import UserError

FINGERPRINT = {"model": {"width": 64, "layers": [1, 1, 2]}, "name": "tiny"}


def make_state(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "params": {"kernel": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32),
                   "half": jnp.asarray(rng.normal(size=300), jnp.bfloat16)},
        "key": jax.random.key(seed), "step": jnp.int32(seed), "scale": jnp.float32(1 / (seed + 3)),
    }


def abstract_state() -> dict:
    return jax.eval_shape(lambda: make_state(0))


def bits(state: dict) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Every leaf's dtype, shape and bytes."""
    leaves = [jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
              for leaf in jax.tree.leaves(state)]
    return [(str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]


def open_checkpoints(folder: Path, keep: int = 3) -> Checkpoints:
    return Checkpoints(folder, keep=keep, model_fingerprint=FINGERPRINT)


def restore(checkpoints: Checkpoints, abstract: Any = None) -> tuple[Any, dict, int]:
    found = checkpoints.restore(abstract or abstract_state())
    assert found is not None
    return found


def steps_on_disk(folder: Path) -> set[int]:
    return {int(path.name) for path in folder.iterdir() if path.name.isdigit()}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with steps 10 and 20, to be copied and harmed."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    checkpoints = open_checkpoints(folder)
    for step in (10, 20):
        checkpoints.save(step, make_state(step), {"position": step}, {BEST: 100 / step})
    checkpoints.close()
    return folder


@pytest.fixture
def copy(two_checkpoints: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))


def test_restored_bit_for_bit(copy: Path) -> None:
    checkpoints = open_checkpoints(copy)
    abstract = abstract_state()
    sharding = SingleDeviceSharding(jax.devices()[0])
    abstract["params"]["kernel"] = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding)
    state, data_state, step = restore(checkpoints, abstract)
    checkpoints.close()
    assert bits(state) == bits(make_state(20)) != bits(make_state(10))
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, make_state(20))
    assert state["params"]["kernel"].sharding == sharding
    assert (data_state, step) == ({"position": 20}, 20)


def test_all_of_it_is_on_the_disk_before_the_next_is_begun(tmp_path: Path, unsynced: Callable[[Path], list[str]]
                                                           ) -> None:
    checkpoints = open_checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, make_state(1), {"position": 1}, {BEST: 1.0})
    checkpoints.wait()
    assert steps_on_disk(tmp_path / "checkpoints") == {1} and unsynced(tmp_path) == []
    checkpoints.close()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   ValueError("RESOURCE_EXHAUSTED: No space left on device [source locations='a.cc']")])
def test_what_can_not_be_written_is_one_line_and_costs_nothing_else(copy: Path, error: Exception, caplog,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(training, "write_checksums", full)
    monkeypatch.setattr(logging.getLogger("absl"), "filters", [])  # main's, where a test before this one ran it
    checkpoints = open_checkpoints(copy)
    checkpoints.save(30, make_state(30), {"position": 30}, None)
    with pytest.raises(UserError, match=r"can't be written \(.*No space left on device\); those") as caught:
        checkpoints.wait()
    assert "\n" not in str(caught.value) and "source" not in str(caught.value)
    with contextlib.suppress(UserError):
        checkpoints.close()
    assert steps_on_disk(copy) == {10, 20}
    of_orbax = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert of_orbax and not any(map(main.is_ours, of_orbax))  # the command line does not show its tracebacks


@pytest.mark.parametrize("processes, expected", [(1, UserError), (2, jax.errors.JaxRuntimeError)])
def test_a_lost_process_is_no_fault_of_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int,
                                               expected: type[Exception]) -> None:
    """Orbax may say it as any error; what trains then says that another process was lost (training/loop.py)."""
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(expected, match="Gloo"), training._writing(tmp_path):
        raise ValueError("UNKNOWN: Gloo AllGather failed: connection closed by peer")


def test_restored_on_other_devices_than_wrote_it(tmp_path: Path) -> None:
    script = f"""
        import jax, jax.numpy as jnp
        from pathlib import Path
        from tests.checkpoints.test_training import make_state, open_checkpoints
        state = jax.device_put(make_state(4), jax.devices()[12])
        checkpoints = open_checkpoints(Path({str(tmp_path)!r}))
        checkpoints.save(1, state, {{}}, None)
        checkpoints.close()
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=16"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment)
    checkpoints = open_checkpoints(tmp_path)
    state, _, _ = restore(checkpoints)
    checkpoints.close()
    assert bits(state) == bits(make_state(4))


def test_empty_folder_restores_nothing(tmp_path: Path) -> None:
    checkpoints = open_checkpoints(tmp_path / "new")
    assert checkpoints.restore(abstract_state()) is None and checkpoints.steps(best=True) == []
    assert checkpoints.latest_step() is None
    checkpoints.close()


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    checkpoints = open_checkpoints(tmp_path, keep=2)
    metrics = {1: 3.0, 2: 1.5, 3: float("nan"), 4: None, 5: 2.0, 6: 2.5}
    for step, value in metrics.items():
        checkpoints.save(step, {"ema": {"w": jnp.full(3, step)}}, {}, None if value is None else {BEST: value})
    checkpoints.close()
    assert steps_on_disk(tmp_path) == {2, 5, 6}
    checkpoints = open_checkpoints(tmp_path, keep=2)  # the ranking is read back
    abstract = {"w": jax.ShapeDtypeStruct((3,), jnp.int32)}
    assert checkpoints.latest_step() == 6
    assert restore(checkpoints, {"ema": abstract})[2] == 6
    assert checkpoints.steps(best=True) == [2, 6, 5]
    best = first_whole(tmp_path, checkpoints.steps(best=True))  # as a model is loaded to sample from
    assert (restore_params(tmp_path / str(best), abstract)["w"] == 2).all()
    checkpoints.save(7, {"ema": {"w": jnp.full(3, 7)}}, {}, {BEST: 1.0})
    checkpoints.close()
    assert steps_on_disk(tmp_path) == {6, 7}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest_array_file(folder: Path) -> Path:
    return max((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink], ids=["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", ["array", "state/_METADATA", "state/manifest.ocdbt", "data/metadata",
                                  "metrics/metrics", "checksums"])
def test_damaged_newest_is_reported_and_the_one_before_used(copy: Path, caplog, name: str, harm) -> None:
    newest = copy / "20"
    harm(largest_array_file(newest) if name == "array" else newest / name)
    checkpoints = open_checkpoints(copy)
    logging.getLogger("absl").propagate = True
    with caplog.at_level(logging.ERROR, logger="absl"):
        state, data_state, step = restore(checkpoints)
    assert (bits(state), data_state, step) == (bits(make_state(10)), {"position": 10}, 10)
    reports = [record.getMessage() for record in caplog.records if "the one before it" in record.getMessage()]
    assert len(reports) == 1 and f"{newest} is damaged" in reports[0] and "\n" not in reports[0]
    assert checkpoints.latest_step() == 10
    checkpoints.close()


def test_a_damaged_step_is_written_again(copy: Path) -> None:
    flip_a_bit(largest_array_file(copy / "20"))
    checkpoints = open_checkpoints(copy)
    assert restore(checkpoints)[2] == 10
    assert steps_on_disk(copy) == {10, 20}  # reading deletes nothing
    checkpoints.save(20, make_state(21), {"position": 20}, None)
    checkpoints.close()
    checkpoints = open_checkpoints(copy)
    state, _, step = restore(checkpoints)
    checkpoints.close()
    assert step == 20 and bits(state) == bits(make_state(21))


def test_all_damaged_is_an_error_that_deletes_nothing(copy: Path) -> None:
    for step in ("10", "20"):
        truncate(largest_array_file(copy / step))
    checkpoints = open_checkpoints(copy)
    with pytest.raises(UserError, match="all checkpoints are damaged"):
        checkpoints.restore(abstract_state())
    checkpoints.close()
    assert steps_on_disk(copy) == {10, 20}


def test_a_state_of_another_shape_is_an_error_that_deletes_nothing(copy: Path) -> None:
    abstract = abstract_state()
    abstract["params"]["kernel"] = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    checkpoints = open_checkpoints(copy)
    with pytest.raises(UserError, match="does not fit"):
        checkpoints.restore(abstract)
    checkpoints.close()
    assert steps_on_disk(copy) == {10, 20}


def test_another_model_is_named_by_its_first_differing_field(copy: Path) -> None:
    other = {"model": {"width": 128, "layers": [1, 1, 2]}, "name": "other"}
    with pytest.raises(UserError, match=r"another model: its model\.width is 64, .* is 128"):
        Checkpoints(copy, keep=3, model_fingerprint=other)
    assert json.loads((copy / "model.json").read_text()) == FINGERPRINT
    (copy / "model.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"model\.json is damaged"):
        open_checkpoints(copy)


SAVE_FOR_EVER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from tests.checkpoints.test_training import BEST, make_state, open_checkpoints
    checkpoints = open_checkpoints(Path(sys.argv[1]), keep=2)
    restored = checkpoints.restore(make_state(0))
    step = restored[2] if restored else 0
    while True:
        step += 1
        checkpoints.save(step, make_state(step), {"position": step}, {BEST: 1 / step})
        print(step, flush=True)
""")


def test_a_kill_at_any_moment_leaves_a_usable_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    moments = random.Random(0)
    begun = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(folder)], env=environment,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        before = begun
        while begun < before + 2:  # at least one save is on disk, another under way
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "the saving process ended by itself"
            begun = int(line)
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        begun = max([begun, *map(int, process.communicate()[0].split())])
        checkpoints = open_checkpoints(folder, keep=2)
        state, data_state, step = restore(checkpoints)
        checkpoints.close()
        assert begun - 1 <= step <= begun + 1
        assert bits(state) == bits(make_state(step)) and data_state == {"position": step}
        begun = step
