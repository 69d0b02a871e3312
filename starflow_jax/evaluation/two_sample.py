"""Can a simple classifier tell samples from real clips? Size, motion, colour and brightness of a clip, and how well a
linear classifier separates two sets of clips by them."""

import numpy as np
from etils import epy

from starflow_jax.data.digits.reader import circular_means

with epy.lazy_imports():  # a second
    from sklearn import linear_model, model_selection, pipeline, preprocessing

FOLDS = 5
LIT, BRIGHT = 64, 128  # shades from which on pixels count towards the size of what is shown


def clip_statistics(frames_BTHWC: np.ndarray) -> np.ndarray:
    """(B, 13) float64 of uint8 clips, (B, 7) of single pictures, from each pixel's brightest channel.

    Brightness: mean and deviation of the pixels, mean of those that are lit. Size: shares of pixels that are lit, and
    bright. Colour: shares of two channels. Motion: deviation over time of brightness, in units of its mean, and of
    size; mean and deviation over time of the change from frame to frame, in those units, and of the way of the centre
    of brightness, in pixels, on a canvas whose opposite sides meet.
    """
    value_BTHW = frames_BTHWC.max(axis=-1).astype(np.float32)
    pixels = (1, 2, 3)
    mean_B = np.maximum(value_BTHW.mean(axis=pixels, dtype=np.float64), 1e-6)
    lit_BTHW = value_BTHW > LIT
    colour_B3 = frames_BTHWC.mean(axis=pixels, dtype=np.float64)
    shares_B3 = colour_B3 / np.maximum(colour_B3.sum(axis=1, keepdims=True), 1e-6)
    lit_B = (value_BTHW * lit_BTHW).sum(axis=pixels) / np.maximum(lit_BTHW.sum(axis=pixels), 1)
    found = [mean_B, value_BTHW.std(axis=pixels, dtype=np.float64), lit_B, lit_BTHW.mean(axis=pixels),
             (value_BTHW > BRIGHT).mean(axis=pixels), *shares_B3.T[:2]]
    if value_BTHW.shape[1] > 1:
        change_BT = np.abs(np.diff(value_BTHW, axis=1)).mean(axis=(2, 3), dtype=np.float64) / mean_B[:, None]
        way_BT = _way_of_centre(value_BTHW)
        found += [value_BTHW.mean(axis=(2, 3), dtype=np.float64).std(axis=1) / mean_B,
                  lit_BTHW.mean(axis=(2, 3)).std(axis=1),
                  change_BT.mean(axis=1), change_BT.std(axis=1), way_BT.mean(axis=1), way_BT.std(axis=1)]
    return np.stack(found, axis=1)


def _way_of_centre(value_BTHW: np.ndarray) -> np.ndarray:
    """(B, T - 1) pixels from one frame's circular mean of places to the next one's."""
    steps = [np.angle(mean_BT[:, 1:] * mean_BT[:, :-1].conj()) * side / (2 * np.pi)
             for mean_BT, side in zip(circular_means(value_BTHW), value_BTHW.shape[2:])]
    return np.hypot(*steps)


def balanced_accuracy(real_NF: np.ndarray, made_MF: np.ndarray) -> float | None:
    """Of a linear classifier (logistic regression on standardised statistics) on clips that it was not fitted to, mean
    over FOLDS: 0.5 where it can't tell the two sets apart. None for fewer than FOLDS clips of either."""
    if min(len(real_NF), len(made_MF)) < FOLDS:
        return None
    clips_KF = np.concatenate([real_NF, made_MF])
    made_K = np.repeat([0, 1], [len(real_NF), len(made_MF)])
    classifier = pipeline.make_pipeline(preprocessing.StandardScaler(),
                                        linear_model.LogisticRegression(class_weight="balanced", max_iter=1000))
    folds = model_selection.StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    return float(model_selection.cross_val_score(
        classifier, clips_KF, made_K, cv=folds, scoring="balanced_accuracy").mean())
