"""What the manual's build adds to its pages: formulas as MathML, and the tables of all settings and of the
release's keys."""

import dataclasses
import html
import re

from latex2mathml.converter import convert
from mkdocs.structure.files import File

from starflow_jax.config import Config
from starflow_jax.model.release import KEYS
from starflow_jax.settings.help import allowed_words
from starflow_jax.settings.listing import Described, describe, sections

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_files(files, config):
    files.append(File.generated(config, "settings.md", content=settings_page()))
    files.append(File.generated(config, "release_keys.md", content=release_keys_page()))
    return files


def on_page_content(content: str, page, config, files) -> str:
    """arithmatex's LaTeX -> MathML, which browsers draw by themselves: no script, no fonts."""
    def formula(found: re.Match) -> str:
        return convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")

    return FORMULA.sub(formula, content)


def settings_page() -> str:
    """Markdown of every setting with its type, default and what is allowed."""
    lines = ["# Settings", "", "Every setting, as `--config.NAME=VALUE` on the command line; those of `sample` are the "
             "keyword arguments of the Python API, too. A config (`configs/*.py`) overrides these defaults."]
    for section, kind in [("", Config), *sections(Config)]:
        lines += ["", f"## {section or 'Config'}", "", kind.__doc__.splitlines()[0], "",
                  "| setting | default | | allowed |", "| --- | --- | --- | --- |"]
        lines += [_row(one) for one in describe(Config) if one.name.rpartition(".")[0] == section]
    return "\n".join(lines)


def release_keys_page() -> str:
    """Markdown of the keys of the release's YAML: what each becomes, or why it has no effect here."""
    lines = ["# The keys of the release's YAML", "", "As `configs/released.py:FILE.yaml` reads them. A default is what "
             "holds where the file does not have the key; one without must be there.", "",
             "| key | becomes | without effect, because | default | can be honoured |",
             "| --- | --- | --- | --- | --- |"]
    for name, key in KEYS.items():
        default = "" if key.default in (None, "") else f"`{key.default}`"
        only = ", ".join(f"`{value}`" for value in key.only) or "any"
        lines.append(f"| `{name}` | {key.becomes} | {key.without_effect} | {default} | {only} |")
    return "\n".join(lines)


def _row(one: Described) -> str:
    default = "(must be given)" if one.default is dataclasses.MISSING else f"`{one.default!r}`"
    cells = (f"`{one.name}`", default, one.description, allowed_words(one))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
