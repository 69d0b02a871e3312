"""Pictures: reading, resizing, contact sheets, moving pictures, maps of values over frames."""

import io
import os
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from starflow_jax.config import UserError
from starflow_jax.io.files import atomic_path

FONT_SIZE = 13  # pixels; legible at 100% on a screen
MAX_PIXELS = 100_000_000  # of a picture that is read
# Not what Pillow reads besides: some of it by other programs, such as PostScript.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000")
MARGIN = 4  # pixels between the cells of a sheet


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a picture as (H, W, 3) uint8, turned upright. Raises UserError if it is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"image not found: {path}; check the path")
    try:
        with open(path, "rb") as file:
            return np.asarray(open_picture(file))
    except (NotAPicture, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot read image {path} ({error}); give an undamaged PNG or JPEG") from error


class NotAPicture(Exception):
    """Why a file is not read as a picture."""


def open_picture(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture as RGB, turned upright. Raises NotAPicture for files of other kinds, and for one of more pixels before
    any is decoded; what Pillow raises for a damaged one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels says what is too large
            image: Image.Image = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError as error:  # says nothing but the name of the file
        raise NotAPicture("unreadable: not a picture of a known kind") from error
    except Image.DecompressionBombError as error:
        raise NotAPicture("too large: more pixels than Pillow opens") from error
    if image.width * image.height > max_pixels:
        raise NotAPicture(f"too large: {image.width}x{image.height}, more than {max_pixels / 1e6:g} million pixels")
    ImageOps.exif_transpose(image, in_place=True)
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_crop(frames_THWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased resize to cover height × width, then a centre crop: (T, H, W, 3) -> (T, height, width, 3), uint8.

    Raises ValueError for another shape or dtype.
    """
    check_frames(frames_THWC)
    _, rows, columns, _ = frames_THWC.shape
    scale = max(height / rows, width / columns)
    left, top = (columns - width / scale) / 2, (rows - height / scale) / 2
    # Rounding may carry the box a hair outside the picture, which Pillow refuses.
    box = (max(left, 0), max(top, 0), min(columns - left, columns), min(rows - top, rows))
    resized = [
        Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box=box)
        for frame in frames_THWC
    ]
    return np.stack([np.asarray(image) for image in resized])


def resize_then_crop(frames_THWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """`resize_crop` as the release does it: bilinear, to whole pixels cut down, then the centre; one pixel that this
    may leave missing is black."""
    check_frames(frames_THWC)
    _, rows, columns, _ = frames_THWC.shape
    scale = max(height / rows, width / columns)
    size = int(rows * scale), int(columns * scale)
    resized = np.stack([np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BILINEAR))
                        for frame in frames_THWC])
    missing = [max(wanted - there, 0) for wanted, there in zip((height, width), size)]
    padded = np.pad(resized, ((0, 0), *((one // 2, (one + 1) // 2) for one in missing), (0, 0)))
    top, left = (int(round((there - wanted) / 2)) for there, wanted in zip(padded.shape[1:3], (height, width)))
    return padded[:, top:top + height, left:left + width]


def contact_sheet(
    path: str | os.PathLike[str],
    clips_BTHWC: np.ndarray,
    captions: Sequence[str],
    columns: int = 16,
    scale: int = 1,
) -> None:
    """Writes a PNG, one row per clip: its caption, and under it `columns` frames evenly spread in time.

    clips (B, T, H, W, 3) uint8, B captions. `scale` enlarges each pixel to scale × scale.
    """
    frame_count = clips_BTHWC.shape[1]
    shown = np.linspace(0, frame_count - 1, min(columns, frame_count)).round().astype(int)
    rows = []
    for clip_THWC, caption in zip(clips_BTHWC, captions, strict=True):
        check_frames(clip_THWC)
        padded = _pad_cells(enlarge(clip_THWC[shown], scale))
        strip_HWC = np.concatenate(list(padded), axis=1)
        rows.append(np.concatenate([_caption_picture(caption, strip_HWC.shape[1]), strip_HWC], axis=0))
    with atomic_path(path) as temporary:
        Image.fromarray(np.concatenate(rows, axis=0)).save(temporary, format="PNG", optimize=True)


def write_gif(
    path: str | os.PathLike[str],
    clips_BTHWC: np.ndarray,
    captions: Sequence[str],
    fps: float,
    columns: int = 4,
    scale: int = 1,
) -> None:
    """Writes clips (B, T, H, W, 3) uint8 as one endlessly moving grid, `columns` clips wide, captions above.

    One palette of 128 colours without dithering keeps the file small. It is chosen from the distinct colours,
    or the black and white that most pixels have would take all of it. GIF counts time in 1/100 s.
    """
    cells = [_pad_cells(enlarge(clip_THWC, scale)) for clip_THWC in clips_BTHWC]
    titles = [_caption_picture(caption, cells[0].shape[2]) for caption in captions]
    title_height = max(title.shape[0] for title in titles)
    for index, (title, cell_THWC) in enumerate(zip(titles, cells, strict=True)):
        title = np.pad(title, ((title_height - title.shape[0], 0), (0, 0), (0, 0)), constant_values=255)
        title_THWC = np.broadcast_to(title, (len(cell_THWC), *title.shape))
        cells[index] = np.concatenate([title_THWC, cell_THWC], axis=1)
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], axis=2) for i in range(0, len(cells), columns)]
    grid_THWC = np.concatenate(rows, axis=1)
    distinct_N3 = np.unique(grid_THWC.reshape(-1, 3), axis=0)
    palette = Image.fromarray(distinct_N3[None]).quantize(128, kmeans=3)
    pictures = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in grid_THWC
    ]
    file = io.BytesIO()  # straight to a disk, Pillow would lose what a write did not take
    pictures[0].save(
        file, format="GIF", save_all=True, append_images=pictures[1:], loop=0,
        duration=round(100 / fps) * 10, optimize=True,
    )  # fmt: skip
    with atomic_path(path) as temporary:
        temporary.write_bytes(file.getvalue())


def webp_bytes(frames_THWC: np.ndarray, fps: float, scale: int = 1) -> bytes:
    """Frames (T, H, W, 3) uint8 as a moving picture that plays once and then shows its last frame: a part of a video
    that is made while it plays, for whatever shows one picture after the other."""
    check_frames(frames_THWC)
    pictures = [Image.fromarray(frame) for frame in enlarge(frames_THWC, scale)]
    file = io.BytesIO()
    pictures[0].save(file, format="WEBP", save_all=True, append_images=pictures[1:], loop=1,
                     duration=round(1000 / fps), quality=90)
    return file.getvalue()


class HeatMap(NamedTuple):
    """Values over frames, as `draw_heat_maps` shows them."""

    values_Nhw: np.ndarray
    colours: str  # matplotlib's name of a colour map
    low: float  # the value of its first colour
    high: float  # and of its last
    label: str


def draw_heat_maps(
    path: str | os.PathLike[str],
    frames_NHWC: np.ndarray,
    titles: Sequence[str],
    maps: Sequence[HeatMap],
    headline: str,
    columns: int = 12,
) -> None:
    """Writes a PNG: a row of at most `columns` frames (uint8) with their titles, and one row for each map over them."""
    from matplotlib.figure import Figure  # takes a third of a second to import

    shown = np.unique(np.linspace(0, len(frames_NHWC) - 1, min(columns, len(frames_NHWC))).round().astype(int))
    extent = (0, frames_NHWC.shape[2], frames_NHWC.shape[1], 0)
    figure = Figure(figsize=(1.3 * len(shown) + 1.8, 1.4 * len(maps) + 1.8), layout="constrained")
    axes = figure.subplots(1 + len(maps), len(shown), squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for column, index in enumerate(shown):
        axes[0, column].imshow(frames_NHWC[index], extent=extent)
        axes[0, column].set_title(titles[index], fontsize=8)
        for row, (values_Nhw, colours, low, high, _) in enumerate(maps, start=1):
            axes[row, column].imshow(frames_NHWC[index].mean(axis=-1), cmap="gray", extent=extent)
            axes[row, column].imshow(values_Nhw[index], cmap=colours, vmin=low, vmax=high, extent=extent, alpha=0.75)
    for row, heat_map in enumerate(maps, start=1):
        figure.colorbar(axes[row, 0].images[1], ax=list(axes[row]), shrink=0.8, label=heat_map.label)
    figure.suptitle(headline, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


class Diagram(NamedTuple):
    """Curves over places 0, 1, 2, ..., as `draw_diagrams` shows them."""

    title: str
    curves: dict[str, Sequence[float]]  # by their labels
    grey: dict[str, Sequence[float]]  # what they are compared with; a single value is drawn as a level
    places: Sequence[int] = ()  # empty: from 0 on


def draw_diagrams(
    path: str | os.PathLike[str],
    diagrams: Sequence[Diagram],
    frames_RVFHWC: np.ndarray,
    rows: Sequence[str],
    captions: Sequence[str],
    headline: str,
    x_label: str,
    columns: int = 3,
) -> None:
    """Writes a PNG: diagrams, `columns` side by side, and below them a sheet with a row for each R, in which each video
    V has its F frames (uint8) side by side, under its caption."""
    from matplotlib.figure import Figure  # takes a third of a second to import

    lines, (row_count, videos, shown, height, width, _) = -(-len(diagrams) // columns), frames_RVFHWC.shape
    cell = 11.0 / videos * height / (shown * width)  # inches
    figure = Figure(figsize=(11.5, 2.1 * lines + cell * row_count + 1.3), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.1 * lines + 0.3, cell * row_count + 0.6])
    top, bottom = parts
    for axes, diagram in zip(top.subplots(lines, columns, squeeze=False).flat, diagrams):
        _draw_diagram(axes, diagram)
        axes.set_xlabel(x_label, fontsize=7)
    for axes in top.axes[len(diagrams):]:
        axes.remove()
    for index, axes in enumerate(bottom.subplots(row_count, videos, squeeze=False).flat):
        row, video = divmod(index, videos)
        axes.imshow(np.concatenate(list(_pad_cells(enlarge(frames_RVFHWC[row, video], 4))), axis=1))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        if row == 0:
            axes.set_title("\n".join(textwrap.wrap(captions[video], 34)), fontsize=7)
        if video == 0:
            axes.set_ylabel(rows[row], fontsize=7, rotation=0, ha="right", va="center")
    figure.suptitle(headline, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _draw_diagram(axes: Any, diagram: Diagram) -> None:
    for values in diagram.grey.values():
        if len(values) == 1:
            axes.axhline(values[0], color="0.6", linestyle="--")
        else:
            axes.plot(values, color="0.6")
    for label, values in diagram.curves.items():
        axes.plot(diagram.places or range(len(values)), values, marker=".", label=label)
    axes.set_title(diagram.title, fontsize=8)
    axes.tick_params(labelsize=7)
    if diagram.places:
        axes.set_xlim(-0.1, max(diagram.places) + 0.5)  # a single place has no range of its own
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if len(diagram.curves) > 1:
        axes.legend(fontsize=7)


def check_frames(frames_THWC: np.ndarray) -> None:
    """Raises ValueError for what is not uint8 of shape (T, H, W, 3), or is empty."""
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3:
        raise ValueError(
            f"frames must be uint8 of shape (T, H, W, 3), not {frames_THWC.dtype} {frames_THWC.shape}"
        )
    if 0 in frames_THWC.shape:
        raise ValueError(f"frames are empty: shape {frames_THWC.shape}")


def enlarge(frames_THWC: np.ndarray, scale: int) -> np.ndarray:
    """Each pixel as scale × scale pixels."""
    return frames_THWC.repeat(scale, axis=1).repeat(scale, axis=2)


def _pad_cells(frames_THWC: np.ndarray) -> np.ndarray:
    """A white margin at the right of and below each frame."""
    return np.pad(frames_THWC, ((0, 0), (0, MARGIN), (0, MARGIN), (0, 0)), constant_values=255)


def _caption_picture(caption: str, width: int) -> np.ndarray:
    """The caption in black on white, wrapped to `width` pixels: (H, width, 3) uint8."""
    font = ImageFont.load_default(FONT_SIZE)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    fits = len(caption)
    lines = [caption]
    while fits > 1 and any(draw.textlength(line, font) > width - MARGIN for line in lines):
        fits -= 1
        lines = textwrap.wrap(caption, fits)
    line_height = FONT_SIZE + 3
    picture = Image.new("RGB", (width, line_height * len(lines)), "white")
    for index, line in enumerate(lines):
        ImageDraw.Draw(picture).text((1, index * line_height), line, fill="black", font=font)
    return np.asarray(picture)
