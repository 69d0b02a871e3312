"""Generation on a small random model: seeds, lengths, given frames, denoising choices, likelihoods."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.flow import generation
from starflow_jax.flow.jacobi import Outcome
from starflow_jax.model.parameters import decoding_variables, flow_variables
from starflow_jax.model.system import System
from starflow_jax.sampling.conditions import Draws, Noise, extended, noise_for, shallow_tokens
from starflow_jax.sampling.denoise import denoise
from starflow_jax.sampling.generate import Clips, generate_clips, log_likelihood
from starflow_jax.sampling.likelihood import frame_nll, window_nll
from starflow_jax.sampling.renoise import refresher
from starflow_jax.sampling.windows import windows
from tests.helpers import changed, forward
from tests.small_model import CAPTIONS, CONFIG, SETTINGS


@pytest.fixture(scope="module")
def clips(system: System, params) -> Clips:
    return generate_clips(system, params, CAPTIONS, [5, 6, 7], SETTINGS)


def test_a_seed_gives_the_same_video_alone_and_in_a_batch(system: System, params, clips: Clips) -> None:
    alone = generate_clips(system, params, CAPTIONS[1:2], [6], SETTINGS)
    np.testing.assert_allclose(alone.noisy_BNhwC[0], clips.noisy_BNhwC[1], atol=1e-4)
    log_likelihood_of = partial(log_likelihood, system, params)
    np.testing.assert_allclose(log_likelihood_of(alone)[0], log_likelihood_of(clips)[1], rtol=1e-4)
    assert np.abs(clips.noisy_BNhwC[0] - clips.noisy_BNhwC[1]).max() > 0.1


def test_noise_of_a_seed_does_not_depend_on_the_length() -> None:
    np.testing.assert_array_equal(noise_for([3], (2, 4, 5))[0], noise_for([9, 3], (6, 4, 5))[1, :2])


def test_sample_encodes_back_to_its_noise(system: System, params, clips: Clips) -> None:
    unguided = generate_clips(system, params, CAPTIONS, [5, 6, 7], changed(SETTINGS, guidance=0.0))
    text = system.features(params, jnp.asarray(system.text_ids([system.prompt(c) for c in CAPTIONS])))
    out = forward(system.flow, flow_variables(params), jnp.asarray(unguided.noisy_BNhwC), text)
    np.testing.assert_allclose(out.z_BTSK, noise_for([5, 6, 7], out.z_BTSK.shape[1:]), atol=2e-3)
    nll = frame_nll(system, params, jnp.asarray(unguided.noisy_BNhwC), text)
    np.testing.assert_allclose(nll.sum(axis=1), -log_likelihood(system, params, unguided), rtol=1e-5)


def test_sequential_equals_jacobi(system: System, params, clips: Clips) -> None:
    sequential = generate_clips(system, params, CAPTIONS, [5, 6, 7], changed(SETTINGS, kind="sequential"))
    np.testing.assert_allclose(sequential.noisy_BNhwC, clips.noisy_BNhwC, atol=2e-2)
    assert sequential.solved.deep_steps_BK.max() == 1 and clips.solved.deep_steps_BK.max() > 1


def test_the_start_does_not_change_the_end(system: System, params, clips: Clips) -> None:
    noise = generate_clips(system, params, CAPTIONS, [5, 6, 7], changed(SETTINGS, start="noise"))
    np.testing.assert_allclose(noise.noisy_BNhwC, clips.noisy_BNhwC, atol=2e-2)


def test_given_frames_come_back_and_the_rest_follows(system: System, params) -> None:
    known = np.random.default_rng(1).integers(0, 256, (3, 5, 8, 8, 3), np.uint8)
    made = generate_clips(system, params, CAPTIONS, [5, 6, 7], SETTINGS, known_BTHWC=known)
    assert made.frames_BTHWC.shape == (3, 9, 8, 8, 3)
    clean = np.asarray(system.encode(jnp.asarray(known)))
    noise = noise_for([seed ^ 0x5EED for seed in (5, 6, 7)], (2, 4, 4)).reshape(clean.shape)
    np.testing.assert_allclose(made.noisy_BNhwC[:, :2], clean + CONFIG.model.noise_std * noise, atol=1e-6)
    # The made frame is the inverse of its own noise, given the noised ones.
    text = system.features(params, jnp.asarray(system.text_ids([system.prompt(c) for c in CAPTIONS])))
    unguided = generate_clips(system, params, CAPTIONS, [5, 6, 7], changed(SETTINGS, guidance=0.0),
                              known_BTHWC=known)
    out = forward(system.flow, flow_variables(params), jnp.asarray(unguided.noisy_BNhwC), text)
    np.testing.assert_allclose(out.z_BTSK[:, 2], noise_for([5, 6, 7], out.z_BTSK.shape[1:])[:, 2], atol=2e-3)


def test_long_videos_pass_the_window(system: System, params, clips: Clips) -> None:
    long = generate_clips(system, params, CAPTIONS, [5, 6, 7], changed(SETTINGS, frames=25))
    assert long.frames_BTHWC.shape[1] == 25
    np.testing.assert_allclose(long.noisy_BNhwC[:, :3], clips.noisy_BNhwC, atol=1e-4)
    assert np.isfinite(log_likelihood(system, params, long)).all()


def test_windows_cover_every_frame_once() -> None:
    for total in range(1, 12):
        spans = list(windows(total, 4, 2))
        assert [n for span in spans for n in range(span.begin, span.end)] == list(range(total))
        assert all(span.stop - span.start <= 4 and span.end == span.stop for span in spans)


def test_denoising_of_a_clip_of_the_training_length_and_longer(system: System, params) -> None:
    noisy = jax.random.normal(jax.random.key(0), (1, 7, 2, 2, 4))
    text = system.features(params, jnp.asarray(system.text_ids([CAPTIONS[0]])))
    for how in ("denoiser", "score"):
        short = denoise(system, params, noisy[:, :3], text, how)
        long = denoise(system, params, noisy, text, how)
        assert long.shape == noisy.shape and np.abs(long - noisy).max() > 1e-3
        np.testing.assert_allclose(long[:, :2], short[:, :2], atol=1e-5)
    np.testing.assert_array_equal(denoise(system, params, noisy, text, "none"), noisy)


def test_lengths_that_cannot_be_are_refused(system: System, params) -> None:
    with pytest.raises(UserError, match="sample.frames=12"):
        generate_clips(system, params, CAPTIONS, [0, 1, 2], changed(SETTINGS, frames=12))
    with pytest.raises(UserError, match="context_frames=3"):
        generate_clips(system, params, CAPTIONS, [0, 1, 2], changed(SETTINGS, frames=25, context_frames=3))
    of_no_size = np.zeros((3, 9, 7, 7, 3), np.uint8)  # which the codec refuses: it isn't asked
    with pytest.raises(UserError, match="sample.frames=9: the 9 given frames fill it; ask for 13"):
        generate_clips(system, params, CAPTIONS, [0, 1, 2], changed(SETTINGS, frames=9), known_BTHWC=of_no_size)


def test_certificate_of_an_unguided_sample(system: System, params) -> None:
    exact = changed(SETTINGS, guidance=0.0, tolerance=0.0, certify=True)
    clips = generate_clips(system, params, CAPTIONS, [5, 6, 7], exact)
    assert clips.certificate_B is not None and clips.certificate_B.max() < 1e-7
    loose = generate_clips(system, params, CAPTIONS, [5, 6, 7],
                           changed(exact, max_steps=1, block_size=4, tolerance=1e-3))
    assert loose.certificate_B.min() > 1e-4 and (loose.solved.outcome_B == Outcome.OUT_OF_STEPS).all()
    with pytest.raises(UserError, match="sample.certify"):
        generate_clips(system, params, CAPTIONS, [5, 6, 7], changed(SETTINGS, certify=True))


def test_a_video_says_how_its_solution_ended(system: System, params, clips: Clips) -> None:
    np.testing.assert_array_equal(clips.solved.outcome_B, [Outcome.EXACT] * 3)  # blocks of two, at a small tolerance
    loose = changed(SETTINGS, block_size=4, tolerance=0.1)
    whole = generate_clips(system, params, CAPTIONS, [5, 6, 7], loose)
    np.testing.assert_array_equal(whole.solved.outcome_B, [Outcome.CONVERGED] * 3)
    broken = Draws(Noise(given_BN=noise_for([5, 6, 7], (3, 4, 4)).at[1, 2].set(jnp.nan)))
    made = generate_clips(system, params, CAPTIONS, [5, 6, 7], loose, draws=broken)
    np.testing.assert_array_equal(made.solved.outcome_B, [Outcome.CONVERGED, Outcome.NOT_FINITE, Outcome.CONVERGED])
    assert made.solved.deep_steps_BK[1, -1] == 1 and np.isnan(made.solved.deep_residual_BK[1, -1])
    np.testing.assert_allclose(made.noisy_BNhwC[::2], whole.noisy_BNhwC[::2], atol=1e-5)
    assert [outcome.words for outcome in Outcome] == ["exact", "converged", "out of steps", "not finite"]


def test_negative_prompt_and_metadata_reach_the_model(system: System, params, clips: Clips) -> None:
    for change in (dict(negative_prompt=CAPTIONS[1]), dict(fps=12), dict(aspect_ratio="16:9")):
        other = generate_clips(system, params, CAPTIONS, [5, 6, 7], changed(SETTINGS, **change))
        assert np.abs(other.noisy_BNhwC - clips.noisy_BNhwC).max() > 1e-4, change


def test_changes_of_prompt(system: System, params, clips: Clips) -> None:
    settings = changed(SETTINGS, changes="5: a blue three drifts left")
    other = generate_clips(system, params, CAPTIONS, [5, 6, 7], settings)
    np.testing.assert_allclose(other.noisy_BNhwC[:, :2], clips.noisy_BNhwC[:, :2], atol=1e-4)
    assert np.abs(other.noisy_BNhwC[0, 2] - clips.noisy_BNhwC[0, 2]).max() > 1e-4
    assert np.abs(other.noisy_BNhwC[1, 2] - clips.noisy_BNhwC[1, 2]).max() > 1e-3  # the same caption, extended
    whole = never_shown_without_first_frame(system)
    same = generate_clips(whole, params, CAPTIONS, [5, 6, 7], settings)
    np.testing.assert_allclose(same.noisy_BNhwC[1], clips.noisy_BNhwC[1], atol=1e-4)
    for wrong in ("a prompt", "x: a prompt", "0: a prompt"):
        with pytest.raises(UserError, match="sample.changes"):
            generate_clips(system, params, CAPTIONS, [5, 6, 7], changed(SETTINGS, changes=wrong))


def never_shown_without_first_frame(system: System) -> System:
    """The system with a config that drops no first frames."""
    data = dataclasses.replace(system.config.data, first_frame_drop=0.0)
    return dataclasses.replace(system, config=dataclasses.replace(system.config, data=data))


def test_captions_of_later_windows_are_extended_as_in_training(system: System) -> None:
    captions, released = ["a seven", ""], changed(SETTINGS, as_released=True)
    assert extended(system.config, captions, SETTINGS) == ["(extend) a seven", ""]
    assert extended(system.config, captions, released) == captions
    assert extended(never_shown_without_first_frame(system).config, captions, SETTINGS) == captions


def test_a_later_window_goes_on_from_its_context_under_its_own_caption_and_guidance(system: System, params) -> None:
    """Frame 3 of four, in a window of three that begins with frame 1: as if that were given. Its likelihood, too."""
    settings = changed(SETTINGS, frames=13, later_guidance=0.5)
    long = generate_clips(system, params, CAPTIONS, [5, 6, 7], settings)
    u = shallow_tokens(system.flow, params, jnp.asarray(long.noisy_BNhwC))
    text = [system.caption_features(params, [f"(extend) {caption}" for caption in CAPTIONS]),
            jnp.broadcast_to(system.caption_features(params, [""]), (3, 24, 16))]
    (made, _), = generation.generate(
        system.flow, decoding_variables(params), noise_for([5, 6, 7], (4, 4, 4))[:, 3:], jnp.stack(text), guidance=0.5,
        token_grid=system.token_grid, known_BTSK=u[:, 1:3], window=3)
    np.testing.assert_allclose(u[:, 3:], made, atol=2e-3)
    guided = generate_clips(system, params, CAPTIONS, [5, 6, 7], changed(settings, later_guidance=-1.0))
    assert np.abs(guided.noisy_BNhwC[:, 3] - long.noisy_BNhwC[:, 3]).max() > 1e-2
    np.testing.assert_array_equal(guided.noisy_BNhwC[:, :3], long.noisy_BNhwC[:, :3])
    nll = window_nll(system.flow, params, jnp.asarray(long.noisy_BNhwC[:, 1:]), text[0])
    np.testing.assert_allclose(frame_nll(system, params, jnp.asarray(long.noisy_BNhwC), long.text)[:, 3], nll[:, 2],
                               rtol=1e-4)


def test_frames_encoded_again_are_denoised_and_noised_anew(system: System, params) -> None:
    """Frame 3 of four as if the two before it had been given clean, with noise of their own; and so for each video
    alone."""
    settings = changed(SETTINGS, frames=13, renoise=True)
    long = generate_clips(system, params, CAPTIONS, [5, 6, 7], settings)
    window, text = jnp.asarray(long.noisy_BNhwC[:, :3]), system.caption_features(params, CAPTIONS)
    clean = denoise(system, params, window, text, "denoiser")
    noise = noise_for([seed ^ 0xF4E5 for seed in (5, 6, 7)], (4, 4, 4)).reshape(3, 4, 2, 2, 4)
    known = shallow_tokens(system.flow, params, clean[:, 1:] + CONFIG.model.noise_std * noise[:, 1:3])
    extend = [system.caption_features(params, [f"(extend) {caption}" for caption in CAPTIONS]),
              jnp.broadcast_to(system.caption_features(params, [""]), (3, 24, 16))]
    (made, _), = generation.generate(
        system.flow, decoding_variables(params), noise_for([5, 6, 7], (4, 4, 4))[:, 3:], jnp.stack(extend),
        guidance=SETTINGS.guidance, token_grid=system.token_grid, known_BTSK=known, window=3)
    u = shallow_tokens(system.flow, params, jnp.asarray(long.noisy_BNhwC))
    np.testing.assert_allclose(u[:, 3:], made, atol=2e-3)
    alone = generate_clips(system, params, CAPTIONS[1:2], [6], settings)
    np.testing.assert_allclose(alone.noisy_BNhwC[0], long.noisy_BNhwC[1], atol=1e-3)
    as_sampled = generate_clips(system, params, CAPTIONS, [5, 6, 7], changed(settings, renoise=False))
    assert np.abs(as_sampled.noisy_BNhwC[:, 3] - long.noisy_BNhwC[:, 3]).max() > 1e-2


def test_what_cannot_be_noised_anew_is_refused(system: System, params) -> None:
    for change in (dict(denoise="none"), dict(as_released=True)):
        with pytest.raises(UserError, match="sample.renoise"):
            changed(SETTINGS, renoise=True, **change)
    for change, words in ((dict(denoiser="none"), "no denoiser"), (dict(local_shallow=False), "local_shallow")):
        model = dataclasses.replace(system.config.model, **change)
        other = dataclasses.replace(system, config=dataclasses.replace(system.config, model=model))
        with pytest.raises(UserError, match=words):
            refresher(other, params, None, changed(SETTINGS, renoise=True))
