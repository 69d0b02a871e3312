"""Settings in writing: names, defaults, ranges, and the values of an instance."""

import dataclasses
import re

from starflow_jax.config import Config, Sample
from starflow_jax.settings.fields import POSITIVE, Settings, one_of, required, setting
from starflow_jax.settings.help import settings_markdown, settings_text
from starflow_jax.settings.listing import describe
from tests.helpers import tiny_model


@dataclasses.dataclass(frozen=True)
class Inner(Settings):
    """Of the inside."""

    kind: str = setting("a", "which|one", one_of("a", "b"))


@dataclasses.dataclass(frozen=True)
class Outer(Settings):
    """Of the outside."""

    size: int = required("how large", POSITIVE)
    inner: Inner = Inner()


@dataclasses.dataclass(frozen=True)
class Root(Settings):
    """All."""

    outer: Outer = required("")
    flag: bool = setting(True, "whether")


def test_text_of_nested_sections() -> None:
    assert settings_text(Root) == "\n".join([
        "  flag=true                   whether (true or false)",
        "",
        "outer: Of the outside.",
        "  size=...                    how large (a whole number, greater than 0)",
        "",
        "outer.inner: Of the inside.",
        "  kind=a                      which|one (one of a, b)"])
    assert settings_text(Root, ("outer",)).startswith("outer: ")
    assert "size=3 " in settings_text(Root, ("outer",), Root(Outer(size=3)))


def test_markdown_of_nested_sections() -> None:
    assert settings_markdown(Root).splitlines()[-6:] == [
        "## outer.inner", "", "Of the inside.", "", "| setting | default | allowed | what it is |",
        "| --- | --- | --- | --- |"][1:] + ["| `outer.inner.kind` | `a` | one of a, b | which\\|one |"]


def test_the_page_has_a_row_for_each_setting() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| `(.+?)` \|", settings_markdown(Config), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(one.name for one in describe(Config))
    shown = dict(rows)
    assert (shown["sample.guidance"], shown["sample.stream"], shown["sample.prompt"]) == ("2.5", "false", '""')


def test_lines_are_not_too_long_and_values_are_those_of_the_instance() -> None:
    config = Config(name="x", model=tiny_model(), sample=Sample(guidance=7.25, prompt="a cat"))
    text = settings_text(Config, (), config)
    assert "\n  guidance=7.25 " in text and "\n  prompt=a cat " in text and "=..." not in text
    assert max(map(len, text.splitlines())) <= 120
