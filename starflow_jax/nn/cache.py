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


class KVCache(flax.struct.PyTreeNode):
    """Fixed-size cache of a stack of layers; slots from `length` on are unused."""

    k_LBPHD: jax.Array
    v_LBPHD: jax.Array
    length: jax.Array  # int32 scalar

    @classmethod
    def empty(cls, layers: int, batch: int, slots: int, heads: int, head_dim: int, dtype) -> "KVCache":
        """At least `slots`. Many are rounded up, so that the TPU kernel reads them where they are."""
        zeros = constrain(jnp.zeros((layers, batch, rounded_slots(slots), heads, head_dim), dtype), *AXES)
        return cls(zeros, zeros, jnp.int32(0))

    def append(self, kv: tuple[jax.Array, jax.Array]) -> "KVCache":
        """The cache with the (L, B, S, H, D) keys and values of the next S slots written behind its end."""
        k, v = (lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), self.length, axis=2)
                for old, new in zip((self.k_LBPHD, self.v_LBPHD), kv))
        k, v = constrain(k, *AXES), constrain(v, *AXES)
        return KVCache(k, v, self.length + kv[0].shape[2])
