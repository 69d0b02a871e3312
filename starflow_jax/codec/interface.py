"""What the system asks of a codec, and the codec as it uses it: uint8 frames <-> the flow's latents.

A codec is a pytree of its constants, which go into jitted functions as arguments: closed over, a VAE's weights would be
compiled into every program that decodes.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import UserError


class LatentCodec(Protocol):
    """Pixels (B, T, H, W, 3) in [-1, 1] <-> latents (B, N, h, w, C), float32; pure functions, causal in time."""

    def encode(self, pixels_BTHWC: jax.Array) -> jax.Array:
        """A whole video's latents. Raises UserError for sizes that the codec doesn't take."""

    def posterior(self, pixels_BTHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(the latents of `encode`, the deviation, before any normalisation, of what a VAE would draw around them)."""

    def decode(self, latents_BNhwC: jax.Array) -> jax.Array:
        """A whole video's pixels, not clamped."""

    def decode_next(self, latents_BNhwC: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """The pixels of a video's next latent frames, and the cache for the next call; None where it begins."""

    def fresh_decoder(self, key: jax.Array, width: int, layers: int) -> dict[str, Any]:
        """The parameters that fine-tuning a decoder for noised latents begins with, float32: those of the codec's own
        decoder, or of one of so many channels and layers that adds nothing to it yet."""

    def with_decoder(self, params: dict[str, Any]) -> Any:
        """The codec that encodes as this one does, and decodes with such parameters."""


class Decoded(NamedTuple):
    """What latents became; an array of the host or of devices each."""

    frames_BTHWC: Any  # uint8
    finite_B: Any  # bool: whether all of a video's pixels were finite: as uint8, NaN is a shade like any other


def check_frame_size(pixels_BTHWC: jax.Array, multiple: int) -> None:
    """Raises UserError for frames whose sides are not multiples of so many pixels."""
    height, width = pixels_BTHWC.shape[2:4]
    if height % multiple or width % multiple:
        raise UserError(f"frames of {height}x{width}: this codec takes multiples of {multiple} pixels")


def deviation(log_variance: jax.Array) -> jax.Array:
    """The standard deviation of a VAE's posterior, from what its encoder gives."""
    return jnp.exp(jnp.clip(log_variance, -30, 20) / 2)


def to_float(frames: np.ndarray | jax.Array):
    """uint8 pixels -> [-1, 1] float32."""
    return frames.astype(np.float32) / 127.5 - 1.0


def to_uint8(pixels: jax.Array, cut: bool = False) -> jax.Array:
    """[-1, 1] -> uint8, clamped and rounded; cut: down, as the release does."""
    if cut:
        return ((jnp.clip(pixels, -1, 1) + 1.0) * 0.5 * 255).astype(jnp.uint8)
    return jnp.clip(jnp.round((pixels + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def _decoded(pixels_BTHWC: jax.Array, cut: bool) -> Decoded:
    return Decoded(to_uint8(pixels_BTHWC, cut), jnp.isfinite(pixels_BTHWC).all(axis=(1, 2, 3, 4)))


@jax.jit
def encode_frames(codec: LatentCodec, frames_BTHWC: jax.Array, later_scale: float | jax.Array) -> jax.Array:
    """uint8 frames -> latents as the flow takes them: those of frames n >= 1 times later_scale."""
    latents = codec.encode(to_float(frames_BTHWC))
    return latents * _frame_scale(latents.shape[1], later_scale)


@jax.jit
def encode_drawn(
    codec: LatentCodec, frames_BTHWC: jax.Array, noise_BNhwC: jax.Array, later_scale: float | jax.Array
) -> jax.Array:
    """The same with noise of the VAE's own spread; as in the release, that is not normalised as the latents are."""
    mean, deviation = codec.posterior(to_float(frames_BTHWC))
    return (mean + deviation * noise_BNhwC) * _frame_scale(mean.shape[1], later_scale)


def decode_pixels(codec: LatentCodec, latents_BNhwC: jax.Array, later_scale: float | jax.Array) -> jax.Array:
    """The inverse of `encode_frames`: pixels in [-1, 1], not clamped."""
    return codec.decode(latents_BNhwC / _frame_scale(latents_BNhwC.shape[1], later_scale))


@partial(jax.jit, static_argnames="cut")
def decode_latents(
    codec: LatentCodec, latents_BNhwC: jax.Array, later_scale: float | jax.Array, cut: bool = False
) -> Decoded:
    """The same as uint8; see `to_uint8`."""
    return _decoded(decode_pixels(codec, latents_BNhwC, later_scale), cut)


@partial(jax.jit, donate_argnames="cache", static_argnames="cut")
def decode_next(
    codec: LatentCodec, latents_BNhwC: jax.Array, cache: Any, later_scale: float | jax.Array, cut: bool = False
) -> tuple[Decoded, Any]:
    """The uint8 frames of a video's next latent frames, and the cache for the next call; None where it begins."""
    count = latents_BNhwC.shape[1]
    scale = _frame_scale(count, later_scale) if cache is None else later_scale
    pixels, cache = codec.decode_next(latents_BNhwC / scale, cache)
    return _decoded(pixels, cut), cache


def _frame_scale(frames: int, later_scale: float | jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.ones(1), jnp.full((frames - 1,), later_scale)])[:, None, None, None]
