"""Frechet video distance on I3D's features."""

import numpy as np

from starflow_jax.config import UserError
from starflow_jax.evaluation.networks import I3D
from starflow_jax.evaluation.videos import Videos
from starflow_jax.io.progress import ProgressBar
from starflow_jax.sampling.batches import filled, in_batches

FVD_BATCH = 4  # clips that I3D takes at once


def features(videos: Videos, i3d: I3D, frames: int) -> np.ndarray:
    """(N, 400): I3D's logits of the first `frames` frames of each video that can be read and has that many."""
    found: list[np.ndarray] = [np.zeros((0, 400))]
    waiting: list[np.ndarray] = []

    def run(clips: list[np.ndarray]) -> None:
        found.append(i3d(np.stack(filled(clips, FVD_BATCH)))[:len(clips)])

    with ProgressBar(f"I3D: {videos.name[:24]}", len(videos.files), unit="video") as progress:
        for name in videos.files:
            try:
                start_THWC = videos.read(name)[:frames]
            except UserError:  # `measure` lists it
                continue
            finally:
                progress.update()
            if len(start_THWC) < frames:
                continue
            if waiting and (len(waiting) == FVD_BATCH or waiting[0].shape != start_THWC.shape):
                run(waiting)
                waiting = []
            waiting.append(start_THWC)
        if waiting:
            run(waiting)
    return np.concatenate(found)


def clip_features(i3d: I3D, frames_BTHWC: np.ndarray) -> np.ndarray:
    """(B, 400): the same of uint8 clips of one size."""
    return np.concatenate([i3d(np.stack(filled(part, FVD_BATCH)))[:len(part)]
                           for part in in_batches(list(frames_BTHWC), FVD_BATCH)])


def frechet_distance(first_ND: np.ndarray, second_MD: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the means and (unbiased) covariances of two sets of features.

    With C = A^T A of centred features A, tr (C1 C2)^(1/2) is the sum of the singular values of A1 A2^T: exact also
    where there are fewer videos than features, and without the root of a matrix. Raises ValueError for fewer than two
    rows of either.
    """
    (mean, root), (other_mean, other_root) = _moments(first_ND), _moments(second_MD)
    common = np.linalg.svd(root @ other_root.T, compute_uv=False).sum()
    return float(((mean - other_mean) ** 2).sum() + (root**2).sum() + (other_root**2).sum() - 2 * common)


def _moments(rows_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean, and a matrix A whose A^T A is the covariance."""
    if len(rows_ND) < 2:
        raise ValueError(f"a covariance needs two rows or more, not {len(rows_ND)}")
    rows_ND = np.asarray(rows_ND, np.float64)
    mean = rows_ND.mean(axis=0)
    return mean, np.asarray(np.linalg.qr((rows_ND - mean) / np.sqrt(len(rows_ND) - 1), mode="r"))
