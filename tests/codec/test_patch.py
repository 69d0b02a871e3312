"""The patch codec: an orthonormal projection, causal in time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.codec import patch
from starflow_jax.codec.interface import to_float, to_uint8
from starflow_jax.config import UserError

SHAPE = patch.PatchShape(time=2, space=2)  # 24 pixel values per patch


def clips(count: int = 4, frames: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(count, frames, 8, 6, 3), dtype=np.uint8)


def smooth_clips() -> np.ndarray:
    """Clips in which one direction has most of the variance: the brightness of the clip."""
    noise = np.random.default_rng(1).integers(-5, 6, size=(4, 5, 8, 6, 3))
    return (np.array([40, 90, 160, 220])[:, None, None, None, None] + noise).astype(np.uint8)


def through(codec: patch.PatchCodec, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(codec.decode(codec.encode(jnp.asarray(pixels))))


def test_all_components_lose_nothing() -> None:
    codec = patch.fit(clips(), SHAPE, channels=24)
    other = clips(seed=7)
    decoded = to_uint8(jnp.asarray(through(codec, to_float(other))))
    np.testing.assert_array_equal(decoded, other)


def test_decode_of_encode_is_a_projection() -> None:
    """Of all frames but the first, which is the mean of its patch's frames."""
    codec = patch.fit(clips(), SHAPE, channels=5)
    pixels = to_float(clips(seed=7))
    once = through(codec, pixels)
    assert np.abs(once - pixels).max() > 0.1
    np.testing.assert_allclose(through(codec, once)[:, 1:], once[:, 1:], atol=1e-5)
    latents = codec.encode(jnp.asarray(pixels))
    np.testing.assert_allclose(codec.encode(jnp.asarray(once))[:, 1:], latents[:, 1:], atol=1e-5)


def test_the_first_frame_is_the_mean_of_the_frames_of_its_patch() -> None:
    codec = patch.fit(clips(), SHAPE, channels=5)
    pixels = to_float(clips(count=1, frames=1, seed=7))
    still = np.repeat(pixels[0, 0, :2, :2][None], 2, axis=0).reshape(24)  # two rows and columns, twice in time
    basis, mean = np.asarray(codec.basis_PC, np.float64), np.asarray(codec.mean_P, np.float64)
    projected = (mean + basis @ (basis.T @ (still - mean))).reshape(2, 2, 2, 3)
    assert np.abs(projected[0] - projected[1]).max() > 0.01
    np.testing.assert_allclose(through(codec, pixels)[0, 0, :2, :2], projected.mean(axis=0), atol=1e-5)


def test_basis_is_orthonormal_and_the_first_latent_has_unit_variance() -> None:
    codec = patch.fit(smooth_clips(), SHAPE, channels=5)
    np.testing.assert_allclose(codec.basis_PC.T @ codec.basis_PC, np.eye(5), atol=1e-5)
    latents = np.asarray(codec.encode(jnp.asarray(to_float(smooth_clips())))).reshape(-1, 5)
    np.testing.assert_allclose(latents.mean(axis=0), 0, atol=1e-4)
    variances = latents.var(axis=0, ddof=1)
    np.testing.assert_allclose(variances[0], 1, rtol=1e-4)
    assert variances[1] < 0.1 * variances[0]


def test_latents_have_the_stated_shape() -> None:
    codec = patch.fit(clips(), SHAPE, channels=5)
    latents = codec.encode(jnp.asarray(to_float(clips())))
    assert latents.shape == (4, 3, 4, 3, 5)
    assert codec.decode(latents).shape == (4, 5, 8, 6, 3)
    assert SHAPE.pixels == 24


def test_a_latent_frame_sees_its_own_pixels_alone() -> None:
    codec = patch.fit(clips(), SHAPE, channels=24)
    pixels = to_float(clips(count=1, seed=7))
    before = np.asarray(codec.encode(jnp.asarray(pixels)))
    image = codec.encode(jnp.asarray(pixels[:, :1]))
    np.testing.assert_allclose(image, before[:, :1], atol=1e-5)
    pixels[:, 3:] += 0.5
    after = np.asarray(codec.encode(jnp.asarray(pixels)))
    np.testing.assert_array_equal(after[:, :2], before[:, :2])
    assert np.abs(after[:, 2] - before[:, 2]).max() > 0.1


def test_pixel_ranges() -> None:
    levels = np.arange(256, dtype=np.uint8)
    values = to_float(levels)
    assert (values[0], values[255], values.dtype) == (-1.0, 1.0, np.float32)
    np.testing.assert_array_equal(to_uint8(jnp.asarray(values)), levels)
    np.testing.assert_array_equal(to_uint8(jnp.array([-1.5, 1.5])), [0, 255])


@pytest.mark.parametrize("frames", [0, 2, 4])
def test_wrong_frame_counts(frames: int) -> None:
    with pytest.raises(UserError, match=f"a clip of {frames} frames: .* 1 \\+ a multiple of 2"):
        SHAPE.latent_frames(frames)
    assert [SHAPE.latent_frames(count) for count in (1, 3, 5)] == [1, 2, 3]


def test_wrong_sizes() -> None:
    with pytest.raises(UserError, match="8x5.*multiples of 2"):
        patch.fit(clips()[:, :, :, :5], SHAPE, channels=5)
    for channels in (0, 25):
        with pytest.raises(UserError, match=f"model.channels={channels}: .*1 to 24"):
            patch.fit(clips(), SHAPE, channels=channels)


def test_frames_one_after_the_other_decode_as_all_at_once() -> None:
    codec = patch.fit(clips(), SHAPE, channels=5)
    latents = codec.encode(jnp.asarray(to_float(clips(seed=7))))
    cache, parts = None, []
    for index in range(latents.shape[1]):
        part, cache = codec.decode_next(latents[:, index:index + 1], cache)
        parts.append(part)
    assert [part.shape[1] for part in parts] == [1, 2, 2]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), codec.decode(latents), atol=1e-5)


def noise_decoder(codec: patch.PatchCodec, seed: int = 3) -> dict:
    """Its parameters, with a last layer that isn't 0."""
    params = codec.fresh_decoder(jax.random.key(seed), width=8, layers=1)
    kernel = 0.1 * jax.random.normal(jax.random.key(seed), params["head"]["kernel"].shape)
    return {**params, "head": {**params["head"], "kernel": kernel}}


def test_a_fresh_decoder_for_noised_latents_adds_nothing() -> None:
    codec = patch.fit(clips(), SHAPE, channels=5)
    latents = codec.encode(jnp.asarray(to_float(clips(seed=7))))
    fresh = codec.with_decoder(codec.fresh_decoder(jax.random.key(0), width=8, layers=1))
    np.testing.assert_array_equal(fresh.decode(latents), codec.decode(latents))
    other = codec.with_decoder(noise_decoder(codec))
    assert np.abs(other.decode(latents) - codec.decode(latents)).max() > 0.01
    np.testing.assert_array_equal(other.encode(jnp.asarray(to_float(clips()))), codec.encode(to_float(clips())))


def test_that_decoder_is_causal_and_decodes_a_stream_as_it_does_a_whole_video() -> None:
    codec = patch.fit(clips(frames=9), SHAPE, channels=5)
    codec = codec.with_decoder(noise_decoder(codec))
    latents = codec.encode(jnp.asarray(to_float(clips(count=2, frames=9, seed=7))))
    whole = codec.decode(latents)
    cache, parts = None, []
    for index in range(latents.shape[1]):
        part, cache = codec.decode_next(latents[:, index:index + 1], cache)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)
    later = codec.decode(latents.at[:, 3].add(1.0))
    np.testing.assert_array_equal(later[:, :5], whole[:, :5])  # the pixels of latent frames 0, 1 and 2
    earlier = codec.decode(latents.at[:, 1].add(1.0))
    assert np.abs(earlier - whole).max(axis=(0, 2, 3, 4))[3:].min() > 1e-4  # which frame 2 and 3 look back to
