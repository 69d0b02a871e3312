"""LoRA factors as PEFT keeps them: adapter_model.safetensors under the names of the release's modules, and
adapter_config.json beside it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from starflow_jax.checkpoints.released import flow_shapes, from_torch, released_names, to_torch
from starflow_jax.config import Model, UserError
from starflow_jax.io.checksums import check_file, checksums_of
from starflow_jax.io.files import read_json, write_text
from starflow_jax.io.tensor_files import open_safetensors, report_misfits, write_safetensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BACKBONE = "starflow_backbone"  # the name in the file's metadata of the fingerprint of the model it belongs to
REFUSED = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save", "layer_replication")
Pairs = Mapping[str, tuple[Any, Any]]  # {name of a stacked matrix: (A (L, in, r), B (L, r, *features))}


def _modules(model: Model) -> dict[str, tuple[str, int]]:
    """{name of a matrix of stacked layers: (the release's module, with {layer}, and how many layers)}."""
    return {ours if ours.startswith("denoiser/") else f"flow/{ours}": (theirs.removesuffix(".weight"), layers)
            for ours, theirs, layers in released_names(model) if layers and ours.endswith("/kernel")}


def _names(module: str, layer: int) -> tuple[str, str]:
    where = f"base_model.model.{module.format(layer=layer)}"
    return f"{where}.lora_A.weight", f"{where}.lora_B.weight"


def write_peft(target: Path, factors: Pairs, model: Model, *, rank: int, alpha: float, backbone: str,
               base: str) -> dict[str, np.ndarray]:
    """Write factors, without their scale alpha / rank, as the file `target` with adapter_config.json beside it; returns
    the tensors. backbone, base: a fingerprint and a name of the model that they belong to."""
    tensors, modules, known = {}, [], _modules(model)
    for name, (a, b) in factors.items():
        module, layers = known[name]
        for layer in range(layers):
            down, up = _names(module, layer)
            tensors[down] = np.ascontiguousarray(np.asarray(a[layer]).T)
            tensors[up] = np.ascontiguousarray(to_torch(name, np.asarray(b[layer]), model.head_dim))
            modules.append(module.format(layer=layer))
    with checksums_of(target.parent, [target.name, CONFIG]):
        write_safetensors(target, tensors, {"format": "pt", BACKBONE: backbone})
        write_text(target.with_name(CONFIG), json.dumps({
            "peft_type": "LORA", "base_model_name_or_path": base, "task_type": None, "inference_mode": True, "r": rank,
            "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
            "target_modules": sorted(modules)}, indent=1))
    return tensors


def read_peft(path: Path, model: Model) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], str]:
    """({name of a stacked matrix: (A, B with its scale)}, the fingerprint of their model, "" where the file has none)
    of a folder or file; layers without factors have zeros.

    Raises UserError where it can't be read, is of another model, or of a kind that factors alone do not say.
    """
    file = path / WEIGHTS if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{path}: is neither a workdir of train.target=lora nor PEFT's {WEIGHTS} or a folder with it")
    tensors, scale = open_safetensors(file), _scale(file.with_name(CONFIG))
    with safe_open(str(file), framework="numpy") as opened:
        backbone = (opened.metadata() or {}).get(BACKBONE, "")
    found, used, shapes = {}, set(), flow_shapes(model)
    for name, (module, layers) in _modules(model).items():
        names = {layer: _names(module, layer) for layer in range(layers)}
        names = {layer: pair for layer, pair in names.items() if set(pair) <= set(tensors)}
        if names:
            used |= {name for pair in names.values() for name in pair}
            pairs = {layer: (np.asarray(tensors[down], np.float32), np.asarray(tensors[up], np.float32))
                     for layer, (down, up) in names.items()}
            found[name] = _stacked(file, name, pairs, shapes[name.removeprefix("flow/")], scale, model.head_dim)
    report_misfits(str(file), missing=[] if found else ["any lora_A and lora_B"],
                   unexpected=sorted(set(tensors) - used), misshapen=[])
    return found, backbone


def _stacked(file: Path, name: str, pairs: Mapping[int, tuple[np.ndarray, np.ndarray]], shape: tuple[int, ...],
             scale: Any, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    layers, inputs, *features = shape
    rank = next(iter(pairs.values()))[0].shape[0]
    a, b = np.zeros((layers, inputs, rank), np.float32), np.zeros((layers, rank, *features), np.float32)
    for layer, (down, up) in pairs.items():
        if down.shape != (rank, inputs) or up.shape != (math.prod(features), rank):
            raise UserError(f"{file}: belongs to another model: the factors of layer {layer} of {name} have shapes "
                            f"{down.shape} and {up.shape}, not {(rank, inputs)} and {(math.prod(features), rank)}")
        a[layer], b[layer] = down.T, scale(rank) * from_torch(name, up, head_dim)
    return a, b


def _scale(path: Path) -> Any:
    """rank -> what the product of factors is multiplied by."""
    check_file(path)
    try:
        facts = read_json(path)
        kind, alpha, root = facts["peft_type"], float(facts["lora_alpha"]), bool(facts.get("use_rslora"))
        refused = [name for name in REFUSED if facts.get(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: can't be read as the settings of LoRA factors ({error}); PEFT writes it beside "
                        f"{WEIGHTS}") from error
    if kind != "LORA" or refused:
        raise UserError(f"{path}: {f'peft_type={kind}' if kind != 'LORA' else ', '.join(refused)}: only plain LoRA "
                        "can be read")
    return lambda rank: alpha / (math.sqrt(rank) if root else rank)
