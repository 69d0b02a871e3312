"""int8 with scales: how arrays are rounded to it, and cached keys and values kept in it."""

from typing import TypeAlias

import flax.struct
import jax
import jax.numpy as jnp

LARGEST = 127  # as far below zero as above it: without -128


def to_int8(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """(q int8, scale float32 without `axis`): x is about q * scale, with one scale for all that lies along the axis."""
    x = x.astype(jnp.float32)
    scale = scales(x, axis)
    return rounded(x, scale), scale.squeeze(axis)


def scales(x: jax.Array, axis: int) -> jax.Array:
    """The scales of `to_int8`, float32, with `axis` of length 1; as exact of an x in fewer bits."""
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True).astype(jnp.float32)
    return jnp.where(largest == 0, 1, largest / LARGEST)


def rounded(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / scale, int8."""
    return jnp.round(x.astype(jnp.float32) / scale).astype(jnp.int8)


class Int8Slots(flax.struct.PyTreeNode):
    """Keys or values of one layer, or of a stack of them; each slot and head has a scale of its own. Slots are the last
    axis of the scales: on a TPU a last axis of a few heads would take the memory of 128. Behind an axis of one they lie
    as the TPU kernel reads them."""

    q_BPGD: jax.Array  # int8
    scale_BG1P: jax.Array  # float32

    @classmethod
    def of(cls, x_BPGD: jax.Array) -> "Int8Slots":
        q, scale_BPG = to_int8(x_BPGD, axis=-1)
        return cls(q, scale_BPG.mT[..., None, :])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q_BPGD.shape

    def scaled_back(self, dtype) -> jax.Array:
        return (self.q_BPGD * jnp.moveaxis(self.scale_BG1P, -1, -3)).astype(dtype)


Slots: TypeAlias = jax.Array | Int8Slots  # (B, P, G, D)
