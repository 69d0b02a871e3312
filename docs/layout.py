"""Draws the picture of the rooms from .importlinter: python -m docs.layout"""

import configparser
import html
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/pages/pictures/layout.svg"
# What stands in a row of the picture, and what each room is for; in the order of .importlinter.
BANDS = {
    "what is run": {"main": "the command line", "modes": "train, sample, evaluate, prepare, ...: one file each"},
    "what modes do": {"serving": "page and HTTP API", "benchmarks": "timed runs",
                      "planning": "a pod, before it is rented", "training": "step, loop, optimizer",
                      "evaluation": "likelihood, quality", "sampling": "generate, stream"},
    "one system": {"model": "codec + text + flow of a config", "checkpoints": "save, resume, release, grow",
                   "data": "digits, raw videos, pipeline"},
    "mathematics": {"flow": "blocks, their inverse, the denoiser", "codec": "pixels to latents",
                    "text": "prompt, tokenizer, T5"},
    "building blocks": {"nn": "Transformer, RoPE, cache", "kernels": "attention: TPU, GPU, reference",
                        "sharding": "array axes to mesh axes"},
    "ground": {"io": "video, atomic files, progress", "config": "every setting, checked",
               "settings": "fields, listing"},
}


def layout() -> str:
    """SVG of the rooms. Raises ValueError where they are not those of .importlinter, in its order."""
    rules = configparser.ConfigParser()
    rules.read(ROOT / ".importlinter")
    named = re.findall(r"\w+", rules["importlinter:contract:rooms"]["layers"])
    if named != [room for band in BANDS.values() for room in band]:
        raise ValueError(f"BANDS of {__file__} must name the rooms of .importlinter in order: {named}")
    left, width, height, gap, body = 130, 820, 56, 10, []
    for row, (label, rooms) in enumerate(BANDS.items()):
        top, cell = 10 + row * (height + gap), (width - gap * (len(rooms) - 1)) / len(rooms)
        body.append(f'<text x="10" y="{top + 33}" class="f">{label}</text>')
        for column, (name, what) in enumerate(rooms.items()):
            x, end = left + column * (cell + gap), "/" if (ROOT / "starflow_jax" / name).is_dir() else ".py"
            body.append(f'<rect x="{x:.0f}" y="{top}" width="{cell:.0f}" height="{height}" rx="6"/>'
                        f'<text x="{x + cell / 2:.0f}" y="{top + 23}" class="a">{name}{end}</text>'
                        f'<text x="{x + cell / 2:.0f}" y="{top + 42}" class="b">{html.escape(what)}</text>')
    bottom = 10 + len(BANDS) * (height + gap)
    body.append(f'<text x="10" y="{bottom + 14}" class="n">A file imports only from rows below it and from rooms to '
                "its right; flow, codec and text do not import one another, nor do checkpoints and data.</text>")
    style = ("rect{fill:#eef3fb;stroke:#5b7db1}.a{font-size:15px;font-weight:bold;text-anchor:middle}"
             ".b{font-size:12px;text-anchor:middle;fill:#444}.f{font-size:13px;fill:#5b7db1}.n{font-size:12px;fill:#444}")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 10} {bottom + 26}" '
            f'font-family="sans-serif"><style>{style}</style><rect width="100%" height="100%" '
            f'style="fill:white;stroke:none"/>{"".join(body)}</svg>\n')


if __name__ == "__main__":
    PICTURE.write_text(layout())
