"""Parameters of a configuration: fresh ones, their shapes, and the views that the flow's methods take."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from starflow_jax.config import Config
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.nn.transformer import unstacked
from starflow_jax.text.pretrained import encoder_config
from starflow_jax.text.t5 import T5Config, T5Encoder

Params = dict[str, Any]  # {"flow", "denoiser" (where there is one), "text" (where it is trained)}



def model_fingerprint(config: Config) -> dict[str, Any]:
    """What a checkpoint's parameters depend on; a workdir holds one such model."""
    model = dataclasses.asdict(config.model)
    for name in ("dtype", "remat", "sequence_parallel", "unroll_layers"):
        del model[name]
    text = dataclasses.asdict(config.text)
    del text["weights"]  # where they lie
    codec = {name: getattr(config.codec, name) for name in ("kind", "stride", "time_stride", "later_frames_scale")}
    return json.loads(json.dumps({"model": model, "text": text, "codec": codec}))


def build_flow(config: Config) -> STARFlow:
    return STARFlow(config.model)


def build_text_encoder(config: Config) -> T5Encoder:
    """The small T5 that is trained along with the flow, or the frozen one of text.weights."""
    text = config.text
    if text.encoder == "frozen":
        t5 = encoder_config(Path(text.weights), config.model.text_dim)
        return T5Encoder(t5, dtype=jnp.dtype(config.model.dtype))
    t5 = T5Config(vocab_size=text.vocab_size, d_model=text.d_model, d_kv=text.d_kv, d_ff=text.d_ff,
                  num_layers=text.layers, num_heads=text.heads)
    return T5Encoder(t5, dtype=jnp.dtype(config.model.dtype))


def flow_variables(params: Params) -> dict[str, Any]:
    """What STARFlow's methods take: the flow's parameters and the denoiser's."""
    denoiser = {"denoiser": params["denoiser"]} if "denoiser" in params else {}
    return {"params": {**params["flow"], **denoiser}}


def decoding_variables(config: Config, params: Params) -> dict[str, Any]:
    """What decoding takes, the flow's parameters; their layers one by one where the configuration unrolls them."""
    variables = {"params": params["flow"]}
    return jax.jit(unstacked)(variables) if config.model.unroll_layers else variables


def init_params(config: Config, key: jax.Array) -> Params:
    """Fresh parameters; pure, so that jax.eval_shape gives a full-size model's shapes without its memory."""
    model = config.model
    flow_key, text_key = jax.random.split(key)
    x = jnp.zeros((1, model.frames, model.height, model.width, model.channels))
    text = jnp.zeros((1, model.text_length, model.text_dim)) if model.text_length else None
    flow = dict(build_flow(config).init(flow_key, x, text)["params"])
    params: Params = {}
    if "denoiser" in flow:
        params["denoiser"] = flow.pop("denoiser")
    params["flow"] = flow
    if config.text.encoder == "trained" and model.text_length:
        ids = jnp.zeros((1, model.text_length), jnp.int32)
        params["text"] = build_text_encoder(config).init(text_key, ids)["params"]
    return params
