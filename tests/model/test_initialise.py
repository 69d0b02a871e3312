"""Stages that begin with the last one's checkpoint: whole, grown, sharded; what is found and what is refused."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from starflow_jax.checkpoints.parameters import restore_params, stored_params
from starflow_jax.checkpoints.training import Checkpoints
from starflow_jax.config import Codec, Config, Convert, Model, Text, Train, UserError
from starflow_jax.model.initialise import inherited_system, initial_params, is_ours, refuse_converted
from starflow_jax.model.parameters import init_params, model_fingerprint
from starflow_jax.modes.convert import convert
from starflow_jax.training.state import TrainState
from tests.helpers import tiny_model

SMALL = tiny_model(shallow_layers=(1,), text_dim=8)
LARGE = dataclasses.replace(SMALL, deep_width=60, deep_layers=3)


def config_of(model: Model = SMALL, init_from: Path | str = "", source: Path | str = "") -> Config:
    return Config(
        name="test", model=model, codec=Codec(), convert=Convert(source=str(source)),
        text=Text(encoder="trained", vocab_size=16, layers=1, d_model=8, d_kv=4, d_ff=8, heads=2),
        train=Train(init_from=str(init_from), steps=2, warmup_steps=1))


@functools.cache
def abstract_params(config: Config) -> Any:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def random_params(config: Config, seed: int) -> Any:
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape, np.float32)),
                        abstract_params(config))


def assert_equal(ours: Any, expected: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def assert_grown(ours: Any, small: Any) -> None:
    """SMALL's parameters as LARGE's: what stays, and what the rule for 40 -> 60 channels and 2 -> 3 layers gives by
    hand. That the whole is the same function is tested with growth itself."""
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, abstract_params(config_of(LARGE)))
    new, old = (traverse_util.flatten_dict(jax.tree.map(np.asarray, tree), sep="/") for tree in (ours, small))
    for name in old:
        if not name.startswith("flow/deep/"):
            np.testing.assert_array_equal(new[name], old[name])
    scale, layer = math.sqrt(60 / 40), "flow/deep/transformer/layers/layer/"
    kernel = old["flow/deep/proj_in/kernel"]
    mean = kernel.mean(axis=1, keepdims=True)
    expected = np.concatenate([scale * kernel - (scale - 1) * mean, np.tile(mean, 20)], axis=1)
    np.testing.assert_allclose(new["flow/deep/proj_in/kernel"], expected, rtol=1e-5, atol=1e-6)
    hidden = old[f"{layer}mlp_in/bias"]  # 4 x 40
    np.testing.assert_array_equal(new[f"{layer}mlp_in/bias"], np.pad(hidden[[0, 0, 1]], ((0, 0), (0, 80))))
    for part in ("proj", "mlp_out"):  # the added layer, a copy of the first, adds nothing
        grown = new[f"{layer}{part}/kernel"]
        assert grown[0].any() and not grown[1].any() and grown[2].any()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    """(workdir of a training run with steps 1 and 2, averaged parameters of each)."""
    workdir, config = tmp_path_factory.mktemp("trained"), config_of()
    checkpoints = Checkpoints(workdir / "checkpoints", keep=3, model_fingerprint=model_fingerprint(config))
    params = {step: random_params(config, step) for step in (1, 2)}
    for step, ema in params.items():
        other = random_params(config, 10 + step)
        state = TrainState(
            step=jnp.int32(step), params=other, ema=ema, flow_optimizer={"mu": other}, denoiser_optimizer=(),
            norm_mean=jnp.float32(0), skipped=jnp.int32(0), key=jnp.zeros(2, jnp.uint32))
        checkpoints.save(step, state, {}, None)
    checkpoints.close()
    return workdir, params


def test_training_begins_with_the_averaged_parameters(trained: tuple[Path, dict], tmp_path: Path) -> None:
    workdir, params = trained
    for source, step in ((workdir, 2), (workdir / "checkpoints" / "1", 1)):
        assert is_ours(source)
        ours, changed = initial_params(config_of(init_from=source), jax.random.key(0))
        assert changed == []
        assert_equal(ours, params[step])
    assert not is_ours(tmp_path)
    with pytest.raises(UserError, match="is neither a workdir that holds a checkpoint"):
        initial_params(config_of(init_from=tmp_path), jax.random.key(0))


def test_without_a_source_they_are_fresh() -> None:
    ours, changed = initial_params(config_of(), jax.random.key(3))
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, abstract_params(config_of())) and changed == []
    deep = jax.tree.map(np.asarray, ours["flow"]["deep"])
    assert deep["sos"].any() and not deep["proj_out"]["kernel"].any()


@pytest.mark.parametrize("model", [SMALL, LARGE], ids=["whole", "grown"])
def test_on_a_mesh(model: Model, trained: tuple[Path, dict]) -> None:
    workdir, params = trained
    config = config_of(model, init_from=workdir)
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    shardings = jax.tree.map(lambda leaf: NamedSharding(
        mesh, PartitionSpec("fsdp") if leaf.shape[0] % 2 == 0 else PartitionSpec()), abstract_params(config_of(model)))
    ours, changed = initial_params(config, jax.random.key(0), shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, ours) == shardings
    if model == SMALL:
        assert_equal(ours, params[2])
        assert changed == []
    else:
        assert_grown(ours, params[2])
        assert [row[0] for row in changed] == ["deep_layers", "deep_width"]


def test_a_workdir_is_converted_by_growing(trained: tuple[Path, dict], tmp_path: Path) -> None:
    workdir, params = trained
    convert(config_of(LARGE, source=workdir), tmp_path / "large")
    ours, changed = initial_params(config_of(LARGE, init_from=tmp_path / "large"), jax.random.key(0))
    assert_grown(ours, params[2])
    facts = json.loads((tmp_path / "large" / "converted.json").read_text())
    assert facts["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(ours)) and changed == []
    assert facts["changes"][0] == {"setting": "deep_layers", "from": "2", "to": "3", "effect": "same function"}
    with pytest.raises(UserError, match=r"train in another --workdir with --config\.train\.init_from="):
        refuse_converted(tmp_path / "large")
    refuse_converted(workdir)
    refuse_converted(tmp_path / "none")


def test_a_damaged_checkpoint_is_passed_over(trained: tuple[Path, dict], tmp_path: Path) -> None:
    workdir, params = trained
    copied = Path(shutil.copytree(workdir, tmp_path / "copy"))
    (copied / "checkpoints" / "2" / "state" / "manifest.ocdbt").write_bytes(b"")
    assert_equal(initial_params(config_of(init_from=copied), jax.random.key(0))[0], params[1])
    (copied / "checkpoints" / "1" / "checksums").unlink()
    with pytest.raises(UserError, match="all checkpoints are damaged"):
        initial_params(config_of(init_from=copied), jax.random.key(0))


def test_another_text_encoder_is_named(trained: tuple[Path, dict]) -> None:
    config = config_of(init_from=trained[0])
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, d_ff=12, layers=2))
    with pytest.raises(UserError, match=r"misshapen \d+: .*text/layers/feed_forward/wi_0/kernel \(1, 8, 8\) instead "
                                        r"of \(2, 8, 12\)"):
        initial_params(config, jax.random.key(0))
    frozen = dataclasses.replace(config, text=Text(encoder="frozen"))
    assert "text" not in initial_params(frozen, jax.random.key(0))[0]


def test_only_the_parameters_are_read(trained: tuple[Path, dict], tmp_path: Path) -> None:
    """bfloat16 on request; the optimizer's state is not among what is read."""
    workdir, params = trained
    held = stored_params(workdir / "checkpoints" / "2")
    assert set(held) == set(traverse_util.flatten_dict(params[2], sep="/"))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params[2])
    assert_equal(restore_params(workdir / "checkpoints" / "2", abstract),
                 jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params[2]))


def test_without_a_system_there_is_none_to_inherit(trained: tuple[Path, dict]) -> None:
    assert inherited_system(config_of()) is None
    assert inherited_system(config_of(init_from=trained[0])) is None
