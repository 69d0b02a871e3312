"""One model's parameters as the start of a larger one's: a deeper and wider deep block, images to video.

Deeper: each added layer is a copy of the one before it with its output projections set to zero, so that it adds
nothing to the residual stream at first and learns from the first step on.

Wider, from D to W = D + K channels, with s = sqrt(W / D). Whatever is written to the residual stream goes through
the linear map P, where m is the mean of the D channels:

    P x = [s x - (s - 1) m,  m, ..., m]        K times m

P keeps mean, variance and mean square, so LayerNorms see their old statistics (epsilon included) and the final
RMSNorm its old scale. What LayerNorms give in the old channels is s times as large, which their scales undo, and
0 in the added ones; so the weights that read these start at random without an effect. Added heads and hidden units
start at random too, and the rows that read them at zero. The whole is the same function, up to rounding.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from starflow_jax.config import Model, UserError
from starflow_jax.io.tensor_files import StoredArray

FIXED = ("channels", "patch_size", "shallow_layers", "shallow_width", "head_dim", "text_dim")
RESHAPING = ("deep_layers", "deep_width", "denoiser")  # settings whose change makes other parameters
LAYER = "flow/deep/transformer/layers/layer/"
FUNCTION_KEPT = "same function"
CHANGED = {  # settings that are no part of any parameter's shape
    "frames": "same function of clips of the old length",
    "height": "same function of the old size", "width": "same function of the old size",
    "extent": "CHANGES the function: rows and columns lie at other positions",
    "text_length": "CHANGES the function: the text's positions are spaced differently",
    "local_shallow": "same function of images; CHANGES that of video",
    "noise_std": "same function; other noise to train with",
    "denoiser_window": "CHANGES the denoiser: frames that it sees",
    "denoiser_lookahead": "CHANGES the denoiser: frames that it sees",
}


class Change(NamedTuple):
    """One setting in which a grown model differs from its source."""

    setting: str
    before: str
    after: str
    effect: str


def changes(source: Model, target: Model) -> list[Change]:
    """What `grow` changes between two models. Raises UserError naming every setting that it can't change."""
    refused = [f"model.{name}={getattr(target, name)} (source: {getattr(source, name)})"
               for name in FIXED if getattr(source, name) != getattr(target, name)]
    refused += [f"model.{name}={getattr(target, name)} (source: {getattr(source, name)}, more)"
                for name in ("deep_layers", "deep_width") if getattr(source, name) > getattr(target, name)]
    both_denoise = "none" not in (source.denoiser, target.denoiser)
    if both_denoise and source.denoiser_layers != target.denoiser_layers:
        refused.append(f"model.denoiser_layers={target.denoiser_layers} (source: {source.denoiser_layers})")
    if (source.text_length > 0) != (target.text_length > 0):
        refused.append(f"model.text_length={target.text_length} (source: {source.text_length})")
    if refused:
        raise UserError(f"the source's model can't become this one: {', '.join(refused)}; what can grow is "
                        "model.deep_layers, model.deep_width and an image model to a video model")
    found = [(name, FUNCTION_KEPT) for name in ("deep_layers", "deep_width")]
    found += [(name, effect) for name, effect in CHANGED.items() if both_denoise or not name.startswith("denoiser")]
    if target.denoiser == "none":
        found.append(("denoiser", "left out"))
    else:
        found.append(("denoiser", "CHANGES the denoiser: layers that look ahead" if both_denoise
                      else "starts from scratch: its first output is 0, which removes nothing"))
    return [Change(name, str(getattr(source, name)), str(getattr(target, name)), effect)
            for name, effect in found if getattr(source, name) != getattr(target, name)]


def grow(
    arrays: Mapping[str, Any], source: Model, target: Model, fresh_denoiser: Callable[[], Mapping[str, Any]],
    seed: int = 0
) -> dict[str, Any]:
    """Parameters {"flow/deep/...": array} of `source` as those of `target`, each computed when it is read.

    fresh_denoiser: {"denoiser/...": array} at the start of training, called where the source has none.
    Raises UserError as `changes` does.
    """
    changes(source, target)
    grown = {name: array for name, array in arrays.items()
             if target.denoiser != "none" or not name.startswith("denoiser/")}
    if target.denoiser != "none" and source.denoiser == "none":
        grown.update(fresh_denoiser())
    if (source.deep_layers, source.deep_width) == (target.deep_layers, target.deep_width):
        return grown
    for name in arrays:
        if name.startswith("flow/deep/"):
            read = _stack_of if name.startswith(LAYER) else _single
            grown[name] = read(name, arrays, source, target, seed)
    return grown


def _single(name: str, arrays: Mapping[str, Any], source: Model, target: Model, seed: int) -> StoredArray:
    """A parameter of the deep block outside of its layers."""
    array, old, wide = arrays[name], source.deep_width, target.deep_width
    part, scale = name.removeprefix("flow/deep/"), math.sqrt(wide / old)

    def read() -> np.ndarray:
        value = np.asarray(array, np.float32)
        if part.startswith(("proj_in", "proj_text")):
            value = _spread(value, wide)
        elif part == "transformer/final_norm/weight":
            value = np.concatenate([(1 + value) / scale - 1, np.zeros(wide - old, np.float32)])
        elif part == "proj_out/kernel" and wide > old:
            # The old channels are read without (s - 1) / s of their mean; the added ones, which are it, give it back.
            weight = np.asarray(arrays["flow/deep/transformer/final_norm/weight"], np.float32)
            row = (scale - 1) / (scale * (wide - old)) * ((1 + weight) @ value)
            value = np.concatenate([value, np.tile(row, (wide - old, 1))])
        return value.astype(array.dtype)

    last = {"proj_in": array.ndim - 1, "proj_text": array.ndim - 1, "transformer": 0}.get(part.split("/")[0])
    axis = 0 if part == "proj_out/kernel" else last
    shape = tuple(wide if index == axis else size for index, size in enumerate(array.shape))
    return StoredArray(shape, array.dtype, read)


def _stack_of(name: str, arrays: Mapping[str, Any], source: Model, target: Model, seed: int) -> StoredArray:
    """A parameter of all layers of the deep block."""
    array, old, wide, layers = arrays[name], source.deep_width, target.deep_width, target.deep_layers
    part = name.removeprefix(LAYER)
    shape = (layers, *(size // old * wide if size % old == 0 else size for size in array.shape[1:]))

    def read() -> np.ndarray:
        value, grown = np.asarray(array), np.empty(shape, array.dtype)
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        before = -1
        for index in range(layers):
            layer = index * source.deep_layers // layers
            if layer == before and part.startswith(("proj/", "mlp_out/")):
                grown[index] = 0
            else:
                grown[index] = _wider_layer(part, np.asarray(value[layer], np.float32), old, wide, random)
            before = layer
        return grown

    return StoredArray(shape, array.dtype, read)


def _wider_layer(part: str, value: np.ndarray, old: int, wide: int, random: np.random.Generator) -> np.ndarray:
    """One layer's parameter at the width `wide` (the module's docstring)."""
    if wide == old:
        return value
    kind, leaf = part.split("/")
    added = wide - old
    if leaf == "scale":
        return np.concatenate([value / math.sqrt(wide / old), np.ones(added, np.float32)])
    if kind.endswith("norm"):
        return np.concatenate([value, np.zeros(added, np.float32)])
    if kind in ("proj", "mlp_out"):
        spread = _spread(value, wide)
        if leaf == "bias":
            return spread
        return np.concatenate([spread, np.zeros((value.shape[0] // old * added, wide), np.float32)])
    one = kind != "qkv"  # q, k and v have an axis of their own, and widen each for itself
    value = value.reshape(*value.shape[:-1], 1, -1) if one else value
    groups = value.shape[-2]
    outputs = value.shape[-1] // old * wide
    if leaf == "bias":
        grown = np.zeros((groups, outputs), np.float32)
        grown[:, :value.shape[-1]] = value
    else:
        grown = random.standard_normal((wide, groups, outputs), np.float32) / np.float32(math.sqrt(wide))
        grown[:old, :, :value.shape[-1]] = value
    return grown.reshape(*grown.shape[:-2], -1) if one else grown


def _spread(value: np.ndarray, wide: int) -> np.ndarray:
    """P along the last axis: of a kernel or bias that writes to the residual stream."""
    old = value.shape[-1]
    scale = math.sqrt(wide / old)
    mean = value.mean(axis=-1, keepdims=True, dtype=np.float64).astype(np.float32)
    return np.concatenate([scale * value - (scale - 1) * mean, np.repeat(mean, wide - old, axis=-1)], axis=-1,
                          dtype=np.float32)
