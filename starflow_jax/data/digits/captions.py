"""What the captions of moving digits say, and what can be read out of one: digit, colour and direction."""

import functools
import re
import string
from collections.abc import Sequence

import numpy as np

from starflow_jax.config import UserError

ATTRIBUTES = ("digit", "colour", "direction")  # of a clip; labels (B, 3) have them in this order
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Corners of the RGB cube: far apart, and a grey level is painted by switching channels on and off.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
}
COLOUR_NAMES = tuple(COLOURS)

# (down, right) steps per unit of travel; clockwise from "right".
DIRECTIONS: dict[str, tuple[int, int]] = {
    "right": (0, 1),
    "lower right": (1, 1),
    "down": (1, 0),
    "lower left": (1, -1),
    "left": (0, -1),
    "upper left": (-1, -1),
    "up": (-1, 0),
    "upper right": (-1, 1),
}
DIRECTION_NAMES = tuple(DIRECTIONS)

_DIRECTION_PHRASES: dict[str, tuple[str, ...]] = {
    "right": ("right", "to the right", "rightwards"),
    "left": ("left", "to the left", "leftwards"),
    "up": ("up", "upwards", "to the top"),
    "down": ("down", "downwards", "to the bottom"),
    "upper left": ("to the upper left", "up and to the left", "up and left"),
    "upper right": ("to the upper right", "up and to the right", "up and right"),
    "lower left": ("to the lower left", "down and to the left", "down and left"),
    "lower right": ("to the lower right", "down and to the right", "down and right"),
}
_VERBS = ("moves", "drifts", "glides", "slides", "floats")
_SHORT_TEMPLATES = ("a {colour} {digit} {verb} {way}", "{colour} {digit} {verb} {way}")
_LONG_TEMPLATES = (
    "a handwritten {digit} in bright {colour} {verb} slowly {way} over a black background",
    "the handwritten digit {digit}, drawn in {colour}, {verb} steadily {way} on a black background",
    "on a black canvas a {colour} {digit} written by hand {verb} {way} at a constant speed",
    "a clip of a {colour} handwritten {digit} that {verb} smoothly {way} in front of a dark background",
    "over an empty black background a {colour} digit {digit} {verb} {way} in a straight line",
)

_DIGIT_OF_WORD = {word: digit for digit, word in enumerate(DIGIT_WORDS)} | {str(d): d for d in range(10)}
_COLOUR_OF_WORD = {name: index for index, name in enumerate(COLOUR_NAMES)}
_STEP_OF_WORD: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("up", "upper", "upward", "upwards", "top"), (-1, 0)),
    **dict.fromkeys(("down", "lower", "downward", "downwards", "bottom"), (1, 0)),
    **dict.fromkeys(("left", "leftward", "leftwards"), (0, -1)),
    **dict.fromkeys(("right", "rightward", "rightwards"), (0, 1)),
}


def caption(digit: int, colour: int, direction: int, wording_rng: np.random.Generator, long: bool) -> str:
    """One of many wordings, e.g. "a red seven moves right"; colour and direction are indices."""

    def pick(choices: Sequence[str]) -> str:
        return choices[int(wording_rng.integers(len(choices)))]

    return pick(_LONG_TEMPLATES if long else _SHORT_TEMPLATES).format(
        digit=pick((DIGIT_WORDS[digit], str(digit))),
        colour=COLOUR_NAMES[colour],
        verb=pick(_VERBS),
        way=pick(_DIRECTION_PHRASES[DIRECTION_NAMES[direction]]),
    )


def parse_caption(text: str) -> tuple[int, int, int]:
    """Reads (digit, colour, direction) out of a caption; UserError where one is missing or ambiguous."""
    words = re.findall(r"[a-z]+|[0-9]+", text.lower())
    digits = {_DIGIT_OF_WORD[word] for word in words if word in _DIGIT_OF_WORD}
    colours = {_COLOUR_OF_WORD[word] for word in words if word in _COLOUR_OF_WORD}
    steps = {_STEP_OF_WORD[word] for word in words if word in _STEP_OF_WORD}
    step = (sum(down for down, _ in steps), sum(right for _, right in steps))
    # Of contrary words ("left", "right") the sum is no step, or a shorter one than was named.
    direction_known = step in DIRECTIONS.values() and len(steps) == sum(map(abs, step))
    for what, known, example in (
        ("digit (zero to nine, or 0 to 9)", len(digits) == 1, "seven"),
        (f"colour ({', '.join(COLOUR_NAMES)})", len(colours) == 1, "red"),
        (f"direction ({', '.join(DIRECTION_NAMES)})", direction_known, "right"),
    ):
        if not known:
            raise UserError(
                f'caption "{text}" must name exactly one {what}, such as "{example}" in '
                '"a red seven moves right"'
            )
    direction = list(DIRECTIONS.values()).index(step)
    return digits.pop(), colours.pop(), direction


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt, in its order, that no caption of the data set has: what a model trained on it can't
    know."""
    words = re.findall(r"[^\W_]+", prompt.lower())
    return [word for word in dict.fromkeys(words) if word not in _vocabulary()]


@functools.cache
def _vocabulary() -> frozenset[str]:
    """Every word of every caption."""
    templates = " ".join(_SHORT_TEMPLATES + _LONG_TEMPLATES)
    fixed = (text for text, *_ in string.Formatter().parse(templates))
    phrases = (phrase for choices in _DIRECTION_PHRASES.values() for phrase in choices)
    texts = [*fixed, *phrases, *_VERBS, *DIGIT_WORDS, *string.digits, *COLOUR_NAMES]
    return frozenset(re.findall(r"[^\W_]+", " ".join(texts)))
