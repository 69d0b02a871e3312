"""What a section of settings is made of: fields that carry their description and the values they may have."""

import dataclasses
import functools
import numbers
import typing
from collections.abc import Callable
from typing import Any, ClassVar


class UserError(Exception):
    """Bad input that its user can mend: shown as one line, exit code 2, no traceback."""

    def __str__(self) -> str:
        """One line, whatever of a library's message or a file's content is in it."""
        return "".join(letter if letter.isprintable() else " " for letter in super().__str__())


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The values that a setting may have, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def at_least(low: float, zero: str = "", *, most: float) -> Allowed:
    """Any number from `low` to `most`. zero: what the value 0 stands for, where low is 0."""
    return Allowed(f"{f'0 ({zero})' if zero else low} or more, at most {most}", lambda value: low <= value <= most)


def positive(most: float) -> Allowed:
    """Any number above 0, up to `most`."""
    return Allowed(f"greater than 0, at most {most}", lambda value: 0 < value <= most)


def one_of(*choices: str) -> Allowed:
    """Any of these words."""
    return Allowed(f"one of {', '.join(choice or '(empty)' for choice in choices)}", lambda value: value in choices)


SEED = Allowed("0 to 4294967295 (2^32 - 1)", lambda value: 0 <= value < 2**32)
WEIGHTS = ("", "int8", "int4")  # what the matrices of layers may be kept as
PROBABILITY = Allowed("a probability, 0 to 1", lambda value: 0 <= value <= 1)
NAMES = Allowed("comma-separated names", lambda value: all(names(value)))


def names(listed: str) -> tuple[str, ...]:
    """The names of a comma-separated list."""
    return tuple(name.strip() for name in listed.split(","))


def whole_number(text: str) -> int | None:
    """The whole number that a text of at most nine digits is; None for any other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None


def is_ratio(text: str) -> bool:
    """Whether it is W:H, of whole numbers greater than 0."""
    width, colon, height = text.partition(":")
    return bool(colon and whole_number(width) and whole_number(height))


RATIO = Allowed("empty, or W:H, such as 16:9", lambda value: not value or is_ratio(value))
RATIOS = Allowed("comma-separated ratios W:H, such as 16:9,1:1", lambda value: all(map(is_ratio, names(value))))
DTYPES = one_of("float32", "bfloat16")


def setting(default: Any, description: str, allowed: Allowed | None = None) -> Any:
    """A field with what --help says about it."""
    return dataclasses.field(default=default, metadata={"description": description, "allowed": allowed})


def required(description: str, allowed: Allowed | None = None) -> Any:
    """A field without a default."""
    return dataclasses.field(metadata={"description": description, "allowed": allowed})


class Settings:
    """A section of the settings; its fields are checked when it is made."""

    path: ClassVar[str] = ""  # its name in errors; "": that of its class

    def __post_init__(self) -> None:
        section: Any = type(self)  # a dataclass, as every subclass is
        hints = type_hints(section)
        for field in dataclasses.fields(section):
            value, kind = getattr(self, field.name), hints[field.name]
            self.require(field.name, _is_a(value, kind), f"must be {type_words(kind)}")
            if kind is str:
                self.require(field.name, _is_utf8(value), "must be text in UTF-8, without NUL")
            allowed = field.metadata.get("allowed")
            if allowed:
                self.require(field.name, allowed.holds(value), f"must be {allowed.words}")
        self.check()

    def check(self) -> None:
        """What must hold beyond each field's own range."""

    def require(self, field: str, holds: bool, words: str) -> None:
        """Raises UserError, which names the field and its value, unless `holds`."""
        if not holds:
            shown = repr(getattr(self, field))
            shown = shown if len(shown) <= 200 else shown[:200] + "..."
            raise UserError(f"{self.path or type(self).__name__.lower()}.{field}={shown}: {words}")


def type_words(kind: Any) -> str:
    """A type as errors and --help call it."""
    if typing.get_origin(kind) is tuple:
        return "a tuple of whole numbers" if typing.get_args(kind)[0] is int else "a tuple of numbers"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words[kind] if kind in words else kind.__name__


@functools.cache
def type_hints(section: Any) -> dict[str, Any]:
    """The type of each field of a section."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a byte of the command line that was none
        return False
    return "\0" not in text


def _is_a(value: Any, kind: Any) -> bool:
    """NumPy's numbers count as numbers; true and false do not."""
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(part, typing.get_args(kind)[0]) for part in value)
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, kind)
