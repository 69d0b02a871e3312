"""The licence of weights: found beside them, kept beside everything that is made of them."""

import re
from collections.abc import Mapping
from pathlib import Path

from starflow_jax.io.files import write_text

KEPT = "WEIGHTS_LICENSE.txt"  # in a workdir; beside a single file NAME.safetensors: NAME.WEIGHTS_LICENSE.txt
NAMES = re.compile(r"(license|licence|notice|copying)", re.IGNORECASE)
NONE_FOUND = ("no licence file was found beside these weights. Their publisher's licence applies all the same, also "
              "to what is made of them: read it where they were published. Apple publishes STARFlow's weights under a "
              "model licence of its own, which is not that of its code.")


def find_licences(source: Path) -> dict[str, str]:
    """{file: text} of the licences and notices beside a file or in a folder, and of the licence that a model card
    (README.md) states."""
    folder = source if source.is_dir() else source.absolute().parent
    if source.is_dir() and (source / KEPT).exists():  # a workdir
        return {KEPT: (source / KEPT).read_text(encoding="utf-8", errors="replace")}
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and NAMES.match(path.name) and path.suffix.lower() in ("", ".txt", ".md", ".rst"):
            found[path.name] = path.read_text(encoding="utf-8", errors="replace")
    card = folder / "README.md"
    if card.is_file():
        stated = _card_lines(card.read_text(encoding="utf-8", errors="replace"))
        found |= {card.name: stated} if stated else {}
    return found


def _card_lines(text: str) -> str:
    """The lines about the licence of a model card's front matter."""
    matter = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    lines = matter[1].splitlines() if matter else []
    return "\n".join(line for line in lines if re.match(r"licen[sc]e\w*:", line, re.IGNORECASE))


def licence_text(sources: Mapping[str, Path]) -> tuple[str, list[str]]:
    """(what is kept of the licences of several weights by what they are, a line to show for each licence)."""
    parts, shown = [], dict[str, list[str]]()
    for what, source in sources.items():
        found = find_licences(source)
        body = "\n\n".join(f"--- {name}\n{text.strip()}" for name, text in found.items()) or NONE_FOUND
        parts.append(f"=== {what}, from {source}\n\n{body}")
        shown.setdefault(_first_words(found), []).append(what)
    return "\n\n".join(parts) + "\n", [f"licence of {', '.join(whats)}: {words}" for words, whats in shown.items()]


def _first_words(found: Mapping[str, str]) -> str:
    if not found:
        return NONE_FOUND
    first = next(iter(found.values())).strip().splitlines()
    return f"{', '.join(found)} ({first[0].strip() if first else 'empty'})"


def carry_licence(source: Path, workdir: Path) -> None:
    """Keep in a workdir what is kept in the one, or beside the checkpoint of one, that its model begins with."""
    held = (source if (source / "checkpoints").is_dir() else source.absolute().parent.parent) / KEPT
    if held.exists():
        keep_licence(held.read_text(encoding="utf-8", errors="replace"), workdir / KEPT)


def beside(target: Path) -> Path:
    """Where the licence of a single file is kept."""
    return target.with_name(f"{target.stem}.{KEPT}")


def keep_licence(text: str, path: Path) -> None:
    """Write it, below what is kept there already of other weights."""
    before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if text not in before:
        write_text(path, f"{before}\n{text}" if before else text)
