"""Conversion: bit for bit there and back, the golden numbers after it, every misfit listed, bounded memory."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from configs.t2v import tiny
from starflow_jax.checkpoints.licences import KEPT
from starflow_jax.checkpoints.parameters import restore_params, stored_params
from starflow_jax.checkpoints.released import flow_shapes, released_model, unstack_to_released
from starflow_jax.checkpoints.torch_files import open_weights
from starflow_jax.config import Codec, Config, Convert, Model, Text, UserError
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.io.tensor_files import StoredArray, open_safetensors, write_safetensors
from starflow_jax.model.initialise import initial_params
from starflow_jax.model.own_settings import PRETRAINED, PRETRAINED_WEIGHTS, settings_of
from starflow_jax.model.parameters import flow_variables, init_params
from starflow_jax.modes import convert as convert_mode
from starflow_jax.modes.convert import convert
from tests.helpers import tiny_model

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = tiny_model(denoiser="every_layer", denoiser_layers=1)


def config_of(model: Any, **settings: str) -> Config:
    return Config(name="test", model=model, text=Text(encoder="frozen"), codec=Codec(),
                  convert=Convert(**settings))


def random_released(model: Any, dtype: Any = np.float32) -> dict[str, StoredArray]:
    """Random weights of a model under the release's names, each made when it is asked for."""
    random = np.random.default_rng(0)

    def array(shape: tuple[int, ...]) -> StoredArray:
        return StoredArray(shape, dtype, lambda: random.standard_normal(shape, np.float32).astype(dtype))

    return unstack_to_released({name: array(shape) for name, shape in flow_shapes(model).items()}, model)


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    # In memory as they lie in a file: safetensors' writer takes a transposed view's memory for its values.
    return {name: np.ascontiguousarray(np.asarray(value)) for name, value in random_released(MODEL).items()}


def assert_same_bits(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        assert np.asarray(ours[name]).tobytes() == np.ascontiguousarray(value).tobytes(), name


def golden(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(case, its tensors, the released weights among them)."""
    case, tensors = json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")
    return case, tensors, {key[7:]: value for key, value in tensors.items() if key.startswith("params/")}


@pytest.mark.parametrize("name", ["image", "video", "video_global"])
def test_golden_weights_there_and_back(name: str, tmp_path: Path) -> None:
    case, tensors, weights = golden(name)
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float16)}
    save_file(weights, tmp_path / "released.safetensors")
    target = tmp_path / "back" / "flow.safetensors"
    config = config_of(released_model(case["model"]), source=str(tmp_path / "released.safetensors"),
                       target=str(target))
    convert(config, tmp_path / "work")
    assert_same_bits(load_file(target), weights)
    if name == "video":
        assert_golden_noise(config, tmp_path / "work" / "checkpoints" / "0", tensors)


def assert_golden_noise(config: Config, folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """A converted checkpoint, restored in float32, maps the golden video to the golden noise."""
    params = restore_params(folder, jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}

    def forward(params: Any, x: jax.Array, text: jax.Array) -> jax.Array:
        flow = STARFlow(config.model)
        out: Any = flow.apply(params, x, text, method=STARFlow.forward)
        return flow.latents(out.z_BTSK, x.shape[2])

    x, z = (np.moveaxis(tensors[key], 2, -1) for key in ("in/x", "out/z"))
    ours = jax.jit(forward)(flow_variables(params), x, tensors["in/text"])
    assert np.abs(ours - z).max() <= 2e-4 * max(1, np.abs(z).max())


def test_a_checkpoint_in_bfloat16_and_back_in_float32(weights: dict, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "released.safetensors")
    convert(config_of(MODEL, source=str(tmp_path / "released.safetensors"), dtype="bfloat16"), tmp_path / "work")
    target = tmp_path / "back.safetensors"
    convert(config_of(MODEL, target=str(target), dtype="float32"), tmp_path / "work")
    assert_same_bits(load_file(target), {name: value.astype(jnp.bfloat16).astype(np.float32)
                                         for name, value in weights.items()})
    held = stored_params(tmp_path / "work" / "checkpoints" / "0")
    assert {array.dtype for array in held.values()} == {np.dtype(jnp.bfloat16)}


def test_shards_are_one_model(weights: dict, tmp_path: Path) -> None:
    names, folder = sorted(weights), tmp_path / "shards"
    folder.mkdir()
    half = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for shard in set(half.values()):
        save_file({name: weights[name] for name in names if half[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": half}))
    target = tmp_path / "back.safetensors"
    convert(config_of(MODEL, source=str(folder), target=str(target)), tmp_path / "work")
    assert_same_bits(load_file(target), weights)


def test_sizes_mean_something_on_a_full_disk(weights: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model of less than a megabyte: what it needs, what there is, and what it comes to on a disk with room."""
    save_file(weights, tmp_path / "released.safetensors")
    config = config_of(MODEL, source=str(tmp_path / "released.safetensors"))
    needed = sum(value.nbytes for value in weights.values())
    assert 10**3 < needed < 10**6
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000))
        with pytest.raises(UserError) as raised:
            convert(config, tmp_path / "work")
    assert str(raised.value).startswith(
        f"{tmp_path / 'work'}: {needed / 1e3:.1f} kB are needed and 1.0 kB free, {(needed - 1e3) / 1e3:.1f} kB too "
        "little; make room")
    assert "0.0" not in str(raised.value).split(": ")[1]
    convert(config, tmp_path / "work")
    assert f" parameters, {needed / 1e3:.1f} kB\n" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["file/flow.safetensors", "/proc/starflow/flow.safetensors",
                                    f"{'x' * 300}.safetensors", "folder.safetensors", f"{'x' * 300}/a.safetensors"])
def test_a_target_that_cannot_be_written_is_found_before_anything_is_read(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for read in ("own_settings", "whole_checkpoint", "open_source"):
        monkeypatch.setattr(f"starflow_jax.modes.convert.{read}", lambda *_: pytest.fail("it was read"))
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match="^convert.target=/.*: can't be written to .*; name another file$"):
        convert(config_of(MODEL, source="pretrained", target=str(tmp_path / target)), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_every_misfit_is_listed(weights: dict, tmp_path: Path) -> None:
    lost = ["blocks.0.sos_embed", "blocks.2.attn_blocks.1.mlp.main.2.weight"]
    for name in lost:
        del weights[name]
    weights["blocks.1.proj_in.weight"] = weights["blocks.1.proj_in.weight"].T.copy()
    weights["blocks.2.proj_in.bias"] = weights["blocks.2.proj_in.bias"].astype(np.int32)
    weights["ema.decay"], weights["blocks.9.sos_embed"] = np.ones(1, np.float32), np.ones(1, np.float32)
    save_file(weights, tmp_path / "released.safetensors")
    with pytest.raises(UserError) as error:
        convert(config_of(MODEL, source=str(tmp_path / "released.safetensors")), tmp_path / "work")
    told = str(error.value)
    assert f"missing 2: {', '.join(lost)}" in told
    assert "unexpected 2: blocks.9.sos_embed, ema.decay" in told
    assert "misshapen 2: blocks.1.proj_in.weight (2, 40) float32 instead of (40, 2), blocks.2.proj_in.bias (40,) " \
           "int32 instead of (40,)" in told
    assert "\n" not in told and not (tmp_path / "work").exists()


def test_a_restored_model_has_to_be_the_one_asked_for(weights: dict, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "released.safetensors")
    config = config_of(MODEL, source=str(tmp_path / "released.safetensors"))
    convert(config, tmp_path / "work")
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    abstract["flow"]["more"] = abstract["flow"]["deep"].pop("sos")
    abstract["flow"]["shallow_1"]["sos"] = jax.ShapeDtypeStruct((1, 1, 3), jnp.float32)
    with pytest.raises(UserError, match=r"missing 1: flow/more; misshapen 1: flow/shallow_1/sos \(1, 1, 2\) instead"):
        restore_params(tmp_path / "work" / "checkpoints" / "0", abstract)


def test_what_cannot_be_converted_is_one_clear_line(weights: dict, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "released.safetensors")
    config = config_of(MODEL, source=str(tmp_path / "released.safetensors"))
    convert(config, tmp_path / "work")
    (tmp_path / "empty").mkdir()
    other = dataclasses.replace(MODEL, denoiser_window=3)
    for told, changed, workdir in [
            ("nothing to convert", config_of(MODEL), "new"),
            ("must end in .safetensors", config_of(MODEL, target="flow.pth"), "new"),
            ("no such file", config_of(MODEL, source=str(tmp_path / "none.pth")), "new"),
            ("neither safetensors nor a sharded", config_of(MODEL, source=str(tmp_path / "empty")), "new"),
            ("neither a workdir that holds", config_of(MODEL, target=str(tmp_path / "x.safetensors")), "new"),
            ("hold no text encoder", dataclasses.replace(config, text=Text(encoder="trained")), "new"),
            ("holds checkpoints", config, "work"),
            ("denoiser_window is 10", config_of(other, source=config.convert.source), "work")]:
        with pytest.raises(UserError, match=told):
            convert(changed, tmp_path / workdir)
        assert not (tmp_path / "new").exists()


def test_what_fails_half_way_goes_on_by_the_same_command(
    weights: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the library of checkpoints raises is one line; what is left of a conversion is made anew."""
    save_file(weights, tmp_path / "released.safetensors")
    config, work = config_of(MODEL, source=str(tmp_path / "released.safetensors")), tmp_path / "work"

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: no room [source locations='a.cc:1']")

    with monkeypatch.context() as patch, pytest.raises(UserError) as said:
        patch.setattr(ocp.Checkpointer, "save", fail)
        convert(config, work)
    assert "checkpoint can't be written (RESOURCE_EXHAUSTED: no room); once that is solved" in str(said.value)
    with monkeypatch.context() as patch, pytest.raises(ValueError):
        patch.setattr(convert_mode, "write_system", fail)
        convert(config, work)
    assert (work / "checkpoints" / "0").exists()
    convert(config, work)
    assert settings_of(work).model == MODEL and not (work / convert_mode.UNFINISHED).exists()
    with pytest.raises(UserError, match="holds checkpoints"):
        convert(config, work)


def test_pth(weights: dict, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(value.copy()).to(torch.bfloat16) for name, value in weights.items()}
    torch.save(tensors, tmp_path / "flow.pth")
    target = tmp_path / "back.safetensors"
    convert(config_of(MODEL, source=str(tmp_path / "flow.pth"), target=str(target)), tmp_path / "work")
    with safe_open(target, framework="numpy") as file:
        back = {name: file.get_tensor(name) for name in file.keys()}
    assert_same_bits(back, {name: value.astype(jnp.bfloat16) for name, value in weights.items()})

    torch.save({"step": 3, "state": {"model": tensors, "other": [torch.ones(2)]}}, tmp_path / "nested.pth")
    with pytest.raises(UserError, match=r"unexpected \d+: state\.model\.blocks\.0"):
        convert(config_of(MODEL, source=str(tmp_path / "nested.pth")), tmp_path / "new")
    with pytest.raises(UserError, match="no tensor's name begins with convert.prefix='ema.'; .* state.model.blocks.0"):
        convert(config_of(MODEL, source=str(tmp_path / "nested.pth"), prefix="ema."), tmp_path / "new")
    found = open_weights(tmp_path / "nested.pth", "state.model.")
    assert_same_bits({name: np.asarray(value) for name, value in found.items()}, back)


class Harmful:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_pytorch_file_is_executed(tmp_path: Path) -> None:
    harmful = pickle.dumps({"x": Harmful(tmp_path / "executed")}, protocol=2)
    with zipfile.ZipFile(tmp_path / "flow.pth", "w") as archive:
        archive.writestr("flow/data.pkl", harmful)
    with pytest.raises(UserError, match=r"flow\.pth: can't be read as weights only \(it asks for posix\.mkdir\)"):
        open_weights(tmp_path / "flow.pth")
    (tmp_path / "flow.pth").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(UserError, match="can't be read as weights only"):
        open_weights(tmp_path / "flow.pth")
    assert not (tmp_path / "executed").exists()


def test_nothing_in_a_sharded_checkpoint_is_executed(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / ".metadata").write_bytes(pickle.dumps(Harmful(tmp_path / "executed")))
    with pytest.raises(UserError, match=r"\.metadata: is no list .*\(it asks for posix\.mkdir\)"):
        open_weights(tmp_path / "sharded")
    assert not (tmp_path / "executed").exists()


WRITE_SHARDED = """
import sys
import torch
import torch.distributed as distributed
from safetensors.torch import load_file
from torch.distributed.checkpoint import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

rank, rendezvous, released, folder = int(sys.argv[1]), *sys.argv[2:]
distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
tensors = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in load_file(released).items()}
save({"model": tensors, "step": 7}, checkpoint_id=folder)
distributed.barrier()  # or one aborts where the other has left
distributed.destroy_process_group()
"""

@pytest.mark.slow
def test_the_sharded_form_of_two_processes(weights: dict, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    save_file(weights, tmp_path / "released.safetensors")
    arguments = [str(tmp_path / name) for name in ("rendezvous", "released.safetensors", "sharded")]
    ranks = [subprocess.Popen([sys.executable, "-c", WRITE_SHARDED, str(rank), *arguments]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    assert len(list((tmp_path / "sharded").glob("*.distcp"))) == 2
    target = tmp_path / "back.safetensors"
    convert(config_of(MODEL, source=str(tmp_path / "sharded"), target=str(target), prefix="model."), tmp_path / "work")
    assert_same_bits(load_file(target), weights)
    next((tmp_path / "sharded").glob("*.distcp")).unlink()
    found = open_weights(tmp_path / "sharded", "model.")
    with pytest.raises(UserError, match="can't be read"):
        [np.asarray(tensor) for tensor in found.values()]


CONVERT_AND_TELL = """
import resource, sys
from pathlib import Path
from starflow_jax.modes import convert as convert_mode
from starflow_jax.modes.convert import convert
from tests.modes.test_convert import blocks_of, config_of
count, source, target, workdir = sys.argv[1:]
convert(config_of(blocks_of(int(count)), source=source, target=target), Path(workdir))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def blocks_of(count: int) -> Model:
    """A model whose parameters are this many blocks of twelve layers, 85 MB each."""
    return tiny_model(head_dim=64, shallow_layers=(12,) * (count - 1), shallow_width=384, deep_layers=12,
                      deep_width=384)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Three times the blocks, there and back: the peak grows by less than a fifth of what the file does."""
    peaks, sizes = [], []
    for count in (3, 9):
        source, target = tmp_path / f"{count}.safetensors", tmp_path / f"{count}_back.safetensors"
        write_safetensors(source, random_released(blocks_of(count)))
        done = subprocess.run(
            [sys.executable, "-c", CONVERT_AND_TELL, str(count), source, target, tmp_path / str(count)],
            capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
        sizes.append(source.stat().st_size)
        first, second = open_safetensors(source), open_safetensors(target)
        assert set(first) == set(second)
        for key in first:
            np.testing.assert_array_equal(np.asarray(first[key]), np.asarray(second[key]))
    assert sizes[1] - sizes[0] > 5e8
    assert peaks[1] - peaks[0] < 0.2 * (sizes[1] - sizes[0]), (peaks, sizes)


def test_the_packages_model_becomes_a_workdir_to_train_on(tmp_path: Path) -> None:
    """Its parameters in float32, its settings, tokenizer, codec and calibration; and training begins with them."""
    asked = dataclasses.replace(tiny(), convert=Convert(source="pretrained"))
    convert(asked, tmp_path / "start")
    packaged = open_safetensors(PRETRAINED / PRETRAINED_WEIGHTS)
    config = settings_of(tmp_path / "start")
    assert config == dataclasses.replace(settings_of(PRETRAINED), convert=Convert())
    for name in ("tokenizer.model", "codec.safetensors", "decoding.json"):
        assert (tmp_path / "start" / "system" / name).read_bytes() == (PRETRAINED / name).read_bytes()
    assert not (tmp_path / "start" / KEPT).exists()  # of weights that are nobody else's
    trained = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(tmp_path / "start")))
    params, changes = initial_params(trained, jax.random.key(0))
    flat = traverse_util.flatten_dict(params, sep="/")
    assert not changes and set(flat) == set(packaged)
    for name, value in flat.items():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, np.asarray(packaged[name], np.float32))
    with pytest.raises(UserError, match="convert.source=pretrained, and the package carries no model of test"):
        convert(config_of(MODEL, source="pretrained"), tmp_path / "other")
