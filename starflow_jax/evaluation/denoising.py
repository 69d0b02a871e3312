"""What noise and each way of denoising do to real clips: PSNR to the codec's own reconstruction, and the clips that
samples are compared with."""

import itertools
from collections.abc import Sequence

import numpy as np

from starflow_jax.evaluation.measures import psnr_of
from starflow_jax.evaluation.two_sample import clip_statistics
from starflow_jax.io.progress import ProgressBar
from starflow_jax.model.parameters import Params
from starflow_jax.model.system import System
from starflow_jax.sampling.batches import filled, in_batches
from starflow_jax.sampling.conditions import noised
from starflow_jax.sampling.denoise import denoise
from starflow_jax.sampling.finite import finite_frames, names_of
from starflow_jax.sharding import fetch

PSNR_CLIPS = 256  # clips that are denoised in every way


def denoised_real_clips(
    system: System, params: Params, captions: Sequence[str], frames_BTHWC: np.ndarray, ways: Sequence[str]
) -> tuple[dict[str, float], np.ndarray]:
    """({way of denoising: PSNR in dB of the first PSNR_CLIPS clips to what the codec makes of them without noise},
    `clip_statistics` of all clips, denoised as the config says).

    frames: uint8, at most the training length. Each clip's noise is drawn from its place among them.
    """
    size, own = system.config.sample.batch_size, system.config.sample.denoise
    errors: dict[str, list[np.ndarray]] = {how: [] for how in ways}
    statistics = []
    with ProgressBar("real clips", len(captions), unit="clip", compiles=True) as progress:
        for begin, batch in zip(itertools.count(step=size), in_batches(captions, size)):
            clips = np.stack(filled(list(frames_BTHWC[begin:begin + size]), size))
            noisy = noised(system, clips, range(begin, begin + size))
            text = system.caption_features(params, filled(batch, size), is_image=noisy.shape[1] == 1)
            kept = slice(min(len(batch), max(0, PSNR_CLIPS - begin)))
            coded = fetch(system.decode(system.encode(clips)))[kept].astype(np.float64)
            for how in ways if len(coded) else (own,):
                names = [f"{name}, real, denoise={how}" for name in names_of(batch, range(begin, begin + size))]
                decoded = system.decoded(denoise(system, params, noisy, text, how), how)
                made = finite_frames(decoded, names)[:len(batch)]
                errors[how].append(((made[kept] - coded) ** 2).mean(axis=(1, 2, 3, 4)))
                if how == own:
                    statistics.append(clip_statistics(made))
            progress.update(len(batch))
    return ({how: psnr_of(np.concatenate(of_way).mean()) for how, of_way in errors.items()},
            np.concatenate(statistics))
