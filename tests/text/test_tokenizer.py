"""The small tokenizer: its conventions, its economy, and what it does with words it has never seen."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.text.prompt import EXTEND, format_prompt
from starflow_jax.text.tokenizer import EOS_ID, PAD_ID, SPACE, UNK_ID, Tokenizer, train_tokenizer

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLORS = ["red", "green", "blue", "yellow", "cyan", "magenta", "orange", "white"]
VERBS = ["drifts", "moves", "glides", "slides", "floats", "travels"]
DIRECTIONS = ("left", "right", "top", "bottom", "upper left", "upper right", "lower left", "lower right")


def _captions() -> list[str]:
    captions = []
    for digit, color, (verb, direction) in itertools.product(
        range(10), COLORS, zip(VERBS * 4, DIRECTIONS * 3, strict=True)
    ):
        captions.append(f"a {color} {DIGITS[digit]} {verb} to the {direction}")
        captions.append(
            f"a handwritten {digit} in bright {color} {verb} slowly towards the {direction} "
            "over a black background"
        )
    return captions


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [format_prompt(caption, 8, 0.3, "1:1") for caption in _captions()]


@pytest.fixture(scope="module")
def model(texts: list[str]) -> bytes:
    return train_tokenizer(texts, 256)


@pytest.fixture(scope="module")
def tokenizer(model: bytes) -> Tokenizer:
    return Tokenizer.load(model)


def test_words_are_whole_pieces(tokenizer: Tokenizer) -> None:
    for word in {word for caption in _captions() for word in caption.split()}:
        assert tokenizer.pieces(word) == [SPACE + word]


def test_long_prompts_are_short(tokenizer: Tokenizer) -> None:
    short = format_prompt("a red seven drifts to the upper left", 8, None, "1:1")
    caption = "a handwritten seven in bright red drifts slowly to the upper left over a black background"
    assert len(tokenizer.pieces(short)) == 15
    assert len(tokenizer.pieces(format_prompt(caption, 8, None, "1:1"))) == 23
    assert len(tokenizer.pieces(format_prompt(EXTEND + caption, 8, 0.3, "1:1"))) == 26


def test_ids(tokenizer: Tokenizer) -> None:
    ids_BS = tokenizer.encode(["a red seven", "", "a red seven drifts to the left"], 5)
    assert ids_BS.dtype == np.int32 and ids_BS.shape == (3, 5)
    assert ids_BS[0, 3:].tolist() == [EOS_ID, PAD_ID]
    assert ids_BS[1].tolist() == [EOS_ID, PAD_ID, PAD_ID, PAD_ID, PAD_ID]
    assert ids_BS[2, :3].tolist() == ids_BS[0, :3].tolist() and ids_BS[2, 4] == EOS_ID
    assert ids_BS[:, 0].tolist()[0] > UNK_ID and ids_BS.max() < tokenizer.vocab_size <= 256
    assert tokenizer.decode(ids_BS) == ["a red seven", "", "a red seven drifts"]


def test_newlines_and_case_do_not_matter(tokenizer: Tokenizer) -> None:
    as_formatted, as_one_line = tokenizer.encode(["A video:\na Red seven\n\n in", "a video: a red seven in"], 24)
    np.testing.assert_array_equal(as_formatted, as_one_line)


def test_unknown_words_are_spelled(tokenizer: Tokenizer) -> None:
    text = "a quick brown fox (jumps) & 1,000 dogs?"
    ids_BS = tokenizer.encode([text, "猫"], 64)
    assert tokenizer.decode(ids_BS[:1]) == [text]
    assert UNK_ID not in ids_BS[0] and UNK_ID in ids_BS[1]


def test_training_is_deterministic_and_silent(
    texts: list[str], model: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert train_tokenizer(iter(texts), 256) == model
    assert capfd.readouterr() == ("", "")
    assert train_tokenizer(texts[:100], 256) != model


def test_small_corpora_and_long_words() -> None:
    tokenizer = Tokenizer.load(train_tokenizer(["one counterclockwise word " + "x" * 50], 256))
    assert tokenizer.pieces("counterclockwise") == [SPACE + "counterclockwise"]


def test_file(tmp_path: Path, model: bytes, tokenizer: Tokenizer) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model)
    np.testing.assert_array_equal(Tokenizer.load(path).encode(["a red 7"], 8), tokenizer.encode(["a red 7"], 8))
    with pytest.raises(UserError, match="can't read"):
        Tokenizer.load(tmp_path / "none")


def test_errors(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="not a sentencepiece model"):
        Tokenizer.load(b"not a model")
    with pytest.raises(UserError, match="at least 1"):
        tokenizer.encode(["a"], 0)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(["", " \n"], 256)
    with pytest.raises(UserError, match="or more"):
        train_tokenizer(["a red seven"], 50)
