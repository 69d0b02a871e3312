"""What makes a video what it is, as a short hash: in the names of its files, and in the JSON beside it."""

import dataclasses
import functools
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from starflow_jax.config import Config, Sample
from starflow_jax.io.cameras import camera_file, names_a_file
from starflow_jax.sampling.requests import Request

# Settings of `sample` that say which videos are made, where, how many at a time and in which memory, but not what is in
# them. What the files that they name hold is in the checksums.
NOT_IN_THE_VIDEO = ("prompt", "prompts_file", "session", "vbench", "image", "video", "count", "keep", "seed",
                    "batch_size", "devices", "offload", "output", "overwrite", "checkpoint", "lora", "control",
                    "draft", "decoder")
OF_A_CHOICE = ("count", "keep", "seed")  # which of a prompt's videos is kept depends on which were made
NOT_IN_THE_MODEL = ("remat", "sequence_parallel", "unroll_layers")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that makes a video but its prompt and its seed."""

    config: Config
    weights: str  # checksums of the flow's weights with its LoRA factors, control module, draft, decoder,
    system: str  # of the files of tokenizer, codec, text encoder and calibration,
    given: str  # and of the given frames and the camera's file; "": none

    def identity(self, request: Request) -> str:
        """16 hexadecimal digits, equal for equal videos: of the same prompt (as given), seed, recipe and, where the
        likeliest are kept, choice."""
        made_of = f"{json.dumps([request.given or request.prompt, request.seed])[:-1]}, {self._of_all[1:]}"
        return hashlib.sha256(made_of.encode()).hexdigest()[:16]

    @functools.cached_property
    def _of_all(self) -> str:
        """What is the same for every video, as a list in JSON."""
        config, sample = self.config, plain(self.config.sample)
        left_out = set(NOT_IN_THE_VIDEO) - (set(OF_A_CHOICE) if config.sample.keep else set())
        made_of = [self.weights, self.system, self.given,
                   _without(sample, left_out), _without(dataclasses.asdict(config.model), NOT_IN_THE_MODEL),
                   _without(dataclasses.asdict(config.text), ("weights",)),
                   _without(dataclasses.asdict(config.codec), ("weights",)), config.data.first_frame_drop]
        return json.dumps(made_of, sort_keys=True)


def checksum_of_given(known_THWC: np.ndarray | None, camera: str = "") -> str:
    """Of given frames, and of the file that sample.camera names; "" where there are none. Raises UserError where that
    can't be read."""
    frames = "" if known_THWC is None else f"{zlib.crc32(known_THWC.tobytes()):08x}"
    return frames + (f"{zlib.crc32(camera_file(camera)):08x}" if names_a_file(camera) else "")


def facts_of(details: Path) -> dict[str, Any]:
    """What the JSON beside a video says; {} where it can't be read."""
    try:
        facts = json.loads(details.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def plain(settings: Sample) -> dict[str, Any]:
    """The settings as JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _without(settings: dict[str, Any], names: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}
