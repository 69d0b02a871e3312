"""Prepared data on disk: ArrayRecord shards with the metadata that makes them TFDS data sets.

    FOLDER/KIND/BUCKET/1.0.0/KIND-SPLIT.array_record-00000-of-00012

KIND is `clips` (captions, and media where it is kept), `cameras` (of each frame of a video, where these are prepared),
or what is computed from clips: `latents` (latents.py, encoder.py), `features` (latents.py). All have the same examples
in the same order. BUCKET is HEIGHTxWIDTH_FRAMESf, frames 1 of pictures. Each bucket is a TFDS data set:
`tfds.builder_from_directory(...)`, or `tfds.load("clips/480x848_85f", data_dir=FOLDER)`.

Files appear whole (io/files.py), here and on an object store.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source, array_record_module
from etils import epath
from tensorflow_datasets.core import example_parser, example_serializer

from starflow_jax.config import UserError
from starflow_jax.io.files import first_line, read_json, sync_all

SPLITS = ("train", "validation", "test")
VERSION = "1.0.0"
CLIPS, CAMERAS, LATENTS, FEATURES = "clips", "cameras", "latents", "features"
SUFFIX = "array_record"
MADE_BY = "made_by.json"  # in the folder of a kind: what its numbers depend on
LATENTS_ARE = "latents of prepared clips."


def clip_features(media: bool = True) -> tfds.features.FeaturesDict:
    """media: MP4 or JPEG bytes, where they are kept. fps: 0 of a picture. start: of the clip, in seconds of its source.
    """
    kept = {"media": tfds.features.Text()} if media else {}
    return tfds.features.FeaturesDict({
        **kept, "caption_long": tfds.features.Text(), "caption_short": tfds.features.Text(),
        "key": tfds.features.Text(), "fps": np.int64, "start": np.float32})


def camera_features() -> tfds.features.FeaturesDict:
    """The camera of each frame, as in data/batch.py."""
    return tfds.features.FeaturesDict({
        "intrinsics": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
        "world_to_camera": tfds.features.Tensor(shape=(None, 3, 4), dtype=np.float32)})


def latent_features(shape_NhwC: Sequence[int]) -> tfds.features.FeaturesDict:
    """Training latents in float16, and what else a training example needs, so that no media is read for it."""
    # "bytes": else TFDS would keep every half as a float of 4 bytes.
    return tfds.features.FeaturesDict({
        "latents": tfds.features.Tensor(shape=tuple(shape_NhwC), dtype=np.float16, encoding="bytes"),
        "caption_long": tfds.features.Text(), "caption_short": tfds.features.Text(), "fps": np.int64})


def text_features(dim: int) -> tfds.features.FeaturesDict:
    """prompts: a JSON list. rows: the features of all of them, one after the other, `lengths` rows each."""
    return tfds.features.FeaturesDict({
        "prompts": tfds.features.Text(),
        "lengths": tfds.features.Tensor(shape=(None,), dtype=np.int64),
        "rows": tfds.features.Tensor(shape=(None, dim), dtype=np.float16, encoding="bytes")})


def is_of_pictures(bucket: str) -> bool:
    """Whether a bucket, by its name, has clips of one frame."""
    return bucket.endswith("_1f")


@functools.cache
def _clip_serializer(media: bool) -> tuple[Any, Any, Any]:
    features = clip_features(media)
    info = features.get_serialized_info()
    return features, example_serializer.ExampleSerializer(info), example_parser.ExampleParserNp(info)


def serialize(features: tfds.features.FeaturesDict, example: Mapping[str, Any]) -> bytes:
    """One example as TFDS keeps it."""
    return _serialized(example_serializer.ExampleSerializer(features.get_serialized_info()), features, example)


def serialize_clip(example: Mapping[str, Any]) -> bytes:
    """The same for `clip_features`."""
    features, serializer, _ = _clip_serializer("media" in example)
    return _serialized(serializer, features, example)


def _serialized(serializer: Any, features: tfds.features.FeaturesDict, example: Mapping[str, Any]) -> bytes:
    # serialize_example() would put the fields in another order in every process.
    return serializer.get_tf_example(features.encode_example(example)).SerializeToString(deterministic=True)


def damaged(what: str, error: Exception) -> UserError:
    """The error of prepared data that a library could not read."""
    return UserError(f"{what}: damaged ({first_line(error)}); copy the prepared data again, or prepare them anew in "
                     "another folder")


class Readable(Sequence[Any]):
    """A sequence read by a library, whose exceptions, whatever they are, become UserErrors that name where it lies."""

    def __init__(self, source: Any, where: str) -> None:
        self._source, self._where = source, where

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self._source[index]
        except IndexError:  # the end of the sequence
            raise
        except Exception as error:
            raise damaged(self._where, error) from error

    def __getitems__(self, indices: Sequence[int]) -> Any:
        try:
            return self._source.__getitems__(indices)
        except Exception as error:
            raise damaged(self._where, error) from error


def parse_clip(record: bytes, media: bool = True) -> dict[str, Any]:
    """An example of `clip_features(media)`. Raises UserError for a record that is none."""
    features, _, parser = _clip_serializer(media)
    try:
        return features.decode_example_np(parser.parse_example(record))
    except Exception as error:  # of the parser of messages or of one of the features
        raise damaged("a record of prepared clips", error) from error


@contextlib.contextmanager
def work_in(folder: epath.Path) -> Iterator[None]:
    """Raises UserError where the disk fails or fills up."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}; what is done is kept: "
                        "once that is solved, the same command resumes") from error


class RecordWriter:
    """Records to a local ArrayRecord file; use as a context."""

    def __init__(self, path: Path) -> None:
        # One record a group, as TFDS does: each is read by itself, in any order. No compression: the media
        # is compressed already, and latents are noise to a compressor.
        self._writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        self.count = 0

    def write(self, record: bytes) -> None:
        self._writer.write(record)
        self.count += 1

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._writer.close()
        except RuntimeError as error:  # a full disk is said here, and not when a record is written
            raise OSError(errno.EIO, str(error).partition("; at byte")[0]) from error


@contextlib.contextmanager
def records(path: epath.Path) -> Iterator[Any]:
    """The records of a file by index, as bytes. ArrayRecord reads local files: others are fetched first.

    Raises UserError, here and where a record is read, for a damaged file.
    """
    with contextlib.ExitStack() as stack:
        local = str(path)
        if "://" in local:
            local = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), path.name)
            path.copy(local)
        try:
            opened = array_record_data_source.ArrayRecordDataSource([local])
        except RuntimeError as error:
            raise damaged(path, error) from error
        stack.callback(_close, opened)
        yield Readable(opened, str(path))


def _close(opened: array_record_data_source.ArrayRecordDataSource) -> None:
    with contextlib.suppress(RuntimeError):  # a reader that could not read says so once more
        opened.__exit__(None, None, None)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of one split of one bucket, and how many examples it has."""

    kind: str
    bucket: str
    split: str
    index: int
    of: int
    count: int

    def path(self, folder: epath.Path) -> epath.Path:
        name = f"{self.kind}-{self.split}.{SUFFIX}-{self.index:05d}-of-{self.of:05d}"
        return folder / self.kind / self.bucket / VERSION / name


def write_metadata(folder: epath.Path, shards: Iterable[Shard], features: tfds.features.FeaturesDict,
                   description: str) -> None:
    """Make the shards of one kind and bucket a TFDS data set."""
    every = list(shards)
    data_dir = every[0].path(folder).parent
    infos = []
    for split in SPLITS:
        of_split = [shard for shard in every if shard.split == split]
        if of_split:
            size = sum(shard.path(folder).stat().length for shard in of_split)
            template = tfds.core.ShardedFileTemplate(data_dir=data_dir, dataset_name=every[0].kind, split=split,
                                                     filetype_suffix=SUFFIX)
            infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[shard.count for shard in of_split],
                                             num_bytes=size, filename_template=template))
    # Checking the data would need TensorFlow; that it can be read is what our tests check.
    tfds.folder_dataset.write_metadata(data_dir=data_dir, features=features, split_infos=infos,
                                       description=description, check_data=False)
    if "://" not in str(data_dir):
        sync_all(Path(data_dir))  # what says that it is whole is written next


def check_made_by(folder: epath.Path, kind: str, made_by: Any, can_be_made_again: bool = True) -> None:
    """Raises UserError where the folder's data of this kind were made by something else."""
    path = folder / kind / MADE_BY
    if not path.exists():
        return
    try:
        held = read_json(path)
    except (OSError, ValueError) as error:
        raise damaged(str(path), error) from error
    if held != json.loads(json.dumps(made_by)):
        again = "delete it to make it again" if can_be_made_again else "prepare the videos in another folder"
        raise UserError(f"{folder / kind}: was made by {json.dumps(held)}, not by {json.dumps(made_by)}; {again}, or "
                        "use the model that made it")


def written_shards(folder: epath.Path, kind: str) -> list[Shard]:
    """The shards of all finished data sets of a kind, by bucket, split and index. Raises UserError for damaged ones."""
    shards = []
    for info in sorted((folder / kind).glob(f"*/{VERSION}/dataset_info.json"), key=str):
        try:
            splits = {split["name"]: split.get("shardLengths", []) for split in read_json(info)["splits"]}
            counts = {split: [int(length) for length in splits.get(split, [])] for split in SPLITS}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(str(info), error) from error
        for split, lengths in counts.items():
            shards += [Shard(kind, info.parent.parent.name, split, index, len(lengths), length)
                       for index, length in enumerate(lengths)]
    return shards
