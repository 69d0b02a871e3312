"""Pixels <-> latents without a VAE, for the small models: principal components of space-time patches.

Like the Wan VAE it is causal, takes the first frame by itself and then `time_stride` frames per latent;
unlike it, it is one orthonormal projection, fitted to the training clips in seconds.
"""

import dataclasses
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.codec.interface import check_frame_size, to_float
from starflow_jax.codec.patch_decoder import PatchDecoder, decoder_of
from starflow_jax.config import UserError

FITTED_PATCHES = 200_000


@dataclasses.dataclass(frozen=True)
class PatchShape:
    """Frames, rows and columns of pixels that one latent stands for."""

    time: int
    space: int

    @property
    def pixels(self) -> int:
        return self.time * self.space**2 * 3

    def latent_frames(self, pixel_frames: int) -> int:
        """Latent frames of a clip. Raises UserError unless it has 1 + k * time frames."""
        if pixel_frames < 1 or (pixel_frames - 1) % self.time:
            raise UserError(f"a clip of {pixel_frames} frames: this codec takes 1 + a multiple of {self.time} frames")
        return 1 + (pixel_frames - 1) // self.time


class PatchCodec(flax.struct.PyTreeNode):
    """The projection, constants that are kept with the model's parameters; and perhaps a decoder for noised latents."""

    mean_P: jax.Array  # of a patch, pixels in [-1, 1]
    basis_PC: jax.Array  # orthonormal columns, most variance first
    scale: jax.Array  # latents are coefficients / scale
    shape: PatchShape = flax.struct.field(pytree_node=False)
    decoder: dict[str, Any] | None = None  # parameters of a PatchDecoder

    def encode(self, pixels_BTHWC: jax.Array) -> jax.Array:
        """(B, 1 + k*time, H, W, 3) in [-1, 1] -> latents (B, 1 + k, H/space, W/space, C) float32."""
        return (_to_patches(pixels_BTHWC, self.shape) - self.mean_P) @ self.basis_PC / self.scale

    def posterior(self, pixels_BTHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(latents, 0): there is nothing to draw."""
        latents = self.encode(pixels_BTHWC)
        return latents, jnp.zeros_like(latents)

    def decode(self, latents_BNhwC: jax.Array) -> jax.Array:
        """Latents -> pixels (B, 1 + (N-1)*time, H, W, 3), not clamped."""
        return self.decode_next(latents_BNhwC, None)[0]

    def decode_next(self, latents_BNhwC: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """The pixels of a video's next latent frames, and the cache for the next call: the past of the decoder for
        noised latents, () without one."""
        past: Any = ()
        patches = latents_BNhwC * self.scale @ self.basis_PC.T + self.mean_P
        if self.decoder is not None:
            added, past = decoder_of(self.decoder).apply({"params": self.decoder}, latents_BNhwC, cache)
            patches += added
        return _from_patches(patches, self.shape, begins=cache is None), past

    def fresh_decoder(self, key: jax.Array, width: int, layers: int) -> dict[str, Any]:
        """Parameters of a PatchDecoder, with which this codec decodes as it does without."""
        latents = jnp.zeros((1, 1, 1, 1, self.basis_PC.shape[1]))
        return PatchDecoder(width, layers, self.shape.pixels).init(key, latents, None)["params"]

    def with_decoder(self, params: dict[str, Any]) -> "PatchCodec":
        """The codec that decodes with these parameters of a PatchDecoder."""
        return self.replace(decoder=params)


def fit(frames_BTHWC: np.ndarray, shape: PatchShape, channels: int, seed: int = 0) -> PatchCodec:
    """The principal components of the patches of uint8 clips. The first latent channel gets unit variance."""
    if not 0 < channels <= shape.pixels:
        raise UserError(f"model.channels={channels}: the patch codec gives 1 to {shape.pixels} channels")
    patches = np.asarray(_to_patches(jnp.asarray(to_float(frames_BTHWC)), shape)).reshape(-1, shape.pixels)
    chosen = np.random.default_rng(seed).permutation(len(patches))[:FITTED_PATCHES]
    patches = patches[chosen].astype(np.float64)
    mean = patches.mean(axis=0)
    variances, vectors = np.linalg.eigh(np.cov(patches - mean, rowvar=False))
    basis = vectors[:, ::-1][:, :channels]
    basis = basis * np.sign(basis[np.abs(basis).argmax(axis=0), np.arange(channels)])
    return PatchCodec(jnp.asarray(mean, jnp.float32), jnp.asarray(basis, jnp.float32),
                      jnp.float32(np.sqrt(variances[-1])), shape)


def _to_patches(pixels_BTHWC: jax.Array, shape: PatchShape) -> jax.Array:
    chex.assert_shape(pixels_BTHWC, (None, None, None, None, 3))
    batch, frames, height, width, _ = pixels_BTHWC.shape
    latent_frames, size, time = shape.latent_frames(frames), shape.space, shape.time
    check_frame_size(pixels_BTHWC, size)
    first = jnp.repeat(pixels_BTHWC[:, :1], time, axis=1)
    pixels = jnp.concatenate([first, pixels_BTHWC[:, 1:]], axis=1)
    pixels = pixels.reshape(batch, latent_frames, time, height // size, size, width // size, size, 3)
    return pixels.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(
        batch, latent_frames, height // size, width // size, shape.pixels)


def _from_patches(patches_BNhwP: jax.Array, shape: PatchShape, begins: bool) -> jax.Array:
    """(B, T, H, W, 3); begins: the first patches are those of a video's first frame."""
    batch, latent_frames, rows, columns, _ = patches_BNhwP.shape
    size, time = shape.space, shape.time
    pixels = patches_BNhwP.reshape(batch, latent_frames, rows, columns, time, size, size, 3)
    pixels = pixels.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(
        batch, latent_frames, time, rows * size, columns * size, 3)
    if not begins:
        return pixels.reshape(batch, -1, *pixels.shape[3:])
    first = pixels[:, 0].mean(axis=1, keepdims=True)  # its patch held the frame `time` times
    return jnp.concatenate([first, pixels[:, 1:].reshape(batch, -1, *pixels.shape[3:])], axis=1)
