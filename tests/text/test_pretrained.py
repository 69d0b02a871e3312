"""A folder as flan-t5 is published: the golden numbers from shards on disk, its tokenizer, what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from starflow_jax import modes
from starflow_jax.codec import patch
from starflow_jax.config import Codec, Config, Convert, Sample, Text, UserError
from starflow_jax.io.tensor_files import write_safetensors
from starflow_jax.model.codec import patch_shape
from starflow_jax.model.parameters import model_fingerprint
from starflow_jax.model.store import load_model
from starflow_jax.model.system import System, save_system
from starflow_jax.model.text import encode_text, frozen_encoder_params, text_encoder
from starflow_jax.modes.convert import convert
from starflow_jax.sampling import batches
from starflow_jax.text.pretrained import encoder_config, load_tokenizer, open_encoder
from starflow_jax.text.t5 import T5Encoder, mask_padding
from starflow_jax.text.tokenizer import EOS_ID, PAD_ID, train_tokenizer
from tests.helpers import tiny_model
from tests.modes.test_convert import random_released

GOLDEN = Path(__file__).parents[1] / "golden"
CASE = json.loads((GOLDEN / "t5_encoder.json").read_text())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden encoder in two shards, with a decoder's tensor among them."""
    folder = tmp_path_factory.mktemp("flan")
    tensors = load_file(GOLDEN / "t5_encoder.safetensors")
    weights = {name[7:]: value for name, value in tensors.items() if name.startswith("params/")}
    weights["decoder.final_layer_norm.weight"] = np.ones(48, np.float32)
    shard_of = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(weights))}
    for shard in set(shard_of.values()):
        save_file({name: weights[name] for name in weights if shard_of[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", **CASE["config"]}))
    (folder / "spiece.model").write_bytes(train_tokenizer(["a red seven moves", "a blue cat sleeps"], 140))
    return folder


def test_golden_numbers_from_shards(published: Path) -> None:
    tensors = load_file(GOLDEN / "t5_encoder.safetensors")
    ids_BS, mask_BS = tensors["in/input_ids"], tensors["in/attention_mask"]
    params = frozen_encoder_params(Config(name="frozen", model=tiny_model(text_dim=48), codec=Codec(),
                                          text=Text(encoder="frozen", weights=str(published))))["text"]
    encoder = T5Encoder(encoder_config(published, text_dim=48))
    features = jax.jit(encoder.apply)({"params": params}, ids_BS, mask_BS)
    for ours, name in ((features, "out/last_hidden_state"), (mask_padding(features, mask_BS), "out/masked")):
        assert np.abs(ours - tensors[name]).max() <= 2e-4 * max(1, np.abs(tensors[name]).max())


def test_features_of_a_prompt(published: Path) -> None:
    """Ids cut or padded to the model's text length with the end mark; padding zeroed; weights in no fingerprint."""
    config = Config(name="frozen", model=tiny_model(text_length=40, text_dim=48), codec=Codec(),
                    text=Text(encoder="frozen", weights=str(published)))
    tokenizer = load_tokenizer(published)
    # The golden encoder's table is smaller than a real one.
    ids_BS = tokenizer.encode(["a red seven", "a red seven " * 30], config.model.text_length)
    assert ids_BS.shape == (2, 40) and ids_BS[1, 39] == EOS_ID
    length = int((ids_BS[0] != PAD_ID).sum())
    assert ids_BS[0, length - 1] == EOS_ID and 3 < length < 12
    params = frozen_encoder_params(config)
    assert text_encoder(config).config.d_ff == CASE["config"]["d_ff"]
    features = np.asarray(encode_text(text_encoder(config), params["text"], np.minimum(ids_BS, 95)))
    assert features.shape == (2, 40, 48)
    assert np.abs(features[0, :length]).max(axis=-1).min() > 0 and not features[0, length:].any()
    assert features[1].any(axis=-1).all()
    moved = dataclasses.replace(config, text=dataclasses.replace(config.text, weights="elsewhere"))
    assert model_fingerprint(moved) == model_fingerprint(config)


def converted(published: Path, workdir: Path) -> Config:
    """The config of a model that is converted into a workdir and has a codec there."""
    config = Config(name="frozen", model=tiny_model(text_dim=48), codec=Codec(kind="patch"),
                    text=Text(encoder="frozen", weights=str(published)),
                    convert=Convert(source=str(workdir / "released.safetensors")))
    write_safetensors(workdir / "released.safetensors", random_released(config.model))
    convert(config, workdir)
    codec = patch.fit(np.zeros((1, 5, 8, 12, 3), np.uint8), patch_shape(config), config.model.channels)
    save_system(System(config, load_tokenizer(published), codec), workdir / "system")
    return config


def test_a_converted_model_comes_with_its_encoder(published: Path, tmp_path: Path) -> None:
    config = converted(published, tmp_path)
    system, params, source, _ = load_model(config, tmp_path)
    assert source == f"{tmp_path}, step 0" and set(params) == {"flow", "text"}
    assert params["text"]["embed"]["embedding"].shape == (96, 48)
    assert params["text"]["layers"]["attention"]["q"]["kernel"].dtype == jnp.float32
    bfloat16 = dataclasses.replace(config, model=tiny_model(text_dim=48, dtype="bfloat16"))
    kept = load_model(bfloat16, tmp_path).params["text"]
    assert kept["layers"]["attention"]["q"]["kernel"].dtype == jnp.bfloat16  # as they are multiplied
    assert kept["embed"]["embedding"].dtype == kept["final_norm"]["weight"].dtype == jnp.float32
    assert system.tokenizer.model == (published / "spiece.model").read_bytes()


def test_offloading_makes_the_same_video_without_the_encoder_beside_the_flow(
        published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts, a negative one and a change of the prompt, all encoded before the flow is read."""
    config = converted(published, tmp_path)
    held: list[set[str]] = []
    codecs_memory: list[set[str]] = []
    generate_clips = batches.generate_clips

    def watched(system, params, *arguments, **settings):
        held.append(set(params))
        codecs_memory.append({leaf.sharding.memory_kind for leaf in jax.tree.leaves(system.codec)
                              if isinstance(leaf, jax.Array)})
        return generate_clips(system, params, *arguments, **settings)

    monkeypatch.setattr(batches, "generate_clips", watched)
    (tmp_path / "prompts.txt").write_text("a red seven moves\na blue cat sleeps")
    sample = Sample(prompts_file=str(tmp_path / "prompts.txt"), negative_prompt="a cat", changes="3: a blue seven",
                    frames=5, guidance=1.5, batch_size=2)
    for offload, name in ((False, "at_once"), (True, "in_turn")):
        modes.run("sample", dataclasses.replace(config, sample=dataclasses.replace(
            sample, offload=offload, output=str(tmp_path / name))), tmp_path)
    assert held == [{"flow", "text"}, {"flow"}] and codecs_memory[1] == {"pinned_host"} != codecs_memory[0]
    for path in (tmp_path / "at_once").glob("*.mp4"):
        assert path.read_bytes() == (tmp_path / "in_turn" / path.name).read_bytes()
    assert len(list((tmp_path / "in_turn").glob("*.mp4"))) == 2


def test_what_is_no_such_encoder_is_refused(published: Path, tmp_path: Path) -> None:
    for told, folder in (("must be a folder", Path("")), ("must be a folder", tmp_path / "none"),
                         ("holds no config.json", tmp_path)):
        with pytest.raises(UserError, match=told):
            open_encoder(folder, 48)
    with pytest.raises(UserError, match="48 channels, model.text_dim=2048"):
        encoder_config(published, 2048)
    for harm, told in [(dict(feed_forward_proj="relu"), "no T5 v1.1"), (dict(d_kv=None), "d_kv"),
                       (dict(model_type="bert"), "no T5 v1.1"), (dict(num_layers=4), "encoder.block.3")]:
        folder = tmp_path / "-".join(harm) / str(*harm.values())
        shutil.copytree(published, folder)
        (folder / "config.json").write_text(json.dumps({**CASE["config"], **harm}))
        with pytest.raises(UserError, match=told):
            open_encoder(folder, 48)
    (folder / "spiece.model").unlink()
    with pytest.raises(UserError, match="holds no spiece.model"):
        load_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(CASE["config"]))
    (folder / "spiece.model").write_bytes(b"")
    next(folder.glob("model-00002*")).write_bytes(b"cut")
    with pytest.raises(UserError, match="can't be read as safetensors"):
        open_encoder(tmp_path / "num_layers" / "4", 48)
