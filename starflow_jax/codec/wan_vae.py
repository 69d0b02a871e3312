"""The Wan2.2 video VAE, encoder and decoder (DESIGN: the Wan2.2 VAE). Causal in time, and a stream by construction.

Every module with a convolution in time takes the last input frames of the call before (`past`) and returns those for
the next call. Without a past, x begins with the video's first frame. So a video may be given at once or in parts:
the first frame, then `time_stride` pixel frames, or one latent frame, at a time. Layout (B, T, H, W, C).

`high` names the parts at the resolutions above the latents', whose memory is large and which see only what is near;
`low` the parts at the latents' resolution, among them the attention over whole frames. On a mesh, `high` has each
device of mesh.tensor and mesh.sequence work on rows of its own where they divide (XLA exchanges those at the edges);
all caches are kept by rows.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.codec.convolution import convolution, doubled
from starflow_jax.config import UserError
from starflow_jax.sharding import constrain

Past = Any  # a tuple (of tuples) of the last input frames of convolutions; None where the video begins


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Sizes of the VAE under the release's names; the defaults are the released model's."""

    dim: int = 160
    dec_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # one for each stage but the last
    patch_size: int = 2

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise UserError(f"wan.temporal_downsample={self.temporal_downsample!r}: must have one flag for each "
                            f"stage of dim_mult={self.dim_mult} but the last")
        for field in ("dim", "dec_dim", "z_dim", "num_res_blocks", "patch_size"):
            if getattr(self, field) < 1:
                raise UserError(f"wan.{field}={getattr(self, field)!r}: must be greater than 0")
        if len(self.dim_mult) < 2 or self.dim_mult[-1] != self.dim_mult[-2]:
            raise UserError(f"wan.dim_mult={self.dim_mult!r}: the last two must be the same; the last stage's "
                            "shortcut has no parameters")

    @property
    def time_stride(self) -> int:
        """Pixel frames of each latent frame after the first."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def stride(self) -> int:
        """Pixels of a latent, in rows and columns."""
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    @property
    def encoder_widths(self) -> list[int]:
        return [self.dim * multiple for multiple in (1, *self.dim_mult)]

    @property
    def decoder_widths(self) -> list[int]:
        return [self.dec_dim * multiple for multiple in (self.dim_mult[-1], *reversed(self.dim_mult))]


class Cache(flax.struct.PyTreeNode):
    """What the next part of a video needs to know of the parts before: the last one or two input frames of every
    convolution in time, (B, 1 or 2, H, W, C) each. Its size does not depend on the video's length."""

    low: Past
    high: Past  # where frames are tiled: with a leading axis of tiles


def over_rows(x_BTHWC: jax.Array) -> jax.Array:
    """Clips, and rows of frames, over the current mesh as far as they divide."""
    return constrain(x_BTHWC, "batch", None, "rows", None, None)


def to_patches(pixels_BTHWC: jax.Array, size: int) -> jax.Array:
    """(B, T, H, W, 3) -> (B, T, H/size, W/size, 3 * size^2), channels in the order (colour, column, row)."""
    batch, frames, height, width, colours = pixels_BTHWC.shape
    x = pixels_BTHWC.reshape(batch, frames, height // size, size, width // size, size, colours)
    return x.transpose(0, 1, 2, 4, 6, 5, 3).reshape(batch, frames, height // size, width // size, colours * size**2)


def from_patches(x_BTHWC: jax.Array, size: int) -> jax.Array:
    """The inverse of `to_patches`."""
    batch, frames, rows, columns, _ = x_BTHWC.shape
    x = x_BTHWC.reshape(batch, frames, rows, columns, -1, size, size)
    return x.transpose(0, 1, 2, 6, 3, 5, 4).reshape(batch, frames, rows * size, columns * size, -1)


def _remember(x_BTHWC: jax.Array, past: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(x with the past frames in front, if any; the last two of the past or zeros, and x)."""
    x_BTHWC = x_BTHWC if past is None else jnp.concatenate([past, x_BTHWC], axis=1)
    missing = max(0, 2 - x_BTHWC.shape[1])
    return x_BTHWC, jnp.pad(x_BTHWC[:, -2:], ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))


def _conv(features: int, kernel: tuple[int, ...], dtype: Any, name: str, padding: Any = "VALID", strides: Any = 1,
          by: Callable[..., jax.Array] = convolution) -> nn.Conv:
    # float32 is to be float32 on accelerators, too; bfloat16 is there for speed.
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return nn.Conv(features, kernel, strides, padding, dtype=dtype, precision=precision, name=name,
                   conv_general_dilated_cls=lambda: by)


class CausalConv(nn.Module):
    """3x3x3, the zeros in time in front only."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, past: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        zeros = 2 if past is None else 0
        x, past = _remember(x_BTHWC, past)
        return _conv(self.features, (3, 3, 3), self.dtype, "conv", ((zeros, 0), (1, 1), (1, 1)))(x), past


class RMSNorm(nn.Module):
    """x / |x| over the channels, times sqrt(C) * gamma, in float32."""

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        channels = x_BTHWC.shape[-1]
        gamma = self.param("gamma", nn.initializers.ones, (channels,))
        x = x_BTHWC.astype(jnp.float32)
        squares = jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24)  # a zero vector stays zero
        return (x * lax.rsqrt(squares) * (math.sqrt(channels) * gamma)).astype(x_BTHWC.dtype)


class Residual(nn.Module):
    """norm, SiLU, 3x3x3, twice; a 1x1x1 shortcut where the widths differ."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        before_1, before_2 = past or (None, None)
        hidden = nn.silu(RMSNorm(name="norm_1")(x_BTHWC))
        hidden, after_1 = CausalConv(self.features, self.dtype, name="conv_1")(hidden, before_1)
        hidden = nn.silu(RMSNorm(name="norm_2")(hidden))
        hidden, after_2 = CausalConv(self.features, self.dtype, name="conv_2")(hidden, before_2)
        if x_BTHWC.shape[-1] != self.features:
            x_BTHWC = _conv(self.features, (1, 1, 1), self.dtype, "shortcut")(x_BTHWC)
        return x_BTHWC + hidden, (after_1, after_2)


class FrameAttention(nn.Module):
    """One head over the pixels of each frame, and the residual."""

    dtype: Any

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        batch, frames, rows, columns, channels = x_BTHWC.shape
        normed = RMSNorm(name="norm")(x_BTHWC).reshape(batch, frames, rows * columns, 1, channels)
        q, k, v = jnp.split(_conv(3 * channels, (1, 1), self.dtype, "to_qkv")(normed)[..., 0, :], 3, axis=-1)
        precision = lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        scores = jnp.einsum("btqc,btkc->btqk", q, k, precision=precision, preferred_element_type=jnp.float32)
        weights = nn.softmax(scores / math.sqrt(channels), axis=-1).astype(self.dtype)
        out = jnp.einsum("btqk,btkc->btqc", weights, v, precision=precision).reshape(x_BTHWC.shape)
        return x_BTHWC + _conv(channels, (1, 1), self.dtype, "proj")(out)


class Middle(nn.Module):
    """residual, attention, residual."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        before_1, before_2 = past or (None, None)
        x, after_1 = Residual(self.features, self.dtype, name="first")(x_BTHWC, before_1)
        x = FrameAttention(self.dtype, name="attention")(x)
        x, after_2 = Residual(self.features, self.dtype, name="last")(x, before_2)
        return x, (after_1, after_2)


class Head(nn.Module):
    """norm, SiLU, 3x3x3."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        return CausalConv(self.features, self.dtype, name="conv")(nn.silu(RMSNorm(name="norm")(x_BTHWC)), past)


class Downsample(nn.Module):
    """Half the rows and columns; where `time`, half the frames after the first."""

    time: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, past: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        channels = x_BTHWC.shape[-1]
        x = _conv(channels, (3, 3), self.dtype, "space", ((0, 1), (0, 1)), 2)(x_BTHWC)
        if not self.time:
            return x, None
        seen = x if past is None else jnp.concatenate([past, x], axis=1)
        first = x[:, :1 if past is None else 0]
        if seen.shape[1] > 2:
            halved = _conv(channels, (3, 1, 1), self.dtype, "time", strides=(2, 1, 1))(seen)
            first = jnp.concatenate([first, halved], axis=1)
        return first, x[:, -1:]


class Upsample(nn.Module):
    """Twice the rows and columns; where `time`, twice the frames after the first."""

    time: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, past: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        x, channels = x_BTHWC, x_BTHWC.shape[-1]
        if self.time:
            split = 1 if past is None else 0
            seen, past = _remember(x[:, split:], past)  # the first frame is not seen by the others
            if x.shape[1] > split:
                pairs = _conv(2 * channels, (3, 1, 1), self.dtype, "time", ((2 * split, 0), (0, 0), (0, 0)))(seen)
                batch, frames, rows, columns, _ = pairs.shape
                pairs = jnp.moveaxis(pairs.reshape(batch, frames, rows, columns, 2, channels), 4, 2)
                x = jnp.concatenate([x[:, :split], pairs.reshape(batch, 2 * frames, rows, columns, channels)], axis=1)
        return _conv(channels, (3, 3), self.dtype, "space", ((1, 1), (1, 1)), by=doubled)(x), past


def _averaged(x_BTHWC: jax.Array, features: int, time: int, space: int) -> jax.Array:
    """Space and time to channels, then means over consecutive groups of channels."""
    x = jnp.pad(x_BTHWC, ((0, 0), (-x_BTHWC.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames // time, time, height // space, space, width // space, space, channels)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(*x.shape[:4], features, -1).astype(jnp.float32).mean(axis=-1).astype(x.dtype)


def _repeated(x_BTHWC: jax.Array, features: int, time: int, space: int, drop_first: bool) -> jax.Array:
    """Channels repeated, then channels to time and space."""
    batch, frames, height, width, channels = x_BTHWC.shape
    x = jnp.repeat(x_BTHWC, features * time * space**2 // channels, axis=-1)
    x = x.reshape(batch, frames, height, width, features, time, space, space).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(batch, frames * time, height * space, width * space, features)
    return x[:, time - 1:] if drop_first else x


class DownStage(nn.Module):
    """Residuals, where not the last stage a Downsample, and the parameter-free shortcut."""

    features: int
    residuals: int
    last: bool
    time: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        before, before_time = past or ((None,) * self.residuals, None)
        x, after = x_BTHWC, []
        for index in range(self.residuals):
            x, kept = Residual(self.features, self.dtype, name=f"residuals_{index}")(x, before[index])
            after.append(kept)
        after_time = None
        if not self.last:
            x, after_time = Downsample(self.time, self.dtype, name="resample")(x, before_time)
        x = x + _averaged(x_BTHWC, self.features, 2 if self.time else 1, 1 if self.last else 2)
        return x, (tuple(after), after_time)


class UpStage(nn.Module):
    """Residuals and, where not the last stage, an Upsample and the parameter-free shortcut."""

    features: int
    residuals: int
    last: bool
    time: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        before, before_time = past or ((None,) * self.residuals, None)
        x, after = x_BTHWC, []
        for index in range(self.residuals):
            x, kept = Residual(self.features, self.dtype, name=f"residuals_{index}")(x, before[index])
            after.append(kept)
        if self.last:
            return x, (tuple(after), None)
        x, after_time = Upsample(self.time, self.dtype, name="resample")(x, before_time)
        time = 2 if self.time else 1
        return x + _repeated(x_BTHWC, self.features, time, 2, drop_first=past is None), (tuple(after), after_time)


class Encoder(nn.Module):
    """Patched pixels -> mean and log-variance before the last 1x1x1."""

    config: WanConfig
    dtype: Any

    def setup(self) -> None:
        c = self.config
        self.stem = CausalConv(c.dim, self.dtype)
        times = (*c.temporal_downsample, False)
        self.stages = [DownStage(width, c.num_res_blocks, stage == len(c.dim_mult) - 1, time, self.dtype)
                       for stage, (width, time) in enumerate(zip(c.encoder_widths[1:], times))]
        self.middle = Middle(c.encoder_widths[-1], self.dtype)
        self.head = Head(2 * c.z_dim, self.dtype)

    def high(self, x_BTHWC: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        before, before_stages = past or (None, (None,) * len(self.stages))
        x, after = self.stem(over_rows(x_BTHWC.astype(self.dtype)), before)
        kept = []
        for stage, before_stage in zip(self.stages, before_stages):
            x, after_stage = stage(x, before_stage)
            x = over_rows(x)
            kept.append(after_stage)
        return x, (after, tuple(kept))

    def low(self, x_BTHWC: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        before_1, before_2 = past or (None, None)
        x, after_1 = self.middle(x_BTHWC, before_1)
        x, after_2 = self.head(x, before_2)
        return x, (after_1, after_2)


class Decoder(nn.Module):
    """Latents after the first 1x1x1 -> patched pixels."""

    config: WanConfig
    dtype: Any

    def setup(self) -> None:
        c = self.config
        widths = c.decoder_widths
        self.stem = CausalConv(widths[0], self.dtype)
        self.middle = Middle(widths[0], self.dtype)
        times = (*reversed(c.temporal_downsample), False)
        self.stages = [UpStage(width, c.num_res_blocks + 1, stage == len(c.dim_mult) - 1, time, self.dtype)
                       for stage, (width, time) in enumerate(zip(widths[1:], times))]
        self.head = Head(3 * c.patch_size**2, self.dtype)

    def low(self, x_BTHWC: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        before_1, before_2 = past or (None, None)
        x, after_1 = self.stem(x_BTHWC, before_1)
        x, after_2 = self.middle(x, before_2)
        return x, (after_1, after_2)

    def high(self, x_BTHWC: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        before_stages, before = past or ((None,) * len(self.stages), None)
        x, kept = x_BTHWC, []
        for stage, before_stage in zip(self.stages, before_stages):
            x, after_stage = stage(x, before_stage)
            x = over_rows(x)
            kept.append(after_stage)
        x, after = self.head(x, before)
        return x.astype(jnp.float32), (tuple(kept), after)


class WanVAE(nn.Module):
    """Both, in the four steps that tiling takes one by one: encode_high, encode_low, decode_low, decode_high."""

    config: WanConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        self.quant = _conv(2 * self.config.z_dim, (1, 1, 1), self.dtype, "quant")
        self.post_quant = _conv(self.config.z_dim, (1, 1, 1), self.dtype, "post_quant")

    def encode_high(self, pixels_BTHWC: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        """Pixels in [-1, 1] -> features at the latents' resolution."""
        return self.encoder.high(to_patches(pixels_BTHWC, self.config.patch_size), past)

    def encode_low(self, x_BTHWC: jax.Array, past: Past) -> tuple[tuple[jax.Array, jax.Array], Past]:
        """Those features -> (mean, log-variance), float32, not normalised."""
        x, past = self.encoder.low(x_BTHWC, past)
        mean, log_variance = jnp.split(self.quant(x).astype(jnp.float32), 2, axis=-1)
        return (mean, log_variance), past

    def decode_low(self, latents_BNhwC: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        """Latents, not normalised -> features at their resolution."""
        return self.decoder.low(self.post_quant(latents_BNhwC.astype(self.dtype)), past)

    def decode_high(self, x_BTHWC: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        """Those features -> pixels, float32, not clamped."""
        x, past = self.decoder.high(x_BTHWC, past)
        return from_patches(x, self.config.patch_size), past

    def __call__(self, pixels_BTHWC: jax.Array) -> jax.Array:
        """The reconstruction; 1 + k * time_stride frames."""
        (mean, _), _ = self.encode_low(self.encode_high(pixels_BTHWC, None)[0], None)
        return self.decode_high(self.decode_low(mean, None)[0], None)[0]
