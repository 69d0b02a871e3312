"""Prepared data as a source for training: buckets of several sizes, of one folder or of several together.

Records are as in examples.py, with `fps` and `aspect_ratio`, and with cameras where these are prepared. Frames
are decoded on first access: a record with latents is trained on without them, and of data prepared without media it has
none.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from starflow_jax.config import UserError
from starflow_jax.data.raw import clips, shards
from starflow_jax.data.raw.building import PREPARED, keeps_media, read_prepared
from starflow_jax.data.raw.job import by_setting
from starflow_jax.io.files import parse_json

CAPTIONS = {"caption_long", "caption_short", "fps"}
FIELDS = {shards.CLIPS: {"media", *CAPTIONS}, shards.LATENTS: {"latents", *CAPTIONS},
          shards.FEATURES: {"prompts", "lengths", "rows"}, shards.CAMERAS: {"intrinsics", "world_to_camera"}}


class Record(dict):
    """An example; "frames" are decoded on first access, of `clip()`, its entry among the clips, which raises UserError
    where no media was kept in the folder."""

    def __init__(self, entries: dict[str, Any], clip: Callable[[], dict[str, Any]], folder: str = "") -> None:
        super().__init__(entries)
        self._clip, self._folder = clip, folder

    def __missing__(self, name: str) -> Any:
        if name != "frames":
            raise KeyError(name)
        clip = self._clip()
        if "media" not in clip:
            raise UserError(f"{self._folder}: has latents but no pixels, for it was prepared with prepare.media=false; "
                            "train on it with data.latents=true, or prepare the videos with media in another folder")
        self["frames"] = clips.decode(clip["media"])
        return self["frames"]


class Bucket(Sequence[dict[str, Any]]):
    """The examples of one size and split of one folder."""

    def __init__(self, folder: epath.Path, name: str, split: str, aspect_ratio: str, latents: bool, features: bool,
                 cameras: bool, media: bool) -> None:
        self.name = name
        self._folder = str(folder)
        self._aspect_ratio = aspect_ratio
        open_kind = functools.partial(_open, folder, bucket=name, split=split, media=media)
        self._clips = open_kind(shards.CLIPS)
        self._latents = open_kind(shards.LATENTS) if latents else None
        self._features = open_kind(shards.FEATURES) if features else None
        self._cameras = open_kind(shards.CAMERAS) if cameras else None

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: Any) -> Any:
        clip = functools.cache(lambda: self._clips[index])
        entries = dict(clip() if self._latents is None else self._latents[index])
        record = Record({**entries, "aspect_ratio": self._aspect_ratio, "fps": int(entries["fps"])}, clip,
                        self._folder)
        if self._cameras is not None:
            record.update(self._cameras[index])
        if self._features is not None:
            record["text"] = _by_prompt(self._features[index])
        return record


class Prepared(Sequence[dict[str, Any]]):
    """All buckets of a split. As a sequence it is its largest bucket, of videos where there are any, for code that
    needs examples of one size."""

    def __init__(self, videos: Sequence[Bucket], images: Sequence[Bucket]) -> None:
        self.videos, self.images = tuple(videos), tuple(images) or tuple(videos)
        self._largest = max(self.videos or self.images, key=len)

    def __len__(self) -> int:
        return len(self._largest)

    def __getitem__(self, index: Any) -> Any:
        return self._largest[index]


def source(folders: str, split: str, *, latents_by: Any = None, features_by: Any = None) -> Prepared:
    """The examples of a split of prepared folders, a comma-separated list.

    latents_by, features_by: fingerprint of what must have made the latents and text features; None: they are
    not read. Raises UserError for a folder that is not prepared, or not by these, and for an empty split.
    """
    if split not in shards.SPLITS:
        raise UserError(f'there is no split "{split}": use one of {", ".join(shards.SPLITS)}')
    videos: list[Bucket] = []
    images: list[Bucket] = []
    for folder in (epath.Path(name.strip()) for name in folders.split(",")):
        if not (folder / PREPARED).exists():
            raise UserError(f"data.directory={folders!r}: {folder} is not prepared data; make it with --mode=prepare")
        prepared = read_prepared(folder)
        for kind, made_by in ((shards.LATENTS, latents_by), (shards.FEATURES, features_by)):
            if made_by is not None:
                _check_derived(folder, kind, made_by, kind == shards.FEATURES or keeps_media(prepared))
        for name, bucket in prepared["buckets"].items():
            if split in bucket["clips"]:
                cameras = by_setting(prepared["job"])["camera"] and not shards.is_of_pictures(name)
                opened = Bucket(folder, name, split, bucket["aspect_ratio"], latents_by is not None,
                                features_by is not None, cameras, keeps_media(prepared))
                (images if bucket["frames"] == 1 else videos).append(opened)
    if not videos and not images:
        raise UserError(f"{folders}: there are no {split} clips; prepare them with a larger "
                        f"prepare.{split}_share" if split != "train" else f"{folders}: there are no train clips")
    return Prepared(videos, images)


def _check_derived(folder: epath.Path, kind: str, made_by: Any, can_be_made_again: bool) -> None:
    shards.check_made_by(folder, kind, made_by, can_be_made_again)
    wanted = {shard.bucket for shard in shards.written_shards(folder, shards.CLIPS)}
    if wanted - {shard.bucket for shard in shards.written_shards(folder, kind)}:
        setting = "latents" if kind == shards.LATENTS else "text_features"
        raise UserError(f"{folder}: holds no {kind} yet, or not all; make them with --mode=prepare "
                        f"--config.prepare.{setting}=true")


def _open(folder: epath.Path, kind: str, bucket: str, split: str, media: bool) -> Sequence[dict[str, Any]]:
    where = folder / kind / bucket / shards.VERSION
    try:
        builder = tfds.builder_from_directory(where)
        missing = FIELDS[kind] - set(builder.info.features) - (set() if media else {"media"})
        if missing:
            raise ValueError(f"features.json has no {', '.join(sorted(missing))}")
        return shards.Readable(builder.as_data_source(split=split), str(where))
    except Exception as error:  # TFDS and what it reads its metadata with fail in many ways
        raise shards.damaged(str(where), error) from error


def _by_prompt(example: dict[str, Any]) -> dict[str, np.ndarray]:
    ends = np.cumsum(example["lengths"])
    try:
        return dict(zip(parse_json(example["prompts"]), np.split(example["rows"], ends[:-1])))
    except (ValueError, TypeError) as error:
        raise shards.damaged("prepared text features", error) from error
