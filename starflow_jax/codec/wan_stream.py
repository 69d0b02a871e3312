"""The Wan VAE as the flow's codec: pixels <-> normalised latents, in parts of bounded memory, large frames in tiles.

A whole video is encoded and decoded as the stream that it is: its first frame, then a scan over the others, so that
memory does not grow with its length but for the result, and for features at the latents' resolution. Of a whole video
one tile is finished after the other, with one tile's cache at a time; a stream keeps the caches of all its tiles.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from starflow_jax.codec.interface import check_frame_size, deviation
from starflow_jax.codec.wan_vae import Cache, Past, WanConfig, WanVAE, over_rows
from starflow_jax.codec.wan_weights import STATISTICS, from_released
from starflow_jax.config import Codec, UserError
from starflow_jax.io.files import read_json
from starflow_jax.io.tensor_files import only_finite, open_safetensors

Step = Callable[[jax.Array, Past], tuple[Any, Past]]
DECODER = ("decoder", "post_quant")  # the parts of the VAE's parameters that decoding needs


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of frames, in latents: `size` rows and columns each, neighbours sharing `overlap` or more; 0: no tiles."""

    size: int = 0
    overlap: int = 8

    def starts(self, length: int) -> np.ndarray:
        """Where each tile along an axis of `length` latents begins; evenly spread, the last ends with the axis."""
        if not self.size or length <= self.size:
            return np.zeros(1, np.int32)
        count = -(-(length - self.overlap) // (self.size - self.overlap))
        return np.round(np.linspace(0, length - self.size, count)).astype(np.int32)

    def weights(self, length: int, scale: int) -> np.ndarray:
        """(tiles, `scale` outputs per latent of a tile): each output's shares over the tiles that hold it sum to 1.

        The quarter of the overlap next to a tile's cut edge, where it knows its surroundings least, is left out, the
        middle half is blended linearly. So tiles are exact where a quarter of the overlap is what a pixel depends on.
        """
        starts = self.starts(length)
        size = min(self.size or length, length)
        inside = (np.arange(size * scale) + 0.5) / scale  # in latents, from the tile's start
        shares = np.ones((len(starts), size * scale))
        for index in range(len(starts)):
            if index > 0:
                shares[index] *= self._ramp(inside)
            if index < len(starts) - 1:
                shares[index] *= self._ramp(size - inside)
        total = np.zeros(length * scale)
        for start, share in zip(starts, shares):
            total[start * scale:(start + size) * scale] += share
        places = starts[:, None] * scale + np.arange(size * scale)
        return (shares / total[places]).astype(np.float32)

    def _ramp(self, distance: np.ndarray) -> np.ndarray:
        return np.clip((distance - self.overlap / 4) / (self.overlap / 2), 0, 1)


class WanCodec(flax.struct.PyTreeNode):
    """The weights, the channel statistics and how they are used; a pytree, so that it goes into jitted functions."""

    params: dict[str, Any]
    mean_C: jax.Array
    std_C: jax.Array
    config: WanConfig = flax.struct.field(pytree_node=False)
    dtype: str = flax.struct.field(pytree_node=False, default="float32")
    tiles: Tiles = flax.struct.field(pytree_node=False, default=Tiles())

    def encode(self, pixels_BTHWC: jax.Array) -> jax.Array:
        """(B, 1 + k * time stride, H, W, 3) in [-1, 1] -> normalised means (B, 1 + k, h, w, C) float32."""
        return self.moments(pixels_BTHWC)[0]

    def moments(self, pixels_BTHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(normalised mean, log-variance, which is not normalised). Raises UserError for sizes that don't divide."""
        frames, stride = pixels_BTHWC.shape[1], self.config.time_stride
        if frames % stride != 1 % stride or not frames:
            raise UserError(f"a clip of {frames} frames: this codec takes 1 + a multiple of {stride} frames")
        check_frame_size(pixels_BTHWC, self.config.stride)
        features, _ = self._tiled(self._whole(WanVAE.encode_high, stride), pixels_BTHWC, None, self.config.stride, 1)
        (mean, log_variance), _ = self._whole(WanVAE.encode_low, 1)(features, None)
        return (mean - self.mean_C) / self.std_C, log_variance

    def posterior(self, pixels_BTHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(normalised mean, deviation, which is not normalised)."""
        mean, log_variance = self.moments(pixels_BTHWC)
        return mean, deviation(log_variance)

    def decode(self, latents_BNhwC: jax.Array) -> jax.Array:
        """Normalised latents -> pixels (B, 1 + (N-1) * time stride, H, W, 3) float32, not clamped."""
        features, _ = self._whole(WanVAE.decode_low, 1)(latents_BNhwC * self.std_C + self.mean_C, None)
        return self._tiled(self._whole(WanVAE.decode_high, 1), features, None, 1, self.config.stride)[0]

    def decode_next(self, latents_BNhwC: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
        """The pixels of a video's next latent frames (without a cache: its first ones), and the cache for the next
        call: the first latent frame becomes one frame, each other one `time stride` frames."""
        before = cache or Cache(None, None)
        features, low = self._part(WanVAE.decode_low)(latents_BNhwC * self.std_C + self.mean_C, before.low)
        pixels, high = self._tiled(self._part(WanVAE.decode_high), features, before.high, 1, self.config.stride)
        return pixels, Cache(low, high)

    def fresh_decoder(self, key: jax.Array, width: int, layers: int) -> dict[str, Any]:
        """The decoder's own parameters, float32."""
        return jax.tree.map(lambda a: a.astype(jnp.float32), {name: self.params[name] for name in DECODER})

    def with_decoder(self, params: dict[str, Any]) -> "WanCodec":
        """The codec that decodes with these."""
        return self.replace(params={**self.params, **params})

    def _part(self, method: Callable) -> Step:
        """A step of the VAE on a video's next frames."""
        vae = WanVAE(self.config, jnp.dtype(self.dtype))

        def step(x: jax.Array, past: Past) -> tuple[Any, Past]:
            out, after = vae.apply({"params": self.params}, x, past, method=method)
            # Laid out in one way, whoever calls, so that a stream's second step is the program of all later ones.
            return out, jax.tree.map(over_rows, after)

        return step

    def _whole(self, method: Callable, length: int) -> Step:
        """The same on a whole video, in parts of `length` frames; it neither takes nor leaves a past."""
        return lambda x, _: (_in_parts(self._part(method), x, length), None)

    def _tiled(self, step: Step, x: jax.Array, past: Past, scale: int, out_scale: int) -> tuple[Any, Past]:
        """`step` tile after tile; scale and out_scale: rows of its input and output per latent row."""
        height, width = x.shape[2] // scale, x.shape[3] // scale
        starts = np.array(list(itertools.product(self.tiles.starts(height), self.tiles.starts(width))), np.int32)
        if len(starts) == 1:
            return step(x, past)
        size = [min(self.tiles.size, length) for length in (height, width)]
        weights = np.stack([np.outer(down, across) for down, across in itertools.product(
            self.tiles.weights(height, out_scale), self.tiles.weights(width, out_scale))])

        def one(start_2: jax.Array, past: Past) -> tuple[jax.Array, Past]:
            part = lax.dynamic_slice(x, (0, 0, *(start_2 * scale), 0),
                                     (*x.shape[:2], *(length * scale for length in size), x.shape[-1]))
            return step(part, past)

        def add(whole: jax.Array, tile: Any) -> tuple[jax.Array, Past]:
            start_2, weight, past = tile
            out, past = one(start_2, past)
            at = (0, 0, *(start_2 * out_scale), 0)
            share = out.astype(jnp.float32) * weight[:, :, None]
            return lax.dynamic_update_slice(whole, lax.dynamic_slice(whole, at, out.shape) + share, at), past

        shape, _ = jax.eval_shape(one, jnp.asarray(starts[0]), jax.tree.map(lambda leaf: leaf[0], past))
        whole = jnp.zeros((*shape.shape[:2], height * out_scale, width * out_scale, shape.shape[-1]))
        whole, past = lax.scan(add, whole, (jnp.asarray(starts), jnp.asarray(weights), past))
        return whole.astype(shape.dtype), past


def _in_parts(step: Step, x: jax.Array, length: int) -> Any:
    """step(the first frame, None), then a scan over parts of `length` frames, the cache as its carry."""
    first, cache = step(x[:, :1], None)
    if x.shape[1] == 1:
        return first
    rest = x[:, 1:].reshape(x.shape[0], -1, length, *x.shape[2:])

    def next_part(cache: Past, part: jax.Array) -> tuple[Past, Any]:
        out, cache = step(part, cache)
        return cache, out

    _, parts = lax.scan(next_part, cache, jnp.moveaxis(rest, 1, 0))

    def joined(first: jax.Array, parts: jax.Array) -> jax.Array:
        later = jnp.moveaxis(parts, 0, 1)
        return jnp.concatenate([first, later.reshape(later.shape[0], -1, *later.shape[3:])], axis=1)

    return jax.tree.map(joined, first, parts)


def load_codec(settings: Codec, channels: int) -> WanCodec:
    """The codec of codec.weights. Raises UserError where the file or the channel statistics are missing, or where
    its tensors, or the settings' strides, are of another VAE."""
    if not settings.weights:
        raise UserError("codec.kind=wan needs the VAE's weights: name them with "
                        "--config.codec.weights=FILE.safetensors (--mode=convert makes one of the released .pth)")
    if not settings.weights.endswith(".safetensors"):
        raise UserError(f"codec.weights={settings.weights!r}: must be a .safetensors file; --mode=convert "
                        "--config.convert.codec=FILE.pth makes one of the released .pth")
    tensors = only_finite(settings.weights, open_safetensors(Path(settings.weights)))
    config = wan_config(settings, channels)
    params = from_released(tensors, config, jnp.dtype(settings.dtype), settings.weights)
    statistics = channel_statistics(settings, channels, tensors)
    mean_C, std_C = (jnp.asarray(statistics[name]) for name in STATISTICS)
    return WanCodec(params, mean_C, std_C, config, settings.dtype, Tiles(settings.tile, settings.tile_overlap))


def wan_config(settings: Codec, channels: int) -> WanConfig:
    """The VAE's sizes. Raises UserError where the settings' strides are not its own."""
    config = WanConfig(settings.encoder_width, settings.decoder_width, channels)
    for field in ("stride", "time_stride"):
        if getattr(settings, field) != getattr(config, field):
            raise UserError(f"codec.{field}={getattr(settings, field)}: the Wan VAE's is {getattr(config, field)}")
    return config


def read_statistics(path: Path, channels: int) -> dict[str, np.ndarray]:
    """The STATISTICS from a JSON file that holds `mean` and `std`, or `latents_mean` and `latents_std` as the
    config.json beside a VAE in diffusers' format does. Raises UserError where it holds something else."""
    try:
        held = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"convert.statistics={path}: can't be read as JSON ({error})") from error
    found = {}
    for name in STATISTICS:
        given = held.get(name, held.get(f"latents_{name}")) if isinstance(held, dict) else None
        try:
            found[name] = np.asarray(given, np.float32)
        except (TypeError, ValueError, OverflowError):
            found[name] = np.full((), np.nan, np.float32)
        if found[name].shape != (channels,) or not np.isfinite(found[name]).all():
            raise UserError(f"convert.statistics={path}: {channels} numbers are needed under `{name}` or "
                            f"`latents_{name}`, one for each channel of the latents")
    if (found["std"] <= 0).any():
        raise UserError(f"convert.statistics={path}: each of `std` must be greater than 0")
    return found


def statistics_beside(source: Path) -> Path | None:
    """The JSON file beside a VAE that `read_statistics` reads: vae.json or a config.json; None where there is none."""
    folder = source if source.is_dir() else source.parent
    for path in (folder / "vae.json", folder / "config.json", folder / "vae" / "config.json"):
        try:
            held = read_json(path) if path.is_file() else {}
        except (OSError, ValueError):
            continue
        if isinstance(held, dict) and any({name, f"latents_{name}"} & held.keys() for name in STATISTICS):
            return path
    return None


def channel_statistics(settings: Codec, channels: int, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The STATISTICS, from the settings or else from among the tensors of a file. Raises UserError where there are
    none, or not one for each channel."""
    found = {}
    for name, given in zip(STATISTICS, (settings.latent_mean, settings.latent_std)):
        value = np.asarray(given or tensors.get(name, ()), np.float32)
        if value.shape != (channels,):
            raise UserError(f"codec.latent_{name}: {channels} numbers are needed, one for each channel of the latents, "
                            f"and there are {value.size}; set them, or put a tensor `{name}` into the file of weights")
        found[name] = value
    return found
