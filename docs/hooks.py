"""What the manual's build adds to its pages: formulas as MathML, and the table of all settings."""

import html
import re

from latex2mathml.converter import convert
from mkdocs.structure.files import File

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_files(files, config):
    files.append(File.generated(config, "settings.md", content=settings_page()))
    return files


def on_page_content(content: str, page, config, files) -> str:
    """arithmatex's LaTeX -> MathML, which browsers draw by themselves: no script, no fonts."""
    def formula(found: re.Match) -> str:
        return convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")

    return FORMULA.sub(formula, content)
