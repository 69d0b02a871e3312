"""Captions of moving digits say what is seen, are read back, and know all their words."""

import re

import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.data.digits.captions import (
    COLOUR_NAMES,
    COLOURS,
    DIRECTION_NAMES,
    DIRECTIONS,
    caption,
    parse_caption,
    unknown_words,
)


def test_captions_say_digit_colour_and_direction_in_many_wordings():
    rng = np.random.default_rng(0)
    for long in (False, True):
        for label in np.ndindex(10, len(COLOURS), len(DIRECTIONS)):
            assert parse_caption(caption(*label, rng, long=long)) == label
        wordings = {caption(7, 0, 0, rng, long) for _ in range(400)}
        assert len(wordings) > 40


def test_parse_caption_reads_a_users_words():
    names = (COLOUR_NAMES.index, DIRECTION_NAMES.index)
    blue, upper_left = names[0]("blue"), names[1]("upper left")
    assert parse_caption("A BLUE 3, moving upwards and left.") == (3, blue, upper_left)


@pytest.mark.parametrize(
    "text,missing",
    [
        ("a cat", "digit"),
        ("a red moves right", "digit"),
        ("a red seven and a red two move right", "digit"),
        ("a seven moves right", "colour"),
        ("a red or blue seven moves right", "colour"),
        ("a red seven", "direction"),
        ("a red seven moves left and right", "direction"),
        ("a red seven moves up, left and right", "direction"),
    ],
)
def test_parse_caption_names_what_is_missing_or_ambiguous(text, missing):
    with pytest.raises(UserError, match=f"exactly one {missing}"):
        parse_caption(text)


def test_no_caption_has_an_unknown_word():
    rng, words = np.random.default_rng(1), set()
    for label in np.ndindex(10, len(COLOURS), len(DIRECTIONS)):
        for long in (False, True):
            text = caption(*label, rng, long=long)
            assert unknown_words(text) == []
            words |= set(re.findall("[a-z0-9]+", text))
    assert {"seven", "7", "magenta", "upwards", "canvas", "drifts", "handwritten"} <= words
    everything = "zero one two 0 1 2 red cyan white up down left right upper lower bottom moves floats steadily"
    assert set(everything.split()) <= words


@pytest.mark.parametrize("prompt, unknown", [
    ("a cat plays the piano", ["cat", "plays", "piano"]),
    ("A Blue THREE moves, right!", []),
    ("a red seven moves left over a beach, a BEACH", ["beach"]),
    ("une étoile moves to the top", ["une", "étoile"]),
    ("", []),
])
def test_words_that_no_caption_has_are_named_once_in_order(prompt, unknown):
    assert unknown_words(prompt) == unknown
