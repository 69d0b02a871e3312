"""STARFlow-V in JAX: text and images to video by an autoregressive normalizing flow.

    import starflow_jax as sf
    model = sf.load()                                       # the pretrained model, or a workdir
    video = model.generate("a blue three moves right", seed=0)
    video.save("three.mp4")

The modes of the command line run in this process too:

    sf.run("train", sf.load_config("configs/t2v.py", train={"steps": 60}), "runs/short")
    sf.load("runs/short").generate("a red seven moves left")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starflow_jax.config import Solver, UserError
    from starflow_jax.io.command_line import load_config
    from starflow_jax.modes import run
    from starflow_jax.sampling.api import Model, Session, Video, load

__all__ = ["Model", "Session", "Solver", "UserError", "Video", "load", "load_config", "run"]

_WHERE = {"Solver": "config", "UserError": "config", "load_config": "io.command_line", "run": "modes"}


def __getattr__(name: str) -> Any:
    # Imported on first access, so that the command line reports a mistake before JAX is imported.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE.get(name, 'sampling.api')}"), name)
