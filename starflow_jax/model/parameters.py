"""Parameters of a config: fresh ones, their shapes, a checkpoint's, and the views that the flow's methods take."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from flax import traverse_util

from starflow_jax import sharding
from starflow_jax.config import Config, Model, Text
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.model.text import text_encoder
from starflow_jax.nn.transformer import unstacked
from starflow_jax.sharding import current_mesh

with epy.lazy_imports():
    from starflow_jax.checkpoints import parameters as stored

# {"flow", "denoiser" (where there is one), "text" (where it is trained)}, and beside them "control" and "draft"
Params = dict[str, Any]
Convert = Callable[[str, jax.Array], Any]  # (name, parameter) -> what is kept of it


def model_fingerprint(config: Config) -> dict[str, Any]:
    """What a checkpoint's parameters depend on; a workdir holds one such model."""
    model = dataclasses.asdict(config.model)
    for name in ("dtype", "remat", "sequence_parallel", "unroll_layers"):
        del model[name]
    text = dataclasses.asdict(config.text)
    del text["weights"]  # a path
    # Models from before these settings, which hold nothing of them, are as their defaults say.
    for section, name, default in ((model, "reference_noise", Model.reference_noise),
                                   (text, "metadata", Text.metadata)):
        if section[name] == default:
            del section[name]
    codec = {name: getattr(config.codec, name) for name in ("kind", "stride", "time_stride", "later_frames_scale")}
    return json.loads(json.dumps({"model": model, "text": text, "codec": codec}))


def flow_variables(params: Params) -> dict[str, Any]:
    """What STARFlow's methods take: the flow's parameters and the denoiser's."""
    denoiser = {"denoiser": params["denoiser"]} if "denoiser" in params else {}
    return {"params": {**params["flow"], **denoiser}}


def decoding_variables(params: Params) -> dict[str, Any]:
    """What decoding takes: the flow's parameters alone."""
    return {"params": params["flow"]}


def shallow_variables(params: Params) -> dict[str, Any]:
    """What the shallow blocks take: theirs alone."""
    return {"params": {name: part for name, part in params["flow"].items() if name != "deep"}}


def inference_params(config: Config, params: Params) -> Params:
    """Parameters as sampling uses them: the flow's layers one by one where the config unrolls them, since on a
    CPU XLA copies a layer's weights out of a stack at each use. Sharded ones stay stacked, as their shardings are."""
    if not config.model.unroll_layers or current_mesh() is not None:
        return params
    unrolled: Params = {name: _unstacked(params[name]) for name in ("flow", "draft") if name in params}
    if "control" in params:
        unrolled["control"] = {**params["control"], "layers": _one_by_one(params["control"]["layers"])}
    return {**params, **unrolled}


_unstacked = jax.jit(unstacked)


@jax.jit
def _one_by_one(stack: Any) -> tuple[Any, ...]:
    """A control module's stack of layers as a tuple, which it may be already."""
    if isinstance(stack, tuple):
        return stack
    return tuple(jax.tree.map(lambda leaf, layer=layer: leaf[layer], stack)
                 for layer in range(len(jax.tree.leaves(stack)[0])))


def init_params(config: Config, key: jax.Array) -> Params:
    """Fresh parameters; pure, so that jax.eval_shape gives a full-size model's shapes without its memory."""
    model = config.model
    flow_key, text_key = jax.random.split(key)
    x = jnp.zeros((1, model.frames, model.height, model.width, model.channels))
    text = jnp.zeros((1, model.text_length, model.text_dim)) if model.text_length else None
    flow = dict(STARFlow(model).init(flow_key, x, text)["params"])
    params: Params = {}
    if "denoiser" in flow:
        params["denoiser"] = flow.pop("denoiser")
    params["flow"] = flow
    if config.text.encoder == "trained" and model.text_length:
        ids = jnp.zeros((1, model.text_length), jnp.int32)
        params["text"] = text_encoder(config).init(text_key, ids)["params"]
    return params


def placed_params(params: Params, convert: Convert | None = None, dtype: Any = None) -> Params:
    """Parameters in host memory on the mesh in force. convert: see `restore_params`. dtype: of the layers' matrices;
    None: as they are."""
    mesh = current_mesh()

    def kept(path: Any, leaf: Any, place: Any) -> Any:
        name = sharding.parameter_name(path)
        placed = jax.device_put(np.asarray(leaf, dtype) if sharding.is_layer_matrix(name) else leaf, place)
        return convert(name, placed) if convert else placed

    places = sharding.parameter_shardings(params, mesh) if mesh else jax.tree.map(lambda _: None, params)
    return jax.tree_util.tree_map_with_path(kept, params, places)


def restored_params(config: Config, folder: Path, convert: Convert | None = None, named: str = "") -> Params:
    """The averaged parameters of a checkpoint whose names ("flow/deep/...") begin as a pattern says, on the mesh in
    force, the layers' matrices in model.dtype. convert, errors: see `restore_params`."""
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    mesh = current_mesh()
    if mesh:
        abstract = sharding.abstract(abstract, mesh)
    abstract = sharding.layers_as(abstract, jnp.dtype(config.model.dtype))
    wanted = {name: leaf for name, leaf in traverse_util.flatten_dict(abstract, sep="/").items()
              if re.match(named, name)}
    return stored.restore_params(folder, traverse_util.unflatten_dict(wanted, sep="/"), convert)
