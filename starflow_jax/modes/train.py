"""--mode=train: train, or resume training, and say how the run starts and what comes next."""

from pathlib import Path

import jax

from starflow_jax import sharding
from starflow_jax.checkpoints.licences import carry_licence
from starflow_jax.checkpoints.training import BEST
from starflow_jax.config import Config
from starflow_jax.model.initialise import refuse_converted
from starflow_jax.modes.alone import alone_in
from starflow_jax.sampling.memory import check_training
from starflow_jax.training.decoder_target import DecoderTarget
from starflow_jax.training.loop import train_to_end
from starflow_jax.training.metrics import read_metrics
from starflow_jax.training.run import Run, open_run
from starflow_jax.training.validation import DIGITS_SHEET


def train(config: Config, workdir: Path) -> None:
    """Train to config.train.steps, resuming from the workdir's newest undamaged checkpoint.

    Raises UserError where another run has the workdir.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_model(config.model, mesh)
    check_training(config, mesh)
    first = jax.process_index() == 0
    with alone_in(workdir), jax.set_mesh(mesh):
        refuse_converted(workdir)
        run = open_run(mesh, config, workdir)
        if first:
            _say_how_it_starts(config, run)
            if config.train.init_from:
                carry_licence(Path(config.train.init_from), workdir)
        step = train_to_end(run, workdir)
    if first:
        _say_what_next(config, workdir, step)
    if run.stop.interrupted and step < config.train.steps:
        raise KeyboardInterrupt


def _say_how_it_starts(config: Config, run: Run) -> None:
    if run.resumed:
        print(f"resuming from step {int(run.state.step)}")
    elif config.train.target != "all":
        what = {"decoder": "a decoder", "lora": f"LoRA factors of rank {config.lora.rank}",
                "control": f"a control module of width {config.control.width}",
                "student": f"a deep block of {config.model.deep_layers} layers and width {config.model.deep_width}"}
        print(f"{what[config.train.target]} beside {config.train.init_from or 'the model in the package'}, which stays "
              "as it is")
    elif config.train.init_from:
        print(f"starting from {config.train.init_from}" + (":" if run.changes else ""))
        for name, old, now, effect in run.changes:
            print(f"  {name} {old} -> {now}: {effect}")
    if isinstance(run.target, DecoderTarget) and run.target.left_out:
        print(run.target.left_out)


def _say_what_next(config: Config, workdir: Path, step: int) -> None:
    if step < config.train.steps:
        print(f"stopped at step {step} of {config.train.steps}, saved; the same command resumes from there")
        return
    command = (f"next: the same --config with --workdir={workdir} --mode=sample "
               f'--config.sample.prompt="{DIGITS_SHEET[0]}"')
    if config.train.target == "decoder":
        psnr = _last_of(workdir, "validation_psnr")
        print(f"trained {step} steps: noised validation clips come out with a PSNR of {psnr} dB, "
              f"{_last_of(workdir, 'validation_psnr_of_the_codecs_own')} dB by the codec's own decoder\n"
              f"clips: {workdir / 'sheets'}\n{command} --config.sample.denoise=decoder")
        return
    print(f"trained {step} steps: validation {_last_of(workdir, BEST, digits=4)} bits per dimension of the noised "
          f"latents\nsamples: {workdir / 'sheets'}\n{command}")


def _last_of(workdir: Path, name: str, digits: int = 2) -> str:
    """The newest figure of that name in the metrics, as text; "?" where they have been lost, or it was not finite."""
    values = [row[name] for row in read_metrics(workdir) if isinstance(row.get(name), int | float)]
    return f"{values[-1]:.{digits}f}" if values else "?"
