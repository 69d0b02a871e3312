"""The causal attention core of training and decoding: one function, several kernels behind it.

A kernel is a pair of functions, `forward` and `backward`, as in reference.py. One that cannot serve a shape,
a dtype or a device raises `Unsupported`, and the next one is asked; the reference serves everything.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from starflow_jax.kernels import pallas_gpu, pallas_tpu, pallas_triton, reference
from starflow_jax.kernels.mask import Full, Mask
from starflow_jax.kernels.reference import Past
from starflow_jax.kernels.unsupported import Unsupported

# By platform, the better one first. The platform is known only when the program is lowered, which may be for
# a machine other than this one.
KERNELS: dict[str, dict[str, ModuleType]] = {
    "cuda": {"gpu": pallas_gpu, "triton": pallas_triton},
    "tpu": {"tpu": pallas_tpu},
}
IMPLEMENTATIONS = {"reference": reference} | {name: kernel for kernels in KERNELS.values()
                                              for name, kernel in kernels.items()}
ATTENTION_RESULTS = ("attention_out", "attention_lse")  # by these names jax.checkpoint can keep them
SHORT = 1024  # keys: up to here one product is as fast as a kernel, and autodiff does the rest


def attention(
    q_BSHD: jax.Array,
    k_BKGD: jax.Array,
    v_BKGD: jax.Array,
    mask: Mask,
    past: Past | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v over the keys that the mask allows; (B, S, H, D) in q's dtype.

    All three in one dtype; softmax in float32. H is a multiple of G: each key head serves H/G query heads.
    past: (k_BPGD, v_BPGD, length) of a cache that is only read: every query also sees its first `length` slots
    (int32, one for all samples or (B,)). RoPE is the caller's. A cache of a multiple of 1024 slots on TPUs,
    of 8 on GPUs, is read where it is; any other is copied first.
    Over several devices, call it in a shard_map (check_vma=False) over samples and heads: XLA parts no kernel.
    implementation: one of IMPLEMENTATIONS. By default the best that serves this call, of the platform that the
    program is lowered for.
    Raises Unsupported where the one asked for does not serve this call, ValueError where there is no such one and
    for shapes that do not fit.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"no implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}")
    if q_BSHD.shape[2] % k_BKGD.shape[2] or k_BKGD.shape != v_BKGD.shape:
        raise ValueError(f"queries {q_BSHD.shape} do not fit keys {k_BKGD.shape} and values {v_BKGD.shape}")
    longest = max(k_BKGD.shape[1], 0 if past is None else past[0].shape[1])
    if longest <= SHORT and implementation in (None, "reference"):
        return checkpoint_name(reference.attention(q_BSHD, k_BKGD, v_BKGD, mask, past), ATTENTION_RESULTS[0])
    q_BSHD = q_BSHD * q_BSHD.shape[-1] ** -0.5
    out, lse_BHS = _flash(mask, implementation, q_BSHD, k_BKGD, v_BKGD, None)
    if past is None:
        return out
    past_k, past_v, length = past
    length_B = jnp.broadcast_to(jnp.asarray(length, jnp.int32), q_BSHD.shape[:1])
    pieces = _flash(Full(), implementation, q_BSHD, past_k, past_v, length_B)
    return _merge((out, lse_BHS), pieces)


def _merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The softmax over two sets of keys from the softmax over each: out weighted by exp(log-sum-exp)."""
    share_BHS = jax.nn.sigmoid(b[1] - a[1])
    share_BSH1 = share_BHS.swapaxes(1, 2)[..., None]
    return (a[0] * (1 - share_BSH1) + b[0] * share_BSH1).astype(a[0].dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(mask: Mask, implementation: str | None, q_BSHD, k_BKGD, v_BKGD, length_B):
    """(out (B, S, H, D), log-sum-exp (B, H, S)) of softmax(q k^T) v."""
    return _run("forward", implementation, q_BSHD, k_BKGD, v_BKGD, mask=mask, length_B=length_B)


def _flash_forward(mask, implementation, q_BSHD, k_BKGD, v_BKGD, length_B):
    results = _flash(mask, implementation, q_BSHD, k_BKGD, v_BKGD, length_B)
    out, lse_BHS = (checkpoint_name(x, name) for x, name in zip(results, ATTENTION_RESULTS))
    return (out, lse_BHS), (q_BSHD, k_BKGD, v_BKGD, length_B, out, lse_BHS)


def _flash_backward(mask, implementation, residuals, gradients):
    q_BSHD, k_BKGD, v_BKGD, length_B, out, lse_BHS = residuals
    dout, dlse_BHS = gradients
    delta_BHS = jnp.einsum("bshd,bshd->bhs", out, dout, preferred_element_type=lse_BHS.dtype) - dlse_BHS
    dqkv = _run("backward", implementation, q_BSHD, k_BKGD, v_BKGD, lse_BHS, delta_BHS, dout,
                mask=mask, length_B=length_B)
    return *dqkv, None


_flash.defvjp(_flash_forward, _flash_backward)


def _run(direction: str, implementation: str | None, q_BSHD, k_BKGD, *arrays, mask: Mask, length_B):
    """Call that direction of the implementation, or of the best one of each platform."""
    def bind(kernel: ModuleType):
        return functools.partial(getattr(kernel, direction), mask=mask, length_B=length_B)

    if implementation is not None:
        kernel = IMPLEMENTATIONS[implementation]
        if kernel is not reference:
            kernel.check(q_BSHD, k_BKGD)
        return bind(kernel)(q_BSHD, k_BKGD, *arrays)
    chosen = {}
    for platform, kernels in KERNELS.items():
        for kernel in kernels.values():
            try:
                kernel.check(q_BSHD, k_BKGD)
            except Unsupported:
                continue
            chosen[platform] = bind(kernel)
            break
    return lax.platform_dependent(q_BSHD, k_BKGD, *arrays, default=bind(reference), **chosen)
