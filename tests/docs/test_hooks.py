"""What the build adds to pages; with the extra `docs`, as in CI."""

import importlib

import pytest

from starflow_jax.config import Config
from starflow_jax.model.release import KEYS
from starflow_jax.settings.listing import describe

pytest.importorskip("latex2mathml")
pytest.importorskip("mkdocs")
hooks = importlib.import_module("docs.hooks")


def test_formulas_become_mathml() -> None:
    page = ('<p>of <span class="arithmatex">\\(x_{&lt;s}\\)</span></p>'
            '<div class="arithmatex">\\[\\frac{a}{b}\\]</div>')
    out = hooks.on_page_content(page, None, None, None)
    assert "arithmatex" not in out and "\\" not in out
    assert 'display="inline"><mrow><msub><mi>x</mi>' in out and "&#x0003C;" in out
    assert 'display="block"><mrow><mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow></mfrac>' in out


def test_every_setting_has_its_row() -> None:
    rows = [line.split(" | ")[0] for line in hooks.settings_page().splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(f"| `{one.name}`" for one in describe(Config))


def test_every_key_of_the_release_has_its_row() -> None:
    rows = [line.split(" | ")[0] for line in hooks.release_keys_page().splitlines() if line.startswith("| `")]
    assert rows == [f"| `{name}`" for name in KEYS]
