"""A training run made ready: its system, data and state, from the newest checkpoint or from the start."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from starflow_jax import sharding
from starflow_jax.checkpoints.growth import Change
from starflow_jax.checkpoints.training import Checkpoints
from starflow_jax.config import Config
from starflow_jax.data.examples import ClipLength, TextInput
from starflow_jax.data.pipeline import BatchIterator, train_batches
from starflow_jax.model.initialise import inherited_system, initial_params
from starflow_jax.model.parameters import model_fingerprint
from starflow_jax.model.system import System, load_system, make_system, save_system, training_source
from starflow_jax.model.text import prompt_text
from starflow_jax.training.state import TrainState, abstract_state, create_state
from starflow_jax.training.stopping import StopOnTerm


@dataclasses.dataclass
class Run:
    """A training run on a mesh; `state` is replaced by each step."""

    system: System
    mesh: Mesh
    state: TrainState
    batches: BatchIterator
    checkpoints: Checkpoints
    stop: StopOnTerm
    resumed: bool  # from a checkpoint
    changes: list[Change]  # to the model of train.init_from, where the run begins with that


def open_run(mesh: Mesh, config: Config, workdir: Path) -> Run:
    """The run of a workdir. Raises UserError where the workdir, the data or train.init_from does not fit it."""
    stop = StopOnTerm(mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.train.keep_checkpoints,
                              model_fingerprint=model_fingerprint(config))
    system = sharding.on_every_process(open_system, config, workdir)
    batches = open_batches(system, mesh)
    training_source(system, "validation")  # fails now rather than at the first validation
    abstract = sharding.abstract(abstract_state(config), mesh)
    restored = checkpoints.restore(abstract)
    if restored is not None:
        state, position, _ = restored
        batches.set_state(position)
        return Run(system, mesh, state, batches, checkpoints, stop, resumed=True, changes=[])
    state, changes = _initial_state(config, abstract)
    return Run(system, mesh, state, batches, checkpoints, stop, resumed=False, changes=changes)


def open_system(config: Config, workdir: Path) -> System:
    """The workdir's tokenizer and codec; at first those of train.init_from, or made from the training data."""
    folder = workdir / "system"
    if (folder / "tokenizer.model").exists():
        return load_system(config, folder)
    system = inherited_system(config) or make_system(config)
    save_system(system, folder)
    return system


def open_batches(system: System, mesh: Mesh) -> BatchIterator:
    """This process's batches, from the start. Raises UserError where they do not divide over the mesh."""
    config, train = system.config, system.config.train
    images = train.image_batch_size or train.batch_size * config.model.frames
    for field, size in (("batch_size", train.batch_size), ("image_batch_size", images)):
        sharding.check_batch(f"train.{field} / train.accumulate", size // train.accumulate, mesh)
    text = TextInput(partial(prompt_text, config), partial(system.tokenizer.encode, length=config.model.text_length),
                     config.model.text_length)
    return train_batches(
        training_source(system), config.data, ClipLength(system.pixel_frames, config.codec.time_stride), text,
        batch_size=train.batch_size, image_batch_size=images, seed=train.seed, share=sharding.data_process(mesh))


def _initial_state(config: Config, abstract: Any) -> tuple[TrainState, list[Change]]:
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    params, changes = initial_params(config, jax.random.key(config.train.seed), placed.params)
    return jax.jit(lambda params: create_state(params, config.train), out_shardings=placed)(params), changes
