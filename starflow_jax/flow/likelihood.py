"""Negative log-likelihood of the flow's forward pass (DESIGN: losses)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from starflow_jax.flow.starflow import FlowOutput, STARFlow

REFERENCE_NOISE = 0.3  # the loss is weighted sigma / 0.3; this constant then is the denoising step


class NLL(NamedTuple):
    """Per-dimension means over the batch, constants left out."""

    loss: jax.Array
    loss_z: jax.Array  # mean of z^2 / 2
    loss_logdet: jax.Array  # minus the sum over blocks of the mean log-determinant


def nll_mean(out: FlowOutput) -> NLL:
    """mean(z^2 / 2) - sum over blocks of mean(log-determinant)."""
    loss_z = 0.5 * jnp.mean(out.z_BTSK**2)
    loss_logdet = -jnp.sum(jnp.stack([jnp.mean(logdet) for logdet in out.logdets]))
    return NLL(loss_z + loss_logdet, loss_z, loss_logdet)


def nll_per_frame(out: FlowOutput) -> jax.Array:
    """(B, T) exact -log p, in nats, of each frame of noised latents, constants included, given the frames before it."""
    batch, frames = out.z_BTSK.shape[:2]
    total = 0.5 * jnp.sum(out.z_BTSK**2 + math.log(2 * math.pi), axis=(2, 3))
    return total - sum(jnp.sum(logdet.reshape(batch, frames, -1), axis=-1) for logdet in out.logdets)


def nll_per_token(flow: STARFlow, out: FlowOutput) -> jax.Array:
    """(B, T, S) exact -log p, in nats, of each token in raster order, constants included; its sum over S is
    `nll_per_frame`.

    A token's share is that of its noise and of every block's scale at its place.
    """
    shape = out.z_BTSK.shape
    total = 0.5 * (out.z_BTSK**2 + math.log(2 * math.pi))
    for index, logdet in enumerate(out.logdets[:-1]):
        ordered = logdet.reshape(-1, *shape[2:]) if flow.config.local_shallow else logdet
        total -= flow.from_block_order(index, ordered, shape)
    return jnp.sum(total - out.logdets[-1].reshape(shape), axis=-1)
