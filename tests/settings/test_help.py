"""Settings in writing: names, defaults, ranges, and the values of an instance."""

import dataclasses

from starflow_jax.config import Config, Sample
from starflow_jax.settings.fields import Settings, one_of, positive, required, setting
from starflow_jax.settings.help import settings_text
from tests.helpers import tiny_model


@dataclasses.dataclass(frozen=True)
class Inner(Settings):
    """Of the inside."""

    kind: str = setting("a", "which one", one_of("a", "b"))


@dataclasses.dataclass(frozen=True)
class Outer(Settings):
    """Of the outside."""

    size: int = required("how large", positive(9))
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
        "  size=...                    how large (a whole number, greater than 0, at most 9)",
        "",
        "outer.inner: Of the inside.",
        "  kind=a                      which one (one of a, b)"])
    assert settings_text(Root, ("outer",)).startswith("outer: ")
    assert "size=3 " in settings_text(Root, ("outer",), Root(Outer(size=3)))


def test_lines_are_not_too_long_and_values_are_those_of_the_instance() -> None:
    config = Config(name="x", model=tiny_model(), sample=Sample(guidance=7.25, prompt="a cat"))
    text = settings_text(Config, (), config)
    assert "\n  guidance=7.25 " in text and "\n  prompt=a cat " in text and "=..." not in text
    assert max(map(len, text.splitlines())) <= 120
