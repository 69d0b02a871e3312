"""A training run made ready: its system, data and state, from the newest checkpoint or from the start."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from starflow_jax import sharding
from starflow_jax.checkpoints.growth import Change
from starflow_jax.checkpoints.training import Checkpoints
from starflow_jax.config import Config
from starflow_jax.data.examples import ClipLength, TextInput
from starflow_jax.data.pipeline import BatchIterator, train_batches
from starflow_jax.model.beside import open_checkpoints, settings_beside
from starflow_jax.model.initialise import inherited_system
from starflow_jax.model.parameters import model_fingerprint
from starflow_jax.model.store import backbone_checksum, backbone_system
from starflow_jax.model.system import System, load_system, make_system, save_system, training_source
from starflow_jax.model.text import TOKENIZER, prompt_text
from starflow_jax.training.beside_target import BesideTarget
from starflow_jax.training.decoder_target import DecoderTarget
from starflow_jax.training.stopping import StopOnTerm
from starflow_jax.training.student_target import StudentTarget
from starflow_jax.training.target import FlowTarget, Target

TARGETS: dict[str, Callable[[System, Mesh], Target]] = {
    "all": FlowTarget, "lora": BesideTarget, "control": BesideTarget, "student": StudentTarget,
    "decoder": DecoderTarget}


@dataclasses.dataclass
class Run:
    """A training run on a mesh; `state` is replaced by each step."""

    system: System
    mesh: Mesh
    target: Target
    state: Any
    batches: BatchIterator
    checkpoints: Checkpoints
    stop: StopOnTerm
    resumed: bool  # from a checkpoint
    changes: list[Change]  # to the model of train.init_from, where the run begins with that


def open_run(mesh: Mesh, config: Config, workdir: Path) -> Run:
    """The run of a workdir. Raises UserError where the workdir, the data or train.init_from does not fit it."""
    stop = StopOnTerm(mesh)
    checkpoints = _open_checkpoints(config, workdir)
    system = sharding.on_every_process(open_system, config, workdir)
    batches = open_batches(system, mesh)
    training_source(system, "validation")  # fails now rather than at the first validation
    target = TARGETS[config.train.target](system, mesh)
    restored = checkpoints.restore(target.abstract_state())
    if restored is not None:
        state, position, _ = restored
        batches.set_state(position)
        return Run(system, mesh, target, state, batches, checkpoints, stop, resumed=True, changes=[])
    state, changes = target.initial_state()
    return Run(system, mesh, target, state, batches, checkpoints, stop, resumed=False, changes=changes)


def _open_checkpoints(config: Config, workdir: Path) -> Checkpoints:
    if config.train.target != "all":
        return open_checkpoints(config, workdir, backbone_checksum(config))
    return Checkpoints(workdir / "checkpoints", keep=config.train.keep_checkpoints,
                       model_fingerprint=model_fingerprint(config))


def open_system(config: Config, workdir: Path) -> System:
    """The workdir's tokenizer and codec; at first those of train.init_from, or made from the training data."""
    folder = workdir / "system"
    if (folder / TOKENIZER).exists():
        return load_system(config, folder)
    if config.train.target != "all":
        system = backbone_system(config)
        save_system(dataclasses.replace(system, config=settings_beside(config)), folder)
    else:
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
