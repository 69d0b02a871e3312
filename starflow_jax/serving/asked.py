"""What clients ask for, checked before anything is done with it."""

import base64
import dataclasses
import json
from typing import Any

import numpy as np

from starflow_jax.config import Serve, UserError
from starflow_jax.io.cameras import names_a_file
from starflow_jax.settings.fields import SEED

FILES = {"image": "a picture", "video": "a video"}  # what one can begin with


@dataclasses.dataclass(frozen=True)
class Asked:
    """A video or a session."""

    prompt: str
    frames: int = 0  # 0: not said
    image: bytes = b""  # a picture file's content
    video: bytes = b""  # or a video file's
    maps: bool = False  # tell where in each latent frame its surprise lies
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `Model.stream`: seed, guidance, camera, ...


def read_json(content: bytes | str, what: str = "the request") -> dict[str, Any]:
    """A JSON object. Raises UserError for anything else."""
    try:
        held = json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: is no JSON; send an object such as {{\"prompt\": \"a blue three moves right\"}}"
                        ) from error
    if not isinstance(held, dict):
        raise UserError(f"{what}: must be a JSON object")
    return held


def read_asked(held: dict[str, Any], settings: Serve, steered: bool = False) -> Asked:
    """What a request's object asks for. steered: of a session, which may also tell where its frames surprise. Raises
    UserError for what it can't ask for."""
    held = dict(held)
    if "prompt" not in held:
        raise UserError("prompt: is missing; say what the video shows")
    prompt = check_prompt(held.pop("prompt"), settings)
    files = {name: _decoded(name, held.pop(name)) for name in FILES if name in held}
    if all(files.get(name) for name in FILES):
        raise UserError("image and video are both given; leave one out")
    frames, surprise = _whole(held.pop("frames", 0)), held.pop("surprise", False)
    if frames is None or not 0 <= frames <= settings.frames:
        raise UserError(f"frames: must be a whole number from 0 (not said) to {settings.frames}")
    maps = steered and surprise == "map"
    if not maps and not isinstance(surprise, bool):
        raise UserError("surprise: must be true or false" + (', or "map"' if steered else ""))
    chosen = {name: _chosen(name, value, settings) for name, value in held.items()}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return Asked(prompt, frames, **files, maps=maps, settings=chosen | ({"surprise": True} if surprise else {}))


def _chosen(name: str, value: Any, settings: Serve) -> Any:
    """A setting of `Model.stream`; None: as the model has it."""
    if name == "seed":
        seed = _whole(value)
        if seed is None or not SEED.holds(seed):
            raise UserError(f"seed: must be {SEED.words}")
        return seed
    if name in ("guidance", "camera"):
        return None if value is None else check_change(name, value, settings)
    raise UserError(f"{name!r:.80}: is nothing that can be asked for; there are prompt, seed, frames, guidance, "
                    "camera, image, video and surprise")


def check_prompt(prompt: Any, settings: Serve, name: str = "prompt") -> str:
    """Raises UserError for what is no prompt."""
    try:
        held = isinstance(prompt, str) and len(prompt.encode()) <= settings.prompt_bytes and "\0" not in prompt
    except UnicodeEncodeError:
        held = False
    if not held:
        raise UserError(f"{name}: must be a text of at most {settings.prompt_bytes} bytes")
    return prompt


def check_change(name: str, value: Any, settings: Serve) -> Any:
    """A session's prompt, guidance, camera, or other prompt to compare with (None: none). Raises UserError for what is
    none, and for a camera that names a file, which would be the server's."""
    if name == "other_prompt" and value is None:
        return None
    if name in ("prompt", "other_prompt"):
        return check_prompt(value, settings, name)
    if name == "guidance":
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError("guidance: must be a number")
        return float(np.clip(value, -1e9, 1e9))
    if isinstance(value, str):
        if len(value) > 200 or names_a_file(value):
            raise UserError('camera: must be moves such as "pan_right:12; zoom_in:8", or a pose')
        return value
    try:
        pose = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError("camera: must be moves, or a pose: three rows of four numbers, world to camera") from error
    if pose.shape != (3, 4) or not np.isfinite(pose).all():
        raise UserError("camera: must be moves, or a pose: three rows of four numbers, world to camera")
    return pose


def _decoded(name: str, value: Any) -> bytes:
    """A file's content; nothing where none is given."""
    try:
        content = b"" if value is None else base64.b64decode(value, validate=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: must be {FILES[name]} file in base64") from error
    if value is not None and not content:
        raise UserError(f"{name}: is empty; send {FILES[name]} file in base64")
    return content


def _whole(value: Any) -> int | None:
    """The whole number, also of 5.0, which to JSON is one; None: it is none."""
    if isinstance(value, bool) or not (isinstance(value, int) or isinstance(value, float) and value.is_integer()):
        return None
    return int(value)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
