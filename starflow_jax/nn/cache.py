"""Keys and values of the slots that a block has seen: pure state that goes in and comes out."""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from starflow_jax.kernels.int8 import Int8Slots, Slots
from starflow_jax.kernels.stacked import Cached, Stacked
from starflow_jax.sharding import constrain, named_sharding, replicated

AXES = (None, "batch", None, "heads", None)  # of keys and values, as sharding.TABLE names them
SCALE_AXES = (None, "batch", "heads", None, None)  # of the scales of int8
BLOCK = 1024


def rounded_slots(slots: int) -> int:
    """Slots that a cache for `slots` has: more than a BLOCK are rounded up to whole ones."""
    return slots if slots <= BLOCK else -(-slots // BLOCK) * BLOCK


Layers = Slots | tuple[Slots, ...]  # (L, B, P, H, D), or L arrays of unstacked layers
Fresh = jax.Array | tuple[jax.Array, ...]  # the same of a call's own slots, which are floats


class KVCache(flax.struct.PyTreeNode):
    """Fixed-size cache of a stack of layers; slots from `length` on are unused."""

    k_LBPHD: Layers
    v_LBPHD: Layers
    length: jax.Array  # int32 scalar

    @classmethod
    def empty(cls, layers: int, batch: int, slots: int, heads: int, head_dim: int, dtype, unstacked: bool = False
              ) -> "KVCache":
        """With room for at least `slots`; many are rounded up, so that the TPU kernel reads them in place. dtype: of a
        float, or int8, which has a float32 scale for each slot and head."""
        slots = rounded_slots(slots)
        zeros = constrain(jnp.zeros((layers, batch, slots, heads, head_dim), dtype), *AXES)
        kept: Layers = tuple(zeros) if unstacked else zeros
        if zeros.dtype == jnp.int8:
            scale = constrain(jnp.zeros((layers, batch, heads, 1, slots), jnp.float32), *SCALE_AXES)
            kept = tuple(map(Int8Slots, zeros, scale)) if unstacked else Int8Slots(zeros, scale)
        return cls(kept, kept, jnp.int32(0))

    @classmethod
    def filled(cls, kv: tuple[Fresh, Fresh], slots: int) -> "KVCache":
        """With these keys and values in its first slots, and room for at least `slots`."""
        room = rounded_slots(slots) - _slots(kv)
        k, v = jax.tree.map(lambda part: jnp.pad(part, [*[(0, 0)] * (part.ndim - 3), (0, room), (0, 0), (0, 0)]), kv)
        return cls(k, v, jnp.int32(_slots(kv)))

    def of_layer(self, layer: int | jax.Array) -> tuple[Cached, Cached]:
        """One layer's keys and values; of a stack, where they lie. layer: an int for unstacked layers."""
        def part(layers: Layers) -> Cached:
            return layers[layer] if isinstance(layers, tuple) else Stacked(layers, jnp.int32(layer))

        return part(self.k_LBPHD), part(self.v_LBPHD)

    def shardings(self, mesh: Mesh) -> Any:
        """A KVCache of the NamedSharding of each array; also of a cache of shapes."""
        def of(array: Any, axes: tuple[str | None, ...] = AXES) -> Any:
            if isinstance(array, Int8Slots):
                return Int8Slots(of(array.q_BPGD), of(array.scale_BG1P, SCALE_AXES))
            return named_sharding(mesh, axes[-len(array.shape):], array.shape)

        k, v = jax.tree.map(of, (self.k_LBPHD, self.v_LBPHD), is_leaf=lambda part: isinstance(part, Int8Slots))
        shardings: Any = (k, v, replicated(mesh))
        return KVCache(*shardings)

    def append(self, kv: tuple[Fresh, Fresh]) -> "KVCache":
        """The cache with the (L, B, S, H, D) keys and values of the next S slots written behind its end."""
        return self._with(kv, self.length, self.length + _slots(kv))

    def write(self, kv: tuple[Fresh, Fresh], at: jax.Array) -> "KVCache":
        """The same with slots `at` .. `at` + S - 1, which may be in use already and must not leave a gap."""
        return self._with(kv, at, jnp.maximum(self.length, at + _slots(kv)))

    def _with(self, kv: tuple[Fresh, Fresh], at: jax.Array, length: jax.Array) -> "KVCache":
        k, v = jax.tree.map(partial(_written, at), (self.k_LBPHD, self.v_LBPHD), tuple(kv),
                            is_leaf=lambda part: isinstance(part, Int8Slots))
        return KVCache(k, v, length)


def _written(at: jax.Array, old: Slots, new: jax.Array) -> Slots:
    """`old` with `new`, rounded to int8 where `old` is, from slot `at` on."""
    def place(old: jax.Array, new: jax.Array, slots: int, axes: tuple[str | None, ...]) -> jax.Array:
        whole = lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis=slots)
        return constrain(whole, *axes[-whole.ndim:])

    if isinstance(old, Int8Slots):
        rounded = Int8Slots.of(new)
        return Int8Slots(place(old.q_BPGD, rounded.q_BPGD, -3, AXES),
                         place(old.scale_BG1P, rounded.scale_BG1P, -1, SCALE_AXES))
    return place(old, new, -3, AXES)


def _slots(kv: tuple[Fresh, Fresh]) -> int:
    return jax.tree.leaves(kv)[0].shape[-3]
