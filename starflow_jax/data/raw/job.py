"""What is to be prepared: the settings, and what follows for it from the model that will be trained."""

import dataclasses
import json
from typing import Any

from etils import epath

from starflow_jax.config import Prepare
from starflow_jax.data.raw.encoder import Encoder

# Settings that the clips don't depend on, and those of which `buckets` and `frames` are what was made.
ELSEWHERE = ("output", "processes", "beam", "latents", "text_features", "batch_size")
LATER = ("max_text_mb", "max_file_mb", "max_unpacking", "max_megapixels", "camera", "media")  # not in older data sets
VERSION = 2  # of the clips' bytes: those of one data set are all of the same; 1 was RGB at every step, kept as 4:4:4
MADE_BY = "made_by"  # what made the latents, where no media is kept
RESOLVED = ("resolution", "aspect_ratios", "frames")


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A size of clips, in pixels, and the aspect ratio that goes into the prompt."""

    height: int
    width: int
    aspect_ratio: str

    @property
    def name(self) -> str:
        return f"{self.height}x{self.width}"


@dataclasses.dataclass(frozen=True)
class Job:
    """All that the clips depend on, but the input's files; sent to every process and machine that makes some."""

    settings: Prepare
    folder: str  # of the result
    buckets: tuple[Bucket, ...]
    frames: int  # of a clip
    encoder: Encoder | None = None  # where no media is kept

    @property
    def path(self) -> epath.Path:
        return epath.Path(self.folder)

    def described(self) -> dict[str, Any]:
        """As JSON, by setting. The folder is not in it: it may be moved."""
        settings = {name: value for name, value in dataclasses.asdict(self.settings).items()
                    if name not in (*ELSEWHERE, *RESOLVED)}
        captions = {"long_captions": self.settings.long_names, "short_captions": self.settings.short_names}
        buckets = [dataclasses.asdict(bucket) for bucket in self.buckets]
        made_by = {} if self.encoder is None else {MADE_BY: self.encoder.made_by}
        return json.loads(json.dumps({**settings, **captions, **made_by, "buckets": buckets, "frames": self.frames,
                                      "version": VERSION}))


def by_setting(described: dict[str, Any]) -> dict[str, Any]:
    """What `Job.described` gave, also as older data sets hold it: with some fields nested, and some missing."""
    later = {field.name: field.default for field in dataclasses.fields(Prepare) if field.name in LATER} | {"version": 1}
    if "recipe" not in described:
        return {**later, **described}
    old = {**later, **described, **described["recipe"]}
    return {**old, "input": old["source"], "items_per_part": old["items_per_unit"],
            "long_captions": old["captions"]["long"], "short_captions": old["captions"]["short"]}
