"""The text that the encoder reads for a caption and its metadata, and the frame size of an aspect ratio."""

import math

from starflow_jax.config import UserError, whole_number

EXTEND = "(extend) "  # begins the caption of a clip that goes on from frames given before it


def parse_aspect_ratio(aspect_ratio: str) -> tuple[int, int]:
    """Splits "W:H" into two positive integers; raises UserError on anything else."""
    width, colon, height = aspect_ratio.partition(":")
    columns, rows = whole_number(width), whole_number(height)
    if not (colon and columns and rows):
        raise UserError(f"aspect ratio {aspect_ratio[:40]!r} is not of the form W:H; write for example 16:9")
    return columns, rows


def format_prompt(
    caption: str, fps: int | None = None, noise_std: float | None = None, aspect_ratio: str | None = None
) -> str:
    """Puts a caption and its metadata into the words that the model is trained on.

    Args:
        caption: what is to be seen; begins with EXTEND where frames are given; "" for the null prompt.
        fps: frames per second, 0 for an image.
        noise_std: standard deviation of the noise that is added to the latents.
        aspect_ratio: "W:H"; UserError if it is not.

    A part whose argument is None is left out.
    """
    text = caption
    if fps is not None:
        kind = "An image" if fps == 0 else f"A video with {fps} fps"
        text = f"{kind}:\n{text}\n"
    if noise_std is not None:
        text = f"Noise Level {int(1000 * noise_std)}:\n{text}"
    if aspect_ratio is not None:
        parse_aspect_ratio(aspect_ratio)
        text = f"{text}\n in a {aspect_ratio} aspect ratio.\n"
    return text


def frame_size(target: int, aspect_ratio: str, multiple: int) -> tuple[int, int]:
    """Height and width in pixels, of about target² pixels, each a multiple of `multiple`.

    Raises UserError if the aspect ratio is not "W:H", or leaves no pixels on a side.
    """
    width, height = parse_aspect_ratio(aspect_ratio)
    if target < 1 or multiple < 1:
        raise UserError(f"target {target} and multiple {multiple} must be at least 1")
    root = math.sqrt(width / height)
    size = round(target / root / multiple) * multiple, round(target * root / multiple) * multiple
    if 0 in size:
        raise UserError(
            f"{aspect_ratio} at {target} pixels rounds to {size[0]}x{size[1]} in multiples of {multiple}; "
            "ask for a larger size"
        )
    return size
