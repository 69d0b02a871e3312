"""The command line on a model that is small enough to train within a test."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from absl import flags

from starflow_jax import main

ROOT = Path(__file__).parent.parent
OVERRIDES = [
    "model.deep_width=64", "model.shallow_width=64", "model.deep_layers=1", "model.denoiser_layers=1",
    "model.shallow_layers=(1,)", "model.channels=8", "model.text_dim=32", "text.layers=1", "text.d_model=32",
    "text.d_ff=32", "data.train_clips=200", "data.validation_clips=20", "data.test_clips=20",
    "train.batch_size=4", "train.image_batch_size=8", "train.warmup_steps=2", "train.log_every=1",
    "train.validation_clips=8", "train.checkpoint_every=3", "train.steps=8", "sample.batch_size=8",
    "evaluate.clips=20", "evaluate.prompts=8",
]


def command(workdir: Path, data: Path, *arguments: str) -> list[str]:
    """The command line of a small run; later arguments override earlier ones."""
    overrides = [f"--config.{item}" for item in (*OVERRIDES, f"data.directory={data}")]
    return [sys.executable, "-m", "starflow_jax.main", "--config=configs/t2v.py", f"--workdir={workdir}",
            *overrides, *arguments]


def environment(**more: str) -> dict[str, str]:
    """Of a run: on the CPU, with the compiled programs of this session of tests."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", **more}


def run(workdir: Path, data: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(workdir, data, *arguments), cwd=ROOT, env=environment(),
                          capture_output=True, text=True, timeout=600)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C as in the foreground, here and in processes that are started meanwhile: in the background of a shell it is
    ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_here(arguments: Sequence[str], folder: Path = ROOT) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of starflow_jax.main, run in this process and a folder: no seconds for starting
    another one."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)  # overrides of an earlier call
    flags.FLAGS.unparse_flags()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["starflow_jax.main", *arguments])
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)  # it is put back afterwards
        patch.chdir(folder)
        try:
            main.run()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            for number, handler in handlers.items():  # training has its own
                signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()
