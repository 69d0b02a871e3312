"""Every setting by its dotted name: for --help, for the manual, and for the error about an unknown name."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from starflow_jax.settings.fields import UserError, type_hints, type_words


@dataclasses.dataclass(frozen=True)
class Described:
    """One setting."""

    name: str  # dotted, such as sample.guidance
    type: str  # in words, such as "a number"
    default: Any  # dataclasses.MISSING where it must be given
    allowed: str  # "": whatever its type allows
    description: str


def describe(section: Any, prefix: str = "") -> Iterator[Described]:
    """The settings of a section and of the sections nested in it, in order."""
    for field in dataclasses.fields(section):
        kind = type_hints(section)[field.name]
        if dataclasses.is_dataclass(kind):
            yield from describe(kind, f"{prefix}{field.name}.")
        else:
            allowed = field.metadata.get("allowed")
            yield Described(prefix + field.name, type_words(kind), field.default, allowed.words if allowed else "",
                            field.metadata.get("description", ""))


def sections(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, class) of each section nested in a section, at any depth."""
    for name, kind in type_hints(section).items():
        if dataclasses.is_dataclass(kind):
            yield prefix + name, kind
            yield from sections(kind, f"{prefix}{name}.")


def unknown_setting(root: Any, name: str, renamed: Mapping[str, str]) -> UserError:
    """The error for a dotted name that is no setting: with its present name, with what is in it where it is a section,
    or with similar names."""
    if name in renamed:
        return UserError(f"{name}: this setting has another name now: {renamed[name]}")
    by_name = dict(sections(root))
    if name in by_name:
        return UserError(f"{name}: is a section of settings; it has {', '.join(type_hints(by_name[name]))}")
    known = [one.name for one in describe(root)]
    section, _, last = name.rpartition(".")
    beside = {_last(one): one for one in known if section and one.startswith(f"{section}.")}
    near = [beside[one] for one in difflib.get_close_matches(last, beside, n=2, cutoff=0.7)]
    near = near or [one for one in known if _last(one) == last]
    near = near or [one for one in known if difflib.get_close_matches(last, [_last(one)], cutoff=0.75)]
    if near:
        return UserError(f"{name}: no such setting; did you mean {' or '.join(near[:3])}?")
    inside = [one.removeprefix(f"{section}.") for one in known if section and one.startswith(f"{section}.")]
    if inside:
        return UserError(f"{name}: no such setting; {section} has {', '.join(inside)}")
    tops = [top for top in by_name if "." not in top]
    return UserError(f"{name}: no such setting; the sections are {', '.join(tops)}, and --help lists all settings")


def _last(name: str) -> str:
    return name.rpartition(".")[2]
