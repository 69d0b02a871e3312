"""The Wan VAE as a codec: whole videos in parts, tiles and their seams, loading, the system and streams with it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from starflow_jax.codec.interface import decode_latents, decode_next, encode_frames
from starflow_jax.codec.wan_stream import Tiles, WanCodec, load_codec
from starflow_jax.codec.wan_vae import WanConfig
from starflow_jax.codec.wan_weights import to_released
from starflow_jax.config import Codec, Config, Convert, UserError
from starflow_jax.data.batch import Batch
from starflow_jax.model.parameters import model_fingerprint
from starflow_jax.model.system import System, load_system, save_system
from starflow_jax.modes.convert import convert
from starflow_jax.sampling.generate import generate_clips
from starflow_jax.sampling.stream import stream_clips
from starflow_jax.training.step import encoded
from tests.codec.test_wan_vae import decode_next as decode_at_once
from tests.codec.test_wan_vae import encode_at_once, latents, moments, pixels, random_params, small_codec
from tests.helpers import changed, tiny_model
from tests.small_model import CAPTIONS, SETTINGS
from tests.small_run import ROOT, environment
from tests.test_sharding import xla_flags

RELEASED = WanConfig(dim=2, dec_dim=2, z_dim=3)  # the released structure, narrow
SETTINGS_OF = dict(kind="wan", stride=16, encoder_width=2, decoder_width=2)

decode = jax.jit(WanCodec.decode)


def test_on_a_mesh_each_device_has_rows_of_its_own(tmp_path: Path) -> None:
    """Eight devices on one video; of its stages one has rows that divide over them, and two more have twice those."""
    subprocess.run([sys.executable, "-m", "tests.sharded_vae", tmp_path / "found.json"], cwd=ROOT, check=True,
                   timeout=300, env=environment(XLA_FLAGS=xla_flags(8)))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["decoded"] < 1e-5 and found["encoded"] < 1e-5 and found["streamed_shades"] <= 1, found
    assert found["stream_programs"] == 2  # the first frame's and all others'
    assert found["share_of_the_work"] < 0.3 and found["rows_of_the_last_cache"] == 6


def test_whole_videos_in_parts() -> None:
    codec, z, video = small_codec(), latents(4, batch=2), pixels(7, batch=2)
    np.testing.assert_allclose(decode(codec, z), decode_at_once(codec, z, None)[0], atol=1e-5)
    for ours, expected in zip(moments(codec, video), encode_at_once(codec, video)):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_latents_are_normalised_and_log_variances_are_not() -> None:
    codec, video = small_codec(), pixels(7, batch=2)
    plain = codec.replace(mean_C=jnp.zeros(3), std_C=jnp.ones(3))
    (mean, log_variance), (raw, raw_log_variance) = moments(codec, video), moments(plain, video)
    np.testing.assert_allclose(mean, (raw - codec.mean_C) / codec.std_C, atol=1e-5)
    np.testing.assert_array_equal(log_variance, raw_log_variance)
    np.testing.assert_allclose(decode(codec, latents(4, batch=2)),
                               decode(plain, latents(4, batch=2) * codec.std_C + codec.mean_C), atol=1e-5)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="a clip of 4 frames: this codec takes 1 [+] a multiple of 2"):
        small_codec().encode(pixels(4))
    with pytest.raises(UserError, match="frames of 8x10: this codec takes multiples of 4 pixels"):
        small_codec().encode(pixels(3, 8, 10))


@pytest.mark.parametrize("length,size,overlap", [(53, 20, 8), (53, 53, 8), (30, 0, 8), (21, 20, 4), (40, 16, 15)])
def test_tiles_cover_and_their_shares_sum_to_one(length: int, size: int, overlap: int) -> None:
    tiles = Tiles(size, overlap)
    starts, width = tiles.starts(length), min(size or length, length)
    assert starts[0] == 0 and starts[-1] + width == length
    assert len(starts) == (1 if size in (0, length) else len(set(starts)))
    assert np.all(starts[:-1] + width - starts[1:] >= overlap)
    total = np.zeros(4 * length)
    for start, share in zip(starts, tiles.weights(length, 4)):
        assert share.min() >= 0
        total[4 * start:4 * (start + width)] += share
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_tiles_are_exact_where_a_quarter_of_the_overlap_is_seen() -> None:
    """A pixel of the small decoder depends on 7 latents to each side, and a latent of its encoder on as many."""
    codec, z, image = small_codec(), latents(1, 2, 50), pixels(1, 8, 200)
    tiled = codec.replace(tiles=Tiles(40, 28))
    np.testing.assert_allclose(*(decode_at_once(c, z, None)[0] for c in (tiled, codec)), atol=1e-5)
    for ours, expected in zip(moments(tiled, image), encode_at_once(codec, image)):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_seams_of_narrow_overlaps_are_small_and_only_there() -> None:
    codec, z = small_codec(), latents(1, 2, 50)
    whole, _ = decode_at_once(codec, z, None)
    errors = []
    for overlap in (4, 8):
        tiled, _ = decode_at_once(codec.replace(tiles=Tiles(29, overlap)), z, None)
        error = np.abs(np.asarray(tiled - whole)).max(axis=(0, 1, 2, 4))
        starts = Tiles(29, overlap).starts(50)
        assert list(starts) == [0, 21]  # 8 latents are shared in either case
        near = np.zeros(200, bool)
        near[4 * (21 - 7):4 * (29 + 7)] = True
        assert error[~near].max() < 1e-5 < error[near].max()
        errors.append(error.max() / np.std(whole))
    assert errors[1] < errors[0] and errors[1] < 0.2


def test_tiles_in_rows_and_columns_stream_as_they_decode_at_once() -> None:
    codec, z = small_codec(tiles=Tiles(6, 4)), latents(3, 8, 9)
    (whole, _), cache, parts = decode_at_once(codec, z, None), None, []
    for index in range(3):
        part, cache = decode_at_once(codec, z[:, index:index + 1], cache)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)
    np.testing.assert_allclose(decode(codec, z), whole, atol=1e-5)  # a tile of all frames after the other


def test_tiles_in_rows_and_columns_of_whole_videos_encode_as_all_at_once() -> None:
    codec, video = small_codec(tiles=Tiles(40, 28)), pixels(5, 164, 172)
    for ours, expected in zip(moments(codec, video), encode_at_once(codec, video)):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_later_latents_are_scaled_and_unscaled() -> None:
    codec = small_codec()
    frames = np.random.default_rng(0).integers(0, 256, (1, 5, 8, 12, 3), np.uint8)
    plain, scaled = (encode_frames(codec, frames, scale) for scale in (1.0, 0.6))
    np.testing.assert_allclose(scaled[:, :1], plain[:, :1], atol=1e-5)
    np.testing.assert_allclose(scaled[:, 1:], 0.6 * plain[:, 1:], atol=1e-5)
    whole = decode_latents(codec, scaled, 0.6).frames_BTHWC
    assert whole.dtype == jnp.uint8 and np.std(whole) > 1
    assert np.abs(np.int32(whole) - np.int32(decode_latents(codec, plain, 1.0).frames_BTHWC)).max() <= 1  # rounding
    cache, parts = None, []
    for index in range(3):
        part, cache = decode_next(codec, scaled[:, index:index + 1], cache, 0.6)
        parts.append(part.frames_BTHWC)
    assert np.abs(np.int32(np.concatenate(parts, axis=1)) - np.int32(whole)).max() <= 1


def with_wan(system: System) -> System:
    """The small system with the small VAE in place of its own codec."""
    settings = Codec(kind="wan", stride=4, time_stride=2, later_frames_scale=0.6)
    model = dataclasses.replace(system.config.model, channels=3)
    return dataclasses.replace(system, codec=small_codec(),
                               config=dataclasses.replace(system.config, model=model, codec=settings))


def test_a_streamed_video_equals_the_whole_one(system: System) -> None:
    wan = with_wan(system)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), jax.eval_shape(lambda: wan.init(0)))
    settings = changed(SETTINGS, frames=5, frames_per_step=1, guidance=0.0, denoise="none")
    whole = generate_clips(wan, params, CAPTIONS, [5, 6, 7], settings).frames_BTHWC
    parts = list(stream_clips(wan, params, CAPTIONS, [5, 6, 7], settings))
    assert [part.shape for part in parts] == [(3, 1, 8, 8, 3), (3, 2, 8, 8, 3), (3, 2, 8, 8, 3)]
    assert np.abs(np.int32(np.concatenate(parts, axis=1)) - np.int32(whole)).max() <= 1 and np.std(whole) > 1


def test_training_batches_are_encoded_before_the_step(system: System) -> None:
    wan = with_wan(system)
    frames = np.random.default_rng(1).integers(0, 256, (2, 7, 8, 8, 3), np.uint8)
    batch = Batch(frames_BTHWC=jnp.asarray(frames), drop_first_B=jnp.asarray([True, False]),
                  text_ids_BS=jnp.zeros((2, 24), jnp.int32))
    found = encoded(wan, batch, {})
    assert found.frames_BTHWC is None and found.text_ids_BS is batch.text_ids_BS
    whole = wan.encode(batch.frames_BTHWC)
    np.testing.assert_array_equal(found.latents_BNhwC, np.stack([whole[0, 1:], whole[1, :-1]]))
    np.testing.assert_array_equal(wan.latents_of(found), found.latents_BNhwC)  # nothing is dropped twice


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """Random weights of the released structure under the release's names."""
    return to_released(random_params(RELEASED), RELEASED)


STATISTICS = {"mean": np.float32([0.1, 0.2, 0.3]), "std": np.float32([1, 2, 3])}


def test_a_file_is_loaded(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    path = tmp_path / "wan.safetensors"
    save_file(weights | STATISTICS, path)
    codec = load_codec(Codec(weights=str(path), dtype="bfloat16", tile=12, tile_overlap=4, **SETTINGS_OF), 3)
    assert codec.config == RELEASED and codec.tiles == Tiles(12, 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(codec.params)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(codec.std_C, [1, 2, 3])
    given = Codec(weights=str(path), latent_mean=(3.0, 2.0, 1.0), **SETTINGS_OF)
    codec = load_codec(given, 3)
    np.testing.assert_array_equal(codec.mean_C, [3, 2, 1])
    jax.tree.map(np.testing.assert_array_equal, codec.params, random_params(RELEASED))


def test_what_cannot_be_loaded_is_told(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    path = tmp_path / "wan.safetensors"

    def load(channels: int = 3, **changes: Any) -> WanCodec:
        return load_codec(Codec(**{**SETTINGS_OF, "weights": str(path), **changes}), channels)

    with pytest.raises(UserError, match="wan.safetensors: can't be read"):
        load()
    save_file(weights, path)
    name = "decoder.conv1.bias"
    save_file({**weights, name: np.full_like(weights[name], np.nan)}, path)
    with pytest.raises(UserError, match="wan.safetensors: decoder.conv1.bias holds values that are not finite"):
        load(latent_mean=(0.0, 0.0, 0.0), latent_std=(1.0, 1.0, 1.0))
    save_file(weights, path)
    with pytest.raises(UserError, match="codec.latent_mean: 3 numbers are needed"):
        load()
    with pytest.raises(UserError, match="codec.latent_std: 3 numbers are needed, .* there are 2"):
        load(latent_mean=(0.0, 0.0, 0.0), latent_std=(1.0, 1.0))
    with pytest.raises(UserError, match="misshapen .*encoder.conv1.weight"):
        load(encoder_width=4)
    with pytest.raises(UserError, match="--config.codec.weights"):
        load(weights="")
    with pytest.raises(UserError, match="--mode=convert"):
        load(weights="Wan2.2_VAE.pth")
    with pytest.raises(UserError, match="codec.time_stride=2: the Wan VAE's is 4"):
        load(time_stride=2)
    with pytest.raises(UserError, match="codec.tile=8"):
        Codec(tile=8, tile_overlap=8)
    with pytest.raises(UserError, match="codec.latent_std"):
        Codec(latent_std=(1.0, 0.0))


def wan_config(path: Path, **changes: Any) -> Config:
    return Config(name="test", model=tiny_model(channels=3), codec=Codec(weights=str(path), **SETTINGS_OF, **changes))


def test_a_systems_weights_stay_where_they_are(tmp_path: Path, system: System, weights: dict[str, np.ndarray]) -> None:
    path = tmp_path / "wan.safetensors"
    save_file(weights | STATISTICS, path)
    config = wan_config(path)
    codec = load_codec(config.codec, 3)
    save_system(System(config, system.tokenizer, codec), tmp_path / "system")
    assert not (tmp_path / "system" / "codec.safetensors").exists()
    again = load_system(config, tmp_path / "system")
    jax.tree.map(np.testing.assert_array_equal, again.codec, codec)
    elsewhere = dataclasses.replace(config, codec=dataclasses.replace(config.codec, weights="b", dtype="bfloat16"))
    assert model_fingerprint(elsewhere) == model_fingerprint(config)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_released_weights_are_converted(tmp_path: Path, weights: dict[str, np.ndarray], suffix: str) -> None:
    source, target = tmp_path / f"Wan2.2_VAE.{suffix}", tmp_path / "wan.safetensors"
    if suffix == "pth":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(value.copy()) for name, value in weights.items()}, source)
    else:
        save_file(weights, source)
    config = wan_config(target, latent_mean=(0.1, 0.2, 0.3), latent_std=(1.0, 2.0, 3.0))
    convert(dataclasses.replace(config, convert=Convert(codec=str(source))), tmp_path)
    written = load_file(target)
    assert set(written) == {*weights, "mean", "std"}
    for name, value in (weights | STATISTICS).items():
        np.testing.assert_array_equal(written[name], value)
    jax.tree.map(np.testing.assert_array_equal, load_codec(wan_config(target).codec, 3).params, random_params(RELEASED))


def test_statistics_are_read_from_a_file(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    source, target, statistics = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "config.json"
    save_file(weights, source)
    config = dataclasses.replace(wan_config(target), convert=Convert(codec=str(source), statistics=str(statistics)))
    given = {name: value.tolist() for name, value in STATISTICS.items()}
    for held in (given, {"z_dim": 3, **{f"latents_{name}": value for name, value in given.items()}}):
        statistics.write_text(json.dumps(held))
        convert(config, tmp_path)
        for name, value in STATISTICS.items():
            np.testing.assert_array_equal(load_file(target)[name], value)
        target.unlink()
    for held, message in (({"mean": [0.0, 0.0, 0.0]}, "`std`"), ({**given, "mean": [1.0]}, "3 numbers .* `mean`"),
                          ({**given, "mean": ["a", 0, 0]}, "`mean`"), ([1], "`mean`"),
                          ({**given, "std": [1.0, 0.0, 1.0]}, "greater than 0")):
        statistics.write_text(json.dumps(held))
        with pytest.raises(UserError, match=message):
            convert(config, tmp_path)
    statistics.write_text("{")
    with pytest.raises(UserError, match="can't be read as JSON"):
        convert(config, tmp_path)
    statistics.unlink()
    with pytest.raises(UserError, match="No such file"):
        convert(config, tmp_path)
    assert not target.exists()


def test_weights_of_something_else_are_not_converted(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({name: value for name, value in weights.items() if name != "conv1.bias"}, source)
    settings = Convert(codec=str(source))
    config = wan_config(target, latent_mean=(0.1, 0.2, 0.3), latent_std=(1.0, 2.0, 3.0))
    with pytest.raises(UserError, match="missing 1: conv1.bias"):
        convert(dataclasses.replace(config, convert=settings), tmp_path)
    with pytest.raises(UserError, match="codec.kind=wan"):
        convert(dataclasses.replace(config, codec=Codec(), convert=settings), tmp_path)
    assert not target.exists()
