"""The caption by likelihood: the search against all captions, marginal choices, and the pretrained model."""

import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from configs.t2v import tiny
from starflow_jax.data.digits.captions import COLOUR_NAMES, DIRECTION_NAMES, parse_caption
from starflow_jax.data.digits.dataset import generate_clips
from starflow_jax.data.digits.scene import MovingDigitsConfig
from starflow_jax.evaluation.classify import (
    ATTRIBUTES,
    CHOICES,
    all_captions,
    choose,
    score_all,
    score_captions,
    search,
)
from starflow_jax.model.store import load_pretrained
from starflow_jax.sampling.conditions import noise_for
from starflow_jax.sampling.likelihood import frame_nll


def test_captions_are_all_labels_in_order() -> None:
    assert [parse_caption(text) for text in all_captions()] == list(itertools.product(*map(range, CHOICES)))
    assert CHOICES == (10, len(COLOUR_NAMES), len(DIRECTION_NAMES))


def peaked(clips: int) -> np.ndarray:
    """Scores with one peak each that a search of one attribute at a time finds."""
    random = np.random.default_rng(0)
    parts = [random.normal(0, 5, (clips, *(count if axis == a else 1 for a, count in enumerate(CHOICES))))
             for axis in range(3)]
    return sum(parts) + random.normal(0, 0.01, (clips, *CHOICES))


def test_search_finds_the_peak_and_scores_no_caption_twice() -> None:
    table, asked = peaked(20), []

    def score(clips_P: np.ndarray, labels_P3: np.ndarray) -> np.ndarray:
        asked.extend(zip(clips_P.tolist(), map(tuple, labels_P3.tolist())))
        return table[clips_P, *labels_P3.T]

    everything = score_all(score, 20)
    np.testing.assert_array_equal(everything, table)
    asked.clear()
    found = search(score, 20)
    assert len(asked) == len(set(asked)) == np.isfinite(found).sum() < 20 * 60
    np.testing.assert_array_equal(found[np.isfinite(found)], table[np.isfinite(found)])
    best = np.stack(np.unravel_index(table.reshape(20, -1).argmax(axis=1), CHOICES), axis=1)
    np.testing.assert_array_equal(np.stack(np.unravel_index(found.reshape(20, -1).argmax(axis=1), CHOICES), 1), best)
    for clip, label in enumerate(best):  # no change of a single attribute is left unscored
        for axis in range(3):
            line = np.moveaxis(found[clip], axis, 0)[:, *np.delete(label, axis)]
            assert np.isfinite(line).all()


def test_choices_are_marginal() -> None:
    scores = np.full((1, *CHOICES), -np.inf)
    scores[0, 3, 2, 1] = np.log(0.4)
    scores[0, 5, 2, 1] = np.log(0.3)
    scores[0, 5, 2, 4] = np.log(0.3)
    assert choose(scores).tolist() == [[5, 2, 1]]  # the digit 5 by sum, though (3, 2, 1) is the likeliest


def test_the_pretrained_model_reads_clips(tmp_path: Path) -> None:
    system, params, *_ = load_pretrained(tiny(), tmp_path)
    examples = list(generate_clips(MovingDigitsConfig(train_clips=1, validation_clips=1, test_clips=3), "test"))
    frames = np.stack([example["frames"][:13] for example in examples])
    labels = np.array([[example[name] for name in ATTRIBUTES] for example in examples])
    scores = score_captions(system, params, frames, every=False)
    assert (choose(scores)[:, 1:] == labels[:, 1:]).all()  # colour and direction; digits are not always legible
    # Differences between captions are those of the exact likelihood.
    digit, colour, direction = choose(scores)[0]
    scored = np.flatnonzero(np.isfinite(scores[0, :, colour, direction]))[:3]
    texts = [all_captions()[np.ravel_multi_index((other, colour, direction), CHOICES)] for other in scored]
    noisy = system.encode(jnp.asarray(frames[:1]))
    noise = noise_for([0], (4, 36, 48)).reshape(noisy.shape)
    noisy = jnp.broadcast_to(noisy + system.config.model.noise_std * noise, (len(scored), *noisy.shape[1:]))
    features = system.features(params, jnp.asarray(system.text_ids([system.prompt(text) for text in texts])))
    nll = np.asarray(frame_nll(system, params, noisy, features).sum(axis=1))
    assert len(scored) == 3 and np.ptp(nll) > 1
    ours = scores[0, scored, colour, direction]
    np.testing.assert_allclose(ours - ours[0], nll[0] - nll, atol=0.05)
