"""Keys and values of the slots that a block has seen: pure state that goes in and comes out."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.sharding import constrain

AXES = (None, "batch", None, "heads", None)  # of keys and values, as sharding.TABLE names them
BLOCK = 1024


def rounded_slots(slots: int) -> int:
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
        """At least `slots`. Many are rounded up, so that the TPU kernel reads them where they are."""
        zeros = constrain(jnp.zeros((layers, batch, rounded_slots(slots), heads, head_dim), dtype), *AXES)
        kept = tuple(zeros) if unstacked else zeros
        return cls(kept, kept, jnp.int32(0))

    def append(self, kv: tuple[Layers, Layers]) -> "KVCache":
        """The cache with the (L, B, S, H, D) keys and values of the next S slots written behind its end."""
        def written(old: jax.Array, new: jax.Array) -> jax.Array:
            whole = lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), self.length, axis=-3)
            return constrain(whole, *AXES[-whole.ndim:])

        k, v = jax.tree.map(written, (self.k_LBPHD, self.v_LBPHD), tuple(kv))
        return KVCache(k, v, self.length + jax.tree.leaves(kv)[0].shape[-3])
