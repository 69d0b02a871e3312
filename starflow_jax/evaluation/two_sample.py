"""Can a simple classifier tell samples from real clips? Size, motion, colour and brightness of a clip, and how well a
linear classifier separates two sets of clips by them."""

import numpy as np
from etils import epy

with epy.lazy_imports():  # a second
    from sklearn import linear_model, model_selection, pipeline, preprocessing

FOLDS = 5
LIT = 0.25  # of a clip's brightest pixel: from there on a pixel counts towards the size of what is shown


def clip_statistics(frames_BTHWC: np.ndarray) -> np.ndarray:
    """(B, 8) float64 of uint8 clips, (B, 6) of single pictures: mean and deviation of the pixels, share of pixels above
    LIT and twice LIT of the brightest, each colour's share but the last's, and mean and deviation over time of the
    change from frame to frame, in units of the mean pixel."""
    frames = frames_BTHWC.astype(np.float32)
    mean_B = frames.mean(axis=(1, 2, 3, 4), dtype=np.float64)
    unit_B = np.maximum(mean_B, 1e-6)
    brightest_BTHW = frames.max(axis=-1)
    peak_B = np.maximum(brightest_BTHW.max(axis=(1, 2, 3)), 1.0)[:, None, None, None]
    size_2B = [(brightest_BTHW > share * peak_B).mean(axis=(1, 2, 3)) for share in (LIT, 2 * LIT)]
    colour_B3 = frames.mean(axis=(1, 2, 3), dtype=np.float64) / (3 * unit_B[:, None])
    found = [mean_B, frames.std(axis=(1, 2, 3, 4), dtype=np.float64), *size_2B, *colour_B3.T[:2]]
    if frames.shape[1] > 1:
        change_BT = np.abs(np.diff(frames, axis=1)).mean(axis=(2, 3, 4), dtype=np.float64) / unit_B[:, None]
        found += [change_BT.mean(axis=1), change_BT.std(axis=1)]
    return np.stack(found, axis=1)


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
