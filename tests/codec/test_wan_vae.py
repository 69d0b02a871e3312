"""The Wan VAE's modules and weights: golden numbers, parts equal the whole, sizes, names, shapes, dtypes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from starflow_jax.codec.wan_stream import WanCodec
from starflow_jax.codec.wan_vae import WanConfig, WanVAE, from_patches, to_patches
from starflow_jax.codec.wan_weights import abstract_params, from_released, released_shapes, to_released
from starflow_jax.config import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
# Stride 4, time stride 2.
SMALL = WanConfig(dim=4, dec_dim=4, z_dim=3, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,))

# The first call for each shape and each kind of cache (none, or one) compiles.
decode_next = jax.jit(WanCodec.decode_next)
moments = jax.jit(WanCodec.moments)


@jax.jit
def encode_at_once(codec: WanCodec, pixels_BTHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`WanCodec.moments` by the VAE itself: no parts, no tiles, no cache."""
    vae, params = WanVAE(codec.config, jnp.dtype(codec.dtype)), {"params": codec.params}
    features, _ = vae.apply(params, pixels_BTHWC, None, method=WanVAE.encode_high)
    (mean, log_variance), _ = vae.apply(params, features, None, method=WanVAE.encode_low)
    return (mean - codec.mean_C) / codec.std_C, log_variance


def random_params(config: WanConfig, seed: int = 0) -> Any:
    """Parameters that keep the variance, with biases and norms that are neither 0 nor 1."""
    random = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) == 1:
            return jax.device_put(random.uniform(0.5, 1.0, leaf.shape).astype(leaf.dtype))
        return jax.device_put(random.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(leaf.dtype))

    return jax.tree.map(draw, abstract_params(config, jnp.float32))


def small_codec(**changes: Any) -> WanCodec:
    mean, std = jnp.asarray([0.3, -0.2, 0.1]), jnp.asarray([0.5, 2.0, 1.5])
    return WanCodec(random_params(SMALL), mean, std, config=SMALL, **changes)


def pixels(frames: int, height: int = 8, width: int = 12, batch: int = 1, seed: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (batch, frames, height, width, 3)), jnp.float32)


def latents(frames: int, height: int = 2, width: int = 3, batch: int = 1, seed: int = 4) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, frames, height, width, 3)), jnp.float32)


def golden_config(case: Mapping[str, Any]) -> WanConfig:
    """The sizes of a golden case of kind wan22_vae."""
    return WanConfig(case["dim"], case["dec_dim"], case["z_dim"], tuple(case["dim_mult"]), case["num_res_blocks"],
                     tuple(case["temporal_downsample"]), case["patch_size"])


def check_golden_wan(case: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Ours for every output of a golden case of kind wan22_vae."""
    assert case["layout"] == "b c t h w"
    config = golden_config(case)
    weights = {name.removeprefix("params/"): value for name, value in tensors.items() if name.startswith("params/")}
    codec = WanCodec(from_released(weights, config, jnp.float32, "golden"), jnp.asarray(tensors["in/mean"]),
                     jnp.asarray(tensors["in/std"]), config=config)
    video, latent = (jnp.moveaxis(jnp.asarray(tensors[name]), 1, -1) for name in ("in/video", "in/latent"))
    (mean, log_variance), (image, _) = moments(codec, video), moments(codec, video[:, :1])
    found = {"mu": mean, "logvar": log_variance, "image_mu": image, "reconstruction": decode_next(codec, mean, None)[0],
             "decoded": decode_next(codec, latent, None)[0]}
    return {name: np.moveaxis(np.asarray(value), -1, 1) for name, value in found.items()}


def test_the_released_model_by_name_and_size() -> None:
    shapes = released_shapes(WanConfig())
    assert len(shapes) == 196
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 704_688_668
    assert shapes["conv1.weight"] == (96, 96, 1, 1, 1)
    assert shapes["encoder.conv1.weight"] == (160, 12, 3, 3, 3)
    assert shapes["encoder.downsamples.2.downsamples.2.time_conv.weight"] == (640, 640, 3, 1, 1)
    assert shapes["decoder.middle.1.norm.gamma"] == (1024, 1, 1)
    assert shapes["decoder.upsamples.0.upsamples.3.time_conv.weight"] == (2048, 1024, 3, 1, 1)
    assert shapes["decoder.upsamples.3.upsamples.0.shortcut.weight"] == (256, 512, 1, 1, 1)
    assert (WanConfig().stride, WanConfig().time_stride) == (16, 4)


def test_names_and_shapes_are_those_of_a_released_file() -> None:
    case = json.loads((GOLDEN / "wan22_vae.json").read_text())
    with safe_open(GOLDEN / "wan22_vae.safetensors", framework="numpy") as file:
        held = {name.removeprefix("params/"): tuple(file.get_slice(name).get_shape())
                for name in file.keys() if name.startswith("params/")}
    assert released_shapes(golden_config(case)) == held


def test_weights_go_there_and_back() -> None:
    params = random_params(SMALL)
    tensors = to_released(params, SMALL)
    assert {name: value.shape for name, value in tensors.items()} == released_shapes(SMALL)
    jax.tree.map(np.testing.assert_array_equal, from_released(tensors, SMALL, jnp.float32, "here"), params)
    half = from_released(tensors, SMALL, jnp.bfloat16, "here")
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def test_every_misfit_is_listed() -> None:
    tensors = to_released(random_params(SMALL), SMALL)
    del tensors["conv1.bias"], tensors["decoder.head.0.gamma"]
    tensors |= {"surplus": np.zeros(1), "conv2.bias": np.zeros(7)}
    with pytest.raises(UserError, match=r"some\.pth .*missing 2: conv1.bias, decoder.head.0.gamma; unexpected 1: "
                                        r"surplus; misshapen 1: conv2.bias \(7,\) instead of \(3,\)"):
        from_released(tensors, SMALL, jnp.float32, "some.pth")


def test_sizes_that_make_no_vae_are_refused() -> None:
    with pytest.raises(UserError, match="temporal_downsample"):
        WanConfig(dim_mult=(1, 2, 2))
    with pytest.raises(UserError, match="last two"):
        WanConfig(dim_mult=(1, 2, 4), temporal_downsample=(True, True))
    with pytest.raises(UserError, match="wan.z_dim=0"):
        WanConfig(z_dim=0)


def test_patches_have_the_order_colour_column_row() -> None:
    x = np.arange(2 * 4 * 3).reshape(1, 1, 2, 4, 3)
    patches = np.asarray(to_patches(jnp.asarray(x), 2))
    assert patches.shape == (1, 1, 1, 2, 12)
    for colour in range(3):
        for column in range(2):
            for row in range(2):
                assert patches[0, 0, 0, 1, colour * 4 + column * 2 + row] == x[0, 0, row, 2 + column, colour]
    np.testing.assert_array_equal(from_patches(jnp.asarray(patches), 2), x)


def test_a_latent_frame_at_a_time_decodes_as_all_at_once() -> None:
    codec, z = small_codec(), latents(4, batch=2)
    whole, _ = decode_next(codec, z, None)
    cache, parts = None, []
    for index in range(4):
        part, cache = decode_next(codec, z[:, index:index + 1], cache)
        parts.append(part)
    assert [part.shape[1] for part in parts] == [1, 2, 2, 2]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)
    assert np.std(whole) > 0.1


def test_what_comes_later_changes_nothing_before() -> None:
    codec, z = small_codec(), latents(4, batch=2)
    before, after = (decode_next(codec, x, None)[0] for x in (z, z.at[:, 2].add(1.0)))
    changed = np.abs(np.asarray(before - after)).max(axis=(0, 2, 3, 4)) > 0
    np.testing.assert_array_equal(changed, [False] * 3 + [True] * 4)
    video = pixels(7, batch=2)
    (before, _), (after, _) = (moments(codec, x) for x in (video, video.at[:, 3].add(1.0)))
    changed = np.abs(np.asarray(before - after)).max(axis=(0, 2, 3, 4)) > 0
    np.testing.assert_array_equal(changed, [False] * 2 + [True] * 2)


def test_the_cache_does_not_grow() -> None:
    codec, z = small_codec(), latents(4, batch=2)
    _, after_one = decode_next(codec, z[:, :1], None)
    _, after_two = decode_next(codec, z[:, 1:2], after_one)
    _, after_four = decode_next(codec, z, None)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cache) for cache in
              (after_one, after_two, after_four)]
    assert shapes[0] == shapes[1] == shapes[2]


def test_bfloat16_is_near_float32() -> None:
    z = latents(4, batch=2)
    exact, _ = decode_next(small_codec(), z, None)
    codec = small_codec(dtype="bfloat16")
    near, cache = decode_next(codec, z, None)
    assert near.dtype == jnp.float32 and {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    error = float(jnp.linalg.norm(near - exact) / jnp.linalg.norm(exact))
    assert 0 < error < 0.03
