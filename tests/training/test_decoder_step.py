"""Fine-tuning a codec's decoder on noised latents: its loss, what a step changes, the Wan VAE by the same code."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.codec.interface import LatentCodec, decode_pixels, encode_frames, to_float
from starflow_jax.config import Codec, Config, Data, Decoder, Train, UserError
from starflow_jax.training.decoder_step import DecoderState, create_state, decoder_step, noised
from starflow_jax.training.discriminator import discriminator_loss, fresh_discriminator, generator_loss, logits
from tests.codec.test_wan_vae import pixels, small_codec
from tests.helpers import tiny_model
from tests.small_model import CONFIG

DECODER = Decoder(width=8, layers=1, lpips=0.0, adversarial=0.0, discriminator_width=4)
TRAIN = Train(steps=50, warmup_steps=0, learning_rate=3e-3, ema=0.5)


def config_of(model: Any = CONFIG.model, codec: Codec = CONFIG.codec, **decoder: Any) -> Config:
    return dataclasses.replace(CONFIG, model=model, codec=codec, train=TRAIN,
                               decoder=dataclasses.replace(DECODER, **decoder))


def smooth_clips(count: int = 4, seed: int = 0) -> np.ndarray:
    """uint8 (count, 9, 8, 8, 3): plain colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (count, 1, 1, 1, 3))
    return np.broadcast_to(colours, (count, 9, 8, 8, 3)).astype(np.uint8)


def trained(config: Config, codec: LatentCodec, frames: np.ndarray, steps: int, *perceptual: Any
            ) -> tuple[DecoderState, list[dict[str, float]]]:
    state, rows = create_state(config, codec), []
    latents = encode_frames(codec, frames, config.codec.later_frames_scale)
    for _ in range(steps):
        state, scalars = decoder_step(config, state, codec, latents, jnp.asarray(frames), *(perceptual or (None, {})))
        rows.append({name: float(value) for name, value in scalars.items()})
    return state, rows


def test_the_first_loss_is_the_l1_of_the_codecs_own_decoder(system) -> None:
    config, frames = config_of(), smooth_clips()
    state, (row,) = trained(config, system.codec, frames, 1)
    clean = encode_frames(system.codec, frames, 1.0)
    key = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), 0))[0]
    made = decode_pixels(system.codec, noised(config, clean, key), 1.0)
    np.testing.assert_allclose(row["l1"], np.abs(made - to_float(frames)).mean(), rtol=1e-5)
    assert row["loss"] == row["l1"] and (int(state.step), int(state.skipped)) == (1, 0)
    assert state.discriminator == {}


def test_training_removes_noise_and_the_same_seed_gives_the_same_parameters(system) -> None:
    config, frames = config_of(), smooth_clips()
    state, rows = trained(config, system.codec, frames, 40)
    assert np.mean([row["l1"] for row in rows[-5:]]) < 0.6 * rows[0]["l1"]
    again, _ = trained(config, system.codec, frames, 40)
    jax.tree.map(np.testing.assert_array_equal, state, again)
    moved = jax.tree.map(lambda now, mean: float(np.abs(now - mean).max()), state.params, state.ema)
    assert max(jax.tree.leaves(moved)) > 0


def test_levels_of_noise() -> None:
    clean = jnp.zeros((1024, 3, 2, 2, 4))
    fixed, uniform = (np.asarray(noised(config_of(noise=noise), clean, jax.random.key(0))).std(axis=(1, 2, 3, 4))
                      for noise in ("fixed", "uniform"))
    sigma = CONFIG.model.noise_std
    np.testing.assert_allclose(fixed.mean(), sigma, rtol=0.05)
    assert fixed.min() > 0.5 * sigma and uniform.min() < 0.2 * sigma and uniform.max() < 1.5 * sigma
    np.testing.assert_allclose(uniform.mean(), sigma / 2, rtol=0.05)


def test_the_hinge_losses() -> None:
    params = fresh_discriminator(jax.random.key(0), 4)
    real, made = (jax.random.normal(jax.random.key(seed), (2, 5, 8, 8, 3)) for seed in (1, 2))
    of_real, of_made = (np.asarray(logits(params, x)) for x in (3 * real, made))
    assert of_real.shape == (2, 5, 2, 2, 1)
    np.testing.assert_allclose(discriminator_loss(params, 3 * real, made),
                               np.maximum(0, 1 - of_real).mean() + np.maximum(0, 1 + of_made).mean(), rtol=1e-5)
    np.testing.assert_allclose(generator_loss(params, made), -of_made.mean(), rtol=1e-5)


def test_every_term_has_its_weight_and_the_discriminator_an_optimizer_of_its_own(system) -> None:
    config = config_of(lpips=0.5, adversarial=0.25)
    distance = lambda scale, a, b: scale * jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))  # noqa: E731
    state, (row, after) = trained(config, system.codec, smooth_clips(), 2, distance, jnp.float32(2.0))
    np.testing.assert_allclose(row["loss"], row["l1"] + 0.5 * row["lpips"] + 0.25 * row["adversarial"], rtol=1e-5)
    assert row["lpips"] > 0 and after["discriminator_loss"] != row["discriminator_loss"]
    fresh = create_state(config, system.codec)
    # Adam's second step at most doubles its first, which is the learning rate.
    moved = jax.tree.map(lambda now, before: float(np.abs(now - before).max()), state.discriminator,
                         fresh.discriminator)
    assert 0 < max(jax.tree.leaves(moved)) <= 2.1 * config.decoder.discriminator_learning_rate
    assert moved["conv_0"]["kernel"] > 0 and moved["logits"]["kernel"] > 0


def test_a_step_that_is_not_finite_is_left_out(system) -> None:
    not_a_number = lambda _, a, b: jnp.full(len(a), jnp.nan)  # noqa: E731
    config = config_of(lpips=1.0, adversarial=0.1)
    state, (row,) = trained(config, system.codec, smooth_clips(), 1, not_a_number, {})
    assert (row["skip"], int(state.skipped), int(state.step)) == (1, 1, 1)
    fresh = create_state(config, system.codec)
    for part in ("params", "ema", "discriminator"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(fresh, part))


def test_the_wan_vae_by_the_same_code() -> None:
    """Its decoder starts as it is, learns, and its encoder stays."""
    codec = small_codec()
    sizes = Codec(kind="wan", stride=4, time_stride=2, later_frames_scale=0.6)
    config = config_of(tiny_model(channels=3, frames=2, height=2, width=2, noise_std=0.3), sizes, adversarial=0.01)
    video = np.asarray((pixels(3, batch=2) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    state, rows = trained(config, codec, video, 12)
    assert set(state.params["decoder"]) == {"decoder", "post_quant"}
    assert np.isfinite([row["loss"] for row in rows]).all() and rows[-1]["l1"] < 0.9 * rows[0]["l1"]
    tuned, z = codec.with_decoder(state.params["decoder"]), encode_frames(codec, video, 0.6)
    np.testing.assert_array_equal(encode_frames(tuned, video, 0.6), z)
    whole = decode_pixels(tuned, z, 1.0)
    first, cache = tuned.decode_next(z[:, :1], None)
    second, _ = tuned.decode_next(z[:, 1:2], cache)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-5)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(UserError, match="train.accumulate=2: must be 1 with train.target=decoder"):
        dataclasses.replace(TRAIN, target="decoder", batch_size=4, accumulate=2)
    data = Data(source="prepared", directory="somewhere", latents=True)
    with pytest.raises(UserError, match="train.target='decoder': needs pixels beside the latents"):
        dataclasses.replace(CONFIG, train=dataclasses.replace(TRAIN, target="decoder"), data=data)
