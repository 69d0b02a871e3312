"""LoRA factors in PEFT's files: what they do to the release's own tensors, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util

from starflow_jax.checkpoints.peft import read_peft, write_peft
from starflow_jax.checkpoints.released import unstack_to_released
from starflow_jax.config import UserError
from starflow_jax.io.checksums import CHECKSUMS, read_checksums
from starflow_jax.io.tensor_files import open_safetensors
from starflow_jax.nn.lora import merged
from tests.helpers import flipped_bits, random_params
from tests.small_model import CONFIG

MODEL = CONFIG.model
LAYER = "flow/deep/transformer/layers/layer"
NAMES = (f"{LAYER}/qkv/kernel", f"{LAYER}/mlp_out/kernel", "denoiser/transformer/layers/layer/proj/kernel")


def flow_arrays() -> dict[str, np.ndarray]:
    arrays = traverse_util.flatten_dict(random_params(CONFIG), sep="/")
    return {name.removeprefix("flow/"): np.asarray(value) for name, value in arrays.items() if name[:4] != "text"}


def factors() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random, found = np.random.default_rng(0), {}
    for name in NAMES:
        layers, inputs, *features = flow_arrays()[name.removeprefix("flow/")].shape
        found[name] = tuple(random.normal(size=shape).astype(np.float32)
                            for shape in ((layers, inputs, 2), (layers, 2, *features)))
    return found


@pytest.fixture
def with_checksums(tmp_path: Path) -> Path:
    write_peft(tmp_path / "adapter_model.safetensors", factors(), MODEL, rank=2, alpha=3.0, backbone="1234", base="b")
    return tmp_path


@pytest.fixture
def folder(with_checksums: Path) -> Path:
    """As PEFT writes it."""
    (with_checksums / CHECKSUMS).unlink()
    return with_checksums


def test_two_flipped_bits_are_found(with_checksums: Path) -> None:
    assert set(read_checksums(with_checksums)) == {"adapter_model.safetensors", "adapter_config.json"}
    for name in read_checksums(with_checksums):
        with flipped_bits(with_checksums / name), pytest.raises(UserError, match=f"{name}: is damaged"):
            read_peft(with_checksums, MODEL)
    assert read_peft(with_checksums, MODEL)


def test_they_adapt_the_releases_modules_as_peft_does(folder: Path) -> None:
    """W + alpha / r * B A, of the release's own names and layouts, is what our merged kernels become there."""
    ours = flow_arrays()
    released = {name: np.asarray(value) for name, value in unstack_to_released(ours, MODEL).items()}
    adapted = {name: np.asarray(merged(ours[name.removeprefix("flow/")], a, 1.5 * b))
               for name, (a, b) in factors().items()}
    expected = unstack_to_released(ours | {name.removeprefix("flow/"): value for name, value in adapted.items()}, MODEL)
    tensors = {name: np.asarray(value) for name, value in open_safetensors(folder).items()}
    facts = json.loads((folder / "adapter_config.json").read_text())
    assert (facts["peft_type"], facts["r"], facts["lora_alpha"]) == ("LORA", 2, 3.0)
    assert facts["target_modules"] == ["blocks.2.attn_blocks.0.attention.qkv", "blocks.2.attn_blocks.0.mlp.main.2",
                                       "learnable_self_denoiser.attn_blocks.0.attention.proj"]
    for module in facts["target_modules"]:
        a, b = (tensors.pop(f"base_model.model.{module}.{part}.weight") for part in ("lora_A", "lora_B"))
        released[f"{module}.weight"] = released[f"{module}.weight"] + 3.0 / 2 * b @ a
    assert not tensors
    for name, value in expected.items():
        np.testing.assert_allclose(released[name], value, atol=1e-5)


@pytest.mark.slow  # starts PyTorch
def test_peft_itself_reads_and_writes_them(with_checksums: Path, tmp_path: Path) -> None:
    """It finds every module, merges to our matrices, and what it writes of them is read back."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    ours = flow_arrays()
    adapted = {name.removeprefix("flow/"): np.asarray(merged(ours[name.removeprefix("flow/")], a, 1.5 * b))
               for name, (a, b) in factors().items()}
    base, expected = torch.nn.Module(), unstack_to_released(ours | adapted, MODEL)
    for name, value in unstack_to_released(ours, MODEL).items():
        *path, layer = name.removesuffix(".weight").split(".")
        if value.ndim == 2:
            inside = base
            for part in path:
                inside.add_module(part, getattr(inside, part, torch.nn.Module()))
                inside = getattr(inside, part)
            linear = torch.nn.Linear(*value.shape[::-1], bias=False)
            linear.weight.data = torch.tensor(np.asarray(value))
            inside.add_module(layer, linear)
    model = peft.PeftModel.from_pretrained(base, str(with_checksums))
    model.save_pretrained(str(tmp_path / "again"))
    again, backbone = read_peft(tmp_path / "again", MODEL)
    assert backbone == "" and set(again) == set(NAMES)
    for name, (a, b) in factors().items():
        np.testing.assert_array_equal(again[name][0], a)
        np.testing.assert_array_equal(again[name][1], np.float32(1.5) * b)
    found = model.merge_and_unload().state_dict()
    changed = [name for name in found if np.abs(found[name] - np.asarray(unstack_to_released(ours, MODEL)[name])).max()]
    assert len(changed) == len(NAMES)
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5)


def test_what_was_written_is_read_with_its_scale(folder: Path) -> None:
    found, backbone = read_peft(folder, MODEL)
    assert backbone == "1234" and set(found) == set(NAMES)
    for name, (a, b) in factors().items():
        np.testing.assert_array_equal(found[name][0], a)
        np.testing.assert_array_equal(found[name][1], np.float32(1.5) * b)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True}))
    np.testing.assert_allclose(read_peft(folder, MODEL)[0][NAMES[0]][1], 3 / np.sqrt(2) * factors()[NAMES[0]][1],
                               rtol=1e-6)


@pytest.mark.parametrize("change, words", [
    ({"use_dora": True}, "use_dora: only plain LoRA"), ({"peft_type": "IA3"}, "peft_type=IA3: only plain LoRA"),
    ({"lora_alpha": None}, "can't be read as the settings of LoRA factors")])
def test_what_factors_alone_do_not_say_is_refused(folder: Path, change: dict, words: str) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words):
        read_peft(folder, MODEL)


def test_another_models_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="belongs to another model: the factors of layer 0 of"):
        read_peft(folder, dataclasses.replace(MODEL, deep_width=60))
    with pytest.raises(UserError, match="is not of this config's model: unexpected 2: .*learnable_self_denoiser"):
        read_peft(folder, dataclasses.replace(MODEL, denoiser="none"))
