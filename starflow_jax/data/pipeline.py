"""From recorded clips to training batches: shuffled, mixed, sharded, resumable to the exact example.

A source is anything with `len(source)` and `source[i]` -> dict with

    frames         uint8 (T, H, W, 3)
    caption_long   str or UTF-8 bytes
    caption_short  str or UTF-8 bytes

and, where there are any, `fps` and `aspect_ratio`, which go into the prompt; `latents`, which are trained on
instead of frames; `text`, features by prompt, instead of token ids. A source of several sizes has them in
`videos` and `images`, sources of one size each: a batch is of one of them, the larger ones more often.

The n-th example of a seed is the same whatever the number of processes, workers and reading threads.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

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


@dataclasses.dataclass(frozen=True)
class MakeExample:
    """A record and a random generator -> an example; an object and not a closure, so that it can be pickled."""

    data: Data
    length: ClipLength
    text: TextInput

    def video(self, record: dict[str, Any], rng: np.random.Generator) -> Example:
        caption = self._caption(record, rng)
        drop_first = bool(rng.random() < self.data.first_frame_drop)
        if drop_first and caption:
            caption = EXTEND + caption
        length = self.length.with_one_more
        if "latents" in record:
            return self._example("latents_BNhwC", record["latents"][:length.latents], record, caption, drop_first)
        start = rng.integers(len(record["frames"]) - length.pixel_frames + 1)
        clip = record["frames"][start:start + length.pixel_frames]
        return self._example("frames_BTHWC", clip, record, caption, drop_first)

    def image(self, record: dict[str, Any], rng: np.random.Generator) -> Example:
        caption = self._caption(record, rng)
        if "latents" in record:  # the codec is causal: the first latent is that of the first frame alone
            return self._example("latents_BNhwC", record["latents"][:1], record, caption, None)
        frame = rng.integers(len(record["frames"]))
        return self._example("frames_BTHWC", record["frames"][frame:frame + 1], record, caption, None)

    def _caption(self, record: dict[str, Any], rng: np.random.Generator) -> str:
        short = rng.random() < self.data.short_caption
        dropped = rng.random() < self.data.caption_drop
        return "" if dropped else _decoded(record["caption_short" if short else "caption_long"])

    def _example(self, kind: str, clip: np.ndarray, record: dict[str, Any], caption: str, drop_first: bool | None
                 ) -> Example:
        prompt = self.text.prompt(record, caption, is_image=drop_first is None)
        return Example(kind, clip, prompt, features_of(record, prompt), drop_first)

    def collate(self, examples: Sequence[Example]) -> Batch:
        clips = {examples[0].kind: np.stack([example.clip for example in examples])}
        text = self.text.arrays([example.prompt for example in examples], [example.text_SD for example in examples])
        if examples[0].drop_first is None:
            return Batch(**clips, **text)
        return Batch(**clips, **text, drop_first_B=np.array([example.drop_first for example in examples]))


def train_batches(
    source: Source,
    data: Data,
    length: ClipLength,
    text: TextInput,
    *,
    batch_size: int,
    image_batch_size: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
    read_threads: int = 2,
) -> "BatchIterator":
    """Endless batches of numpy arrays; every epoch is shuffled anew.

    Videos are as long as `length.with_one_more`, with drop_first_B; images have one frame, without it.

    data: of its settings the probabilities (those of captions and dropped first frames hold for each example; that of
    images is their share of the batches, spread evenly, at the same steps on all processes) and `workers`, the
    processes that decode, for which `text` is pickled. batch_size and image_batch_size are global: share=(i, n) gets
    the i-th of n equal parts of the same batch.

    Raises UserError for settings that don't fit each other or the source.
    """
    if not 0 <= seed < 2**31:
        raise UserError(f"seed is {seed}: must be between 0 and {2**31 - 1}")
    make = MakeExample(data, length, text)
    streams, weights = [], []
    if data.image_probability < 1:
        videos = _parts(source, "videos")
        for part in videos:
            _check_frames(part, length)
        streams.append(_mixed(videos, make.video, make.collate, _local_size(batch_size, share), 2 * seed, share))
        weights.append(1 - data.image_probability)
    if data.image_probability > 0:
        images, size = _parts(source, "images"), _local_size(image_batch_size, share)
        streams.append(_mixed(images, make.image, make.collate, size, 2 * seed + 1, share))
        weights.append(data.image_probability)
    return BatchIterator(grain.MapDataset.mix(streams, weights), read_threads, data.workers)


def _mixed(
    parts: Sequence[Source],
    make_example: Callable[[dict[str, Any], np.random.Generator], Example],
    collate: Callable[[Sequence[Example]], Batch],
    local_size: int,
    seed: int,
    share: tuple[int, int],
) -> grain.MapDataset[Batch]:
    """This process's share of the batches: as many of each part of the source as its share of the examples."""
    seeds = [seed, *np.random.SeedSequence(seed).generate_state(len(parts) - 1).tolist()]
    streams = []
    for part, part_seed in zip(parts, seeds):
        records = grain.MapDataset.source(part).seed(part_seed).shuffle().repeat()
        batches = records.random_map(make_example).batch(local_size, drop_remainder=True, batch_fn=collate)
        # Part i, i + n, i + 2n ...: the i-th slice of each global batch.
        streams.append(batches[share[0]::share[1]])
    return grain.MapDataset.mix(streams, [len(part) for part in parts])


class BatchIterator(Iterator[Batch]):
    """Batches in order, read ahead. Its state is how many were taken, so that a run can resume with another number of
    workers or threads."""

    def __init__(self, batches: grain.MapDataset[Batch], read_threads: int, workers: int) -> None:
        self._all, self._read_threads, self._workers = batches, read_threads, workers
        self._ahead: grain.DatasetIterator[Batch] | None = None
        self.set_state({"batches": 0})

    def __next__(self) -> Batch:
        if self._ahead is None:
            self._ahead = self._open()
        batch = next(self._ahead)
        self._taken += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """JSON-serialisable."""
        return {"batches": self._taken}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue with the batch after the last one that was taken before `get_state` gave `state`."""
        self.close()
        self._taken = state["batches"]

    def close(self) -> None:
        """Stop reading ahead and end its processes; the next batch would start them again."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _open(self) -> grain.DatasetIterator[Batch]:
        options = grain.ReadOptions(num_threads=self._read_threads, prefetch_buffer_size=8)
        batches = self._all[self._taken:].to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which a notebook never parses
            processes = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=4)
            batches = batches.mp_prefetch(processes)
        return iter(batches)


def evaluation_batches(source: Source, length: ClipLength, text: TextInput, *, batch_size: int, limit: int
                       ) -> Iterator[Batch]:
    """The first `limit` clips (or all) once, in order, with long captions; of several sizes in one order, each
    batch of one size. Clips are the first `length` of each, an image's where that is one frame; valid_B says which
    are not repeated.
    """
    is_image = length.pixel_frames == 1
    for part in _parts(source, "images" if is_image else "videos"):
        kind, wanted = ("latents", length.latents) if "latents" in part[0] else ("frames", length.pixel_frames)
        recorded = len(part[0][kind])
        if wanted > recorded:
            raise UserError(f"pixel_frames is {length.pixel_frames}, {wanted} {kind}: the clips have 1 to {recorded} "
                            f"{kind}")
        count = min(limit, len(part))
        limit -= count
        for begin in range(0, count, batch_size):
            indices_B = np.arange(begin, begin + batch_size)
            records = [part[int(index)] for index in np.minimum(indices_B, count - 1)]
            prompts = [text.prompt(record, _decoded(record["caption_long"]), is_image) for record in records]
            clips = {"latents_BNhwC" if kind == "latents" else "frames_BTHWC":
                     np.stack([record[kind][:wanted] for record in records])}
            features = [features_of(record, prompt) for record, prompt in zip(records, prompts)]
            yield Batch(**clips, **text.arrays(prompts, features), valid_B=indices_B < count)


def metadata(record: dict[str, Any]) -> dict[str, Any]:
    """What goes into a record's prompt beside its caption."""
    return {name: record[name] for name in ("fps", "aspect_ratio") if name in record}


def prompts_of(record: dict[str, Any], format_caption: FormatCaption, is_image: bool) -> list[str]:
    """All prompts that a record may be trained with, some of them twice; is_image: as an image only."""
    captions = ["", *(_decoded(record[name]) for name in ("caption_long", "caption_short"))]
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
        raise UserError(f"no prepared text features of {prompt!r}; make them again with this configuration")
    return record["text"][prompt]


def _padded(text_SD: np.ndarray, length: int) -> np.ndarray:
    return np.pad(text_SD[:length], ((0, max(0, length - len(text_SD))), (0, 0)))


def _parts(source: Source, kind: str) -> Sequence[Source]:
    """The sources of one size that a source consists of. Raises UserError where there is none of a kind."""
    parts = getattr(source, kind, (source,))
    if not parts:
        raise UserError(f"the data holds no {kind}; prepare some, or set data.image_probability to "
                        f"{1 if kind == 'videos' else 0}")
    return parts


def _decoded(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _local_size(batch_size: int, share: tuple[int, int]) -> int:
    index, count = share
    if not 0 <= index < count:
        raise UserError(f"process {index} of {count}: count from 0 to {count - 1}")
    if batch_size < 1 or batch_size % count:
        raise UserError(f"a global batch of {batch_size} cannot be shared by {count} processes: use a multiple of "
                        f"{count}")
    return batch_size // count


def _check_frames(source: Source, length: ClipLength) -> None:
    first, stride = source[0], length.latent_stride
    recorded = 1 + (len(first["latents"]) - 1) * stride if "latents" in first else len(first["frames"])
    if recorded < length.with_one_more.pixel_frames:
        raise UserError(f"pixel_frames is {length.pixel_frames}: with {stride} more for examples without their first "
                        f"latent that is longer than the recorded {recorded} frames; use at most {recorded - stride}, "
                        "or record longer clips")
