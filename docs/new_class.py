"""A class that the model in the package never saw: hand-drawn stars, moving in the digits' world.

    python -m docs.new_class draw FOLDER      clips of stars and, so that nothing is forgotten, of digits, with captions
    python -m docs.new_class read WORKDIR     what is read of samples of a workdir's model, and of the package's; and
                                              WORKDIR/stars.png, of some of its stars

The reader is the digits' own, fitted on stars as an eleventh class. Those that it is fitted and tested on are others.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import starflow_jax as sf
from starflow_jax.config import UserError
from starflow_jax.data.digits import scene
from starflow_jax.data.digits.captions import COLOURS, DIRECTIONS, caption
from starflow_jax.data.digits.reader import Reader
from starflow_jax.evaluation.measures import share_interval
from starflow_jax.io.pictures import contact_sheet
from starflow_jax.io.progress import table
from starflow_jax.io.video import write_mp4

STAR = 10  # behind the ten digits
STARS = {"train": range(240), "test": range(240, 300)}  # by the seed that each is drawn from
SHOWN = 6
SIDE, FPS, FRAMES, SCALE = 20, 8, 17, 4  # of a drawing; of the clips: a second and a half more than the model makes
WORLD = scene.MovingDigitsConfig(wraps=True)


def draw_star(seed: int) -> np.ndarray:
    """uint8 (SIDE, SIDE), bright on dark as the digits' scans are: five strokes from tip to tip, by a shaky hand."""
    random, fine = np.random.default_rng([STAR, seed]), 8 * SIDE
    turn, stretch = random.normal(0, 0.12), random.uniform(0.8, 1.1, 2)
    angles = turn + 2 * np.pi * np.array([0, 2, 4, 1, 3, 0]) / 5 + random.normal(0, 0.06, 6)
    radius = fine * 0.42 * random.uniform(0.9, 1.08, 6)
    tips_62 = fine / 2 + radius[:, None] * np.stack([np.sin(angles), -np.cos(angles)], axis=1) * stretch
    picture = Image.new("L", (fine, fine))
    pen, width = ImageDraw.Draw(picture), int(random.integers(10, 16))
    for begin, end in zip(tips_62, tips_62[1:]):
        bent = (begin + end) / 2 + random.normal(0, fine * 0.015, 2)
        pen.line([*begin, *bent, *end], fill=255, width=width, joint="curve")
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def star_caption(colour: int, direction: int, random: np.random.Generator, long: bool) -> str:
    """As the digits' are, with "star" for the digit."""
    return re.sub(r"(digit )?\b(seven|7)\b", "star", caption(7, colour, direction, random, long))


def draw(folder: Path, digits: int = 240) -> None:
    """A video of each star of the training part, and of so many digits of training scans: NAME.mp4 with NAME.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    stars = np.stack([draw_star(seed) for seed in STARS["train"]])
    which_N = random.choice(scene.split_scan_ids("train"), digits)
    scans = np.concatenate([stars, scene.load_scans(which_N, SIDE)])
    labels_N = np.concatenate([np.full(len(stars), STAR), which_N // 500])
    clips, colours_N, directions_N = moving(scans, random)
    for index, (label, colour, direction) in enumerate(zip(labels_N, colours_N, directions_N)):
        name = folder / f"{'star' if label == STAR else 'digit'}_{index:03d}"
        say = star_caption if label == STAR else lambda *of, label=int(label): caption(label, *of)
        write_mp4(name.with_suffix(".mp4"), clips[index], FPS, SCALE)
        name.with_suffix(".txt").write_text(say(int(colour), int(direction), random, True) + "\n")
    print(f"{len(stars)} stars and {digits} digits: {folder}")


def moving(scans_NDD: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(clips (N, FRAMES, H, W, 3) uint8, colours, directions), drawn at random."""
    colours_N, directions_N = (random.integers(len(kinds), size=len(scans_NDD)) for kinds in (COLOURS, DIRECTIONS))
    position_NT2 = scene.random_motion(random, directions_N, WORLD).positions(FRAMES)
    small = np.stack([np.asarray(Image.fromarray(scan).resize((WORLD.digit_size,) * 2, Image.Resampling.LANCZOS))
                      for scan in scans_NDD])
    return scene.render_clips(small, colours_N, position_NT2, size=WORLD.size), colours_N, directions_N


def star_reader() -> Reader:
    """Of eleven classes."""
    scan_ids = scene.split_scan_ids("train")
    stars = np.stack([draw_star(seed) for seed in STARS["train"]])
    return Reader.fit(np.concatenate([scene.load_scans(scan_ids, SIDE), stars]),
                      np.concatenate([scan_ids // 500, np.full(len(stars), STAR)]))


def read(workdir: str, prompts: int = 200) -> list[tuple[str, float, float]]:
    """(whose clips, share of stars read as stars, of digits as those asked for): of real clips of stars and digits that
    the reader was not fitted on, of samples of the workdir's model, and of the package's; prints a table, with half of
    Wilson's 95 % intervals over prompts."""
    reader, random = star_reader(), np.random.default_rng(1)
    test_ids = random.choice(scene.split_scan_ids("test"), prompts)
    real_stars, *_ = moving(np.stack([draw_star(seed) for seed in STARS["test"]]), random)
    real_digits, *_ = moving(scene.load_scans(test_ids, SIDE), random)
    rows = [("real clips", _share(reader, real_stars, STAR), _share(reader, real_digits, test_ids // 500))]
    looks = np.stack([random.integers(len(kinds), size=prompts) for kinds in (COLOURS, DIRECTIONS)], axis=1).tolist()
    of_stars = [star_caption(colour, direction, random, True) for colour, direction in looks]
    of_digits = [caption(int(label), colour, direction, random, True)
                 for label, (colour, direction) in zip(test_ids // 500, looks)]
    for name, model in ((workdir, sf.load(workdir)), ("the model in the package", sf.load())):
        stars = _sampled(model, of_stars)
        rows.append((name, _share(reader, stars, STAR), _share(reader, _sampled(model, of_digits), test_ids // 500)))
        if name == workdir:
            contact_sheet(Path(workdir) / "stars.png", stars[:SHOWN], of_stars[:SHOWN], scale=3)
    print(table([(name, *("{:.3f} ± {:.3f}".format(*share_interval(share, prompts)) for share in shares))
                 for name, *shares in rows],
                ("read as asked", "stars", "digits")))
    return rows


def _share(reader: Reader, clips: np.ndarray, labels: int | np.ndarray) -> float:
    return float((reader.read(clips)[0] == labels).mean())


def _sampled(model: sf.Model, prompts: Sequence[str]) -> np.ndarray:
    return np.stack([video.frames for video in model.generate(list(prompts), seed=0)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("draw").add_argument("folder", type=Path)
    reading = commands.add_parser("read")
    reading.add_argument("workdir")
    reading.add_argument("--prompts", type=int, default=200)
    given = parser.parse_args()
    try:
        if given.command == "draw":
            draw(given.folder)
        else:
            read(given.workdir, given.prompts)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
