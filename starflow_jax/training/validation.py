"""What a training run measures at intervals: validation likelihood, adherence, and a sheet of samples."""

import numpy as np

from starflow_jax.checkpoints.training import BEST
from starflow_jax.evaluation.adherence import adherence_of_samples
from starflow_jax.io.pictures import contact_sheet
from starflow_jax.model.parameters import Params, inference_params
from starflow_jax.model.sources import fixed_captions
from starflow_jax.model.system import System
from starflow_jax.sampling.generate import generate_clips
from starflow_jax.sampling.likelihood import bits_per_frame, likelihood_batches
from starflow_jax.training.metrics import MetricWriter

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


def validate(system: System, params: Params, step: int, writer: MetricWriter) -> dict[str, float]:
    """Write the metrics of these parameters, and the sheet; returns the metrics."""
    settings, params = system.config.train, inference_params(system.config, params)
    bits = bits_per_frame(system, params, likelihood_batches(system, "validation", settings.validation_clips))
    metrics = {BEST: float(bits.mean())}
    if settings.adherence_prompts:
        # What training makes of a model meanwhile may sample badly, and goes on.
        shares = adherence_of_samples(system, params, "validation", settings.adherence_prompts, checked=False)
        metrics |= {f"adherence_{name}": share for name, share in shares.items()}
    writer.scalars(step, metrics)
    if settings.sheet_clips:
        _sheet(system, params, step, writer)
    return metrics


def _sheet(system: System, params: Params, step: int, writer: MetricWriter) -> None:
    """Samples from fixed captions as a picture."""
    count, size = system.config.train.sheet_clips, system.config.sample.batch_size
    digits = system.config.data.source == "digits"
    # Clips of one video share its caption.
    found = DIGITS_SHEET if digits else dict.fromkeys(fixed_captions(system.config, "validation", 32 * count))
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
