"""Who may attend to whom, as one interval of keys per query: nothing here has the size queries x keys.

Under every mask query i sees the first `prefix` keys and the keys low_i .. high_i - 1. Neither bound
falls from one query to the next, so the blocks of keys that a block of queries sees are two runs, and the
blocks of queries that see a block of keys are one.
"""

import dataclasses
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax

HIDDEN, PARTLY, WHOLLY = 0, 1, 2  # what a block of queries sees of a block of keys


@dataclasses.dataclass(frozen=True)
class Causal:
    """Slot i sees slots 0..i. A text prefix is simply the first slots of the sequence."""

    prefix = 0

    def interval(self, query, keys: int, xp=np) -> tuple[Any, Any]:
        """(low, high) of each query; xp: numpy or jax.numpy, whichever the queries are of."""
        return 0, query + 1


@dataclasses.dataclass(frozen=True)
class Full:
    """Every query sees every key."""

    prefix = 0

    def interval(self, query, keys: int, xp=np) -> tuple[Any, Any]:
        return 0, keys


@dataclasses.dataclass(frozen=True)
class FrameWindow:
    """Frame n sees frames n-window+1 .. n+lookahead, wholly, and the text, which is the first `prefix` slots.

    Text queries see all text and frames 0 .. lookahead (as frame 0 would).
    """

    prefix: int
    tokens: int  # per frame
    window: int
    lookahead: int
    frames: int = 0  # slots behind these are padding, which nobody sees; 0: there is none

    def interval(self, query, keys: int, xp=np) -> tuple[Any, Any]:
        divide = lax.div if xp is jnp else np.floor_divide
        frame = divide(xp.maximum(query - self.prefix, 0), xp.full_like(query, self.tokens))
        end = self.prefix + self.frames * self.tokens if self.frames else keys
        low = self.prefix + xp.maximum(frame - (self.window - 1), 0) * self.tokens
        return xp.minimum(low, end), xp.minimum(self.prefix + (frame + (self.lookahead + 1)) * self.tokens, end)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A mask over `slots` slots, of some of its queries and a run of its keys.

    runs: (first slot, count) of the queries, one behind the other, each beyond the one before.
    """

    mask: "Mask"
    slots: int
    runs: tuple[tuple[int, int], ...]
    first_key: int
    keys: int

    @property
    def prefix(self) -> int:
        return min(max(self.mask.prefix - self.first_key, 0), self.keys)

    def interval(self, query, keys: int, xp=np) -> tuple[Any, Any]:
        slot, before = query + self.runs[0][0], self.runs[0][1]
        for first, count in self.runs[1:]:
            slot, before = xp.where(query < before, slot, query + (first - before)), before + count
        low, high = self.mask.interval(slot, self.slots, xp)
        return self._in_run(low, xp), self._in_run(high, xp)

    def _in_run(self, slot, xp):
        if isinstance(slot, int):
            return min(max(slot - self.first_key, 0), self.keys)
        return xp.minimum(xp.maximum(slot - self.first_key, 0), self.keys)


Mask: TypeAlias = Causal | Full | FrameWindow | Piece


def piece(mask: Mask, slots: int, runs: tuple[tuple[int, int], ...], first_key: int, keys: int) -> Mask | None:
    """A Piece; Full where it sees everything, None where it sees nothing, as kernels then have less to do."""
    cut = Piece(mask, slots, runs, first_key, keys)
    prefix, low_S, high_S = bounds(cut, sum(count for _, count in runs), keys)
    if prefix == keys or ((low_S <= prefix).all() and (high_S == keys).all()):
        return Full()
    return cut if prefix or (low_S < high_S).any() else None


def seen(mask: Mask, query, key, keys: int, xp=np):
    """Elementwise: whether a query sees a key, as slot numbers; any integer arrays that broadcast."""
    low, high = mask.interval(query, keys, xp)
    inside = key < high if isinstance(low, int) else (key >= low) & (key < high)
    return inside | (key < mask.prefix) if mask.prefix else inside


class Bounds(NamedTuple):
    """Query i sees key j where j < prefix or low_S[i] <= j < high_S[i]; int32."""

    prefix: int
    low_S: np.ndarray
    high_S: np.ndarray


def bounds(mask: Mask, queries: int, keys: int, q_block: int = 1) -> Bounds:
    """The mask's intervals, for queries up to a multiple of q_block (those beyond see what the last one sees).

    Raises ValueError where the mask needs as many queries as keys (the same slots) and they differ.
    """
    if queries != keys and not isinstance(mask, Full | Piece):
        raise ValueError(f"{mask} needs as many queries as keys, not {queries} and {keys}")
    query = np.minimum(np.arange(-(-queries // q_block) * q_block), queries - 1)
    low, high = (np.broadcast_to(x, query.shape).astype(np.int32) for x in mask.interval(query, keys))
    return Bounds(mask.prefix, low, high)


def visible_blocks(mask: Mask, queries: int, keys: int, q_block: int, k_block: int) -> np.ndarray:
    """(query blocks, key blocks) of HIDDEN, PARTLY or WHOLLY; keys from `keys` on are hidden."""
    prefix, low_S, high_S = bounds(mask, queries, keys, q_block)
    low, high = low_S.reshape(-1, q_block), high_S.reshape(-1, q_block)
    start = np.arange(-(-keys // k_block)) * k_block
    stop = start + k_block
    sees = (low < high).any(1, keepdims=True)  # padding sees nothing but the prefix
    some = (start < prefix) | (sees & (stop > low.min(1, keepdims=True)) & (start < high.max(1, keepdims=True)))
    all_ = (np.maximum(start, prefix) >= low.max(1, keepdims=True)) & (stop <= high.min(1, keepdims=True))
    return np.where((stop <= prefix) | all_, WHOLLY, np.where(some, PARTLY, HIDDEN))


def block_runs(visible: np.ndarray, in_front: int = 0) -> np.ndarray:
    """(4, rows): first and last + 1 of the blocks that each row sees, then of those it sees wholly.

    The first `in_front` blocks are left out. Where none is seen wholly, that run is empty and starts with the first.
    """
    def run(some: np.ndarray, if_none: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        position = some.argmax(1) if some.shape[1] else 0
        first = np.where(some.any(1), in_front + position, if_none)
        return first, first + some.sum(1)

    behind = visible[:, in_front:]
    first, last = run(behind != HIDDEN, in_front)
    return np.stack((first, last, *run(behind == WHOLLY, first))).astype(np.int32)
