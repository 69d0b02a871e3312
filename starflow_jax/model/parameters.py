"""Parameters of a config: fresh ones, their shapes, and the views that the flow's methods take."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp

from starflow_jax.config import Config, Model, Text
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.model.text import text_encoder
from starflow_jax.nn.transformer import unstacked
from starflow_jax.sharding import current_mesh

Params = dict[str, Any]  # {"flow", "denoiser" (where there is one), "text" (where it is trained)}


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
    whole = config.model.unroll_layers and current_mesh() is None
    return {**params, "flow": _unstacked(params["flow"])} if whole else params


_unstacked = jax.jit(unstacked)


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
