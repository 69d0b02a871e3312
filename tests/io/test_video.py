"""Videos: what is written is read back, right in colour, size and rate."""

import contextlib
import gc
import io
import os
import resource
import socket
import subprocess
import sys

import av
import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.io import video as video_io


def moving_square(frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    video_THWC = np.zeros((frames, height, width, 3), np.uint8)
    for t in range(frames):
        video_THWC[t, 8:16, 2 + 2 * t : 10 + 2 * t] = (40 + 5 * t, 200, 90)
    return video_THWC


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 0, 255), (0, 255, 0), (200, 30, 90), (255, 255, 255)])
def test_flat_colour_survives_mp4(tmp_path, colour):
    frames_THWC = np.broadcast_to(np.uint8(colour), (3, 32, 32, 3))
    video_io.write_mp4(tmp_path / "flat.mp4", frames_THWC, fps=8)
    read_THWC, _ = video_io.read_video(tmp_path / "flat.mp4")
    # BT.709 shown as BT.601 would be off by more than 20.
    assert np.abs(read_THWC.astype(int) - np.array(colour)).max() <= 3


def test_mp4_is_tagged_as_converted_and_playable(tmp_path):
    video_io.write_mp4(tmp_path / "clip.mp4", moving_square(), fps=8)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert stream.frames == 9
    file = (tmp_path / "clip.mp4").read_bytes()
    assert file.index(b"moov") < file.index(b"mdat")  # plays while it downloads


def test_untagged_video_is_bt601_when_small_and_bt709_when_large(tmp_path):
    for height in (64, 720):
        frame = av.VideoFrame(32, height, "yuv420p")
        for plane, value in zip(frame.planes, (81, 90, 240), strict=True):  # red in BT.601
            plane.update(bytes([value]) * plane.buffer_size)
        with av.open(str(tmp_path / f"{height}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = 32, height, "yuv420p"
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    small, _ = video_io.read_video(tmp_path / "64.mp4")
    large, _ = video_io.read_video(tmp_path / "720.mp4")
    assert np.abs(small[0, 0, 0].astype(int) - (254, 0, 0)).max() <= 4
    # 1.164·(81 − 16) + 1.793·112 clips; green 1.164·65 − 0.213·(90 − 128) − 0.533·112 = 24
    assert np.abs(large[0, 0, 0].astype(int) - (255, 24, 0)).max() <= 4


@pytest.mark.parametrize("fps", [8, 16, 30000 / 1001])
def test_round_trip_keeps_frames_and_rate(tmp_path, fps):
    video_THWC = moving_square()
    video_io.write_mp4(tmp_path / "clip.mp4", video_THWC, fps=fps)
    read_THWC, read_fps = video_io.read_video(tmp_path / "clip.mp4")
    assert read_THWC.shape == video_THWC.shape and read_THWC.dtype == np.uint8
    assert read_fps == pytest.approx(fps, rel=1e-6)
    error_THWC = np.abs(read_THWC.astype(int) - video_THWC)
    assert error_THWC.mean() < 3
    assert error_THWC.mean() < np.abs(video_THWC[1:].astype(int) - video_THWC[:-1]).mean()


def test_odd_sizes_are_padded_and_pixels_enlarged(tmp_path):
    video_THWC = np.zeros((2, 5, 7, 3), np.uint8)
    video_THWC[:, :, :3] = 255
    video_io.write_mp4(tmp_path / "odd.mp4", video_THWC, fps=8)
    assert video_io.read_video(tmp_path / "odd.mp4")[0].shape == (2, 6, 8, 3)
    video_io.write_mp4(tmp_path / "large.mp4", video_THWC, fps=8, scale=4)
    large_THWC, _ = video_io.read_video(tmp_path / "large.mp4")
    assert large_THWC.shape == (2, 20, 28, 3)
    assert large_THWC[:, :, :12].min() > 240 and large_THWC[:, :, 12:].max() < 15
    video_io.write_mp4(tmp_path / "odd_and_large.mp4", video_THWC, fps=8, scale=3)
    assert video_io.read_video(tmp_path / "odd_and_large.mp4")[0].shape == (2, 16, 22, 3)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), video_io.atomic_path(path) as temporary:
        temporary.write_bytes(b"half a file")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="uint8"):
        video_io.write_mp4(path, np.zeros((1, 4, 4, 3), np.float32), fps=8)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@contextlib.contextmanager
def largest_file(size):
    """Writing beyond that fails; Python ignores SIGXFSZ."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_write_fails_unseen(tmp_path):
    """Nor the last one, about which ffmpeg says nothing."""
    def grow(path):
        with contextlib.closing(video_io.growing_mp4(path, fps=8)) as writer:
            writer.write(moving_square(frames=9))

    for name, write in (("growing", grow), ("whole", lambda path: video_io.write_mp4(path, moving_square(9), fps=8))):
        write(tmp_path / f"{name}.mp4")
        size = (tmp_path / f"{name}.mp4").stat().st_size
        for limit in (size - 1, size - 40, size - 100, size - 400, size // 2, 10):
            with pytest.raises(OSError), largest_file(limit):
                write(tmp_path / f"{name}_{limit}.mp4")


def test_bad_videos_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="not found"):
        video_io.read_video(tmp_path / "none.mp4")
    video_io.write_mp4(tmp_path / "clip.mp4", moving_square(frames=30), fps=8)
    whole = (tmp_path / "clip.mp4").read_bytes()
    for size in (0, 20, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.mp4").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.mp4"):
            video_io.read_video(tmp_path / "cut.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match="no video"):
        video_io.read_video(tmp_path / "sound.mp4")


def test_damaged_videos_are_read_or_one_line_with_their_name(tmp_path):
    """300 fixed mutations: one byte to eight of a small MP4, anywhere in it."""
    video_io.write_mp4(tmp_path / "clip.mp4", moving_square(2, 16, 16), fps=8)
    whole, path, refused = (tmp_path / "clip.mp4").read_bytes(), tmp_path / "mutated.mp4", 0
    for seed in range(300):
        random = np.random.default_rng(seed)
        damaged = np.frombuffer(whole, np.uint8).copy()
        places = random.integers(len(whole), size=random.integers(1, 9))
        damaged[places] = random.integers(256, size=len(places))
        path.write_bytes(damaged.tobytes())
        try:
            video_io.read_video(path)
        except UserError as error:
            refused += str(path) in str(error) and "\n" not in str(error)
    assert 50 < refused < 250


def test_tags_in_another_encoding_do_no_harm(tmp_path):
    video_io.write_mp4(tmp_path / "clip.mp4", moving_square(), fps=8)
    whole = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(whole.replace(b"Lavf", b"\xe9\xe9\xe9\xe9"))
    assert b"Lavf" in whole and len(video_io.read_video(tmp_path / "clip.mp4")[0]) == 9


def test_whatever_a_decoder_raises_is_one_line(tmp_path, monkeypatch):
    def fail(frame):
        raise MemoryError

    video_io.write_mp4(tmp_path / "clip.mp4", moving_square(), fps=8)
    monkeypatch.setattr(video_io, "to_rgb", fail)
    with pytest.raises(UserError, match=r"clip\.mp4 \(MemoryError\)"):
        video_io.read_video(tmp_path / "clip.mp4")


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile {name}\n",
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{name}\n#EXT-X-ENDLIST\n",
    "DASH": '''<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"
        mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="video/mp4">
        <Representation id="1" bandwidth="1"><BaseURL>{name}</BaseURL></Representation>
        </AdaptationSet></Period></MPD>''',
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_only_the_named_file_is_opened(tmp_path, kind):
    """Nor is any address: a server that listens is not asked."""
    video_io.write_mp4(tmp_path / "real.ts.mp4", moving_square(), fps=8)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/real.mp4"
        for name in ("real.ts.mp4", str(tmp_path / "real.ts.mp4"), address):
            content = PLAYLISTS[kind].format(name=name)
            (tmp_path / "playlist.mp4").write_text(content)
            with pytest.raises(UserError, match=r"cannot read video .*playlist\.mp4"):
                video_io.read_video(tmp_path / "playlist.mp4")
            with pytest.raises((video_io.NotAVideo, av.FFmpegError)):
                video_io.open_video(io.BytesIO(content.encode()))
        with pytest.raises(BlockingIOError):
            server.accept()
    assert len(video_io.read_video(tmp_path / "real.ts.mp4")[0]) == 9


def test_names_that_look_like_addresses_are_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "concat:a.mp4|b.mp4", "%03d.mp4", "pipe:0.mp4"):
        video_io.write_mp4(name, moving_square(3), fps=8)
        assert len(video_io.read_video(name)[0]) == 3


def test_frames_that_are_too_large_are_not_decoded(tmp_path):
    video_io.write_mp4(tmp_path / "v.mp4", moving_square(3, 64, 96), fps=8)
    with pytest.raises(video_io.NotAVideo, match="too large: frames of 96x64, more than 0.006 million"):
        video_io.open_video(tmp_path / "v.mp4", 6_000)
    with video_io.open_video(tmp_path / "v.mp4", 6_144) as container:
        assert container.streams.video[0].width == 96
    # A GIF's size is known to its decoder alone: 65,535 x 65,535, of which the file has one pixel.
    header = b"GIF89a" + b"\xff" * 4 + bytes(9)
    (tmp_path / "v.gif").write_bytes(header + b"\x2c" + bytes(4) + b"\xff" * 4 + b"\0\x02\x02\x4c\x01\0;")
    with pytest.raises(UserError, match=r"v\.gif"):
        video_io.read_video(tmp_path / "v.gif")


def test_what_does_not_fit_into_memory_is_said(tmp_path, monkeypatch):
    video_io.write_mp4(tmp_path / "v.mp4", moving_square(30), fps=8)  # 138 kB of frames
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 102}.get)
    assert len(video_io.read_video(tmp_path / "v.mp4")[0]) == 30
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 80}.get)
    with pytest.raises(UserError, match=r"v\.mp4: its frames take 0\.0 GB or more, over a third"):
        video_io.read_video(tmp_path / "v.mp4")
    with pytest.raises(UserError, match="a video of 1e-06 frames per second at 16: its frames take 73.7 GB"):
        video_io.at_rate(moving_square(1), 1e-6, 16)


def test_growing_mp4_plays_before_it_is_closed(tmp_path):
    frames_THWC = moving_square(8)
    writer = video_io.growing_mp4(tmp_path / "grows.mp4", fps=8)
    writer.write(frames_THWC[:5])
    (tmp_path / "copy.mp4").write_bytes((tmp_path / "grows.mp4").read_bytes())
    early_THWC, rate = video_io.read_video(tmp_path / "copy.mp4")
    assert len(early_THWC) >= 3 and rate == 8
    assert np.abs(early_THWC[0].astype(int) - frames_THWC[0]).mean() < 4
    writer.write(frames_THWC[5:])
    writer.close()
    assert len(video_io.read_video(tmp_path / "grows.mp4")[0]) == 8


def test_a_recording_is_saved_as_often_as_one_likes(tmp_path):
    """All frames until then, as if they had been written at once; nothing lies beside the files."""
    frames_THWC, recording = moving_square(8), video_io.Recording(fps=8, scale=2)
    recording.write(frames_THWC[:1])
    recording.write(frames_THWC[1:5])
    recording.save(tmp_path / "early.mp4")
    recording.write(frames_THWC[5:])
    recording.save(tmp_path / "whole.mp4")
    recording.save(tmp_path / "again.mp4")
    at_once = video_io.Recording(fps=8, scale=2)
    at_once.write(frames_THWC)
    at_once.save(tmp_path / "at_once.mp4")
    early_THWC, rate = video_io.read_video(tmp_path / "early.mp4")
    whole_THWC, _ = video_io.read_video(tmp_path / "whole.mp4")
    assert len(early_THWC) == 5 and len(whole_THWC) == 8 and rate == 8
    np.testing.assert_array_equal(early_THWC, whole_THWC[:5])
    assert np.abs(whole_THWC[:, ::2, ::2].astype(int) - frames_THWC).mean() < 4
    assert len({(tmp_path / f"{name}.mp4").read_bytes() for name in ("whole", "again", "at_once")}) == 1
    assert len(list(tmp_path.iterdir())) == 4


def test_an_encoder_ends_with_its_recording_and_what_was_recorded_is_kept(tmp_path):
    """Without waiting for Python to look for objects that hold each other."""
    frames_THWC = moving_square(8)
    whole, dropped = (video_io.Recording(fps=8) for _ in range(2))
    for recording in (whole, dropped):
        recording.write(frames_THWC)
    whole.save(tmp_path / "before.mp4")
    whole.finish()
    whole.save(tmp_path / "after.mp4")
    assert (tmp_path / "after.mp4").read_bytes() == (tmp_path / "before.mp4").read_bytes()
    ended = dropped._end_encoder
    gc.disable()
    try:
        assert ended.alive
        del recording, dropped
        assert not ended.alive
    finally:
        gc.enable()


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p"])
def test_the_same_frames_give_the_same_bytes_whatever_memory_held_before(pixels: str) -> None:
    """In fresh processes whose memory is filled with something else each time."""
    program = f"""
import hashlib, io
import numpy as np
from starflow_jax.io.video import Mp4Writer
file, rows = io.BytesIO(), np.random.default_rng(0).integers(0, 255, (1, 8, 30, 3), np.uint8)
frames = np.concatenate([np.roll(rows.repeat(8, 1).repeat(8, 2), 2 * step, axis=2) for step in range(20)])
writer = Mp4Writer(file, 8, 1, {{}}, {{"crf": "16"}}, {pixels!r})
writer.write(frames[:, :, :96])
writer.close()
print(hashlib.sha256(file.getvalue()).hexdigest())
"""
    made = {subprocess.run([sys.executable, "-c", program], env={**os.environ, "MALLOC_PERTURB_": fill}, check=True,
                           capture_output=True, text=True).stdout for fill in ("1", "200")}
    assert len(made) == 1 and len(made.pop().strip()) == 64
