"""The command line on a model that is small enough to train within a test."""

import os
import subprocess
import sys
from pathlib import Path

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


def environment(cache: Path) -> dict[str, str]:
    """One folder of compiled programs for all runs of a test session."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}


def run(workdir: Path, data: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(workdir, data, *arguments), cwd=ROOT, env=environment(data / "compiled"),
                          capture_output=True, text=True, timeout=600)
