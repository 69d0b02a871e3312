"""From a record to an example: which frames, which caption, and the prompt that the text encoder reads.

A record is a dict of

    frames         uint8 (T, H, W, 3)
    caption_long   str or UTF-8 bytes
    caption_short  str or UTF-8 bytes

and, where there are any, `fps` and `aspect_ratio`, which go into the prompt; `latents`, which are trained on
instead of frames; `text`, features by prompt, instead of token ids; `change`, the first frame that
`later_caption_long` and `later_caption_short` describe (none where it is the number of frames); `intrinsics`, float32
(T, 4), and `world_to_camera`, float32 (T, 3, 4), the camera of each frame, also beside latents. A source is anything
with `len(source)` and `source[i]` -> record. One of several sizes has them in `videos` and `images`, sources of one
size each.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from starflow_jax.config import Data, UserError
from starflow_jax.data.batch import Batch
from starflow_jax.text.prompt import EXTEND

Source = Sequence[dict[str, Any]]
EncodeText = Callable[[list[str]], np.ndarray]  # prompts -> int32 ids (B, S)
FormatCaption = Callable[..., str]  # (caption, is_image, and fps and aspect_ratio of the record) -> prompt


@dataclasses.dataclass(frozen=True)
class ClipLength:
    """Pixel frames that a clip is trained on with: one for the first latent, `latent_stride` for each later one."""

    pixel_frames: int
    latent_stride: int = 4

    def __post_init__(self) -> None:
        if self.pixel_frames < 1 or (self.pixel_frames - 1) % self.latent_stride:
            raise UserError(f"pixel_frames is {self.pixel_frames}: the codec takes 1 frame and then groups of "
                            f"{self.latent_stride}, such as {1 + 3 * self.latent_stride}")

    @property
    def latents(self) -> int:
        return 1 + (self.pixel_frames - 1) // self.latent_stride

    @property
    def with_one_more(self) -> "ClipLength":
        """As clips of video are recorded, so that they can lose either end (batch.py)."""
        return ClipLength(self.pixel_frames + self.latent_stride, self.latent_stride)


@dataclasses.dataclass(frozen=True)
class TextInput:
    """How a caption becomes what the text encoder reads."""

    format_caption: FormatCaption
    encode: EncodeText
    length: int = 0  # that prepared features are padded to

    def prompt(self, record: dict[str, Any], caption: str, is_image: bool) -> str:
        return self.format_caption(caption, is_image, **metadata(record))

    def arrays(self, prompts: list[str], features: Sequence[np.ndarray | None]) -> dict[str, np.ndarray]:
        """The texts' fields of a Batch: the prompts' features where they are prepared, else their ids."""
        prepared = [text_SD for text_SD in features if text_SD is not None]
        if prepared:
            return {"features_BSD": np.stack([_padded(text_SD, self.length) for text_SD in prepared])}
        return {"text_ids_BS": np.asarray(self.encode(prompts), np.int32)}


class Example(NamedTuple):
    """One clip on its way into a batch."""

    kind: str  # the Batch's field that the clip goes into
    clip: np.ndarray
    prompt: str
    text_SD: np.ndarray | None  # features of the prompt, where they are prepared
    drop_first: bool | None  # None: of an image, which has no end to drop
    cameras: dict[str, np.ndarray] = {}  # fields of a Batch; an image has none: there is no path in it


@dataclasses.dataclass(frozen=True)
class MakeExample:
    """A record and a random generator -> an example; an object and not a closure, so that it can be pickled."""

    data: Data
    length: ClipLength
    text: TextInput

    def video(self, record: dict[str, Any], rng: np.random.Generator) -> Example:
        wording = self._wording(rng)
        drop_first = bool(rng.random() < self.data.first_frame_drop)
        length = self.length.with_one_more
        if "latents" in record:
            caption = _caption(record, wording, extends=drop_first)
            example = self._example("latents_BNhwC", record["latents"][:length.latents], record, caption, drop_first)
            return example._replace(cameras=cameras_of(record, 0, length.pixel_frames))
        start = self._start(record, rng)
        # Of a clip whose caption changes, the later one says what follows, as when a video goes on with another prompt.
        begin, end = start + drop_first, start + (length if drop_first else self.length).pixel_frames
        change = _change(record)
        caption = _caption(record, wording, extends=drop_first or begin < change < end, later=change < end)
        clip = record["frames"][start:start + length.pixel_frames]
        example = self._example("frames_BTHWC", clip, record, caption, drop_first)
        return example._replace(cameras=cameras_of(record, start, length.pixel_frames))

    def image(self, record: dict[str, Any], rng: np.random.Generator) -> Example:
        wording = self._wording(rng)
        if "latents" in record:  # the codec is causal: the first latent is that of the first frame alone
            return self._example("latents_BNhwC", record["latents"][:1], record, _caption(record, wording), None)
        frame = int(rng.integers(len(record["frames"])))
        caption = _caption(record, wording, later=frame >= _change(record))
        return self._example("frames_BTHWC", record["frames"][frame:frame + 1], record, caption, None)

    def _start(self, record: dict[str, Any], rng: np.random.Generator) -> int:
        """The first frame; of a clip that changes, one from which it does so between two latent frames."""
        starts = np.arange(len(record["frames"]) - self.length.with_one_more.pixel_frames + 1)
        if _change(record) < len(record["frames"]):
            starts = starts[(_change(record) - 1 - starts) % self.length.latent_stride == 0]
        return int(starts[rng.integers(len(starts))])

    def _wording(self, rng: np.random.Generator) -> str:
        """Which of a record's captions, "" for none."""
        short = rng.random() < self.data.short_caption
        dropped = rng.random() < self.data.caption_drop
        return "" if dropped else "caption_short" if short else "caption_long"

    def _example(self, kind: str, clip: np.ndarray, record: dict[str, Any], caption: str, drop_first: bool | None
                 ) -> Example:
        prompt = self.text.prompt(record, caption, is_image=drop_first is None)
        return Example(kind, clip, prompt, features_of(record, prompt), drop_first)

    def collate(self, examples: Sequence[Example]) -> Batch:
        clips = {examples[0].kind: np.stack([example.clip for example in examples])}
        text = self.text.arrays([example.prompt for example in examples], [example.text_SD for example in examples])
        if examples[0].drop_first is None:
            return Batch(**clips, **text)
        for name in examples[0].cameras:
            clips[name] = np.stack([example.cameras[name] for example in examples])
        return Batch(**clips, **text, drop_first_B=np.array([example.drop_first for example in examples]))


def _change(record: dict[str, Any]) -> int:
    """The first frame that the later captions describe; the number of frames where there is none."""
    return int(record.get("change", len(record["frames"])))


def _caption(record: dict[str, Any], wording: str, extends: bool = False, later: bool = False) -> str:
    """extends: the clip goes on from frames before it; later: the caption is that of what it changes to."""
    caption = decoded(record[("later_" if later else "") + wording]) if wording else ""
    return EXTEND + caption if extends and caption else caption


def metadata(record: dict[str, Any]) -> dict[str, Any]:
    """What goes into a record's prompt beside its caption."""
    return {name: record[name] for name in ("fps", "aspect_ratio") if name in record}


def prompts_of(record: dict[str, Any], format_caption: FormatCaption, is_image: bool) -> list[str]:
    """All prompts that a record may be trained with, some of them twice; is_image: as an image only."""
    captions = ["", *(decoded(record[name]) for name in ("caption_long", "caption_short"))]
    prompts = [format_caption(caption, True, **metadata(record)) for caption in captions]
    if not is_image:
        captions += [EXTEND + caption for caption in captions[1:]]
        prompts += [format_caption(caption, False, **metadata(record)) for caption in captions]
    return prompts


def features_of(record: dict[str, Any], prompt: str) -> np.ndarray | None:
    """float16 (S, D), the prepared features of a prompt, None where the record has none. Raises UserError for a
    prompt that was not foreseen."""
    if "text" not in record:
        return None
    if prompt not in record["text"]:
        raise UserError(f"no prepared text features of {prompt!r}; make them again with this config")
    return record["text"][prompt]


def cameras_of(record: dict[str, Any], start: int, frames: int) -> dict[str, np.ndarray]:
    """The cameras of so many frames of a record as fields of a Batch; none where the record has none."""
    if "world_to_camera" not in record:
        return {}
    part = slice(start, start + frames)
    return {"intrinsics_BT4": record["intrinsics"][part], "world_to_camera_BT34": record["world_to_camera"][part]}


def _padded(text_SD: np.ndarray, length: int) -> np.ndarray:
    return np.pad(text_SD[:length], ((0, max(0, length - len(text_SD))), (0, 0)))


def parts_of(source: Source, kind: str) -> Sequence[Source]:
    """The sources of one size that a source consists of. Raises UserError where there is none of a kind."""
    parts = getattr(source, kind, (source,))
    if not parts:
        raise UserError(f"the data holds no {kind}; prepare some, or set data.image_probability to "
                        f"{1 if kind == 'videos' else 0}")
    return parts


def decoded(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
