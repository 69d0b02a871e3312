"""What training starts from: fresh parameters, or those of an earlier stage, grown where this model is larger."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from starflow_jax.checkpoints.checksums import first_whole
from starflow_jax.checkpoints.growth import RESHAPING, Change, changes, grow
from starflow_jax.checkpoints.parameters import newest_first, restore_params, stored_params
from starflow_jax.config import Config, Model, UserError
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.io.checksums import check_file
from starflow_jax.io.files import read_json
from starflow_jax.io.tensor_files import check_shapes
from starflow_jax.model.calibration import Calibration
from starflow_jax.model.parameters import Params, init_params
from starflow_jax.model.system import System, load_system


def initial_params(config: Config, key: jax.Array, shardings: Any = None) -> tuple[Params, list[Change]]:
    """Parameters at the start of training, float32, and what was changed in those of train.init_from.

    shardings: a pytree of shardings shaped like the parameters; None: this process's first device. Raises UserError
    where train.init_from holds no model that can become this one.
    """
    make = partial(init_params, config)
    if not config.train.init_from:
        return jax.jit(make, out_shardings=shardings)(key), []
    abstract = jax.eval_shape(make, key)
    if shardings is not None:
        abstract = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings)
    source = Path(config.train.init_from)
    arrays, changed = inherited_arrays(config, source)
    flat = traverse_util.flatten_dict(abstract, sep="/")
    check_shapes(str(source), arrays, {name: leaf.shape for name, leaf in flat.items()})
    if not any(name in RESHAPING for name, *_ in changed):
        return restore_params(whole_checkpoint(source), abstract), changed
    # Grown on the host, one array at a time; every process makes all of it and keeps its part.
    return traverse_util.unflatten_dict({name: _placed(arrays[name], leaf) for name, leaf in flat.items()},
                                        sep="/"), changed


def _placed(array: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    value = np.asarray(array, leaf.dtype)
    if leaf.sharding is None:
        return jnp.asarray(value)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])


def inherited_arrays(config: Config, source: Path) -> tuple[dict[str, Any], list[Change]]:
    """({"flow/deep/...": array}, what was changed): the averaged parameters of a workdir or checkpoint as this
    config's; each array is read and grown when it is used. Raises UserError where that can't be."""
    folder = whole_checkpoint(source)
    model = model_of(folder)
    arrays = stored_params(folder)
    if config.text.encoder != "trained":
        arrays = {name: array for name, array in arrays.items() if not name.startswith("text/")}
    changed = changes(model, config.model)
    return grow(arrays, model, config.model, partial(fresh_denoiser, config.model, config.train.seed)), changed


def inherited_system(config: Config) -> System | None:
    """The tokenizer and codec that train.init_from's model was trained with, None where there are none to share."""
    if not config.train.init_from:
        return None
    source = Path(config.train.init_from)
    workdir = source if (source / "checkpoints").exists() else source.absolute().parent.parent
    if not (workdir / "system").exists():
        return None
    # What calibration found holds for the model that it was measured on.
    return dataclasses.replace(load_system(config, workdir / "system"), calibration=Calibration())


def is_ours(source: Path) -> bool:
    """Whether a path is a workdir with checkpoints, or one of its checkpoints."""
    return (source / "checkpoints").is_dir() or (source.name.isdigit() and (source / "state").is_dir())


def whole_checkpoint(source: Path) -> Path:
    """The newest undamaged checkpoint of a workdir, or the checkpoint itself. Raises UserError where there is none."""
    if (source / "checkpoints").is_dir():
        directory = source / "checkpoints"
        step = first_whole(directory, newest_first(directory))
    elif is_ours(source):
        directory = source.absolute().parent
        step = first_whole(directory, [int(source.name)])
    else:
        step = None
    if step is None:
        raise UserError(f"{source}: is neither a workdir that holds a checkpoint nor a checkpoint")
    return directory / str(step)


def model_of(folder: Path) -> Model:
    """The model whose parameters a checkpoint holds. Raises UserError where its model.json can't be read."""
    path = folder.absolute().parent / "model.json"
    check_file(path)
    try:
        settings: dict[str, Any] = read_json(path)["model"]
        return Model(**{**settings, "shallow_layers": tuple(settings["shallow_layers"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: can't be read as a checkpoint's model ({error})") from error


def refuse_converted(workdir: Path) -> None:
    """Raises UserError where a workdir holds nothing but a converted model, which training can't resume from."""
    if (workdir / "converted.json").exists() and newest_first(workdir / "checkpoints") == [0]:
        raise UserError(f"{workdir} holds a converted model, without an optimizer's state to resume from; train in "
                        f"another --workdir with --config.train.init_from={workdir}")


def fresh_denoiser(model: Model, seed: int) -> Mapping[str, Any]:
    """{"denoiser/...": array} at the start of training."""
    x = jnp.zeros((1, 1, model.patch_size, model.patch_size, model.channels))
    text = jnp.zeros((1, model.text_length, model.text_dim)) if model.text_length else None
    init = jax.jit(partial(STARFlow(model).init, method=STARFlow.score))
    return traverse_util.flatten_dict(dict(init(jax.random.key(seed), x, text)["params"]), sep="/")
