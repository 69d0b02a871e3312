"""How fast a TPU could at best run a step: what the model needs, what a chip can do, and the bound that follows."""

import dataclasses
from typing import Any

import numpy as np

from starflow_jax.config import Model, UserError
from starflow_jax.kernels.mask import Causal, FrameWindow, Mask, bounds
from starflow_jax.planning.program_cost import Cost

GIB, GB, TERA = 2**30, 1e9, 1e12

# Assumed, not measured: what starting a program costs beside its work, and a collective's messages beside their bytes.
DISPATCH_SECONDS = 10e-6
COLLECTIVE_SECONDS = 5e-6


@dataclasses.dataclass(frozen=True)
class Chip:
    """Memory, speed and bandwidths of a chip, or of the part of it that is one JAX device."""

    name: str
    cores: int
    hbm_bytes: float
    peak_flops: float  # bfloat16 products, a second; 0, like both bandwidths: not known
    hbm_bandwidth: float  # bytes a second
    ici_bandwidth: float  # bytes a second that it sends over all its links together


# By `device_kind`. Whole chips, from Google's pages (docs.cloud.google.com/tpu/docs/...): ICI there is "bidirectional",
# both directions together, or in Gbit/s one direction; here it is bytes in one direction.
CHIPS = {
    # .../v4; ICI: six links of 50 GB/s, arxiv.org/abs/2304.01433, Table 4
    "TPU v4": Chip("v4", 2, 32 * GIB, 275 * TERA, 1200 * GB, 300 * GB),
    # .../v5e: 819 GBps, 400 GBps bidirectional
    "TPU v5 lite": Chip("v5e", 1, 16 * GIB, 197 * TERA, 819 * GB, 200 * GB),
    # .../v5p: 2765 GBps, 1200 GBps bidirectional
    "TPU v5": Chip("v5p", 2, 95 * GIB, 459 * TERA, 2765 * GB, 600 * GB),
    # .../v6e: 1638 GBps, 800 GBps bidirectional
    "TPU v6 lite": Chip("v6e", 1, 32 * GIB, 918 * TERA, 1638 * GB, 400 * GB),
    # .../tpu7x: 7380 GBps, 1200 GBps bidirectional
    "TPU7x": Chip("tpu7x", 2, 192 * GIB, 2307 * TERA, 7380 * GB, 600 * GB),
}


def chip_of(device: Any, memory_gb: float = 0) -> Chip:
    """What a JAX device has of its chip: half of one where each of a chip's two cores is a device (TPU7x).

    memory_gb: of a GPU, for which a CPU stands in.

    Raises UserError for a device that the table doesn't have.
    """
    if memory_gb:
        return Chip(f"{memory_gb:g} GB", 1, memory_gb * GB, 0, 0, 0)
    if device.device_kind not in CHIPS:
        raise UserError(f"device kind {device.device_kind!r}: its limits are not known; there are {', '.join(CHIPS)}")
    chip = CHIPS[device.device_kind]
    share = device.num_cores / chip.cores
    scaled = {field: getattr(chip, field) * share
              for field in ("hbm_bytes", "peak_flops", "hbm_bandwidth", "ici_bandwidth")}
    return dataclasses.replace(chip, cores=device.num_cores, **scaled)


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time of a step; limited_by: "compute", "hbm" or "ici"."""

    seconds: float
    compute_seconds: float
    hbm_seconds: float
    ici_seconds: float
    limited_by: str
    mfu: float  # the share of the chip's peak that the model's own operations would then take


def bound(cost: Cost, chip: Chip, model_flops: float) -> Bound:
    """The roofline of one device: products, memory and links each at their full rate, all overlapping perfectly.

    cost: of one device; chip: what that device has; model_flops: the model's operations of that device's share of a
    step. A bound, not a forecast: nothing here waits, vector arithmetic is free, each byte is read once, and a
    collective has all links to itself.
    """
    times = {"compute": cost.flops / chip.peak_flops, "hbm": cost.hbm_bytes / chip.hbm_bandwidth,
             "ici": sum(cost.collective_bytes.values()) / chip.ici_bandwidth}
    limited_by = max(times, key=lambda name: times[name])
    seconds = times[limited_by]
    return Bound(seconds, times["compute"], times["hbm"], times["ici"], limited_by,
                 model_flops / (seconds * chip.peak_flops) if seconds else 0.0)


def overhead_seconds(dispatches: float, collectives: float) -> float:
    """What starting so many programs and collectives takes where none hides behind another's work."""
    return dispatches * DISPATCH_SECONDS + collectives * COLLECTIVE_SECONDS


def model_flops(model: Model, clips: float, frames: int = 0, training: bool = False, branches: int = 1) -> float:
    """Operations that the flow and the denoiser need for so many clips of `frames` latent frames (0: as trained).

    2 for each multiply-add of the matrices and of attention over the pairs that the masks allow; nothing
    that an implementation does besides (masked pairs, rematerialisation). Not the text encoder, nor the codec.
    training: forward and backward, three times the forward pass, as every product has two in its gradient (the flow's
    is also taken by the latents, so none of them can be left out).
    branches: of guidance, through the deep block. Sampling takes one pass over all tokens at the least.
    """
    parts = forward_flops(model, frames)
    parts["deep"] *= branches
    return clips * sum(parts.values()) * (3 if training else 1)


def forward_flops(model: Model, frames: int = 0) -> dict[str, float]:
    """Operations of one clip's forward pass (or one pass of its inverse), of the shallow blocks, the deep block and
    the denoiser; as in `model_flops`."""
    frames = frames or model.frames
    tokens, channels, prefix = frames * model.tokens_per_frame, model.token_channels, model.text_length

    def stack(width: int, slots: int, masks: list[Mask]) -> float:
        """One layer for each mask: qkv, output and the MLP's two matrices are 12 width^2; scores and their sums."""
        return sum(12 * width**2 * slots + 2 * width * visible_pairs(mask, slots) for mask in masks)

    def ends(width: int, outputs: int) -> float:
        return tokens * width * (channels + outputs)

    sequences = frames if model.local_shallow else 1
    shallow = sum(sequences * stack(model.shallow_width, tokens // sequences, [Causal()] * layers)
                  + ends(model.shallow_width, 2 * channels) for layers in model.shallow_layers)
    deep = (stack(model.deep_width, prefix + tokens, [Causal()] * model.deep_layers)
            + ends(model.deep_width, 2 * channels) + prefix * model.text_dim * model.deep_width)
    denoiser = 0.0
    if model.denoiser != "none":
        ahead = FrameWindow(prefix, model.tokens_per_frame, model.denoiser_window, model.denoiser_lookahead)
        later = dataclasses.replace(ahead, lookahead=0) if model.denoiser == "first_layer" else ahead
        masks: list[Mask] = [ahead, *[later] * (model.denoiser_layers - 1)]
        denoiser = (stack(model.shallow_width, prefix + tokens, masks) + ends(model.shallow_width, channels)
                    + prefix * model.text_dim * model.shallow_width)
    return {"shallow": 2.0 * shallow, "deep": 2.0 * deep, "denoiser": 2.0 * denoiser}


def visible_pairs(mask: Mask, slots: int) -> int:
    """How many pairs of a query and a key the mask allows."""
    prefix, low_S, high_S = bounds(mask, slots, slots)
    return int((high_S - low_S).sum(dtype=np.int64)) + prefix * slots
