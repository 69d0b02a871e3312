"""The names and layouts of the release's state dict <-> our parameters, array by array."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from starflow_jax.config import Model, UserError
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.io.tensor_files import StoredArray, report_misfits
from starflow_jax.nn.rope import pair_order

LAYER_NAMES = {
    "attention_norm/scale": "attention.norm.weight",
    "attention_norm/bias": "attention.norm.bias",
    "qkv/kernel": "attention.qkv.weight",
    "qkv/bias": "attention.qkv.bias",
    "proj/kernel": "attention.proj.weight",
    "proj/bias": "attention.proj.bias",
    "mlp_norm/scale": "mlp.norm.weight",
    "mlp_norm/bias": "mlp.norm.bias",
    "mlp_in/kernel": "mlp.main.0.weight",
    "mlp_in/bias": "mlp.main.0.bias",
    "mlp_out/kernel": "mlp.main.2.weight",
    "mlp_out/bias": "mlp.main.2.bias",
}
BLOCK_NAMES = {
    "sos": "sos_embed",
    "proj_in/kernel": "proj_in.weight",
    "proj_in/bias": "proj_in.bias",
    "proj_text/kernel": "proj_txt.weight",
    "proj_text/bias": "proj_txt.bias",
    "proj_out/kernel": "proj_out.weight",
    "proj_out/bias": "proj_out.bias",
    "transformer/final_norm/weight": "final_norm.weight",
}


# What a state dict of the release holds beside its parameters: masks, tables of positions, and the prior's variance.
BUFFERS = re.compile(r"(.*\.)?(attn_mask|freqs_cos|freqs_sin|var)")


def released_model(arguments: Mapping[str, Any]) -> Model:
    """The settings of a released model from its own argument names (tests/golden/README.md)."""
    layers = arguments["layers_per_block"]
    patch = arguments.get("patch_size", 1)
    size = arguments["img_size"]
    return Model(
        channels=arguments["in_channels"], frames=1, height=size, width=size, patch_size=patch,
        shallow_layers=tuple(layers[:-1]), shallow_width=arguments["channels"],
        deep_layers=layers[-1], deep_width=arguments.get("top_block_channels") or arguments["channels"],
        head_dim=arguments["head_dim"], rope_extent=arguments.get("pt_seq_len") or size // patch,
        local_shallow=arguments.get("shallow_block_local", False),
        text_length=arguments["txt_size"], text_dim=arguments["txt_dim"],
        denoiser="every_layer" if arguments.get("learnable_self_denoiser") else "none",
        denoiser_window=arguments.get("denoiser_window") or 10,
        denoiser_lookahead=arguments.get("temporal_causal", 2) - 1,
    )


def from_released(tensors: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """Parameters for STARFlow(model), float32, from tensors under the release's names.

    Raises UserError listing every missing, unexpected or misshapen tensor.
    """
    found = stack_released(tensors, model, "these tensors")
    return {"params": traverse_util.unflatten_dict(
        {name: np.asarray(array, np.float32) for name, array in found.items()}, sep="/")}


def to_released(params: Mapping[str, Any], model: Model) -> dict[str, np.ndarray]:
    """The inverse of `from_released`, also for gradients."""
    flat = traverse_util.flatten_dict(params["params"], sep="/")
    return {name: np.asarray(array) for name, array in unstack_to_released(flat, model).items()}


def stack_released(tensors: Mapping[str, Any], model: Model, source: str) -> dict[str, StoredArray]:
    """{"deep/proj_in/kernel": array}, our flow's and denoiser's parameters, each read on first use.

    Raises UserError listing every tensor of `source` that is missing, unexpected or misshapen (or no float).
    """
    shapes, stacks = flow_shapes(model), {}
    if "var" in tensors and not np.all(np.asarray(tensors["var"]) == 1):
        raise UserError(f"{source}: its prior has variances other than 1 (the tensor `var`), which ours has not")
    tensors = {name: tensor for name, tensor in tensors.items() if not BUFFERS.fullmatch(name)}
    missing: list[str] = []
    misshapen: list[str] = []
    for ours, theirs, layers in released_names(model):
        shape = shapes[ours][1:] if layers else shapes[ours]
        released = _released_shape(ours, shape)
        wanted = [theirs.format(layer=index) for index in range(layers)] if layers else [theirs]
        missing += [name for name in wanted if name not in tensors]
        for name in set(wanted) & set(tensors):
            value = tensors[name]
            if tuple(value.shape) != released or not jnp.issubdtype(value.dtype, jnp.floating):
                misshapen.append(f"{name} {tuple(value.shape)} {value.dtype} instead of {released}")
        stacks[ours] = (shapes[ours], wanted)
    used = {name for _, wanted in stacks.values() for name in wanted}
    report_misfits(source, missing=missing, unexpected=sorted(set(tensors) - used), misshapen=sorted(misshapen))
    return {ours: _stack(ours, shape, [tensors[name] for name in wanted], model.head_dim)
            for ours, (shape, wanted) in stacks.items()}


@functools.lru_cache
def flow_shapes(model: Model) -> Mapping[str, tuple[int, ...]]:
    """The shape of every parameter of STARFlow(model)."""
    x = jnp.zeros((1, 1, model.patch_size, model.patch_size, model.channels))
    text = jnp.zeros((1, model.text_length, model.text_dim)) if model.text_length else None
    made = jax.eval_shape(STARFlow(model).init, jax.random.key(0), x, text)["params"]
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(made, sep="/").items()}


def _stack(name: str, shape: tuple[int, ...], parts: list[Any], head_dim: int) -> StoredArray:
    dtype = functools.reduce(jnp.promote_types, (part.dtype for part in parts))

    def read() -> np.ndarray:
        if "/layers/" not in name:
            return from_torch(name, np.asarray(parts[0]), head_dim)
        stacked = np.empty(shape, dtype)
        for index, part in enumerate(parts):
            stacked[index] = from_torch(name, np.asarray(part), head_dim)
        return stacked

    return StoredArray(shape, dtype, read)


def unstack_to_released(arrays: Mapping[str, Any], model: Model) -> dict[str, StoredArray]:
    """The release's tensors from our parameters {"deep/proj_in/kernel": array}; of these only the one that was
    read last is kept in memory."""
    read = _last_kept(arrays)
    tensors = {}
    for ours, theirs, layers in released_names(model):
        shape = arrays[ours].shape[1:] if layers else arrays[ours].shape
        released = _released_shape(ours, shape)
        for index in range(layers or 1):
            def part(ours: str = ours, index: int | None = index if layers else None) -> np.ndarray:
                value = read(ours) if index is None else read(ours)[index]
                return to_torch(ours, value, model.head_dim)

            tensors[theirs.format(layer=index)] = StoredArray(released, arrays[ours].dtype, part)
    return tensors


def _last_kept(arrays: Mapping[str, Any]) -> Callable[[str], np.ndarray]:
    last: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        if name not in last:
            last.clear()  # before the next one is read
            last[name] = np.asarray(arrays[name])
        return last[name]

    return read


def released_names(model: Model) -> Iterator[tuple[str, str, int]]:
    """(our name, released name, layers stacked in ours or 0) of every parameter."""
    blocks = [(f"shallow_{i}", f"blocks.{i}", n, False) for i, n in enumerate(model.shallow_layers)]
    blocks.append(("deep", f"blocks.{len(model.shallow_layers)}", model.deep_layers, model.text_length > 0))
    if model.denoiser != "none":
        blocks.append(("denoiser", "learnable_self_denoiser", model.denoiser_layers, model.text_length > 0))
    for ours, theirs, layers, text in blocks:
        for name, released in BLOCK_NAMES.items():
            if (name.startswith("proj_text") and not text) or (name == "sos" and ours == "denoiser"):
                continue
            yield f"{ours}/{name}", f"{theirs}.{released}", 0
        for name, released in LAYER_NAMES.items():
            yield f"{ours}/transformer/layers/layer/{name}", theirs + ".attn_blocks.{layer}." + released, layers


def _released_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a parameter (of one layer): outputs first, and q, k and v in one axis."""
    if "/qkv/" in name:
        shape = (*shape[:-2], shape[-2] * shape[-1])
    return shape[::-1] if name.endswith("kernel") else shape


def from_torch(name: str, value: np.ndarray, head_dim: int) -> np.ndarray:
    """One layer's tensor of the release in our layout; name: ours."""
    if "/qkv/" in name:
        value = value[_qkv_order(value.shape[0], head_dim)].reshape(3, -1, *value.shape[1:])
    return np.moveaxis(value, -1, 0) if name.endswith("kernel") else value


def to_torch(name: str, value: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `from_torch`."""
    value = np.moveaxis(value, 0, -1) if name.endswith("kernel") else value
    if "/qkv/" in name:
        value = value.reshape(-1, *value.shape[2:])
        value = value[np.argsort(_qkv_order(value.shape[0], head_dim))]
    return value


def _qkv_order(rows: int, head_dim: int) -> np.ndarray:
    """Row of the release's fused q, k, v for each of ours: RoPE pairs lie apart in ours (nn/rope.py)."""
    width = rows // 3
    heads = np.arange(0, 2 * width, head_dim)[:, None] + pair_order(head_dim)
    return np.concatenate([heads.ravel(), np.arange(2 * width, rows)])
