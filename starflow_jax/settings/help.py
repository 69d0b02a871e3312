"""The list of settings as --help prints it."""

import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from starflow_jax.settings.listing import Described, describe, sections

NAME_WIDTH, LINE_WIDTH = 30, 110  # characters


def settings_text(root: Any, chosen: Sequence[str] = (), values: Any = None) -> str:
    """What --help prints about the chosen sections of `root`, or about all. values: an instance of it, whose values are
    shown instead of the defaults."""
    parts: dict[str, list[str]] = {}
    for section, description, settings in _by_section(root):
        lines = [_setting_entry(one, section, values) for one in settings]
        head = textwrap.wrap(f"{section}: {description}", LINE_WIDTH) if section else []
        parts.setdefault(section.split(".")[0], []).append("\n".join([*head, *lines]))
    return "\n\n".join(part for top in chosen or parts for part in parts.get(top, ()))


def allowed_words(one: Described) -> str:
    """A setting's type and range, "a number, 0 (none) or more"; a range that implies the type stands alone."""
    if one.allowed.startswith(("a ", "one of ", "comma-separated ")):
        return one.allowed
    return ", ".join(filter(None, (one.type, one.allowed)))


def _by_section(root: Any) -> Iterator[tuple[str, str, list[Described]]]:
    """(dotted name, description, settings) of the root itself, "", and of each section."""
    for name, section in [("", root), *sections(root)]:
        prefix = f"{name}." if name else ""
        own = [one for one in describe(section, prefix) if "." not in one.name.removeprefix(prefix)]
        if own:
            yield name, " ".join((inspect.getdoc(section) or "").split()), own


def _setting_entry(one: Described, section: str, values: Any) -> str:
    value = one.default if values is None else functools.reduce(getattr, one.name.split("."), values)
    return entry(f"{one.name.removeprefix(f'{section}.')}={_shown(value)}", f"{one.description} ({allowed_words(one)})")


def entry(name: str, description: str) -> str:
    """A name and, in a column to its right, its description."""
    lines = [" " * NAME_WIDTH + line for line in textwrap.wrap(description, LINE_WIDTH - NAME_WIDTH)]
    name = f"  {name}"
    if len(name) < NAME_WIDTH:
        return "\n".join([f"{name:{NAME_WIDTH}}{lines[0].lstrip()}", *lines[1:]])
    return "\n".join([name, *lines])


def _shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is dataclasses.MISSING:
        return "..."
    return str(value).lower() if isinstance(value, bool) else str(value)
