"""Attention over a mesh whose sequence axis shards the tokens: what moves (config.SEQUENCE_PARALLEL).

    ulysses     all-to-all: each device gets whole sequences of some heads, and returns its tokens' share of the results
    all_gather  keys and values of all devices: each device answers its own queries of all its heads
    ring        the same, with keys and values passed round, one device's shard at a time, and their softmaxes merged

Ulysses sends 4 (n-1)/n of a device's queries' bytes among n devices, the others 2 (n-1) of its keys' and values' and 2
of its queries'; but ulysses needs a number of heads that divides over the devices.

Under a causal mask the device with the last tokens would have n times the first one's work. For all_gather and ring,
queries are therefore dealt out in zigzag order: of 2n pieces of the sequence device d answers the d-th and the d-th
from the end.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from starflow_jax.kernels import attention as core
from starflow_jax.kernels.mask import Mask, piece
from starflow_jax.sharding import TABLE, over_heads, over_tokens, tokens_sharded

AXIS, = TABLE["tokens"]


def by_tokens(choice: str, past: Any, count: jax.Array | None = None) -> bool:
    """Whether each device answers its own tokens' queries. With a cache, or where only the running program knows how
    many of the tokens there are, attention is sharded by heads."""
    return choice != "ulysses" and past is None and count is None and tokens_sharded()


def sequence_parallel_attention(choice: str, q_BSHD: jax.Array, k_BSHD: jax.Array, v_BSHD: jax.Array,
                                masks: tuple[Mask, ...], which: jax.Array | None, past: Any,
                                count: jax.Array | None = None) -> jax.Array:
    """kernels.attention.attention on the current mesh, (B, S, H, D); by tokens, S must divide over the devices."""
    if not by_tokens(choice, past, count):
        given = {name: value for name, value in (("which", which), ("count", count)) if value is not None}

        def attend(q, k, v, *values, past):
            return core.attention(q, k, v, masks, past, **dict(zip(given, values)))

        return over_heads(attend, q_BSHD, k_BSHD, v_BSHD, past, *given.values())
    run = partial(_gathered if choice == "all_gather" else _round_the_ring, masks)
    return over_tokens(run, q_BSHD, k_BSHD, v_BSHD, jnp.int32(0) if which is None else which)


def _gathered(masks: tuple[Mask, ...], q_BSHD, k_BSHD, v_BSHD, which):
    count, devices = k_BSHD.shape[1], lax.axis_size(AXIS)
    pieces, of_device = _pieces(masks, which, count, [(0, count * devices)] * devices)
    k, v = (lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (k_BSHD, v_BSHD))
    return _from_zigzag(core.attention(_to_zigzag(q_BSHD), k, v, pieces, which=of_device))


def _round_the_ring(masks: tuple[Mask, ...], q_BSHD, k_BSHD, v_BSHD, which):
    devices, count = lax.axis_size(AXIS), k_BSHD.shape[1]
    steps = [_pieces(masks, which, count, [((device - step) % devices * count, count) for device in range(devices)])
             for step in range(devices)]
    q_BSHD = _to_zigzag(q_BSHD) * q_BSHD.shape[-1] ** -0.5
    return _from_zigzag(_ring(tuple(pieces for pieces, _ in steps), q_BSHD, k_BSHD, v_BSHD,
                              tuple(of_device for _, of_device in steps)))


def _pieces(masks: tuple[Mask, ...], which, count: int, keys: list[tuple[int, int]]) -> tuple[core.Masks, jax.Array]:
    """The different pieces of the masks that any device needs, and which of them this one does.

    count: slots of a device; keys: of each device the first key and the number of keys.
    """
    devices = lax.axis_size(AXIS)
    table = [[piece(mask, devices * count, zigzag_runs(device, devices, count), *keys[device])
              for device in range(devices)] for mask in masks]
    distinct = tuple(dict.fromkeys(part for row in table for part in row))
    index = np.array([[distinct.index(part) for part in row] for row in table], np.int32)
    return distinct, jnp.asarray(index)[which, lax.axis_index(AXIS)]


def zigzag_runs(device: int, devices: int, count: int) -> tuple[tuple[int, int], ...]:
    """(first slot, how many) of both pieces of the sequence that a device answers."""
    sizes = (count - count // 2, count // 2)  # of each device's tokens
    return tuple((at // 2 * count + at % 2 * sizes[0], sizes[at % 2]) for at in (device, 2 * devices - 1 - device))


def _routes(devices: int) -> list[list[tuple[int, int]]]:
    """(from, to) of the first and of the second piece of each device's tokens."""
    return [[(device, min(2 * device + half, 2 * devices - 1 - 2 * device - half)) for device in range(devices)]
            for half in range(2)]


def _to_zigzag(x_BSHD: jax.Array) -> jax.Array:
    """From each device's own tokens to the two pieces that it answers, the earlier one first."""
    cut = x_BSHD.shape[1] - x_BSHD.shape[1] // 2
    first, second = (lax.ppermute(part, AXIS, route) for part, route in zip(
        (x_BSHD[:, :cut], x_BSHD[:, cut:]), _routes(lax.axis_size(AXIS))))
    return jnp.where(_is_even_device(), jnp.concatenate([first, second], 1), jnp.concatenate([second, first], 1))


def _from_zigzag(x_BSHD: jax.Array) -> jax.Array:
    """`_to_zigzag` undone."""
    small = x_BSHD.shape[1] // 2
    cut = x_BSHD.shape[1] - small
    first = jnp.where(_is_even_device(), x_BSHD[:, :cut], x_BSHD[:, small:])
    second = jnp.where(_is_even_device(), x_BSHD[:, cut:], x_BSHD[:, :small])
    back = [[(target, source) for source, target in route] for route in _routes(lax.axis_size(AXIS))]
    return jnp.concatenate([lax.ppermute(part, AXIS, route) for part, route in zip((first, second), back)], 1)


def _is_even_device() -> jax.Array:
    """Whether this device's earlier piece is the first half of some device's tokens."""
    return lax.axis_index(AXIS) % 2 == 0


def _rotate(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    devices = lax.axis_size(AXIS)
    return lax.ppermute(arrays, AXIS, [(device, (device + 1) % devices) for device in range(devices)])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(masks: tuple[core.Masks, ...], q_BSHD, k_BSHD, v_BSHD, which: tuple[jax.Array, ...]):
    """softmax(q k^T) v over all devices' keys. masks, which: one per step; step i has the keys of the device i places
    back."""
    return _ring_forward(masks, q_BSHD, k_BSHD, v_BSHD, which)[0]


def _ring_forward(masks, q_BSHD, k_BSHD, v_BSHD, which):
    keys: tuple[jax.Array, ...] = (k_BSHD, v_BSHD)
    result: tuple[jax.Array, jax.Array] | None = None
    for step in range(len(masks)):
        out, lse_BHS = core.forward(masks[step], which[step], q_BSHD, *keys)
        part = (out.astype(lse_BHS.dtype), lse_BHS)
        result = core.merge(result, part) if result else part
        keys = _rotate(*keys) if step + 1 < len(masks) else keys
    assert result is not None
    out, lse_BHS = (checkpoint_name(x, name) for x, name in zip(
        (result[0].astype(q_BSHD.dtype), result[1]), core.ATTENTION_RESULTS))
    return out, (q_BSHD, k_BSHD, v_BSHD, which, out, lse_BHS)


def _ring_backward(masks, residuals, dout_BSHD):
    """Keys and values go round once more, and their gradients with them, back to where they came from."""
    q_BSHD, k_BSHD, v_BSHD, which, out_BSHD, lse_BHS = residuals
    keys: tuple[jax.Array, ...] = (k_BSHD, v_BSHD)
    delta_BHS = core.inner(out_BSHD, dout_BSHD, lse_BHS.dtype)
    dq, dkeys = jnp.zeros(q_BSHD.shape, lse_BHS.dtype), tuple(map(jnp.zeros_like, keys))
    for step in range(len(masks)):
        dq_part, *parts = core.backward(masks[step], which[step], q_BSHD, keys[0], keys[1], lse_BHS,
                                         delta_BHS, dout_BSHD)
        dq, dkeys = dq + dq_part, tuple(total + part for total, part in zip(dkeys, parts))
        dkeys = _rotate(*dkeys)
        keys = _rotate(*keys) if step + 1 < len(masks) else keys
    return dq.astype(q_BSHD.dtype), *dkeys, None


_ring.defvjp(_ring_forward, _ring_backward)
