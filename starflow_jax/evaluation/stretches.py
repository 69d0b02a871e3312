"""Figures of a long video stretch by stretch; a stretch is a training length of latent frames."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from starflow_jax.data.digits import reader
from starflow_jax.data.digits.captions import ATTRIBUTES
from starflow_jax.evaluation.frechet import clip_features
from starflow_jax.evaluation.networks import I3D


@dataclasses.dataclass(frozen=True)
class Measures:
    """What is measured of every stretch besides likelihood, brightness and flicker."""

    reads: bool = False  # digit, colour and direction, which the clips have
    i3d: I3D | None = None  # its features, of the first `frames` frames
    frames: int = 0


class Stretches:
    """Figures by stretch and by video, gathered batch by batch."""

    def __init__(self, measures: Measures = Measures()) -> None:
        self.measures = measures
        self._parts: list[dict[str, list[np.ndarray]]] = []

    def add(self, stretch: int, frames_BTHWC: np.ndarray, labels_B3: np.ndarray | None) -> None:
        """uint8 frames of a stretch of a batch of videos. labels: what they should show, where that is read."""
        pixels = frames_BTHWC.astype(np.float32)
        axes = (1, 2, 3, 4)
        self._keep(stretch, mean_pixel=pixels.mean(axis=axes), pixel_variance=pixels.var(axis=axes))
        if pixels.shape[1] > 1:
            self._keep(stretch, flickering=1 - np.abs(np.diff(pixels, axis=1)).mean(axis=axes) / 255)
        if self.measures.reads and labels_B3 is not None:
            read_B3 = np.stack(reader.default_reader().read(frames_BTHWC), axis=1)
            self._keep(stretch, **dict(zip(ATTRIBUTES, (read_B3 == labels_B3).T.astype(float))))
        if self.measures.i3d is not None:
            self._keep(stretch, features=clip_features(self.measures.i3d, frames_BTHWC[:, :self.measures.frames]))

    def add_bits(self, bits_BN: np.ndarray, length: int) -> None:
        """Bits per dimension of a batch's latent frames, `length` of them a stretch."""
        for stretch in range(bits_BN.shape[1] // length):
            self._keep(stretch, bits_per_dim=bits_BN[:, stretch * length:(stretch + 1) * length].mean(axis=1))

    def _keep(self, stretch: int, **values_B: np.ndarray) -> None:
        self._parts += [{} for _ in range(stretch + 1 - len(self._parts))]
        for name, of_batch in values_B.items():
            self._parts[stretch].setdefault(name, []).append(of_batch)

    def __len__(self) -> int:
        return len(self._parts)

    def of(self, stretch: int, name: str) -> np.ndarray:
        """Every video's figure, (B,), or features (B, 400)."""
        return np.concatenate(self._parts[stretch][name])

    def means(self) -> list[dict[str, float]]:
        """Of each stretch, over videos."""
        return [{name: float(self.of(stretch, name).mean()) for name in part if name != "features"}
                for stretch, part in enumerate(self._parts)]

    def standard_errors(self) -> list[dict[str, float]]:
        """Of those means, as far as videos differ."""
        return [{name: float(values_B.std() / np.sqrt(len(values_B))) for name in part if name != "features"
                 for values_B in (self.of(stretch, name),)} for stretch, part in enumerate(self._parts)]


def in_stretches(parts: Iterable[np.ndarray], first: int, later: int) -> Iterator[np.ndarray]:
    """A stream's frames (B, T, H, W, 3) as stretches: of `first` frames, then of `later` each; an incomplete one at the
    end is left out."""
    held: list[np.ndarray] = []
    wanted = first
    for part in parts:
        held.append(part)
        while sum(part.shape[1] for part in held) >= wanted:
            frames = np.concatenate(held, axis=1)
            yield frames[:, :wanted]
            held, wanted = [frames[:, wanted:]], later
