"""The image models' VAE: beside diffusers' own, and by its properties."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from starflow_jax.codec.interface import decode_latents, decode_next, encode_frames
from starflow_jax.codec.kl_vae import (
    SCALING,
    KLCodec,
    KLConfig,
    check_released,
    config_of,
    load_kl,
    our_shapes,
    released_name,
    released_shape,
    with_present_names,
)
from starflow_jax.config import Codec, UserError

encode, decode = jax.jit(KLCodec.encode), jax.jit(KLCodec.decode)
SIZES = KLConfig(channels=4, widths=(8, 16), residuals=2, norm_groups=4)
SETTINGS = dict(kind="kl", stride=2, time_stride=1, norm_groups=4)


def random_tensors(config: KLConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights under diffusers' names, none of them zero."""
    random, tensors = np.random.default_rng(seed), {}
    for ours, shape in our_shapes(config).items():
        shape = released_shape(ours, shape)
        spread = 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
        value = random.normal(size=shape) * spread + ours.endswith("scale")
        tensors[released_name(ours)] = value.astype(np.float32)
    return tensors


@pytest.fixture
def codec(tmp_path: Path):
    save_file(random_tensors(SIZES), tmp_path / "vae.safetensors")
    return load_kl(Codec(weights=str(tmp_path / "vae.safetensors"), **SETTINGS), 4)


def pictures(frames: int = 2, height: int = 6, width: int = 10) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (1, frames, height, width, 3)).astype(np.float32)


def test_as_diffusers_own(tmp_path: Path) -> None:
    """Encoder, decoder and the file's names, against the published implementation in PyTorch."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 16, 16), layers_per_block=2,
        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.3).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path / "vae")
    settings = Codec(kind="kl", stride=4, time_stride=1, weights=str(tmp_path / "vae"))
    ours = load_kl(settings, 4)
    assert ours.config == KLConfig(4, (8, 16, 16), 2, 4)
    x = pictures(2, 12, 20)
    with torch.no_grad():
        moments = theirs.encode(torch.from_numpy(np.moveaxis(x[0], -1, 1).copy())).latent_dist
        mean, deviation = (np.moveaxis(part.numpy(), 1, -1)[None] for part in (moments.mean, moments.std))
        decoded = np.moveaxis(theirs.decode(moments.mean).sample.numpy(), 1, -1)[None]
    our_mean, our_deviation = ours.posterior(jnp.asarray(x))
    np.testing.assert_allclose(our_mean / 0.3, mean, atol=1e-5)
    np.testing.assert_allclose(our_deviation, deviation, atol=1e-5)
    np.testing.assert_allclose(ours.decode(jnp.asarray(mean * 0.3)), decoded, atol=1e-5)


def test_the_published_sizes() -> None:
    """83,653,863 parameters in 248 tensors, 32x32 latents of a picture of 256x256."""
    shapes = our_shapes(KLConfig())
    assert (len(shapes), sum(int(np.prod(shape)) for shape in shapes.values())) == (248, 83_653_863)
    assert KLConfig().stride == 8
    names = {released_name(name) for name in shapes}
    assert {"encoder.down_blocks.3.resnets.1.conv2.bias", "decoder.up_blocks.2.upsamplers.0.conv.weight",
            "decoder.up_blocks.2.resnets.0.conv_shortcut.weight", "encoder.mid_block.attentions.0.to_out.0.weight",
            "encoder.conv_norm_out.weight", "post_quant_conv.bias"} <= names


def test_every_frame_is_a_picture_of_its_own(codec) -> None:
    x = jnp.asarray(pictures())
    latents = encode(codec, x)
    assert latents.shape == (1, 2, 3, 5, 4)
    np.testing.assert_allclose(encode(codec, x[:, 1:]), latents[:, 1:], atol=1e-5)
    whole = decode_latents(codec, latents, 1.0).frames_BTHWC
    assert whole.dtype == jnp.uint8 and whole.shape == (1, 2, 6, 10, 3)
    parts, cache = [], None
    for index in range(2):
        part, cache = decode_next(codec, latents[:, index:index + 1], cache, 1.0)
        parts.append(part.frames_BTHWC)
    assert np.abs(np.concatenate(parts, axis=1).astype(int) - np.asarray(whole)).max() <= 1


def test_latents_are_scaled(codec) -> None:
    """mean = 0 and std = 1 / scaling: what the flow sees is the VAE's latents times the scaling factor."""
    np.testing.assert_allclose(codec.std_C, np.full(4, 1 / SCALING), rtol=1e-6)
    x = jnp.asarray(pictures())
    plain = codec.replace(std_C=jnp.ones(4))
    np.testing.assert_allclose(encode(codec, x), SCALING * encode(plain, x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(decode(codec, SCALING * encode(plain, x)), decode(plain, encode(plain, x)), atol=1e-4)


def test_files_of_earlier_versions(tmp_path: Path, codec) -> None:
    """Attention as query, key, value and proj_attn, 1x1 convolutions among them."""
    tensors, earlier = random_tensors(SIZES), {}
    for name, value in tensors.items():
        for now, before in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            name = name.replace(f".{now}.", f".{before}.")
        earlier[name] = value[:, :, None, None] if name.endswith("query.weight") else value
    assert set(earlier) != set(tensors)
    save_file(earlier, tmp_path / "earlier.safetensors")
    loaded = load_kl(Codec(weights=str(tmp_path / "earlier.safetensors"), **SETTINGS), 4)
    frames = np.random.default_rng(2).integers(0, 256, (1, 1, 6, 10, 3), np.uint8)
    np.testing.assert_array_equal(encode_frames(loaded, frames, 1.0), encode_frames(codec, frames, 1.0))
    assert set(with_present_names(load_file(tmp_path / "earlier.safetensors"))) == set(tensors)


def test_what_cannot_be_is_one_line(tmp_path: Path, codec) -> None:
    with pytest.raises(UserError, match="frames of 5x10: this codec takes multiples of 2 pixels"):
        codec.encode(jnp.asarray(pictures(height=5)))
    with pytest.raises(UserError, match="codec.kind=kl needs the VAE's weights"):
        load_kl(Codec(**SETTINGS), 4)
    tensors = random_tensors(SIZES)
    save_file(tensors, tmp_path / "a.safetensors")
    for settings, channels, words in ((SETTINGS, 3, "model.channels=3: the VAE of .* has 4"),
                                      ({**SETTINGS, "stride": 8}, 4, "codec.stride=8: the VAE of .* has 2"),
                                      ({**SETTINGS, "norm_groups": 3}, 4, "codec.norm_groups=3: must divide each"),
                                      ({**SETTINGS, "latent_std": (1.0,)}, 4, "codec.latent_std: 4 numbers")):
        with pytest.raises(UserError, match=words):
            load_kl(Codec(weights=str(tmp_path / "a.safetensors"), **settings), channels)
    damaged = {**tensors, "decoder.conv_in.bias": np.full_like(tensors["decoder.conv_in.bias"], np.inf)}
    save_file(damaged, tmp_path / "damaged.safetensors")
    with pytest.raises(UserError, match="/damaged.safetensors: decoder.conv_in.bias holds values that are not finite"):
        load_kl(Codec(weights=str(tmp_path / "damaged.safetensors"), **SETTINGS), 4)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    del tensors["decoder.conv_in.bias"]
    with pytest.raises(UserError, match="missing 1: decoder.conv_in.bias"):
        check_released(tensors, SIZES, "a file")
    with pytest.raises(UserError, match="a file: is no AutoencoderKL under diffusers' names"):
        config_of({"x": tensors["quant_conv.bias"]}, 4, "a file")


def test_a_fine_tuned_decoder_takes_the_place_of_the_own_one(codec) -> None:
    x, fresh = jnp.asarray(pictures()), codec.fresh_decoder(jax.random.key(0), width=8, layers=1)
    z = encode(codec, x)
    np.testing.assert_array_equal(decode(codec.with_decoder(fresh), z), decode(codec, z))
    other = codec.with_decoder(jax.tree.map(lambda a: 0.5 * a, fresh))
    assert np.abs(decode(other, z) - decode(codec, z)).max() > 1e-3
    np.testing.assert_array_equal(encode(other, x), z)
