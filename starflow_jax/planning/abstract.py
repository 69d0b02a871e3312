"""A model as `load_model` places it on a mesh, in shapes."""

import collections
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh

from starflow_jax import sharding
from starflow_jax.codec.patch import PatchCodec
from starflow_jax.config import Config
from starflow_jax.model.beside import SUFFIX
from starflow_jax.model.codec import patch_shape
from starflow_jax.model.control import fresh_module, packaged_module, read_module
from starflow_jax.model.lora import Factors, adapted_kernels, kernel_shapes, read_named
from starflow_jax.model.own_settings import PRETRAINED, settings_of
from starflow_jax.model.quantize import quantize_params
from starflow_jax.model.store import abstract_params, drafting_model, has_packaged_module
from starflow_jax.model.text import text_encoder
from starflow_jax.nn.lora import Adapted
from starflow_jax.planning import codec as plan_codec
from starflow_jax.text.pretrained import FLAN_T5_XL
from starflow_jax.text.t5 import T5Encoder


def abstract_text_encoder(config: Config) -> T5Encoder:
    """The encoder of text.weights; where no folder is named, a frozen one has the depth of flan-t5-xl."""
    if config.text.encoder == "frozen" and not config.text.weights:
        sizes = dataclasses.replace(FLAN_T5_XL, d_model=config.model.text_dim)
        return T5Encoder(sizes, dtype=jnp.dtype(config.model.dtype))
    return text_encoder(config)


def abstract_model(config: Config, mesh: Mesh) -> tuple[dict[str, Any], Any]:
    """(parameters as `load_model` places them on the mesh, the codec), in shapes."""
    params = _with_factors(config, abstract_params(config, mesh, config.sample.weights), mesh)
    if config.sample.draft:
        own = dataclasses.replace(config, model=drafting_model(config))
        params["draft"] = {"deep": abstract_params(own, mesh, config.sample.weights)["flow"]["deep"]}
    params |= sharding.abstract(_abstract_control(config), mesh)
    if config.text.encoder == "frozen" and config.model.text_length:
        encoder, ids = abstract_text_encoder(config), jax.ShapeDtypeStruct((1, config.model.text_length), jnp.int32)
        shapes = jax.eval_shape(lambda ids: encoder.init(jax.random.key(0), ids)["params"], ids)
        shapes = sharding.layers_as(shapes, jnp.dtype(config.model.dtype))
        if config.sample.weights:
            params |= sharding.abstract(jax.eval_shape(
                partial(quantize_params, weights=config.sample.weights), {"text": shapes}), mesh)
        else:
            params["text"] = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                                  sharding=sharding.spread_sharding(leaf.shape, mesh)), shapes)
    return params, replicated(abstract_codec(config), mesh)


def _with_factors(config: Config, params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The parameters with the LoRA factors that `load_model` keeps apart, in shapes. Merged ones change none."""
    if config.sample.merge_lora:
        return params
    ranks = collections.Counter(dict.fromkeys(adapted_kernels(config), config.lora.rank)
                                if config.train.target == "lora" else {})
    for lora in read_named(config):
        ranks.update({name: factors.lora_a.shape[-1] for name, factors in lora.factors.items()})
    shapes, flat = kernel_shapes(config.model), traverse_util.flatten_dict(params, sep="/")
    for name, rank in ranks.items():
        layers, inputs, *features = shapes[name]
        factors = sharding.abstract({name: Factors(
            jax.ShapeDtypeStruct((layers, inputs, rank), jnp.float32),
            jax.ShapeDtypeStruct((layers, rank, *features), jnp.float32))}, mesh)
        flat[name] = Adapted(flat[name], *factors[name])
    return traverse_util.unflatten_dict(flat, sep="/")


def _abstract_control(config: Config) -> dict[str, Any]:
    """The control module that `load_model` adds to the parameters, in shapes; of the package's only where there is a
    camera, without which it has no part in what runs."""
    named = Path(config.sample.control)
    if named.suffix == SUFFIX:
        module = read_module(config, named, place=False)
        return {"control": jax.eval_shape(lambda: module.params)} if module else {}
    if config.sample.control:
        config = dataclasses.replace(config, control=settings_of(named).control)
    elif config.train.target != "control":
        asked = config.sample.camera and has_packaged_module(config)
        packaged = packaged_module(config, PRETRAINED, place=False) if asked else None
        return {"control": jax.eval_shape(lambda: packaged.params)} if packaged else {}
    return jax.eval_shape(lambda: fresh_module(config, jax.random.key(0)))


def replicated(tree: Any, mesh: Mesh) -> Any:
    """The shapes of a tree whose arrays all devices have."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)),
                        tree)


def abstract_codec(config: Config) -> Any:
    """The config's codec in shapes."""
    if config.codec.kind != "patch":
        return plan_codec.abstract_codec(config)
    shape = patch_shape(config)
    mean_P, basis_PC, scale = (jax.ShapeDtypeStruct(size, jnp.float32) for size in (
        (shape.pixels,), (shape.pixels, config.model.channels), ()))
    return PatchCodec(mean_P, basis_PC, scale, shape)  # type: ignore[arg-type]  # shapes in place of arrays
