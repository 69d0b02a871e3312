"""Keys and values of the slots that a block has seen: pure state that goes in and comes out."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.sharding import constrain

AXES = (None, "batch", None, "heads", None)  # of keys and values, as sharding.TABLE names them
BLOCK = 1024


def rounded_slots(slots: int) -> int:
    """Slots that a cache for `slots` has: more than a BLOCK are rounded up to whole ones."""
    return slots if slots <= BLOCK else -(-slots // BLOCK) * BLOCK


Layers = jax.Array | tuple[jax.Array, ...]  # (L, B, P, H, D), or L arrays of unstacked layers


class KVCache(flax.struct.PyTreeNode):
    """Fixed-size cache of a stack of layers; slots from `length` on are unused."""

    k_LBPHD: Layers
    v_LBPHD: Layers
    length: jax.Array  # int32 scalar

    @classmethod
    def empty(cls, layers: int, batch: int, slots: int, heads: int, head_dim: int, dtype, unstacked: bool = False
              ) -> "KVCache":
        """With room for at least `slots`; many are rounded up, so that the TPU kernel reads them in place."""
        zeros = constrain(jnp.zeros((layers, batch, rounded_slots(slots), heads, head_dim), dtype), *AXES)
        kept = tuple(zeros) if unstacked else zeros
        return cls(kept, kept, jnp.int32(0))

    @classmethod
    def filled(cls, kv: tuple[Layers, Layers], slots: int) -> "KVCache":
        """With these keys and values in its first slots, and room for at least `slots`."""
        room = rounded_slots(slots) - _slots(kv)
        k, v = jax.tree.map(lambda part: jnp.pad(part, [*[(0, 0)] * (part.ndim - 3), (0, room), (0, 0), (0, 0)]), kv)
        return cls(k, v, jnp.int32(_slots(kv)))

    def append(self, kv: tuple[Layers, Layers]) -> "KVCache":
        """The cache with the (L, B, S, H, D) keys and values of the next S slots written behind its end."""
        return self._with(kv, self.length, self.length + _slots(kv))

    def write(self, kv: tuple[Layers, Layers], at: jax.Array) -> "KVCache":
        """The same with slots `at` .. `at` + S - 1, which may be in use already and must not leave a gap."""
        return self._with(kv, at, jnp.maximum(self.length, at + _slots(kv)))

    def _with(self, kv: tuple[Layers, Layers], at: jax.Array, length: jax.Array) -> "KVCache":
        def written(old: jax.Array, new: jax.Array) -> jax.Array:
            whole = lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis=-3)
            return constrain(whole, *AXES[-whole.ndim:])

        k, v = jax.tree.map(written, (self.k_LBPHD, self.v_LBPHD), tuple(kv))
        return KVCache(k, v, length)


def _slots(kv: tuple[Layers, Layers]) -> int:
    return jax.tree.leaves(kv)[0].shape[-3]
