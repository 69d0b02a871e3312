"""From recorded clips to training batches: shuffled, mixed, sharded, resumable to the exact example.

A source is anything with `len(source)` and `source[i]` -> dict with

    frames         uint8 (T, H, W, 3)
    caption_long   str or UTF-8 bytes
    caption_short  str or UTF-8 bytes

and, where there are any, `fps` and `aspect_ratio`, which the model is told; `latents`, which are trained on
instead of frames; `text`, features by prompt, instead of token ids. A source of several sizes has them in
`videos` and `images`, sources of one size each: a batch is of one of them, the larger ones more often.

The n-th example of a seed is the same whatever the number of processes and of reading threads.

*Dropping the first latent frame.* The codec is causal: the first latent holds `first_latent_pixels`
pixel frames, every later one `latent_stride`. A clip that begins with a later latent has no place in
a batch of its own length, so video batches carry one latent more than is trained on,
`pixel_frames + latent_stride` pixel frames, and say per example which end to cut off after encoding:

    latents[1:] where drop_first_B, with a caption that begins "(extend) "
    latents[:-1] elsewhere
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from starflow_jax.config import UserError

EXTEND = "(extend) "  # begins the caption of a clip without its first latent (text/prompt.py says so, too)
Source = Sequence[dict[str, Any]]
Batch = dict[str, np.ndarray]
KINDS = {"frames": "frames_BTHWC", "latents": "latents_BNhwC"}  # what is trained on, in a record and in a batch
EncodeText = Callable[[list[str]], np.ndarray]  # captions -> int32 ids (B, S)
FormatCaption = Callable[..., str]  # (caption, is_image, and fps and aspect_ratio of the record) -> text to encode


class Example(NamedTuple):
    """One clip on its way into a batch; `caption` is formatted already."""

    kind: str  # a name of KINDS
    clip: np.ndarray
    caption: str
    drop_first: bool
    text_SD: np.ndarray | None  # features of the caption, where they are prepared


def train_batches(
    source: Source,
    *,
    batch_size: int,
    image_batch_size: int,
    seed: int,
    image_probability: float = 0.2,
    first_frame_drop: float = 0.25,
    caption_drop: float = 0.1,
    short_caption: float = 0.1,
    pixel_frames: int,
    first_latent_pixels: int = 1,
    latent_stride: int = 4,
    encode_text: EncodeText,
    format_caption: FormatCaption,
    process_index: int = 0,
    process_count: int = 1,
    read_threads: int = 2,
    workers: int = 0,
    text_length: int = 0,
) -> "BatchIterator":
    """Endless batches; every epoch is shuffled anew. Each is a dict of numpy arrays:

        frames_BTHWC  uint8; T = pixel_frames + latent_stride, in an image batch 1
                      (or latents_BNhwC, float16, as trained on: the first or last is cut off already)
        text_ids_BS   int32 (or features_BSD, float16, padding zero)
        drop_first_B  bool: train on latents[1:] instead of latents[:-1]; all False in an image batch

    batch_size and image_batch_size are global: process i of n gets the i-th part of the same batch.
    image_probability: the share of image batches, spread evenly; all processes get them at the same
    steps. first_frame_drop, caption_drop, short_caption: probabilities per example (a dropped caption
    is "", formatted like any other). pixel_frames: trained on, as the codec counts them. workers:
    processes that decode (0: in this one); encode_text and format_caption are pickled for them.
    text_length: that prepared text features are padded to.

    Raises UserError for settings that don't fit each other or the source.
    """
    probabilities = {
        "image_probability": image_probability,
        "first_frame_drop": first_frame_drop,
        "caption_drop": caption_drop,
        "short_caption": short_caption,
    }
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}: a probability is between 0 and 1")
    if not 0 <= seed < 2**31:
        raise UserError(f"seed is {seed}: must be between 0 and {2**31 - 1}")

    def pick_caption(record: dict[str, Any], rng: np.random.Generator) -> str:
        short = rng.random() < short_caption
        dropped = rng.random() < caption_drop
        return "" if dropped else _text(record["caption_short" if short else "caption_long"])

    def video_example(record: dict[str, Any], rng: np.random.Generator) -> Example:
        caption = pick_caption(record, rng)
        drop_first = bool(rng.random() < first_frame_drop)
        if drop_first and caption:
            caption = EXTEND + caption
        length = pixel_frames + latent_stride
        if "latents" in record:
            latents = record["latents"][: 1 + (length - first_latent_pixels) // latent_stride]
            kept = latents[1:] if drop_first else latents[:-1]
            return example(KINDS["latents"], kept, caption, record, drop_first)
        start = rng.integers(len(record["frames"]) - length + 1)
        return example(KINDS["frames"], record["frames"][start : start + length], caption, record, drop_first)

    def image_example(record: dict[str, Any], rng: np.random.Generator) -> Example:
        caption = pick_caption(record, rng)
        if "latents" in record:  # the codec is causal: the first latent is that of the first frame alone
            return example(KINDS["latents"], record["latents"][:1], caption, record, is_image=True)
        frame = rng.integers(len(record["frames"]))
        return example(KINDS["frames"], record["frames"][frame : frame + 1], caption, record, is_image=True)

    def example(kind: str, clip: np.ndarray, caption: str, record: dict[str, Any], drop_first: bool = False,
                is_image: bool = False) -> Example:
        prompt = format_caption(caption, is_image, **conditions(record))
        return Example(kind, clip, prompt, drop_first, text_of(record, prompt))

    def collate(examples: Sequence[Example]) -> Batch:
        return {
            examples[0].kind: np.stack([example.clip for example in examples]),
            **_text_batch([example.caption for example in examples], [example.text_SD for example in examples],
                          encode_text, text_length),
            "drop_first_B": np.array([example.drop_first for example in examples]),
        }

    def batches(
        part: Source,
        make_example: Callable[[dict[str, Any], np.random.Generator], Example],
        size: int,
        stream_seed: int,
    ) -> grain.MapDataset[Batch]:
        local_size = _local_size(size, process_index, process_count)
        examples = grain.MapDataset.source(part).seed(stream_seed).shuffle().repeat()
        parts = examples.random_map(make_example).batch(local_size, drop_remainder=True, batch_fn=collate)
        # Part i, i + n, i + 2n ...: the i-th slice of each global batch.
        return parts[process_index::process_count]

    def mixed(
        parts: Sequence[Source],
        make_example: Callable[[dict[str, Any], np.random.Generator], Example],
        size: int,
        stream_seed: int,
    ) -> grain.MapDataset[Batch]:
        """As many batches of each part as its share of the examples."""
        seeds = [stream_seed, *np.random.SeedSequence(stream_seed).generate_state(len(parts) - 1).tolist()]
        streams = [batches(part, make_example, size, part_seed) for part, part_seed in zip(parts, seeds)]
        return grain.MapDataset.mix(streams, [len(part) for part in parts])

    streams, weights = [], []
    if image_probability < 1:
        videos = _parts(source, "videos")
        for part in videos:
            _check_frames(part, pixel_frames, first_latent_pixels, latent_stride)
        streams.append(mixed(videos, video_example, batch_size, 2 * seed))
        weights.append(1 - image_probability)
    if image_probability > 0:
        images = _parts(source, "images")
        streams.append(mixed(images, image_example, image_batch_size, 2 * seed + 1))
        weights.append(image_probability)
    return BatchIterator(grain.MapDataset.mix(streams, weights), read_threads, workers)


class BatchIterator(Iterator[Batch]):
    """Batches in order, read ahead. Its state is how many were taken, so that a run may go on with
    another number of workers or threads."""

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
        """Go on with the very next batch after `state` was taken."""
        self.close()
        self._taken = state["batches"]

    def close(self) -> None:
        """End the reading ahead and its processes; the next batch would start it again."""
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


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    limit: int,
    pixel_frames: int,
    latent_stride: int = 4,
    encode_text: EncodeText,
    format_caption: FormatCaption,
    process_index: int = 0,
    process_count: int = 1,
    text_length: int = 0,
) -> Iterator[Batch]:
    """The first `limit` clips (or all) once, in order, with long captions; of several sizes in one order, each
    batch of one size. Each batch is a dict of

        frames_BTHWC  uint8, the first pixel_frames of each clip (1: the captions are an image's)
                      (or latents_BNhwC, float16, of as many frames)
        text_ids_BS   int32 (or features_BSD, float16, as of `train_batches`)
        captions_B    str, as recorded (not formatted)
        valid_B       bool: False where the last batch repeats the last clip to keep its shape

    batch_size is global: process i of n gets the i-th part of each batch.
    """
    local_size = _local_size(batch_size, process_index, process_count)
    for part in _parts(source, "images" if pixel_frames == 1 else "videos"):
        kind = "latents" if "latents" in part[0] else "frames"
        wanted = 1 + (pixel_frames - 1) // latent_stride if kind == "latents" else pixel_frames
        recorded = len(part[0][kind])
        if not 1 <= wanted <= recorded:
            raise UserError(f"pixel_frames is {pixel_frames}, {wanted} {kind}: the clips have 1 to {recorded} {kind}")
        count = min(limit, len(part))
        limit -= count
        for begin in range(process_index * local_size, _round_up(count, batch_size), batch_size):
            indices_B = np.arange(begin, begin + local_size)
            records = [part[int(index)] for index in np.minimum(indices_B, count - 1)]
            captions = [_text(record["caption_long"]) for record in records]
            formatted = [format_caption(caption, pixel_frames == 1, **conditions(record))
                         for caption, record in zip(captions, records)]
            yield {
                KINDS[kind]: np.stack([record[kind][:wanted] for record in records]),
                **_text_batch(formatted, [text_of(record, prompt) for record, prompt in zip(records, formatted)],
                              encode_text, text_length),
                "captions_B": np.array(captions),
                "valid_B": indices_B < count,
            }


def conditions(record: dict[str, Any]) -> dict[str, Any]:
    """What the record says of itself to the model, beside its caption."""
    return {name: record[name] for name in ("fps", "aspect_ratio") if name in record}


def prompts_of(record: dict[str, Any], format_caption: FormatCaption, is_image: bool) -> list[str]:
    """All texts that a record may be trained with, some of them twice; is_image: as an image only."""
    captions = ["", *(_text(record[name]) for name in ("caption_long", "caption_short"))]
    told = conditions(record)
    prompts = [format_caption(caption, True, **told) for caption in captions]
    if not is_image:
        captions += [EXTEND + caption for caption in captions[1:]]
        prompts += [format_caption(caption, False, **told) for caption in captions]
    return prompts


def text_of(record: dict[str, Any], prompt: str) -> np.ndarray | None:
    """float16 (S, D), the prepared features of a prompt, None where there are none for any. Raises UserError for a
    prompt that was not foreseen."""
    if "text" not in record:
        return None
    if prompt not in record["text"]:
        raise UserError(f"no prepared text features of {prompt!r}; make them anew with this configuration")
    return record["text"][prompt]


def _text_batch(prompts: list[str], features: Sequence[np.ndarray | None], encode_text: EncodeText, length: int
                ) -> Batch:
    """The prompts' features where they are prepared, else their ids."""
    known = [text_SD for text_SD in features if text_SD is not None]
    if known:
        return {"features_BSD": np.stack([_padded(text_SD, length) for text_SD in known])}
    return {"text_ids_BS": np.asarray(encode_text(prompts), np.int32)}


def _padded(text_SD: np.ndarray, length: int) -> np.ndarray:
    return np.pad(text_SD[:length], ((0, max(0, length - len(text_SD))), (0, 0)))


def _parts(source: Source, kind: str) -> Sequence[Source]:
    """The sources of one size that a source consists of. Raises UserError where there is none of a kind."""
    parts = getattr(source, kind, (source,))
    if not parts:
        raise UserError(f"the data holds no {kind}; prepare some, or set data.image_probability to "
                        f"{1 if kind == 'videos' else 0}")
    return parts


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise UserError(f"process {process_index} of {process_count}: count from 0 to {process_count - 1}")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"a global batch of {batch_size} cannot be shared by {process_count} processes: "
            f"use a multiple of {process_count}"
        )
    return batch_size // process_count


def _check_frames(source: Source, pixel_frames: int, first_latent_pixels: int, latent_stride: int) -> None:
    later_pixels = pixel_frames - first_latent_pixels
    if later_pixels < 0 or later_pixels % latent_stride:
        raise UserError(
            f"pixel_frames is {pixel_frames}: the codec takes {first_latent_pixels} frames and then "
            f"groups of {latent_stride}, such as {first_latent_pixels + 3 * latent_stride}"
        )
    first = source[0]
    latents = len(first["latents"]) if "latents" in first else 0
    recorded = first_latent_pixels + (latents - 1) * latent_stride if latents else len(first["frames"])
    if recorded < pixel_frames + latent_stride:
        raise UserError(
            f"pixel_frames is {pixel_frames}: with {latent_stride} more for examples without their first "
            f"latent that is longer than the recorded {recorded} frames; "
            f"use at most {recorded - latent_stride}, or record longer clips"
        )
