"""The model: flow and denoiser, text encoder, codec, and the mesh that they are sharded over."""

import dataclasses
import math

from starflow_jax.settings.fields import (
    DTYPES,
    RATIO,
    Allowed,
    Settings,
    at_least,
    names,
    one_of,
    positive,
    required,
    setting,
)

# What is kept of a layer for its backward pass: all that it needs; the layer's input, from which the rest is computed
# again; that and the output of attention; or the same, kept in the host's memory.
REMAT = ("none", "layer", "attention", "offload")
# What moves in attention where mesh.sequence shards the tokens (nn/sequence_parallel.py).
SEQUENCE_PARALLEL = ("ulysses", "all_gather", "ring")


@dataclasses.dataclass(frozen=True)
class Model(Settings):
    """The flow f_D o f_S and its denoiser."""

    channels: int = required("C of the latents", positive(65_536))
    frames: int = required("latent frames of a training clip; 1 for an image model", positive(10_000))
    height: int = required("latent rows", positive(16_384))
    width: int = required("latent columns", positive(16_384))
    shallow_layers: tuple[int, ...] = required(
        "Transformer layers of each shallow block, counted from the data",
        Allowed("a tuple of layer counts greater than 0, at most 10000, one per shallow block",
                lambda value: len(value) > 0 and 0 < min(value) <= max(value) <= 10_000))
    shallow_width: int = required("channels inside the shallow blocks and the denoiser", positive(1_000_000))
    deep_layers: int = required("Transformer layers of the deep block", positive(10_000))
    deep_width: int = required("channels inside the deep block", positive(1_000_000))
    head_dim: int = setting(64, "channels of an attention head",
                            Allowed("a multiple of 4, 20 to 1024",
                                    lambda value: value % 4 == 0 and 20 <= value <= 1024))
    patch_size: int = setting(1, "rows and columns of latents that make one token", positive(1024))
    rope_extent: float = setting(0.0, "side of the grid of rotary positions; 0: sqrt(height * width) / patch_size",
                                 at_least(0, "from the latent size", most=1_000_000))
    local_shallow: bool = setting(True, "shallow blocks see one frame at a time")
    text_length: int = setting(256, "tokens of text; 0: no text", at_least(0, "no text", most=65_536))
    text_dim: int = setting(2048, "channels of the text features", positive(1_000_000))
    denoiser: str = setting("first_layer", "which of the denoiser's layers look ahead; none: no denoiser",
                            one_of("none", "first_layer", "every_layer"))
    denoiser_layers: int = setting(8, "Transformer layers of the denoiser", positive(10_000))
    denoiser_window: int = setting(10, "latent frames that a frame attends to, its own included", positive(10_000))
    denoiser_lookahead: int = setting(1, "latent frames that it attends to after its own", at_least(0, most=10_000))
    noise_std: float = setting(0.5, "standard deviation of the noise that training adds to the latents", positive(1000))
    reference_noise: float = setting(0.3, "the loss is weighted by noise_std / this, and the denoiser's output is "
                                     "multiplied by this; 0: noise_std, which is no weight",
                                     at_least(0, "noise_std", most=1000))
    dtype: str = setting("float32", "dtype in which the layers compute", DTYPES)
    remat: str = setting("none", "what is kept for the backward pass: everything, a layer's input, that and the output "
                         "of its attention, or the same in the host's memory", one_of(*REMAT))
    sequence_parallel: str = setting("ulysses", "what moves in attention where mesh.sequence shards the tokens",
                                     one_of(*SEQUENCE_PARALLEL))
    unroll_layers: bool = setting(False, "faster steps for small models on a CPU, but longer compilation")

    def check(self) -> None:
        for field in ("shallow_width", "deep_width"):
            self.require(field, getattr(self, field) % self.head_dim == 0,
                         f"must be a multiple of head_dim={self.head_dim}")
        for field in ("height", "width"):
            self.require(field, getattr(self, field) % self.patch_size == 0,
                         f"must be a multiple of patch_size={self.patch_size}")

    @property
    def denoising_step(self) -> float:
        """What the denoiser's output is multiplied by; the loss that it learns from is weighted by noise_std / this."""
        return self.reference_noise or self.noise_std

    @property
    def token_channels(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def extent(self) -> float:
        return self.rope_extent or math.sqrt(self.height * self.width) / self.patch_size

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of a frame's tokens."""
        return self.height // self.patch_size, self.width // self.patch_size

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width // self.patch_size**2


METADATA = ("noise_level", "fps", "aspect_ratio")  # what a prompt may state besides its caption


@dataclasses.dataclass(frozen=True)
class Text(Settings):
    """The text encoder: a small T5 trained along with the flow, or frozen flan-t5 features."""

    encoder: str = setting("trained", "trained along with the flow, or frozen", one_of("trained", "frozen"))
    vocab_size: int = setting(320, "most pieces that the trained tokenizer may have", positive(10_000_000))
    layers: int = setting(2, "Transformer layers", positive(10_000))
    d_model: int = setting(128, "channels", positive(1_000_000))
    d_kv: int = setting(32, "channels of an attention head", positive(65_536))
    d_ff: int = setting(256, "channels of the feed-forward layers", positive(1_000_000))
    heads: int = setting(4, "attention heads", positive(65_536))
    metadata: str = setting("fps,aspect_ratio", "what the prompt states besides the caption, comma-separated; empty: "
                            "nothing", Allowed(f"comma-separated parts of {', '.join(METADATA)}",
                                               lambda value: not value or set(names(value)) <= set(METADATA)))
    fps: int = setting(8, "frame rate of training, which the prompt states", at_least(0, "an image model", most=1000))
    aspect_ratio: str = setting("1:1", "aspect ratio of training, which the prompt states", RATIO)
    weights: str = setting("", "of the frozen encoder: a folder as flan-t5-xl is published, which also sets the sizes")

    def states(self, name: str) -> bool:
        """Whether prompts state one of METADATA."""
        return name in names(self.metadata)


@dataclasses.dataclass(frozen=True)
class Codec(Settings):
    """Pixels <-> latents: the small models' linear patch codec, or the Wan2.2 VAE."""

    kind: str = setting("patch", "the linear codec, the Wan2.2 VAE, or the image models' AutoencoderKL",
                        one_of("patch", "wan", "kl"))
    stride: int = setting(4, "pixels per latent, in rows and columns", positive(1024))
    time_stride: int = setting(4, "frames per latent frame after the first", positive(1024))
    later_frames_scale: float = setting(1.0, "latents of frames n >= 1 are multiplied by this", positive(1000))
    weights: str = setting("", "a safetensors file under the VAE's published names; kl: or a folder with one")
    latent_mean: tuple[float, ...] = setting(
        (), "mean of each channel; (): the file's tensor `mean`; kl: 0",
        Allowed("a tuple of numbers of at most 1000000, either sign",
                lambda value: all(abs(one) <= 1e6 for one in value)))
    latent_std: tuple[float, ...] = setting(
        (), "standard deviation of each channel; (): the file's tensor `std`; kl: 1 / its scaling factor",
        Allowed("a tuple of numbers greater than 0, at most 1000000",
                lambda value: all(0 < one <= 1e6 for one in value)))
    encoder_width: int = setting(160, "Wan: channels of the encoder's first stage", positive(65_536))
    decoder_width: int = setting(256, "Wan: channels of the decoder's last stage", positive(65_536))
    norm_groups: int = setting(32, "kl: groups of channels in its norms, where no config.json beside it says so",
                               positive(65_536))
    dtype: str = setting("float32", "dtype in which a VAE computes", DTYPES)
    # Saves memory for whole videos; a stream must keep the cache of each tile, overlaps too.
    tile: int = setting(0, "Wan: latent rows and columns encoded and decoded at once; 0: whole frames",
                        at_least(0, "whole frames", most=16_384))
    tile_overlap: int = setting(8, "Wan: latents that neighbouring tiles share", positive(16_384))

    def check(self) -> None:
        self.require("tile", self.tile == 0 or self.tile > self.tile_overlap,
                     f"must be 0 (whole frames) or greater than tile_overlap={self.tile_overlap}")


_AXIS = at_least(0, "what the others leave", most=1_000_000)


@dataclasses.dataclass(frozen=True)
class Mesh(Settings):
    """How devices are arranged: the product of the axes is their number; one axis may be 0, what the others leave."""

    data: int = setting(0, "copies of the model", _AXIS)
    fsdp: int = setting(1, "shards of parameters and optimizer state; clips are sharded over data and fsdp", _AXIS)
    tensor: int = setting(1, "shards of every layer", _AXIS)
    sequence: int = setting(1, "shards of every clip's tokens", _AXIS)

    def check(self) -> None:
        zeros = [self.data, self.fsdp, self.tensor, self.sequence].count(0)
        self.require("data", zeros <= 1, "only one axis of the mesh can be 0 (what the others leave)")

