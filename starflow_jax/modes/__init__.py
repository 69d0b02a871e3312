"""What the command line does, one function per mode: settings and a workdir in, files and a table out."""

import importlib
from pathlib import Path

from starflow_jax.config import Config, UserError
from starflow_jax.io.files import check_writable

# Each mode is the function of its name in the module of its name. Here: what it does, and the main sections of settings
# that it reads, of which the first is its own.
MODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "train": ("train a model, or resume its training", ("train", "data", "model", "text", "codec", "mesh")),
    "sample": ("make videos from prompts, pictures and videos", ("sample",)),
    "serve": ("a page and an HTTP API where videos are made and steered", ("serve", "sample")),
    "evaluate": ("measure a model, or any system's videos", ("evaluate", "sample")),
    "calibrate": ("find the fastest solver for a model and keep it beside the model", ("sample",)),
    "convert": ("turn released weights into a checkpoint, and back", ("convert", "text", "codec")),
    "prepare": ("turn videos and captions into data to train on", ("prepare",)),
    "plan": ("compile for a pod that is not there: memory, time and bounds", ("plan", "mesh", "train", "model")),
    "benchmark": ("time this machine", ("benchmark",)),
    "package": ("put the workdir's model into the package", ("sample",)),
}
OF_A_MODEL = ("sample", "serve", "evaluate", "calibrate", "package")  # use the workdir's model, with its own settings


def check(mode: str, config: Config) -> None:
    """Raises UserError where a mode lacks a setting; without importing JAX, which takes a second."""
    if mode == "sample":
        config.sample.check_prompts()
    if mode == "serve":
        config.serve.check_safe()


def run(mode: str, config: Config, workdir: str | Path) -> None:
    """What `--mode=MODE --workdir=WORKDIR` does, in this process. Raises UserError for what can't be."""
    if mode not in MODES:
        raise UserError(f"{mode}: no such mode; there are {', '.join(MODES)}")
    check(mode, config)
    check_writable(workdir, "--workdir")
    module = importlib.import_module(f"{__name__}.{mode}")
    if mode in OF_A_MODEL:
        config, line = importlib.import_module("starflow_jax.model.own_settings").own_settings(config, Path(workdir))
        if line:
            print(line)
    getattr(module, mode)(config, Path(workdir))
