"""What is computed once from prepared clips and kept beside them: latents, and features of the prompts.

Shard by shard: each has the examples of the clips' shard of its name. A shard that is there is left alone, so
a run that was killed resumes, and several processes can share the work. The functions that compute are arguments.
"""

import concurrent.futures
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from starflow_jax.data.raw import clips, shards
from starflow_jax.data.raw.building import keeps_media, read_prepared
from starflow_jax.io.files import ARRIVING, atomic_path, write_text
from starflow_jax.io.memory import cores
from starflow_jax.io.progress import ProgressBar

Example = dict[str, Any]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """One kind of derived data, by functions of a bucket (its entry in prepared.json) and of examples."""

    name: str
    features: Callable[[Example], tfds.features.FeaturesDict]
    load: Callable[[bytes], Example]
    compute: Callable[[Example, Sequence[Example]], list[Example]]

    @property
    def description(self) -> str:
        return shards.LATENTS_ARE if self.name == shards.LATENTS else f"{self.name} of prepared clips."


def write_latents(folder: str, encode: Callable[[np.ndarray], np.ndarray], latent_shape: Callable[[Shape], Shape], *,
                  batch_size: int, made_by: Any, share: tuple[int, int] = (0, 1)) -> None:
    """Latents in float16 of all clips.

    encode: uint8 frames (batch_size, T, H, W, 3) -> (batch_size, N, h, w, C). latent_shape: (T, H, W, 3) ->
    (N, h, w, C). made_by: JSON that names the codec. share: this process's number, and of how many. Raises
    UserError where latents of another codec are there, FloatingPointError for ones that float16 can't hold.
    """

    def load(record: bytes) -> Example:
        example = shards.parse_clip(record)
        return {**example, "frames": clips.decode(example["media"])}

    def compute(bucket: Example, examples: Sequence[Example]) -> list[Example]:
        frames = [example["frames"] for example in examples]
        padded = np.stack(frames + [frames[-1]] * (batch_size - len(frames)))
        latents = to_half(np.asarray(encode(padded))[:len(frames)], "latents")
        return [{"latents": row, **{name: example[name] for name in ("caption_long", "caption_short", "fps")}}
                for row, example in zip(latents, examples)]

    def features(bucket: Example) -> tfds.features.FeaturesDict:
        return shards.latent_features(latent_shape((bucket["frames"], bucket["height"], bucket["width"], 3)))

    _derive(epath.Path(folder), _Kind(shards.LATENTS, features, load, compute), batch_size, made_by, share)


def write_text_features(folder: str, encode: Callable[[list[str]], np.ndarray], dim: int,
                        prompts_of: Callable[[Example, Example], list[str]], *, batch_size: int, made_by: Any,
                        share: tuple[int, int] = (0, 1)) -> None:
    """Features in float16 of every prompt that an example may be trained with, without their padding.

    encode: batch_size prompts -> (batch_size, S, dim), padding zero. prompts_of: (bucket, example) -> the
    prompts, repeated ones too. Otherwise as `write_latents`.
    """

    def compute(bucket: Example, examples: Sequence[Example]) -> list[Example]:
        prompts = [list(dict.fromkeys(prompts_of(bucket, example))) for example in examples]
        distinct = list(dict.fromkeys(itertools.chain.from_iterable(prompts)))
        rows: dict[str, np.ndarray] = {}
        for begin in range(0, len(distinct), batch_size):
            part = distinct[begin:begin + batch_size]
            features_BSD = np.asarray(encode(part + [part[-1]] * (batch_size - len(part))))[:len(part)]
            rows.update(zip(part, map(_without_padding, to_half(features_BSD, "text features"))))
        return [{"prompts": json.dumps(of_one), "lengths": np.array([len(rows[prompt]) for prompt in of_one]),
                 "rows": np.concatenate([rows[prompt] for prompt in of_one])} for of_one in prompts]

    def load(record: bytes) -> Example:
        return shards.parse_clip(record, media)

    media = keeps_media(read_prepared(epath.Path(folder)))
    kind = _Kind(shards.FEATURES, lambda _: shards.text_features(dim), load, compute)
    _derive(epath.Path(folder), kind, batch_size, made_by, share)


def to_half(values: np.ndarray, what: str) -> np.ndarray:
    """float16. Raises FloatingPointError for what it can't hold."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise FloatingPointError(f"{what} reach {np.abs(values).max():.4g}: not finite, or too large for float16")
    return half


def _without_padding(features_SD: np.ndarray) -> np.ndarray:
    used = np.flatnonzero(features_SD.any(axis=1))
    return features_SD[:used[-1] + 1] if len(used) else features_SD[:0]


def _derive(folder: epath.Path, kind: _Kind, batch_size: int, made_by: Any, share: tuple[int, int]) -> None:
    with shards.work_in(folder):
        _derive_in(folder, kind, batch_size, made_by, share)


def _derive_in(folder: epath.Path, kind: _Kind, batch_size: int, made_by: Any, share: tuple[int, int]) -> None:
    shards.check_made_by(folder, kind.name, made_by)
    write_text(folder / kind.name / shards.MADE_BY, json.dumps(made_by))
    buckets = read_prepared(folder)["buckets"]
    sources = shards.written_shards(folder, shards.CLIPS)
    mine = sources[share[0]::share[1]]
    for leftover in folder.glob(f"{kind.name}/*/*/{ARRIVING}*") if share[1] == 1 else ():
        leftover.rmtree()  # of a process that was killed
    with (ProgressBar(kind.name, sum(shard.count for shard in mine), unit="clip") as progress,
          concurrent.futures.ThreadPoolExecutor(cores()) as pool):
        for source in mine:
            target, bucket = _of_kind(source, kind.name).path(folder), buckets[source.bucket]
            if not target.exists():
                features = kind.features(bucket)
                with atomic_path(target, keep=True) as local, shards.RecordWriter(local) as writer:
                    for examples in _batches(source.path(folder), batch_size, kind.load, pool):
                        for example in kind.compute(bucket, examples):
                            writer.write(shards.serialize(features, example))
            progress.update(source.count)
    for name, bucket in buckets.items():
        targets = [_of_kind(shard, kind.name) for shard in sources if shard.bucket == name]
        # The process that finishes last writes the metadata of the whole.
        if all(target.path(folder).exists() for target in targets):
            shards.write_metadata(folder, targets, kind.features(bucket), kind.description)


def _of_kind(shard: shards.Shard, kind: str) -> shards.Shard:
    return dataclasses.replace(shard, kind=kind)


def _batches(path: epath.Path, size: int, load: Callable[[bytes], Example], pool: concurrent.futures.Executor
             ) -> Iterator[list[Example]]:
    """The examples of a shard in order, loaded by threads one batch ahead."""
    with shards.records(path) as records:
        ahead: list[concurrent.futures.Future[Example]] = []
        for begin in range(0, len(records), size):
            now = ahead or _submit(records, begin, size, load, pool)
            ahead = _submit(records, begin + size, size, load, pool)
            yield [future.result() for future in now]


def _submit(records: Any, begin: int, size: int, load: Callable[[bytes], Example], pool: concurrent.futures.Executor
            ) -> list[concurrent.futures.Future[Example]]:
    chosen = range(begin, min(begin + size, len(records)))
    return [pool.submit(load, record) for record in records.__getitems__(chosen)] if chosen else []
