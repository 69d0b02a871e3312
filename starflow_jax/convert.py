"""Released weights: the names and layouts of the release's state dict <-> our parameters."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from starflow_jax.config import Model, UserError
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


def from_released(tensors: Mapping[str, np.ndarray], model: Model) -> dict[str, Any]:
    """Parameters for STARFlow(model) from tensors under the release's names.

    Raises UserError listing every missing, unexpected or misshapen tensor.
    """
    flat, used, missing = {}, set(), []
    for ours, theirs, layers in _names(model):
        wanted = [theirs.format(layer=index) for index in range(layers)] if layers else [theirs]
        missing += [name for name in wanted if name not in tensors]
        if any(name not in tensors for name in wanted):
            continue
        used.update(wanted)
        parts = [_from_torch(ours, tensors[name], model.head_dim) for name in wanted]
        flat[ours] = np.stack(parts) if layers else parts[0]
    unexpected = sorted(set(tensors) - used)
    if missing or unexpected:
        raise UserError(f"these weights are not of this model: missing {missing}, unexpected {unexpected}")
    return {"params": traverse_util.unflatten_dict(flat, sep="/")}


def to_released(params: Mapping[str, Any], model: Model) -> dict[str, np.ndarray]:
    """The inverse of `from_released`, also for gradients."""
    flat = traverse_util.flatten_dict(params["params"], sep="/")
    tensors = {}
    for ours, theirs, layers in _names(model):
        value = np.asarray(flat[ours])
        for index in range(layers or 1):
            part = value[index] if layers else value
            tensors[theirs.format(layer=index)] = _to_torch(ours, part, model.head_dim)
    return tensors


def _names(model: Model) -> Iterator[tuple[str, str, int]]:
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


def _from_torch(name: str, value: np.ndarray, head_dim: int) -> np.ndarray:
    value = np.asarray(value, np.float32)
    if "/qkv/" in name:
        value = value[_qkv_order(value.shape[0], head_dim)].reshape(3, -1, *value.shape[1:])
    return np.moveaxis(value, -1, 0) if name.endswith("kernel") else value


def _to_torch(name: str, value: np.ndarray, head_dim: int) -> np.ndarray:
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
