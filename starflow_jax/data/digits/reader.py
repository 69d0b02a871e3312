"""Reads a clip of moving digits back: which digit, which colour, which direction?

The reader is an SVM on the digit's picture, cut out around its ink and brought to a fixed size, plus
plain measurements for colour and direction. It is trained on the train scans alone, in seconds, so a
score on test captions says how well generated clips do what they were asked.
"""

import functools

import numpy as np
from etils import epy
from PIL import Image

from starflow_jax.data.digits import scene
from starflow_jax.data.digits.captions import ATTRIBUTES, COLOUR_NAMES, COLOURS, DIRECTIONS, parse_caption

with epy.lazy_imports():  # a second together
    from scipy import ndimage
    from sklearn import svm

CUTOUT = 16  # pixels on a side of the SVM's input
_INK_THRESHOLD = 0.25  # of the clip's brightest ink: below it is background or noise
_SPECK = 0.1  # of the largest connected ink in a frame: below it is no part of the digit
_TRAINING_FRAMES = 2  # each training scan is seen at this many subpixel offsets


class Reader:
    """Reads digit, colour and direction; make it with `Reader.fit`."""

    def __init__(self, classifier: "svm.SVC") -> None:
        self._classifier = classifier

    @classmethod
    def fit(cls, scans_NDD: np.ndarray, digits_N: np.ndarray) -> "Reader":
        """Trains on scans (uint8, N, D, D) rendered as frames of white clips. Deterministic."""
        digit_size = scans_NDD.shape[1]
        start_N2 = np.random.default_rng(0).uniform(0, 1, (len(scans_NDD), 2)).astype(np.float32)
        white_N = np.full(len(scans_NDD), COLOUR_NAMES.index("white"))
        position_NT2 = scene.Motion(start_N2, 1 - 2 * start_N2).positions(_TRAINING_FRAMES)
        frames_NTHWC = scene.render_clips(scans_NDD, white_N, position_NT2, size=2 * digit_size)
        classifier = svm.SVC(kernel="rbf", C=10.0, gamma="scale")
        classifier.fit(_cutouts(_centred_ink(frames_NTHWC)[0]), np.repeat(digits_N, _TRAINING_FRAMES))
        return cls(classifier)

    def read(self, frames_BTHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Digit, colour and direction of each clip, int64 (B,) each; frames are uint8.

        Colour and direction index `COLOUR_NAMES` and `DIRECTION_NAMES`. What cannot be read, in a
        clip without ink or without movement, is -1.
        """
        ink_BTHW, shift_BT2 = _centred_ink(frames_BTHWC)
        blank_B = ink_BTHW.max((1, 2, 3)) == 0
        digit_B = self._read_digits(ink_BTHW)
        digit_B[blank_B] = -1
        colour_B = _read_colours(frames_BTHWC, _rolled(ink_BTHW, -shift_BT2))
        colour_B[blank_B] = -1
        return digit_B, colour_B, _read_directions(ink_BTHW, shift_BT2)

    def adherence(self, labels_B3: np.ndarray, frames_BTHWC: np.ndarray) -> dict[str, float]:
        """Share of clips, 0 to 1, whose digit, colour and direction match its caption.

        labels_B3: int (digit, colour, direction) per clip; of captions, by `labels_of`.
        """
        read_B3 = np.stack(self.read(frames_BTHWC), axis=1)
        shares_3 = (read_B3 == labels_B3).mean(0)
        return dict(zip(ATTRIBUTES, map(float, shares_3)))

    def _read_digits(self, ink_BTHW: np.ndarray) -> np.ndarray:
        """The digit with the most margin summed over all frames of the clip: a graded vote."""
        scores_FD = self._classifier.decision_function(_cutouts(ink_BTHW))
        return scores_FD.reshape(*ink_BTHW.shape[:2], -1).sum(1).argmax(1)


@functools.cache
def default_reader() -> Reader:
    """The reader of the built-in data set, fitted on its train scans at first use (seconds)."""
    scan_ids = scene.split_scan_ids("train")
    return Reader.fit(scene.load_scans(scan_ids, 20), scan_ids // 500)


def labels_of(captions: list[str]) -> np.ndarray:
    """int64 (B, 3): digit, colour, direction of each caption; UserError where one is not said."""
    return np.array([parse_caption(caption) for caption in captions])


def _centred_ink(frames_BTHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brightness float32 (B, T, H, W), 0..1 of each clip's brightest; background and specks are 0. Each frame is
    rolled around the torus, by the int64 (B, T, 2) that is returned too, so that its ink is whole and in the middle."""
    brightest_BTHW = frames_BTHWC.max(-1).astype(np.float32)
    peak_B111 = np.maximum(brightest_BTHW.max((1, 2, 3), keepdims=True), 1)
    ink_BTHW = brightest_BTHW / peak_B111
    ink_BTHW[ink_BTHW < _INK_THRESHOLD] = 0
    shift_BT2 = np.rint(_centre(ink_BTHW) - np.array(ink_BTHW.shape[2:]) / 2).astype(np.int64)
    centred_BTHW = _rolled(ink_BTHW, shift_BT2)
    return np.where(_is_speck(centred_BTHW), 0, centred_BTHW), shift_BT2


def _centre(ink_BTHW: np.ndarray) -> np.ndarray:
    """(B, T, 2): centre of the ink (down, right) on the torus, by the angle of its circular mean; anywhere where there
    is none."""
    sides_2 = np.array(ink_BTHW.shape[2:])
    return np.angle(np.stack(circular_means(ink_BTHW), axis=-1)) * sides_2 / (2 * np.pi) % sides_2


def circular_means(weight_BTHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """complex (B, T), down and right: sums of the weights with their places as angles, a turn to a side of the frame.
    """
    down, right = (np.exp(2j * np.pi * np.arange(side) / side) for side in weight_BTHW.shape[2:])
    return weight_BTHW.sum(3) @ down, weight_BTHW.sum(2) @ right


def _rolled(ink_BTHW: np.ndarray, shift_BT2: np.ndarray) -> np.ndarray:
    """Each frame with its pixel at `shift` in the corner."""
    height, width = ink_BTHW.shape[2:]
    rows_BTH = (np.arange(height) + shift_BT2[..., :1]) % height
    columns_BTW = (np.arange(width) + shift_BT2[..., 1:]) % width
    down = np.take_along_axis(ink_BTHW, rows_BTH[..., None], axis=2)
    return np.take_along_axis(down, columns_BTW[:, :, None, :], axis=3)


def _is_speck(ink_BTHW: np.ndarray) -> np.ndarray:
    """True on connected ink that is much less than the largest connected ink of its frame."""
    touching = np.zeros((3, 3, 3, 3), bool)
    touching[1, 1] = ndimage.generate_binary_structure(2, 1)  # side by side, in the same frame
    component_BTHW, count = ndimage.label(ink_BTHW, touching)
    mass_of_component = np.bincount(component_BTHW.ravel(), ink_BTHW.ravel(), count + 1)
    mass_BTHW = mass_of_component[component_BTHW]
    return mass_BTHW < _SPECK * mass_BTHW.max((2, 3), keepdims=True)


def _cutouts(ink_BTHW: np.ndarray) -> np.ndarray:
    """(B·T, CUTOUT²): each frame's ink, cut out around its bounding box and resized, proportions kept."""
    frames_FHW = ink_BTHW.reshape(-1, *ink_BTHW.shape[2:])
    return np.stack([_cutout(frame).ravel() for frame in frames_FHW])


def _cutout(ink_HW: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(ink_HW.any(1)), np.flatnonzero(ink_HW.any(0))
    square = np.zeros((CUTOUT, CUTOUT), np.float32)
    if not len(rows):
        return square
    box = ink_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = CUTOUT / max(box.shape)
    height, width = (max(1, round(side * scale)) for side in box.shape)
    resized = np.asarray(Image.fromarray(box).resize((width, height), Image.Resampling.BILINEAR))
    top, left = (CUTOUT - height) // 2, (CUTOUT - width) // 2
    square[top : top + height, left : left + width] = resized / resized.max()
    return square


def _read_colours(frames_BTHWC: np.ndarray, ink_BTHW: np.ndarray) -> np.ndarray:
    """The named colour nearest in direction to the sum of the ink's pixels."""
    total_B3 = np.einsum("bthwc,bthw->bc", frames_BTHWC.astype(np.float32), ink_BTHW)
    named_C3 = np.array(list(COLOURS.values()), np.float32)
    return (total_B3 @ (named_C3 / np.linalg.norm(named_C3, axis=1, keepdims=True)).T).argmax(1)


def _read_directions(ink_BTHW: np.ndarray, shift_BT2: np.ndarray) -> np.ndarray:
    """The direction nearest to the way of the ink's centre over the clip, around the torus; -1 below half a pixel.

    The way is the slope of the least-squares line through all frames that have ink, which were rolled by `shift`.
    """
    frames, height, width = ink_BTHW.shape[1:]
    seen_BT = ink_BTHW.max((2, 3)) > 0
    last_seen_BT = np.maximum.accumulate(np.where(seen_BT, np.arange(frames), 0), axis=1)
    around_BT2 = np.take_along_axis(_centre(ink_BTHW) + shift_BT2, last_seen_BT[..., None], axis=1)
    position_BT2 = np.stack([np.unwrap(around_BT2[..., axis], period=side, axis=1)
                             for axis, side in enumerate((height, width))], axis=-1)
    weight_BT = seen_BT.astype(np.float64)
    total_B1 = np.maximum(weight_BT.sum(1, keepdims=True), 1)
    time_BT = np.arange(frames) - (weight_BT @ np.arange(frames))[:, None] / total_B1
    moment_B = np.maximum((weight_BT * time_BT**2).sum(1), 1e-6)
    slope_B2 = np.einsum("bt,btd->bd", weight_BT * time_BT, position_BT2) / moment_B[:, None]
    way_B2 = slope_B2 * (frames - 1)
    steps_82 = np.array(list(DIRECTIONS.values()))
    unit_82 = steps_82 / np.linalg.norm(steps_82, axis=1, keepdims=True)
    direction_B = (way_B2 @ unit_82.T).argmax(1)
    direction_B[np.linalg.norm(way_B2, axis=1) < 0.5] = -1
    return direction_B
