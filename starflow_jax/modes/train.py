"""The training loop: data in, checkpoints, metrics and sample sheets out; killed and restarted at will."""

from pathlib import Path

import jax

from starflow_jax import sharding
from starflow_jax.config import Config
from starflow_jax.model.initialise import refuse_converted
from starflow_jax.training.loop import train_on


def train(config: Config, workdir: Path) -> None:
    """Train to config.train.steps, going on from the workdir's newest whole checkpoint."""
    refuse_converted(workdir)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_model(config.model, mesh)
    with jax.set_mesh(mesh):
        train_on(mesh, config, workdir)
