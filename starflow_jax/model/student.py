"""The smaller deep block that train.target=student trains beside a model: what it begins with, and how it is drafted
with. Its sizes are the config's model.deep_layers and model.deep_width; all else is the model's that it is beside, the
teacher's."""

import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from flax import traverse_util

from starflow_jax.config import Config, Model, UserError
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.model.beside import checksum_of, read_alone, read_checkpoint, save_alone, shapes_of, stored_beside
from starflow_jax.model.parameters import Convert, Params, init_params, placed_params, restored_params

with epy.lazy_imports():
    from starflow_jax.checkpoints import checksums

Deep = dict[str, Any]  # parameters of a deep block, those of its layers stacked
DEEP = "flow/deep/"  # begins their names


def fresh_block(config: Config, key: jax.Array) -> Params:
    """{"flow": {"deep": parameters}}, random, float32."""
    return {"flow": {"deep": init_params(config, key)["flow"]["deep"]}}


def with_block(_: Config, frozen: Params, trained: Params) -> Params:
    """The model's parameters: those of the teacher with the smaller block in place of its own."""
    return {**frozen, "flow": {**frozen["flow"], **trained["flow"]}}


def flow_of(model: Model, deep: Deep) -> STARFlow:
    """The flow of a model whose deep block has such parameters, whatever its sizes are in `model`."""
    layers = deep["transformer"]["layers"]["layer"]
    depth = len(layers) if isinstance(layers, tuple) else layers["proj"]["bias"].shape[0]
    return STARFlow(dataclasses.replace(model, deep_layers=depth, deep_width=deep["proj_in"]["bias"].shape[0]))


@dataclasses.dataclass(frozen=True)
class Draft:
    """A student's block as it lies in its workdir or in a file, for the model that it was trained beside to start from.
    """

    model: Model  # its sizes
    read: Callable[[Convert | None], Params]  # {"deep": parameters}, as `restored_params` gives them
    backbone: str  # beside.fingerprint_of the teacher
    source: str
    checksum: str  # equal for equal parameters


class Kept(NamedTuple):
    """Which parts of a teacher's deep block a smaller one begins with: indices, each row ascending."""

    layers_l: np.ndarray
    channels_d: np.ndarray  # of the hidden states, the same in all layers
    heads_lh: np.ndarray  # of each layer that is kept
    units_lm: np.ndarray  # of its MLP's hidden ones


class Magnitudes(NamedTuple):
    """Mean absolute activations of a deep block's layers."""

    channels_LD: Any  # of what both norms of a layer give
    heads_LH: Any  # of what attention gives
    units_LM: Any  # of the MLP's hidden units


def chosen_layers(config: Config, teacher: Model) -> np.ndarray:
    """Which of the teacher's layers the student begins with: student.layers, or evenly spaced ones. Raises UserError
    where the teacher does not have them, and for a student that is larger than it."""
    model, settings = config.model, config.student
    for name in ("deep_layers", "deep_width"):
        most = getattr(teacher, name)
        model.require(name, getattr(model, name) <= most, f"a student begins with parts of its teacher, which has "
                      f"{most}; make it smaller, or set student.start=random")
    layers = settings.chosen_layers or tuple(
        int(place) for place in np.linspace(0, teacher.deep_layers - 1, model.deep_layers).round())
    settings.require("layers", layers[-1] < teacher.deep_layers,
                     f"the teacher's layers are 0 to {teacher.deep_layers - 1}")
    return np.array(layers)


def kept_parts(layers_l: np.ndarray, model: Model, teacher: Model, found: Magnitudes | None) -> Kept:
    """Those of the largest magnitudes in the layers that are kept. found: None for a student as wide as its teacher, of
    which nothing is left out."""
    if found is None:
        heads, width = teacher.deep_width // teacher.head_dim, teacher.deep_width
        found = Magnitudes(*(np.ones((teacher.deep_layers, size)) for size in (width, heads, 4 * width)))
    channels_D = found.channels_LD[layers_l].mean(axis=0)
    return Kept(layers_l, _largest(channels_D, model.deep_width),
                _largest(found.heads_LH[layers_l], model.deep_width // model.head_dim),
                _largest(found.units_LM[layers_l], 4 * model.deep_width))


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest along the last axis, ascending; of equal ones the first."""
    return np.sort(np.argsort(-values, axis=-1, kind="stable")[..., :count], axis=-1)


def cut(deep: Deep, kept: Kept, head_dim: int) -> Deep:
    """The parts of a deep block's parameters that are kept, float32: rows and columns of its matrices, and of the
    projections into it and out of it."""
    channels = jnp.asarray(kept.channels_d)
    columns_lw = (kept.heads_lh[:, :, None] * head_dim + np.arange(head_dim)).reshape(len(kept.heads_lh), -1)

    def dense(of: Any, rows: Any, columns: Any) -> Any:
        return {"kernel": of["kernel"][rows][..., columns], "bias": of["bias"][..., columns]}

    def of_layer(layer: Any, columns: jax.Array, units: jax.Array) -> Any:
        norms = {name: layer[name] for name in ("attention_norm", "mlp_norm")}
        return {**jax.tree.map(lambda leaf: leaf[channels], norms),
                "qkv": dense(layer["qkv"], channels, columns), "proj": dense(layer["proj"], columns, channels),
                "mlp_in": dense(layer["mlp_in"], channels, units), "mlp_out": dense(layer["mlp_out"], units, channels)}

    layers = jax.tree.map(lambda leaf: leaf[kept.layers_l], deep["transformer"]["layers"]["layer"])
    everything = slice(None)
    found: Deep = {
        **{name: dense(deep[name], everything, channels) for name in ("proj_in", "proj_text") if name in deep},
        "sos": deep["sos"],
        "transformer": {"layers": {"layer": jax.vmap(of_layer)(layers, jnp.asarray(columns_lw),
                                                               jnp.asarray(kept.units_lm))},
                        "final_norm": {"weight": deep["transformer"]["final_norm"]["weight"][channels]}},
        "proj_out": dense(deep["proj_out"], channels, everything)}
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found)


def read_draft(config: Config, own: Config | None) -> Draft:
    """The block of sample.draft, a workdir with settings of its own, or what `save_block` wrote. Raises UserError where
    it holds none, and where it is damaged."""
    path = Path(config.sample.draft)
    if own is None:
        return _draft_in(config, path)
    own = dataclasses.replace(own, sample=dataclasses.replace(own.sample, checkpoint=config.sample.checkpoint),
                              model=dataclasses.replace(own.model, dtype=config.model.dtype))
    folder, backbone = stored_beside(path, own)
    return Draft(own.model, lambda convert: restored_params(own, folder, convert, DEEP)["flow"], backbone,
                 f"drafts of {path}, step {folder.name}",
                 f"{zlib.crc32((folder / checksums.CHECKSUMS).read_bytes()):08x}")


def save_block(config: Config, workdir: Path, path: Path, dtype: Any = None) -> str:
    """Write a workdir's smaller block, and what it was trained beside, as one safetensors file; returns what it was.
    dtype: None: as it is kept."""
    found = read_checkpoint(workdir, config.sample.checkpoint == "best", "student")
    save_alone(config, path, found.within(DEEP), found.backbone, dtype)
    return found.source


def _draft_in(config: Config, path: Path) -> Draft:
    """Of a file."""
    deep, backbone = read_alone(path, "student")
    try:
        model = flow_of(config.model, deep).config
        own = dataclasses.replace(config, model=model)
        expected = jax.eval_shape(lambda: fresh_block(own, jax.random.key(0)))["flow"]["deep"]
        fits = shapes_of(deep) == shapes_of(expected)
    except (KeyError, TypeError, IndexError, AttributeError, UserError):  # of sizes that no model has
        fits = False
    if not fits:
        raise UserError(f"{path}: its smaller deep block belongs to another model")
    dtype = jnp.dtype(config.model.dtype)
    return Draft(model, lambda convert: placed_params({"flow": {"deep": deep}}, convert, dtype)["flow"], backbone,
                 f"drafts of {path}", checksum_of(traverse_util.flatten_dict(deep, sep="/")))
