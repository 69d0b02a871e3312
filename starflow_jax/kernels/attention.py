"""The causal attention core of training and decoding: one function, several kernels behind it.

A kernel is a pair of functions, `forward` and `backward`, as in reference.py. One that cannot serve a shape,
a dtype or a device raises `Unsupported`, and the next one is tried; the reference serves everything.
"""

import functools
from types import ModuleType
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap

from starflow_jax.kernels import reference
from starflow_jax.kernels.int8 import Int8Slots
from starflow_jax.kernels.mask import Causal, Full, Mask, seen
from starflow_jax.kernels.stacked import Cached, Stacked, first_slots, taken
from starflow_jax.kernels.unsupported import Unsupported

with epy.lazy_imports():  # Pallas takes a fifth of a second, and short attention needs none of them
    from starflow_jax.kernels import pallas_gpu, pallas_tpu, pallas_triton

# By platform, the better one first. The platform is known only when the program is lowered, which may be for
# a machine other than this one.
KERNELS: dict[str, dict[str, ModuleType]] = {
    "cuda": {"gpu": pallas_gpu, "triton": pallas_triton},
    "tpu": {"tpu": pallas_tpu},
}
IMPLEMENTATIONS = {"reference": reference} | {name: kernel for kernels in KERNELS.values()
                                              for name, kernel in kernels.items()}
ATTENTION_RESULTS = ("attention_out", "attention_lse")  # by these names jax.checkpoint can keep them
Masks: TypeAlias = tuple[Mask | None, ...]  # None: nothing is seen
Past: TypeAlias = tuple[Cached, Cached, jax.Array]  # keys and values of earlier slots, and how many of them there are
SHORT = 1024  # keys: up to here products of all pairs are as fast as a kernel, and autodiff does the rest
LEAST_IN_PARTS = 128  # queries: for fewer, parts save a CPU little, and all programs take longer to compile


def attention(
    q_BSHD: jax.Array,
    k_BKGD: jax.Array,
    v_BKGD: jax.Array,
    mask: Mask | Masks,
    past: Past | None = None,
    implementation: str | None = None,
    which: jax.Array | None = None,
    count: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v over the keys that the mask allows; (B, S, H, D) in q's dtype.

    All three in one dtype; softmax in float32. H is a multiple of G: each key head serves H/G query heads.
    mask: one, or several, of which `which` (int32), known only when the program runs, selects one.
    count: how many of the K keys there are (int32), known only then; those behind them are padding. None: all.
    past: (k_BPGD, v_BPGD, length) of a cache that is only read: every query also sees its first `length` slots
    (int32, one for all samples or (B,)). RoPE is the caller's. A cache of a multiple of 1024 slots on TPUs,
    of 8 on GPUs, is read where it is; any other is copied first. Keys and values that are Int8Slots or Stacked have no
    derivatives; the reference and the TPU kernel apply scales themselves, the GPU kernels get what is scaled back; the
    TPU kernel takes a layer from its stack itself, for the others it is copied.
    Over several devices, call it in a shard_map (check_vma=False) over samples and heads: XLA does not shard kernels.
    implementation: one of IMPLEMENTATIONS. By default the best that serves this call, of the platform that the
    program is lowered for.
    Raises Unsupported where the requested one does not serve this call, ValueError where there is no such one and
    for shapes that do not fit.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"no implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}")
    if q_BSHD.shape[2] % k_BKGD.shape[2] or k_BKGD.shape != v_BKGD.shape:
        raise ValueError(f"queries {q_BSHD.shape} do not fit keys {k_BKGD.shape} and values {v_BKGD.shape}")
    masks = mask if isinstance(mask, tuple) else (mask,)
    longest = max(k_BKGD.shape[1], 0 if past is None else past[0].shape[1])
    if longest <= SHORT and implementation in (None, "reference"):
        sees = _dense(masks, which, q_BSHD, k_BKGD)
        sees = sees if count is None else sees & (jnp.arange(k_BKGD.shape[1]) < count)
        if past is not None:
            return lax.platform_dependent(q_BSHD, k_BKGD, v_BKGD, sees, past, cpu=_filled_part, default=_whole)
        at_once = functools.partial(reference.attention, mask=sees)
        in_parts = count is None and masks == (Causal(),) and LEAST_IN_PARTS <= q_BSHD.shape[1] == k_BKGD.shape[1]
        out = (lax.platform_dependent(q_BSHD, k_BKGD, v_BKGD, cpu=reference.causal, default=at_once) if in_parts
               else at_once(q_BSHD, k_BKGD, v_BKGD))
        return checkpoint_name(out, ATTENTION_RESULTS[0])
    q_BSHD = q_BSHD * q_BSHD.shape[-1] ** -0.5
    count_B = None if count is None else jnp.broadcast_to(jnp.asarray(count, jnp.int32), q_BSHD.shape[:1])
    out, lse_BHS = _flash(masks, implementation, q_BSHD, k_BKGD, v_BKGD, count_B, which)
    if past is None:
        return out
    past_k, past_v, length = past
    length_B = jnp.broadcast_to(jnp.asarray(length, jnp.int32), q_BSHD.shape[:1])
    pieces = _flash((Full(),), implementation, q_BSHD, past_k, past_v, length_B, None)
    return merge((out, lse_BHS), pieces)[0].astype(out.dtype)


def _whole(q_BSHD, k_BKGD, v_BKGD, sees_SK, past: Past) -> jax.Array:
    past_k, past_v, length = past
    return reference.attention(q_BSHD, k_BKGD, v_BKGD, sees_SK, (taken(past_k), taken(past_v), length))


def _filled_part(q_BSHD, k_BKGD, v_BKGD, sees_SK, past: Past) -> jax.Array:
    """reference.attention over the quarters of the cache that hold anything: a CPU pays for every slot."""
    past_k, past_v, length = past
    slots = past_k.shape[1]
    quarter = max(1, -(-slots // 4))
    ends = [min(end, slots) for end in range(quarter, slots + quarter, quarter)]

    def upto(end: int):
        return lambda past_k, past_v: reference.attention(
            q_BSHD, k_BKGD, v_BKGD, sees_SK, (first_slots(past_k, end), first_slots(past_v, end), length))

    filled = _of_the_fullest_lane((jnp.max(length) - 1) // quarter)
    return lax.switch(jnp.clip(filled, 0, len(ends) - 1), [upto(end) for end in ends], past_k, past_v)


@custom_vmap
def _of_the_fullest_lane(number: jax.Array) -> jax.Array:
    """One number for all lanes of vmap: with one for each, it would compute every branch for every lane."""
    return number


@_of_the_fullest_lane.def_vmap
def _largest(_, is_batched, number: jax.Array) -> tuple[jax.Array, bool]:
    return (jnp.max(number) if is_batched[0] else number), False


def _dense(masks: Masks, which, q_BSHD, k_BKGD) -> jax.Array | np.ndarray:
    """(queries, keys) of bool."""
    queries, keys = q_BSHD.shape[1], k_BKGD.shape[1]
    query, key = np.arange(queries)[:, None], np.arange(keys)
    sees = np.stack([np.broadcast_to(mask is not None and seen(mask, query, key, keys), (queries, keys))
                     for mask in masks])
    return sees[0] if which is None else jnp.asarray(sees)[which]


def merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The softmax over two sets of keys from the softmax over each: out weighted by exp(log-sum-exp), and that of both;
    in the wider dtype."""
    share_BSH1 = jax.nn.sigmoid(b[1] - a[1]).swapaxes(1, 2)[..., None]
    return a[0] * (1 - share_BSH1) + b[0] * share_BSH1, jnp.logaddexp(a[1], b[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(masks: Masks, implementation: str | None, q_BSHD, k_BKGD, v_BKGD, length_B, which):
    """(out (B, S, H, D), log-sum-exp (B, H, S)) of softmax(q k^T) v."""
    return _run("forward", masks, which, length_B, implementation, q_BSHD, k_BKGD, v_BKGD)


def _flash_forward(masks, implementation, q_BSHD, k_BKGD, v_BKGD, length_B, which):
    results = _flash(masks, implementation, q_BSHD, k_BKGD, v_BKGD, length_B, which)
    out, lse_BHS = (checkpoint_name(x, name) for x, name in zip(results, ATTENTION_RESULTS))
    return (out, lse_BHS), (q_BSHD, k_BKGD, v_BKGD, length_B, which, out, lse_BHS)


def _flash_backward(masks, implementation, residuals, gradients):
    q_BSHD, k_BKGD, v_BKGD, length_B, which, out, lse_BHS = residuals
    dout, dlse_BHS = gradients
    delta_BHS = inner(out, dout, lse_BHS.dtype) - dlse_BHS
    dqkv = _run("backward", masks, which, length_B, implementation, q_BSHD, k_BKGD, v_BKGD, lse_BHS, delta_BHS, dout)
    return *dqkv, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def inner(out_BSHD: jax.Array, dout_BSHD: jax.Array, dtype) -> jax.Array:
    """(B, H, S): what `backward` takes for delta."""
    return jnp.einsum("bshd,bshd->bhs", out_BSHD, dout_BSHD, preferred_element_type=dtype)


def forward(masks: Masks, which, q_BSHD, k_BKGD, v_BKGD) -> tuple[jax.Array, jax.Array]:
    """reference.forward of the mask that `which` selects, by the best kernel: for a set of keys that is a part of the
    whole (see `merge`); has no derivatives."""
    if k_BKGD.shape[1] <= SHORT:
        return reference.forward_at_once(q_BSHD, k_BKGD, v_BKGD, _dense(masks, which, q_BSHD, k_BKGD))
    return _run("forward", masks, which, None, None, q_BSHD, k_BKGD, v_BKGD)


def backward(masks: Masks, which, q_BSHD, k_BKGD, v_BKGD, lse_BHS, delta_BHS, dout_BSHD) -> tuple[jax.Array, ...]:
    """reference.backward of such a part, with the log-sum-exp and delta of the whole."""
    arrays = (q_BSHD, k_BKGD, v_BKGD, lse_BHS, delta_BHS, dout_BSHD)
    if k_BKGD.shape[1] <= SHORT:
        return reference.backward_at_once(*arrays, _dense(masks, which, q_BSHD, k_BKGD))
    return _run("backward", masks, which, None, None, *arrays)


def _run(direction: str, masks: Masks, which, length_B, implementation: str | None, q_BSHD, k_BKGD, *arrays):
    """Call that direction of the implementation, or of the best one of each platform."""
    kept = k_BKGD.stack_LBPGD if isinstance(k_BKGD, Stacked) else k_BKGD
    is_int8 = isinstance(kept, Int8Slots)
    dtype = q_BSHD.dtype if isinstance(kept, Int8Slots) else kept.dtype
    keys = jax.ShapeDtypeStruct(k_BKGD.shape, dtype)

    def bind(kernel: ModuleType):
        run = getattr(kernel, direction)
        if is_int8 and not kernel.TAKES_INT8:
            run = functools.partial(_scaled_back, run)
        if isinstance(k_BKGD, Stacked) and not kernel.TAKES_STACKS:
            run = functools.partial(_taken, run)
        branches = [functools.partial(_unseen, direction) if mask is None
                    else functools.partial(run, mask=mask, length_B=length_B) for mask in masks]
        return branches[0] if len(branches) == 1 else functools.partial(lax.switch, which, branches)

    if implementation is not None:
        kernel = IMPLEMENTATIONS[implementation]
        if kernel is not reference:
            kernel.check(q_BSHD, keys)
        return bind(kernel)(q_BSHD, k_BKGD, *arrays)
    chosen = {platform: bind(kernel) for platform, kernel in _best(q_BSHD, keys).items()}
    return lax.platform_dependent(q_BSHD, k_BKGD, *arrays, default=bind(reference), **chosen)


def _best(q_BSHD, keys: jax.ShapeDtypeStruct) -> dict[str, ModuleType]:
    """Of each platform, the first kernel that serves such a call."""
    best = {}
    for platform, kernels in KERNELS.items():
        for kernel in kernels.values():
            try:
                kernel.check(q_BSHD, keys)
            except Unsupported:
                continue
            best[platform] = kernel
            break
    return best


def takes_lanes(queries: jax.ShapeDtypeStruct, keys: jax.ShapeDtypeStruct) -> bool:
    """Whether vmap has a rule for `attention` of such arrays: not by the kernels for Hoppers."""
    return keys.shape[1] <= SHORT or all(kernel.TAKES_LANES for kernel in _best(queries, keys).values())


def _taken(run, q_BSHD, k_BKGD: Cached, v_BKGD: Cached, **options):
    """A kernel that takes no stacks, on one layer's keys and values."""
    return run(q_BSHD, taken(k_BKGD), taken(v_BKGD), **options)


def _scaled_back(run, q_BSHD, k_BKGD: Int8Slots, v_BKGD: Int8Slots, **options):
    """A kernel that takes no int8, on one layer's keys and values in the queries' dtype."""
    return run(q_BSHD, k_BKGD.scaled_back(q_BSHD.dtype), v_BKGD.scaled_back(q_BSHD.dtype), **options)


def _unseen(direction: str, q_BSHD, k_BKGD, v_BKGD, *_: jax.Array):
    """What the kernels return where no query sees a key."""
    if direction == "backward":
        return tuple(map(jnp.zeros_like, (q_BSHD, k_BKGD, v_BKGD)))
    rows = q_BSHD[..., 0].swapaxes(1, 2).astype(jnp.promote_types(q_BSHD.dtype, jnp.float32))
    return jnp.zeros_like(q_BSHD), jnp.full_like(rows, reference.MASKED)
