"""The training loop: data in, checkpoints, metrics and sample sheets out; killed and restarted at will."""

import dataclasses
import signal
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from starflow_jax import sharding
from starflow_jax.checkpoints.training import BEST, Checkpoints
from starflow_jax.config import Config, UserError
from starflow_jax.data import pipeline
from starflow_jax.evaluation.adherence import adherence_of_samples
from starflow_jax.io.pictures import contact_sheet
from starflow_jax.io.progress import ProgressBar
from starflow_jax.model.fit import make_system
from starflow_jax.model.initialise import inherited_system, initial_params
from starflow_jax.model.parameters import Params, model_fingerprint
from starflow_jax.model.shapes import prompt_text
from starflow_jax.model.sources import fixed_captions, training_source
from starflow_jax.model.store import with_text
from starflow_jax.model.system import System, load_system, save_system
from starflow_jax.sampling.generate import generate_clips
from starflow_jax.sampling.likelihood import bits_per_frame, likelihood_batches
from starflow_jax.training.metrics import MetricWriter, read_metrics
from starflow_jax.training.optimizer import TrainState, abstract_state, create_state, schedule
from starflow_jax.training.step import encoded, make_train_step, tokens_of

CELL_PIXELS, SHEET_PIXELS = 72, 3_000  # heights that small frames are enlarged to; about the width of a sheet
DIGITS_SHEET = (
    "a red seven moves right",
    "a handwritten three in bright blue drifts slowly to the upper left over a black background",
    "a green zero glides down",
    "a yellow 5 floats up and to the right",
    "the handwritten digit 8, drawn in white, slides steadily left on a black background",
    "a magenta two moves up",
    "a cyan 4 drifts to the lower right",
    "a red 9 slides to the lower left",
)


def open_system(config: Config, workdir: Path) -> System:
    """The workdir's tokenizer and codec, made from the training data at first."""
    folder = workdir / "system"
    if (folder / "tokenizer.model").exists():
        return load_system(config, folder)
    system = inherited_system(config) or make_system(config)
    save_system(system, folder)
    return system


def train_iterator(system: System, mesh: Mesh):
    """This process's batches, from the start. Raises UserError where they do not divide over the mesh."""
    config = system.config
    data, train = config.data, config.train
    images = train.image_batch_size or train.batch_size * config.model.frames
    for field, size in (("batch_size", train.batch_size), ("image_batch_size", images)):
        sharding.check_batch(f"train.{field} / train.accumulate", size // train.accumulate, mesh)
    part, parts = sharding.data_process(mesh)
    return pipeline.train_batches(
        training_source(system), batch_size=train.batch_size, image_batch_size=images, seed=train.seed,
        image_probability=data.image_probability, first_frame_drop=data.first_frame_drop,
        caption_drop=data.caption_drop, short_caption=data.short_caption, pixel_frames=system.pixel_frames,
        latent_stride=config.codec.time_stride,
        encode_text=partial(system.tokenizer.encode, length=config.model.text_length),
        format_caption=partial(prompt_text, config), text_length=config.model.text_length, workers=data.workers,
        process_index=part, process_count=parts)


def train_on(mesh: Mesh, config: Config, workdir: Path) -> None:
    first, stop = jax.process_index() == 0, _StopOnTerm(mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.train.keep_checkpoints,
                              model_fingerprint=model_fingerprint(config))
    system = sharding.on_every_process(open_system, config, workdir)
    batches = train_iterator(system, mesh)
    training_source(system, "validation")  # or a run would end at its first evaluation
    abstract = sharding.abstract(abstract_state(config), mesh)
    restored = checkpoints.restore(abstract)
    if restored is not None:
        state, position, step = restored
        batches.set_state(position)
        if first:
            print(f"resuming from step {step}")
    else:
        placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        params, changes = initial_params(config, jax.random.key(config.train.seed), placed.params)
        state = jax.jit(lambda params: create_state(params, config.train), out_shardings=placed)(params)
        del params
        if first and config.train.init_from:
            print(f"beginning with {config.train.init_from}" + (":" if changes else ""))
            for name, old, now, effect in changes:
                print(f"  {name} {old} -> {now}: {effect}")
    writer, lost = MetricWriter(workdir, resume_step=int(state.step), writes=first), False
    try:
        state = _run(system, mesh, state, batches, checkpoints, writer, stop)
    except jax.errors.JaxRuntimeError as error:
        lost = jax.process_count() > 1
        if not lost:
            raise
        raise UserError(f"another process of this run was lost ({str(error).splitlines()[0][:200]}); start all of them "
                        "again with the same command: training goes on from the newest checkpoint") from error
    finally:
        batches.close()
        writer.close()
        if not lost:  # or it waits for the lost one
            checkpoints.close()
    if first:
        _say_what_next(config, workdir, int(state.step))


def _run(
    system: System, mesh: Mesh, state: TrainState, batches: Any, checkpoints: Checkpoints, writer: MetricWriter,
    stop: "_StopOnTerm",
) -> TrainState:
    settings = system.config.train
    step_fn, rate = make_train_step(system, mesh), schedule(settings)
    if system.config.codec.kind == "wan":
        system = dataclasses.replace(system, codec=jax.device_put(system.codec, sharding.replicated(mesh)))
    frozen = sharding.spread(with_text(system.config, {}), mesh)
    since, tokens, step = time.perf_counter(), 0, int(state.step)
    with ProgressBar("train", settings.steps, initial=step, shown=writer.writes) as progress:
        while step < settings.steps and not stop.agreed():
            batch = sharding.put_batch(next(batches), mesh)
            tokens += tokens_of(batch, system.config)
            state, scalars = step_fn(state, encoded(system, batch, frozen))
            step += 1
            if step % settings.log_every == 0 or step == settings.steps:
                learning_rate = float(rate(step - 1 - int(scalars["skipped"])))
                row = _row(scalars, learning_rate, time.perf_counter() - since, tokens)
                since, tokens = time.perf_counter(), 0
                writer.scalars(step, row)
                progress.update(0, row["bits_per_dim"])
            progress.update()
            evaluated = step % settings.evaluate_every == 0 or step == settings.steps
            metrics = _evaluate(system, {**state.ema, **frozen}, step, writer) if evaluated else None
            if evaluated or step % settings.checkpoint_every == 0:
                checkpoints.save(step, _own(state), batches.get_state(), metrics)
        if step < settings.steps and checkpoints.latest_step() != step:
            checkpoints.save(step, _own(state), batches.get_state(), None)
        checkpoints.wait()
    return state


def _own(state: TrainState) -> TrainState:
    """A copy that the asynchronous writer can read while the next step reuses the donated buffers."""
    return jax.tree.map(jnp.copy, state)


def _row(scalars: dict[str, jax.Array], rate: float, seconds: float, tokens: int) -> dict[str, float]:
    row = {name: float(value) for name, value in scalars.items() if name != "skip"}
    row["skipped"] = int(row["skipped"])
    return {**row, "learning_rate": rate, "seconds": seconds, "tokens_per_second": tokens / seconds}


class _StopOnTerm:
    """Turns SIGTERM into a wish to stop, so that the step under way ends and is saved.

    One of several processes that is sent it is enough, and all stop at the same step, which they have to save together.
    JAX has a handler of its own from jax.distributed.initialize on, which this one replaces.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.asked = False
        self.answers: deque[jax.Array] = deque(maxlen=2)
        self.by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self.anyone = jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def agreed(self) -> bool:
        """Whether to stop now, the same on all processes; to be asked by all of them before each step.

        From the second time on they are told what was asked the time before: to know it nobody waits for the step that
        is under way.
        """
        if jax.process_count() == 1:
            return self.asked
        wishes = jax.make_array_from_callback(
            (self.by_device.mesh.size,), self.by_device, lambda _: np.array([self.asked], np.int32))
        self.answers.append(self.anyone(wishes))
        return bool(self.answers[0])


def _evaluate(system: System, params: Params, step: int, writer: MetricWriter) -> dict[str, float]:
    """Validation likelihood and a sample sheet, by the averaged parameters."""
    settings = system.config.train
    bits = bits_per_frame(system, params, likelihood_batches(system, "validation", settings.validation_clips))
    metrics = {BEST: float(bits.mean())}
    if settings.adherence_prompts:
        shares = adherence_of_samples(system, params, "validation", settings.adherence_prompts)
        metrics |= {f"adherence_{name}": share for name, share in shares.items()}
    writer.scalars(step, metrics)
    if settings.sheet_clips:
        _sheet(system, params, step, writer)
    return metrics


def _sheet(system: System, params: Params, step: int, writer: MetricWriter) -> None:
    """Samples of fixed captions as a picture."""
    count, size = system.config.train.sheet_clips, system.config.sample.batch_size
    digits = system.config.data.source == "digits"
    # Clips of one video share its caption.
    found = DIGITS_SHEET if digits else dict.fromkeys(fixed_captions(system, "validation", 32 * count))
    captions = list(found)[:count]
    parts = [generate_clips(system, params, captions[begin:begin + size], range(begin, len(captions))[:size],
                            system.config.sample).frames_BTHWC for begin in range(0, len(captions), size)]
    frames_BTHWC = np.concatenate(parts)
    if writer.writes:
        scale = max(1, CELL_PIXELS // frames_BTHWC.shape[2])
        columns = min(16, max(4, SHEET_PIXELS // (scale * frames_BTHWC.shape[3])))
        contact_sheet(writer.path.parent / "sheets" / f"samples_step_{step:07d}.png", frames_BTHWC, captions,
                      columns, scale)
    writer.image(step, "samples", np.concatenate([np.concatenate(list(clip), axis=1) for clip in frames_BTHWC]))


def _say_what_next(config: Config, workdir: Path, step: int) -> None:
    if step < config.train.steps:
        print(f"stopped at step {step} of {config.train.steps}, saved; the same command goes on from there")
        return
    bits = next(row[BEST] for row in reversed(read_metrics(workdir)) if BEST in row)
    print(f"trained {step} steps: validation {bits:.4f} bits per dimension of the noised latents\n"
          f"samples: {workdir / 'sheets'}\n"
          f"next: the same --config with --workdir={workdir} --mode=sample "
          f'--config.sample.prompt="{DIGITS_SHEET[0]}"')
