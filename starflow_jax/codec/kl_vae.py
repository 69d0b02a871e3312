"""The image models' VAE, AutoencoderKL as sd-vae-ft-ema is published, behind the codec's interface.

    huggingface-cli download stabilityai/sd-vae-ft-ema config.json diffusion_pytorch_model.safetensors --local-dir vae
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

from starflow_jax.codec.interface import check_frame_size, deviation
from starflow_jax.config import Codec, UserError
from starflow_jax.io.files import read_json
from starflow_jax.io.tensor_files import Array, check_shapes, only_finite, open_safetensors

SCALING = 0.18215  # latents as flows take them are the VAE's times this, where its config.json says nothing else
EPSILON = 1e-6
STATISTICS = ("mean", "std")


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """Sizes of the VAE; the defaults are the published one's."""

    channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    residuals: int = 2  # of a stage of the encoder; one more in the decoder
    norm_groups: int = 32

    def __post_init__(self) -> None:
        if any(width % self.norm_groups for width in self.widths):
            raise UserError(f"codec.norm_groups={self.norm_groups}: must divide each of the VAE's widths {self.widths}")

    @property
    def stride(self) -> int:
        return 2 ** (len(self.widths) - 1)


def _conv(features: int, size: int, dtype: Any, name: str, strides: int = 1, padding: Any = None) -> nn.Conv:
    # float32 is to be float32 on accelerators, too; bfloat16 is there for speed.
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return nn.Conv(features, (size, size), strides, padding or size // 2, dtype=dtype, precision=precision, name=name)


class Norm(nn.Module):
    """Group norm, then SiLU unless it stands before attention."""

    groups: int
    dtype: Any
    silu: bool = True

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x = nn.GroupNorm(self.groups, epsilon=EPSILON, dtype=jnp.float32, use_fast_variance=False, name="norm")(x_BHWC)
        return (nn.silu(x) if self.silu else x).astype(self.dtype)


class Residual(nn.Module):
    """norm, SiLU, 3x3, twice; a 1x1 shortcut where the widths differ."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x = _conv(self.features, 3, self.dtype, "conv1")(Norm(self.groups, self.dtype, name="norm1")(x_BHWC))
        x = _conv(self.features, 3, self.dtype, "conv2")(Norm(self.groups, self.dtype, name="norm2")(x))
        if x_BHWC.shape[-1] != self.features:
            x_BHWC = _conv(self.features, 1, self.dtype, "conv_shortcut")(x_BHWC)
        return x_BHWC + x


class Attention(nn.Module):
    """One head over all places of a picture."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        batch, height, width, channels = x_BHWC.shape
        precision = lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        x_BSC = Norm(self.groups, self.dtype, silu=False, name="group_norm")(x_BHWC).reshape(batch, -1, channels)

        def dense(name: str) -> nn.Dense:
            return nn.Dense(channels, dtype=self.dtype, precision=precision, name=name)

        q, k, v = (dense(name)(x_BSC) for name in ("to_q", "to_k", "to_v"))
        scores = jnp.einsum("bqc,bkc->bqk", q, k, precision=precision, preferred_element_type=jnp.float32)
        weights = nn.softmax(scores / math.sqrt(channels), axis=-1).astype(self.dtype)
        out = dense("to_out")(jnp.einsum("bqk,bkc->bqc", weights, v, precision=precision))
        return x_BHWC + out.reshape(x_BHWC.shape)


class Middle(nn.Module):
    """residual, attention, residual."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        features = x_BHWC.shape[-1]
        x = Residual(features, self.groups, self.dtype, name="resnets_0")(x_BHWC)
        x = Attention(self.groups, self.dtype, name="attentions_0")(x)
        return Residual(features, self.groups, self.dtype, name="resnets_1")(x)


class Encoder(nn.Module):
    """Pixels -> mean and log-variance before the last 1x1."""

    config: KLConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        c = self.config
        x = _conv(c.widths[0], 3, self.dtype, "conv_in")(x_BHWC.astype(self.dtype))
        for stage, width in enumerate(c.widths):
            for index in range(c.residuals):
                name = f"down_blocks_{stage}_resnets_{index}"
                x = Residual(width, c.norm_groups, self.dtype, name=name)(x)
            if stage < len(c.widths) - 1:
                x = _conv(width, 3, self.dtype, f"down_blocks_{stage}_downsamplers_0_conv", 2, ((0, 1), (0, 1)))(x)
        x = Middle(c.norm_groups, self.dtype, name="mid_block")(x)
        x = Norm(c.norm_groups, self.dtype, name="conv_norm_out")(x)
        return _conv(2 * c.channels, 3, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """Latents after the first 1x1 -> pixels."""

    config: KLConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        c = self.config
        x = _conv(c.widths[-1], 3, self.dtype, "conv_in")(x_BHWC)
        x = Middle(c.norm_groups, self.dtype, name="mid_block")(x)
        for stage, width in enumerate(reversed(c.widths)):
            for index in range(c.residuals + 1):
                x = Residual(width, c.norm_groups, self.dtype, name=f"up_blocks_{stage}_resnets_{index}")(x)
            if stage < len(c.widths) - 1:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = _conv(width, 3, self.dtype, f"up_blocks_{stage}_upsamplers_0_conv")(x)
        return _conv(3, 3, self.dtype, "conv_out")(Norm(c.norm_groups, self.dtype, name="conv_norm_out")(x))


class AutoencoderKL(nn.Module):
    """Both."""

    config: KLConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        self.quant_conv = _conv(2 * self.config.channels, 1, self.dtype, "quant_conv")
        self.post_quant_conv = _conv(self.config.channels, 1, self.dtype, "post_quant_conv")

    def moments(self, pixels_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pixels in [-1, 1] -> (mean, log-variance), float32, not normalised."""
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(pixels_BHWC)).astype(jnp.float32), 2, axis=-1)
        return mean, log_variance

    def decode(self, latents_BhwC: jax.Array) -> jax.Array:
        """Latents, not normalised -> pixels, float32, not clamped."""
        return self.decoder(self.post_quant_conv(latents_BhwC.astype(self.dtype))).astype(jnp.float32)

    def __call__(self, pixels_BHWC: jax.Array) -> jax.Array:
        """The reconstruction."""
        return self.decode(self.moments(pixels_BHWC)[0])


class KLCodec(flax.struct.PyTreeNode):
    """The weights, and the mean and deviation that latents are normalised by; every frame is a picture of its own."""

    params: dict[str, Any]
    mean_C: jax.Array
    std_C: jax.Array
    config: KLConfig = flax.struct.field(pytree_node=False)
    dtype: str = flax.struct.field(pytree_node=False, default="float32")

    def encode(self, pixels_BTHWC: jax.Array) -> jax.Array:
        """(B, T, H, W, 3) in [-1, 1] -> normalised means (B, T, h, w, C). Raises UserError for sizes that don't
        divide."""
        return self.posterior(pixels_BTHWC)[0]

    def posterior(self, pixels_BTHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(normalised mean, deviation, which is not normalised)."""
        check_frame_size(pixels_BTHWC, self.config.stride)
        mean, log_variance = self._apply(AutoencoderKL.moments, pixels_BTHWC)
        return (mean - self.mean_C) / self.std_C, deviation(log_variance)

    def decode(self, latents_BNhwC: jax.Array) -> jax.Array:
        """Normalised latents -> pixels (B, N, H, W, 3), not clamped."""
        return self._apply(AutoencoderKL.decode, latents_BNhwC * self.std_C + self.mean_C)

    def decode_next(self, latents_BNhwC: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """The same; frames know nothing of one another."""
        return self.decode(latents_BNhwC), ()

    def fresh_decoder(self, key: jax.Array, width: int, layers: int) -> dict[str, Any]:
        """The decoder's own parameters, float32."""
        own = {name: self.params[name] for name in ("decoder", "post_quant_conv")}
        return jax.tree.map(lambda a: a.astype(jnp.float32), own)

    def with_decoder(self, params: dict[str, Any]) -> "KLCodec":
        """The codec that decodes with these."""
        return self.replace(params={**self.params, **params})

    def _apply(self, method: Any, x_BTHWC: jax.Array) -> Any:
        """A method on all frames as one batch of pictures."""
        vae = AutoencoderKL(self.config, jnp.dtype(self.dtype))
        out = vae.apply({"params": self.params}, x_BTHWC.reshape(-1, *x_BTHWC.shape[2:]), method=method)
        return jax.tree.map(lambda part: part.reshape(*x_BTHWC.shape[:2], *part.shape[1:]), out)


# Ours -> diffusers', one after the other.
NAMES = (
    (r"/norm/(scale|bias)$", r"/\1"),
    (r"/scale$", "/weight"),
    (r"/kernel$", "/weight"),
    (r"_blocks_(\d+)_", r"_blocks/\1/"),
    (r"(resnets|attentions)_(\d+)", r"\1/\2"),
    (r"(downsamplers|upsamplers)_0_conv", r"\1/0/conv"),
    (r"/to_out/", "/to_out/0/"),
)
# What attention was called in files of earlier versions of diffusers.
EARLIER_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def released_name(ours: str) -> str:
    """diffusers' name of one of our parameters."""
    for pattern, replacement in NAMES:
        ours = re.sub(pattern, replacement, ours)
    return ours.replace("/", ".")


def our_shapes(config: KLConfig) -> dict[str, tuple[int, ...]]:
    picture = jax.ShapeDtypeStruct((1, config.stride, config.stride, 3), jnp.float32)
    params = jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), picture)["params"]
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def released_shape(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[-1], shape[-2], *shape[:-2]) if ours.endswith("kernel") else shape


def with_present_names(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Attention of earlier files under the names of today, its 1x1 convolutions as matrices; without STATISTICS."""
    renamed = {}
    for name, tensor in tensors.items():
        for now, earlier in EARLIER_NAMES.items():
            name = name.replace(f"attentions.0.{earlier}.", f"attentions.0.{now}.")
        if "attentions.0.to_" in name and tensor.ndim == 4:
            tensor = np.asarray(tensor)[:, :, 0, 0]
        renamed[name] = tensor
    return {name: tensor for name, tensor in renamed.items() if name not in STATISTICS}


def config_of(tensors: Mapping[str, Array], norm_groups: int, source: str) -> KLConfig:
    """The sizes that a VAE's tensors have. Raises UserError where they are none's."""
    stages = {int(found[1]) for name in tensors if (found := re.match(r"encoder\.down_blocks\.(\d+)\.", name))}
    first = [f"encoder.down_blocks.{stage}.resnets.0.conv1.weight" for stage in range(len(stages))]
    of_first_stage = re.compile(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight")
    residuals = sum(bool(of_first_stage.fullmatch(name)) for name in tensors)
    wanted = [*first, "post_quant_conv.weight"]
    if not stages or not all(name in tensors for name in wanted):
        raise UserError(f"{source}: is no AutoencoderKL under diffusers' names (encoder.down_blocks.0.resnets.0...)")
    return KLConfig(tensors["post_quant_conv.weight"].shape[0], tuple(tensors[name].shape[0] for name in first),
                    residuals, norm_groups)


def check_released(tensors: Mapping[str, Array], config: KLConfig, source: str) -> None:
    """Raises UserError listing every tensor that is missing, unexpected or misshapen."""
    check_shapes(source, tensors, {released_name(ours): released_shape(ours, shape)
                                   for ours, shape in our_shapes(config).items()})


def from_released(tensors: Mapping[str, Array], config: KLConfig, dtype: Any, source: str) -> dict[str, Any]:
    """Parameters for AutoencoderKL(config), in `dtype`. Raises UserError as `check_released`."""
    check_released(tensors, config, source)
    flat = {}
    for ours in our_shapes(config):
        value = np.asarray(tensors[released_name(ours)])
        if ours.endswith("kernel"):
            value = np.moveaxis(value, (0, 1), (-1, -2))
        flat[ours] = jnp.asarray(value, dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


def read_settings(path: Path) -> dict[str, Any]:
    """{norm_groups, scaling} of the config.json beside a VAE in diffusers' format, as far as it says so."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        held = read_json(file) if file.is_file() else {}
        if not isinstance(held, dict) or held.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            return {}
        names = {"norm_num_groups": "norm_groups", "scaling_factor": "scaling"}
        return {ours: held[theirs] for theirs, ours in names.items() if theirs in held}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read as the settings of a VAE ({error})") from error


def statistics_of(settings: Codec, channels: int, tensors: Mapping[str, Any], scaling: float) -> dict[str, np.ndarray]:
    """The STATISTICS: the settings', a file's own or, as for stable diffusion, no mean and 1 / scaling."""
    given = {"mean": settings.latent_mean or tensors.get("mean", (0.0,) * channels),
             "std": settings.latent_std or tensors.get("std", (1 / scaling,) * channels)}
    found = {name: np.asarray(value, np.float32) for name, value in given.items()}
    for name, value in found.items():
        if value.shape != (channels,):
            raise UserError(f"codec.latent_{name}: {channels} numbers are needed, and there are {value.size}")
    return found


def load_kl(settings: Codec, channels: int) -> KLCodec:
    """The codec of codec.weights: a safetensors file under diffusers' names, or a folder with one. Raises UserError
    where it is missing or of another VAE."""
    if not settings.weights:
        raise UserError("codec.kind=kl needs the VAE's weights: name them with --config.codec.weights=FILE.safetensors"
                        ", such as diffusion_pytorch_model.safetensors of stabilityai/sd-vae-ft-ema")
    path = Path(settings.weights)
    tensors = only_finite(settings.weights, open_safetensors(path))
    weights, said = with_present_names(tensors), read_settings(path)
    config = config_of(weights, said.get("norm_groups", settings.norm_groups), settings.weights)
    for field, own, asked in (("model.channels", config.channels, channels), ("codec.stride", config.stride,
                                                                              settings.stride)):
        if own != asked:
            raise UserError(f"{field}={asked}: the VAE of {settings.weights} has {own}")
    params = from_released(weights, config, jnp.dtype(settings.dtype), settings.weights)
    statistics = statistics_of(settings, channels, tensors, said.get("scaling", SCALING))
    mean_C, std_C = (jnp.asarray(statistics[name]) for name in STATISTICS)
    return KLCodec(params, mean_C, std_C, config, settings.dtype)
