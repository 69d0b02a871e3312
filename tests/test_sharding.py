"""One code on any mesh: eight simulated devices give what one device gives."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from configs import t2i, t2v
from starflow_jax import config as settings_of
from starflow_jax import sharding
from starflow_jax.config import UserError, changed, from_config_dict
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.model.control import fresh_module
from starflow_jax.settings.training import OPTIMIZERS
from starflow_jax.training.state import abstract_state, create_state
from tests.conftest import FAST_COMPILATION
from tests.helpers import latents, text, tiny_model
from tests.small_run import ROOT, environment


def xla_flags(devices: int) -> str:
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *FAST_COMPILATION])


def shape_of(*sizes: int) -> AbstractMesh:
    return AbstractMesh(sizes, sharding.AXES)


def sharded_run(folder: Path, *names: str) -> dict:
    """Differences from one device, by mesh and by way to shard the tokens."""
    subprocess.run([sys.executable, "-m", "tests.sharded_run", folder, *names], cwd=ROOT, check=True, timeout=900,
                   env=environment(XLA_FLAGS=xla_flags(8)))
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory) -> dict:
    """One program for all, as each start costs seconds; every axis is in a mesh."""
    return sharded_run(tmp_path_factory.mktemp("sharded"), "1x2x2x2", "ring")


SINGLE_VIDEO = ("2x2x2x1", "1x2x2x2")  # sharded by its heads


def test_training_sampling_and_checkpoints_are_those_of_one_device(eight_devices: dict) -> None:
    check_mesh(eight_devices["1x2x2x2"], "1x2x2x2")


@pytest.mark.slow  # 1x2x2x2 is quick, as is training with `ring` over data
def test_other_meshes(tmp_path: Path) -> None:
    meshes = ("8x1x1x1", "1x8x1x1", "2x2x2x1")
    found = sharded_run(tmp_path, *meshes)
    for mesh in meshes:
        check_mesh(found[mesh], mesh)
    assert [found[mesh]["kernel_part"] for mesh in meshes] == [1, 1 / 8, 1 / 4]


@pytest.mark.slow  # quick: tests/flow/test_steering_computed.py
def test_a_control_modules_training_is_that_of_one_device(tmp_path: Path) -> None:
    found = sharded_run(tmp_path, "control")
    for mesh in ("2x2x2x1", "1x2x2x2"):
        row = found[f"control {mesh}"]
        assert row["state"] < 1e-5 and row["scalars"] < 1e-5 and row["laid_out"], row
        assert row["parts"] == {"qkv": 1 / 4, "out": 1 / 2, "hidden": 1 / 2, "tokens": 1 / 2}


def check_mesh(found: dict, mesh: str) -> None:
    samples = {"many"} | ({"single"} if mesh in SINGLE_VIDEO else set())
    assert {name for name in found if name in ("many", "single")} == samples
    for name in {"state", "scalars"} | samples:
        assert found[name] < 1e-5, (name, found)
    assert found["restored"] == 0  # one device's checkpoint, on this mesh
    assert found["back_on_one"] < 1e-5  # this mesh's, on one device
    assert found["laid_out"]


def test_attention_by_tokens_is_that_of_one_device(eight_devices: dict) -> None:
    check_attention(eight_devices["ring"], {"state", "scalars"})


@pytest.mark.slow  # `ring` is quick, and tests/nn/test_sequence_parallel.py has the values and gradients of each choice
def test_gathered_attention_is_that_of_one_device(tmp_path: Path) -> None:
    check_attention(sharded_run(tmp_path, "all_gather")["all_gather"], {"state", "scalars", "single"})


def check_attention(found: dict, kinds: set[str]) -> None:
    """Training, the denoiser's first layer with a mask of its own; gathered also a sample, over more devices than
    heads."""
    assert set(found) == kinds
    assert all(error < 1e-5 for error in found.values()), found


def test_parameters_are_sharded(eight_devices: dict) -> None:
    """A matrix of a layer over fsdp and tensor, and only over those."""
    parts = {mesh: found["kernel_part"] for mesh, found in eight_devices.items() if "x" in mesh}
    assert parts == {"1x1x1x1": 1, "1x2x2x2": 1 / 4}


def test_one_table_and_no_collisions() -> None:
    assert sharding.spec(("batch", "tokens", "hidden")) == PartitionSpec(("data", "fsdp"), ("sequence",), ("tensor",))
    with pytest.raises(ValueError, match="fsdp"):
        sharding.spec(("batch", "width"))


@pytest.mark.parametrize(("config", "variant"), [
    (t2v, "tiny"), (t2v, "3b"), (t2v, "7b"), (t2i, "tiny"), (t2i, "released")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_models_state_has_its_shardings(config: ModuleType, variant: str, optimizer: str) -> None:
    """On 8 x 4 devices of which only shapes are needed; of the large models, nothing large is left whole."""
    state = abstract_state(changed(from_config_dict(config.get_config(variant)), "train", {"optimizer": optimizer}))
    leaves, _ = jax.tree.flatten_with_path(state)
    shardings = jax.tree.leaves(sharding.parameter_shardings(state, shape_of(1, 8, 4, 1)))
    kept = {}
    for (path, leaf), placed in zip(leaves, shardings, strict=True):
        kept[sharding.parameter_name(path)] = math.prod(placed.shard_shape(leaf.shape)) / max(leaf.size, 1)
    matrices = {name: share for name, share in kept.items() if re.search("layers/layer/.*kernel$", name)}
    assert set(matrices.values()) == {1 / 32} and any("/nu/" in name or "/mu/" in name for name in matrices)
    assert {share for name, share in kept.items() if re.search("flow.*proj_(in|out|text)/kernel$", name)} == {1 / 8}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_control_modules_state_at_full_size_is_sharded(optimizer: str) -> None:
    """On 8 x 4 devices, parameters, averages and moments: what makes queries, keys and values over both axes, the other
    matrices of layers over the first."""
    config = changed(from_config_dict(t2v.get_config("7b")), "train", {"optimizer": optimizer})
    state = jax.eval_shape(lambda: create_state(fresh_module(config, jax.random.key(0)), config.train))
    leaves, _ = jax.tree.flatten_with_path(state)
    shardings = jax.tree.leaves(sharding.parameter_shardings(state, shape_of(1, 8, 4, 1)))
    shares: dict[str, set[float]] = {}
    copies, held = set(), 0
    for (path, leaf), placed in zip(leaves, shardings, strict=True):
        name, size = sharding.parameter_name(path), math.prod(placed.shard_shape(leaf.shape))
        held += size * leaf.dtype.itemsize
        if matrix := re.search(r"(.*)control/layers/(\w+)/kernel$", name):
            copies.add(matrix[1])
            shares.setdefault(matrix[2], set()).add(size / leaf.size)
    assert shares == {"qkv": {1 / 32}, "out": {1 / 8}, "hidden": {1 / 8}, "tokens": {1 / 8}}
    assert {"params/", "ema/"} < copies and any("mu/" in name for name in copies)
    whole = sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) > 63e6 and held < whole / 14


def test_features_of_a_control_module_that_do_not_divide_stay_whole() -> None:
    kernel = jax.ShapeDtypeStruct((2, 12, 3, 80), jnp.float32)
    tree = {"control": {"layers": {"qkv": {"kernel": kernel}}}}
    for fsdp, axis in ((4, ("fsdp",)), (8, None)):
        found, = jax.tree.leaves(sharding.parameter_shardings(tree, shape_of(1, fsdp, 2, 1)))
        assert found.spec == PartitionSpec(None, axis, None, ("tensor",))


def test_a_large_parameter_that_no_pattern_matches_is_named() -> None:
    mesh, small = shape_of(1, 2, 1, 1), jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    tree = {"deep": {"adapter": small}, "text": {"embedding": jax.ShapeDtypeStruct((4096, 1024), jnp.float32)}}
    found = sharding.parameter_shardings(tree, mesh)  # 1 MiB exactly; and what is whole because the table says so
    assert all(one.spec == PartitionSpec() or set(one.spec) == {None} for one in jax.tree.leaves(found))
    tree["deep"]["adapter"] = jax.ShapeDtypeStruct((257, 1024), jnp.float32)
    with pytest.raises(ValueError, match=r"parameter deep/adapter, float32\[257, 1024\].*1.0 MiB"):
        sharding.parameter_shardings(tree, mesh)


def test_a_zero_takes_what_the_others_leave() -> None:
    assert sharding.mesh_shape(settings_of.Mesh(data=1, fsdp=0, tensor=2), 64) == (1, 32, 2, 1)
    with pytest.raises(UserError, match="3 devices|tensor=2"):
        sharding.mesh_shape(settings_of.Mesh(tensor=2), 3)


def test_what_does_not_divide_is_named() -> None:
    model = tiny_model()  # two heads of 20
    sharding.check_model(model, shape_of(1, 2, 2, 1))
    with pytest.raises(UserError, match="mesh.tensor=2, mesh.sequence=2.*2 heads"):
        sharding.check_model(model, shape_of(1, 1, 2, 2))
    sharding.check_model(dataclasses.replace(model, sequence_parallel="all_gather"), shape_of(1, 1, 2, 2))
    with pytest.raises(UserError, match="mesh.fsdp=3"):
        sharding.check_model(model, shape_of(1, 3, 1, 1))
    with pytest.raises(UserError, match="train.batch_size=6.*= 4"):
        sharding.check_batch("train.batch_size", 6, shape_of(2, 2, 2, 1))


def test_what_every_process_holds_is_laid_out() -> None:
    batch = {"latents_BNhwC": np.arange(24.0).reshape(4, 6)}
    assert sharding.lay_out(batch) is batch
    mesh = sharding.make_mesh(settings_of.Mesh(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = sharding.lay_out(batch)["latents_BNhwC"]
        odd = {"latents_BNhwC": np.zeros((3, 2))}
        assert sharding.lay_out(odd) is odd
    assert placed.addressable_shards[0].data.shape == (2, 6)
    np.testing.assert_array_equal(placed, batch["latents_BNhwC"])


def test_what_is_not_trained_is_spread() -> None:
    mesh = sharding.make_mesh(settings_of.Mesh(fsdp=4, data=1), jax.devices()[:4])
    tree = {"table": np.arange(24.0).reshape(3, 8), "odd": np.arange(3.0)}
    spread = sharding.spread(tree, mesh)
    assert spread["table"].addressable_shards[0].data.shape == (3, 2)
    assert spread["odd"].addressable_shards[0].data.shape == (3,)
    for name, value in tree.items():
        np.testing.assert_array_equal(spread[name], value)


def test_only_the_layers_matrices_change_their_dtype() -> None:
    model = tiny_model(denoiser="first_layer", denoiser_layers=1)
    params = jax.eval_shape(STARFlow(model).init, jax.random.key(0), latents(model), text(model))["params"]
    kinds = {sharding.parameter_name(path): leaf.dtype for path, leaf in
             jax.tree_util.tree_flatten_with_path(sharding.layers_as(params, jnp.bfloat16))[0]}
    halved = {name for name, dtype in kinds.items() if dtype == jnp.bfloat16}
    assert halved == {name for name in kinds if "layers/layer" in name and name.endswith("kernel")}
    assert any("qkv" in name for name in halved) and any("denoiser" in name for name in halved)


def test_without_a_mesh_nothing_happens() -> None:
    x = np.ones((2, 3, 4))
    assert sharding.constrain(x, "batch", "tokens", None) is x
    assert sharding.over_heads(lambda q, k, v, past: q, x, x, x, None) is x


def test_what_the_first_process_has_is_what_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes in turn, the second one with what the first one sent."""
    value, sent = {"prompts": ["a käse", ""], "todo": [True, False]}, []
    assert sharding.as_first_process_has_it(value) is value
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharding.multihost_utils, "broadcast_one_to_all", lambda x: sent.append(np.asarray(x)) or x)
    assert sharding.as_first_process_has_it(value) == value and len(sent) == 2
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    of_first = iter(sent[:])

    def received(own: np.ndarray) -> np.ndarray:
        sent_by_first = next(of_first)
        assert np.shape(own) == sent_by_first.shape
        return sent_by_first

    monkeypatch.setattr(sharding.multihost_utils, "broadcast_one_to_all", received)
    assert sharding.as_first_process_has_it(None) == value
