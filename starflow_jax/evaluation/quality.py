"""Quality of videos as the field measures it, for folders of any system's videos, side by side
(--mode=evaluate --config.evaluate.task=quality).

- VBench's temporal flickering, at each video's own size; with VBench's file names also on its own prompts for it.
- Frechet video distance to the reference: I3D's Kinetics-400 logits of the first `frames` frames.
- PSNR, SSIM and LPIPS against the reference's video of the same name and size, as of a codec's reconstructions.
  Without a folder the model's codec reconstructs the reference.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from scipy.ndimage import gaussian_filter

from starflow_jax.config import UserError
from starflow_jax.evaluation.frechet import features, frechet_distance
from starflow_jax.evaluation.measures import psnr, temporal_flickering
from starflow_jax.evaluation.networks import I3D, LPIPS, MissingPackage
from starflow_jax.evaluation.videos import Videos
from starflow_jax.io.progress import ProgressBar
from starflow_jax.model.system import System
from starflow_jax.sampling import vbench
from starflow_jax.sampling.given import read_given
from starflow_jax.sharding import fetch

Network = TypeVar("Network", I3D, LPIPS)
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # the Gaussian window of 11 pixels of Wang et al. 2004


def if_installed(network: Callable[[], Network], missing: list[str]) -> Network | None:
    """The network; None where its package is not installed, of which a line is added to `missing`."""
    try:
        return network()
    except MissingPackage as error:
        missing.append(f"not measured: {error}")
        return None


def codec_pair(system: System, source: str, reference: Videos) -> tuple[Videos, Videos]:
    """The reference at the model's size and rate, and what the model's codec makes of it."""

    def given(name: str) -> np.ndarray:
        return read_given(system.config, str(reference.files[name]))[0]

    def coded(name: str) -> np.ndarray:
        return fetch(system.decode(system.encode(given(name)[None])))[0]

    return (dataclasses.replace(reference, read=given),
            dataclasses.replace(reference, name=f"codec of {source}", read=coded))


def compare(
    sets: Sequence[Videos], reference: Videos | None, prompts: dict[str, frozenset[str]], frames: int
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(what `measure` finds of each set and of the reference, by name, with the sets' Frechet video distance to it;
    a line for each network that is not installed). frames: of each video, that this distance compares.

    Raises UserError where none of a set's videos can be read.
    """
    missing: list[str] = []
    lpips = None if reference is None else if_installed(LPIPS, missing)
    i3d = None if reference is None else if_installed(I3D, missing)
    results = {videos.name: measure(videos, reference, lpips, prompts) for videos in sets}
    if reference is not None:
        results[f"{reference.name} (reference)"] = measure(reference, None, None, {})
    if reference is not None and i3d is not None:
        real_ND = features(reference, i3d, frames)
        for videos in sets:
            made_ND = features(videos, i3d, frames)
            enough = min(len(real_ND), len(made_ND)) > 1
            results[videos.name] |= {"fvd": frechet_distance(real_ND, made_ND) if enough else None,
                                     "fvd_videos": [len(made_ND), len(real_ND)]}
    return results, missing


def measure(
    videos: Videos, reference: Videos | None, lpips: LPIPS | None, prompts: dict[str, frozenset[str]]
) -> dict[str, Any]:
    """Means over a set's videos, and each video's own figures; videos that can't be read are left out and listed.

    Raises UserError where none can be read.
    """
    by_video: dict[str, dict[str, float]] = {}
    unreadable: dict[str, str] = {}
    with ProgressBar(videos.name[:30], len(videos.files), unit="video") as progress:
        for name in videos.files:
            try:
                frames_THWC = videos.read(name)
            except UserError as error:
                unreadable[name] = str(error)
            else:
                by_video[name] = {"frames": len(frames_THWC)}
                if len(frames_THWC) > 1:
                    by_video[name]["temporal_flickering"] = temporal_flickering(frames_THWC)
                if reference is not None and name in reference.files:
                    with contextlib.suppress(UserError):  # the reference's own row lists it
                        by_video[name] |= of_pair(reference.read(name), frames_THWC, lpips)
            progress.update()
    if not by_video:
        raise UserError(f"{videos.name}: none of its {len(videos.files)} videos can be read; the first: "
                        f"{next(iter(unreadable.values()))}")
    keys = dict.fromkeys(key for values in by_video.values() for key in values)
    means = {key: float(np.mean([values[key] for values in by_video.values() if key in values])) for key in keys}
    found = {"videos": len(by_video), "pairs": sum("psnr" in values for values in by_video.values()), **means}
    if prompts:
        found |= vbench_share(by_video, prompts)
    if unreadable:
        found["left_out"] = len(unreadable)
    return {**found, "unreadable": unreadable, "by_video": by_video}


def of_pair(real_THWC: np.ndarray, made_THWC: np.ndarray, lpips: LPIPS | None) -> dict[str, float]:
    """PSNR of all pixels, and the frames' mean SSIM and LPIPS; {} for videos of different sizes or lengths.

    PSNR is capped at 100 dB, which stands for equal videos.
    """
    if real_THWC.shape != made_THWC.shape:
        return {}
    found = {"psnr": min(psnr(real_THWC, made_THWC), 100.0)}
    if min(real_THWC.shape[1:3]) > 2 * SSIM_RADIUS:
        found["ssim"] = float(ssim(real_THWC, made_THWC).mean())
    if lpips is not None:
        found["lpips"] = float(np.mean([lpips(real[None], made[None])[0]
                                        for real, made in zip(real_THWC, made_THWC)]))
    return found


def ssim(first_THWC: np.ndarray, second_THWC: np.ndarray) -> np.ndarray:
    """(T,) structural similarity of uint8 frames, mean over colours and places (Wang et al. 2004).

    A Gaussian window of 11 pixels, K = 0.01 and 0.03, population covariances; the border of half a window is left out.
    """
    x, y = first_THWC.astype(np.float64), second_THWC.astype(np.float64)

    def window(a: np.ndarray) -> np.ndarray:
        return gaussian_filter(a, SSIM_SIGMA, radius=SSIM_RADIUS, axes=(1, 2))

    mean_x, mean_y = window(x), window(y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    variances = window(x * x) - mean_x**2 + window(y * y) - mean_y**2
    structure = (2 * (window(x * y) - mean_x * mean_y) + c2) / (variances + c2)
    inside = slice(SSIM_RADIUS, -SSIM_RADIUS)
    return (luminance * structure)[:, inside, inside].mean(axis=(1, 2, 3))


def vbench_share(by_video: dict[str, dict[str, float]], prompts: dict[str, frozenset[str]]) -> dict[str, Any]:
    """How many of the videos that VBench looks for are there, in all and by dimension; and the flickering of those that
    it measures it on (its own figure also leaves out, by an optical-flow network, videos that are hardly static).
    """
    wanted = {vbench.stem(prompt, index): dimensions for prompt, dimensions in prompts.items()
              for index in range(vbench.SAMPLES)}
    there = wanted.keys() & by_video.keys()
    by_dimension = {dimension: [sum(dimension in wanted[name] for name in names) for names in (there, wanted)]
                    for dimension in sorted(frozenset().union(*prompts.values()))}
    flickering = [by_video[name]["temporal_flickering"] for name in there
                  if "temporal_flickering" in wanted[name] and "temporal_flickering" in by_video[name]]
    return {"vbench_videos": [len(there), len(wanted)], "vbench_videos_by_dimension": by_dimension,
            "vbench_temporal_flickering": float(np.mean(flickering)) if flickering else None}


def check_all_were_read(results: dict[str, dict[str, Any]]) -> None:
    """Raises UserError, naming each file that could not be read and was left out."""
    left_out = {name: found["unreadable"] for name, found in results.items() if found["unreadable"]}
    if left_out:
        counts = ", ".join(f"{len(listed)} of {len(listed) + results[name]['videos']} in {name}"
                           for name, listed in left_out.items())
        reasons = "; ".join(reason for listed in left_out.values() for reason in listed.values())
        raise UserError(f"videos that can't be read were left out, {counts}: {reasons}")


def rows_of(results: dict[str, dict[str, Any]]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The table, (rows, headers): a row for each set, and a column for each measure that any of them has."""
    columns = {"videos": ("videos", "d"), "left_out": ("left out", "d"), "temporal_flickering": ("flickering", ".4f"),
               "fvd": ("FVD", ".1f"), "psnr": ("PSNR, dB", ".2f"), "ssim": ("SSIM", ".4f"), "lpips": ("LPIPS", ".4f"),
               "vbench_temporal_flickering": ("VBench's flickering", ".4f")}
    shown = [key for key in columns if any(found.get(key) is not None for found in results.values())]
    rows = [(name, *("" if found.get(key) is None else format(found[key], columns[key][1]) for key in shown))
            for name, found in results.items()]
    return rows, ("", *(columns[key][0] for key in shown))
