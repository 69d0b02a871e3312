"""Clips have the frames, sizes and times they should, and what is no clip is named with its reason."""

import ctypes
import io
import itertools
import re
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from PIL import Image

from starflow_jax.config import Prepare
from starflow_jax.data.raw.clips import Clip, cut, decode, encode, nearest_bucket
from starflow_jax.data.raw.items import Item, Rejected
from starflow_jax.data.raw.job import Bucket, Job
from starflow_jax.data.raw.planes import Fitter, plane, to_rgb
from starflow_jax.io import video as video_io
from starflow_jax.io.video import Mp4Writer, write_mp4
from tests.prepared_input import changed, counting, frames_of, real_videos, scene, textured, write_as, write_at

CRF = Prepare().crf
SQUARE, WIDE, TALL = Bucket(16, 16, "1:1"), Bucket(16, 24, "3:2"), Bucket(24, 16, "2:3")
ALL = Job(Prepare(fps=0, max_upscale=1.0, min_brightness=0.0, min_motion=0.0, cut_threshold=0.0), folder="",
          buckets=(SQUARE,), frames=5)


def made(path, is_image=False, start=0.0, end=np.inf, **changes):
    item = Item("key", path if isinstance(path, bytes) else str(path), is_image, "long", "short", start, end)
    return list(cut(item, changed(ALL, **changes)))


def levels(clip):
    """What `counting` frames show, as their numbers."""
    return np.round((clip.frames_THWC.mean((1, 2, 3)) - 20) / 8).astype(int).tolist()


def video(tmp_path, frames, fps=16, name="video.mp4"):
    write_mp4(tmp_path / name, frames, fps)
    return tmp_path / name


def test_clips_follow_one_another_without_overlap(tmp_path):
    clips = made(video(tmp_path, counting(14)))
    assert [levels(clip) for clip in clips] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [clip.fps for clip in clips] == [16, 16]
    np.testing.assert_allclose([clip.start for clip in clips], [0, 5 / 16], atol=1e-4)
    assert clips[0].frames_THWC.shape == (5, 16, 16, 3) and clips[0].frames_THWC.dtype == np.uint8


def test_bytes_are_read_as_a_path_is(tmp_path):
    path = video(tmp_path, scene(6))
    (one,), (other,) = made(path), made(path.read_bytes())
    np.testing.assert_array_equal(one.frames_THWC, other.frames_THWC)


def test_tags_in_another_encoding_do_no_harm(tmp_path):
    clip, = made(video(tmp_path, counting(6)).read_bytes().replace(b"Lavf", b"\xe9" * 4))
    assert levels(clip) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("fps,expected", [(30, [0, 1, 2, 3, 4]), (15, [0, 2, 4, 6, 8]), (16, [0, 1, 3, 5, 7])])
def test_each_time_shows_the_frame_of_that_time(tmp_path, fps, expected):
    # At 16 fps from 30: frame floor(k * 30 / 16).
    assert levels(made(video(tmp_path, counting(11), 30), fps=fps)[0]) == expected


def test_uneven_timestamps_are_honoured(tmp_path):
    times = [0, 0.05, 0.1, 0.31, 0.32, 0.4]
    write_at(tmp_path / "v.mp4", counting(6), times)
    expected = [max(n for n, time in enumerate(times) if time <= k / 10 + 1e-6) for k in range(5)]
    assert levels(made(tmp_path / "v.mp4", fps=10)[0]) == expected == [0, 2, 2, 2, 5]


def test_a_gap_ends_a_clip(tmp_path):
    write_at(tmp_path / "v.mp4", counting(9), [0, 0.1, 0.2, 3.0, 3.1, 3.2, 3.3, 3.4, 3.5])
    short, clip = made(tmp_path / "v.mp4")
    assert short == Rejected("key", "cut inside: 3 frames of 5", 0.0, 0.2)
    assert levels(clip) == [3, 4, 5, 6, 7] and clip.start == pytest.approx(3.0)
    times = [*np.arange(5) / 20, *(1 + np.arange(40) / 20)]
    write_at(tmp_path / "v.mp4", counting(45), times)
    clips = made(tmp_path / "v.mp4", fps=10)
    assert clips[0].reason == "cut inside: 3 frames of 5" and levels(clips[1]) == [5, 7, 9, 11, 13]


def test_a_stretch_of_a_video(tmp_path):
    path = video(tmp_path, counting(60), 20)
    clips = made(path, start=1.0, end=1.55)
    assert [levels(clip) for clip in clips] == [[20, 21, 22, 23, 24], [25, 26, 27, 0, 1]]


def test_cuts_are_found_and_movement_is_none(tmp_path):
    frames = np.concatenate([scene(7, seed=1, step=3), scene(6, seed=2, step=3)])
    path = video(tmp_path, frames)
    uncut = made(path, buckets=(WIDE,))
    assert len(uncut) == 2 and all(isinstance(clip, Clip) for clip in uncut)
    first, rejected, second = made(path, buckets=(WIDE,), cut_threshold=20.0)
    assert isinstance(first, Clip) and isinstance(second, Clip)
    assert rejected == Rejected("key", "cut inside: 2 frames of 5", round(5 / 16, 3), round(7 / 16, 3))
    assert second.start == pytest.approx(7 / 16, abs=1e-4)
    assert len(made(video(tmp_path, scene(13, step=3)), buckets=(WIDE,), cut_threshold=20.0)) == 2


def test_fast_movement_is_no_cut_and_a_cut_in_fast_movement_is_one(tmp_path):
    """Stripes that slide by a third of their period change by more than the threshold at every frame."""
    columns = np.arange(48)[None, None, :, None]
    stripes = [np.broadcast_to(96 + 90 * np.sin((columns + 4 * np.arange(20)[:, None, None, None]) / 2 + phase),
                               (20, 32, 48, 3)).astype(np.uint8) for phase in (0, 3)]
    changes = np.abs(np.diff(stripes[0].astype(int), axis=0)).mean((1, 2, 3))
    assert changes.min() > 40
    fast = made(video(tmp_path, stripes[0]), buckets=(WIDE,), cut_threshold=20.0)
    assert [clip.start for clip in fast if isinstance(clip, Clip)] == pytest.approx([0, 5 / 16, 10 / 16, 15 / 16])
    # A still shot, and then the fast one: its every frame differs from the still ones' habits, but it is one shot.
    still = np.repeat(scene(1), 7, axis=0)
    both = made(video(tmp_path, np.concatenate([still, stripes[0]])), buckets=(WIDE,), cut_threshold=20.0)
    assert [type(found) for found in both] == [Clip, Rejected, Clip, Clip, Clip, Clip]
    # Slower stripes, a change to bright ones among them: 2.6 times what they change by.
    slow = np.broadcast_to(60 + 50 * np.sin((columns + np.arange(12)[:, None, None, None]) / 2), (12, 32, 48, 3))
    cut_in = np.concatenate([slow[:8], slow[:6] + 90]).astype(np.uint8)
    usual = np.abs(np.diff(slow, axis=0)).mean((1, 2, 3)).max()
    assert 15 < usual < 40
    starts = [clip.start for clip in made(video(tmp_path, cut_in), buckets=(WIDE,), cut_threshold=20.0)
              if isinstance(clip, Clip)]
    assert starts == pytest.approx([0, 8 / 16], abs=1e-3)


def test_a_cut_between_two_clips_costs_nothing(tmp_path):
    frames = np.concatenate([scene(5, seed=1), scene(5, seed=2)])
    assert all(isinstance(clip, Clip) for clip in made(video(tmp_path, frames), buckets=(WIDE,), cut_threshold=20.0))


def test_noise_is_no_movement(tmp_path):
    noisy = np.repeat(np.full((1, 288, 288, 3), 100), 5, axis=0)
    noisy = noisy + np.random.default_rng(0).integers(-6, 7, noisy.shape)
    path = video(tmp_path, noisy.astype(np.uint8))
    rejected, = made(path, buckets=(Bucket(288, 288, "1:1"),), min_motion=0.8)
    assert "too static" in rejected.reason
    assert np.abs(np.diff(noisy, axis=0)).mean() > 4


def test_a_video_marked_as_turned_is_turned(tmp_path):
    """As phones keep upright videos: lying, with a matrix that says how to show them."""
    path = video(tmp_path, scene(5, 32, 48))
    upright, = made(path, buckets=(WIDE, TALL))
    content = bytearray(path.read_bytes())
    whole, turned = 0x40000000, (0, 65536, 0, -65536, 0, 0, 0, 0, 0x40000000)  # x' = -y, y' = x: clockwise
    place = content.index(struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, whole), content.index(b"tkhd"))
    content[place:place + 36] = struct.pack(">9i", *turned)
    (tmp_path / "turned.mp4").write_bytes(content)
    clip, = made(tmp_path / "turned.mp4", buckets=(WIDE, TALL))
    assert upright.bucket is WIDE and clip.bucket is TALL
    for index in range(3):
        as_it_lies, as_shown = (np.stack([plane(frame, index) for frame in one.frames]) for one in (upright, clip))
        np.testing.assert_array_equal(as_shown, np.rot90(as_it_lies, -1, axes=(1, 2)))


def test_dark_and_still_clips_are_left_out(tmp_path):
    still = np.repeat(scene(1), 5, axis=0)
    rejected, = made(video(tmp_path, still), min_motion=0.1)
    assert rejected.reason.startswith("too static: 0.0") and (rejected.start, rejected.end) == (0.0, 0.25)
    assert isinstance(made(video(tmp_path, scene(5)), min_motion=0.1)[0], Clip)
    rejected, = made(video(tmp_path, scene(5) // 16), min_brightness=20.0)
    assert rejected.reason.startswith("too dark: brightness")
    # The mean is that of what was put in, within the codec's error.
    said = float(rejected.reason.split()[3])
    assert said == pytest.approx((scene(5) // 16).mean(), abs=2.5)


@pytest.mark.parametrize("changes,frames,message", [
    ({}, 4, "too short: 4 frames at 16 fps, a clip has 5"),
    ({"buckets": (Bucket(64, 64, "1:1"),)}, 6, "too small: 48x32 would be enlarged 2.00 times"),
    ({"fps": 20}, 6, "frame rate 16 is below 20"), ({"rate": 0.25}, 6, "frame rate 0.25 is not from 1 to 240"),
    ({"rate": 500}, 6, "frame rate 500 is not from 1 to 240"),
])
def test_videos_that_give_no_clip_say_why(tmp_path, changes, frames, message):
    path = video(tmp_path, scene(frames), changes.pop("rate", 16))
    assert [rejected.reason for rejected in made(path, **changes)] == [message]


def test_enlarging_is_allowed_up_to_the_limit(tmp_path):
    buckets = (Bucket(64, 64, "1:1"),)
    assert made(video(tmp_path, scene(5)), buckets=buckets, max_upscale=2.0)[0].frames_THWC.shape == (5, 64, 64, 3)


@pytest.mark.parametrize("content", [b"", b"text", b"\x00" * 5000, bytes(range(256)) * 40])
def test_files_that_are_no_video_or_picture(tmp_path, content):
    for is_image in (False, True):
        rejected, = made(content, is_image)
        assert isinstance(rejected, Rejected) and rejected.reason.startswith("unreadable: ")
    (tmp_path / "v.mp4").write_bytes(content)
    assert made(tmp_path / "v.mp4")[0].reason.startswith("unreadable: ")
    assert "No such file" in made(tmp_path / "missing.mp4")[0].reason


def test_a_video_damaged_in_the_middle_gives_the_clips_before(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (30, 32, 32, 3), np.uint8)
    # Fragments: the index is in front, so a file cut short can still be opened.
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=16)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuvj444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    whole = made(tmp_path / "v.mkv")
    content = (tmp_path / "v.mkv").read_bytes()
    part = made(content[:len(content) // 2])
    clips = [clip for clip in part if isinstance(clip, Clip)]
    assert len(whole) == 6 and 1 <= len(clips) <= 3
    for clip, same in zip(clips, whole):
        np.testing.assert_array_equal(clip.frames_THWC, same.frames_THWC)


def test_a_video_without_a_frame():
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=16)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuvj420p"
        container.start_encoding()
    assert made(file.getvalue()) == [Rejected("key", "no frames")]


def test_a_sound_file_has_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert made(tmp_path / "a.mp4")[0].reason == "no video track"


def test_each_video_goes_into_the_bucket_nearest_in_shape(tmp_path):
    buckets = (SQUARE, WIDE, TALL)
    for height, width, bucket in ((32, 32, SQUARE), (32, 48, WIDE), (48, 32, TALL), (32, 38, SQUARE), (32, 40, WIDE)):
        assert nearest_bucket(buckets, height, width) is bucket
    clip, = made(video(tmp_path, scene(5, 48, 32)), buckets=buckets)
    assert clip.bucket is TALL and clip.frames_THWC.shape == (5, 24, 16, 3)
    assert made(video(tmp_path, scene(12)), clips_per_video=1, buckets=buckets)[0].bucket is WIDE
    assert len(made(video(tmp_path, scene(12)), clips_per_video=1)) == 1


def fitted(frame, height, width, pixel_aspect=1.0):
    return to_rgb([Fitter(height, width, pixel_aspect)(frame)])[0]


@pytest.mark.parametrize("rows", [32, 720])
@pytest.mark.parametrize("colour", [(200, 30, 90), (128, 128, 128), (10, 10, 10)])
def test_colours_are_kept(rows, colour):
    picture = np.full((rows, rows, 3), colour, np.uint8)
    # Untagged and tagged, as 601 and 709.
    for standard in (Colorspace.ITU601, Colorspace.ITU709):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p", dst_colorspace=standard)
        untagged_as = Colorspace.ITU709 if rows == 720 else Colorspace.ITU601
        frame.colorspace = 2 if standard == untagged_as else standard
        np.testing.assert_allclose(fitted(frame, 16, 16).mean((0, 1)), colour, atol=1.5)


def test_resizing_covers_the_bucket_and_keeps_the_middle():
    ramp = np.broadcast_to(np.linspace(0, 240, 96)[None, :, None], (32, 96, 3)).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(ramp), format="rgb24")
    middle = fitted(frame, 16, 16)
    assert middle.shape == (16, 16, 3)
    # Half size, of whose 48 columns those from 16 to 31 are kept.
    np.testing.assert_allclose(middle[8, :, 0], ramp[0, 32:64, 0].reshape(16, 2).mean(1), atol=2)
    # Pixels twice as wide as high: the same picture is shown 192 wide, and its middle sixth is kept.
    wide = fitted(frame, 16, 16, pixel_aspect=2.0)
    np.testing.assert_allclose(wide[8, :, 0], ramp[0, 40:56, 0], atol=2)


def test_pictures(tmp_path):
    picture = scene(1, 40, 60)[0]
    upright = np.rot90(picture, 1)
    Image.fromarray(picture).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(upright).save(tmp_path / "b.png", exif=exif)
    clip, = made(tmp_path / "a.png", True, buckets=(SQUARE, WIDE))
    assert clip.frames_THWC.shape == (1, 16, 24, 3) and (clip.bucket, clip.fps) == (WIDE, 0)
    np.testing.assert_array_equal(made(tmp_path / "b.png", True, buckets=(SQUARE, WIDE))[0].frames_THWC,
                                  clip.frames_THWC)
    exact = np.asarray(Image.fromarray(picture).resize((24, 16), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(clip.frames_THWC[0], exact)
    assert "too dark" in made(tmp_path / "a.png", True, min_brightness=250.0)[0].reason


KEPT_AS = ("yuv420p", "yuv422p", "yuv444p")


@pytest.mark.parametrize("frames,pixels,limit", [(1, "", 4.0), *((5, pixels, 6.0) for pixels in KEPT_AS)])
def test_what_is_kept_is_nearly_what_was_seen_and_the_same_bytes(frames, pixels, limit):
    clip = Clip(frames_of(scene(frames), pixels) if pixels else scene(frames), WIDE, 16, 0.0)
    kept = encode(clip, 10)
    assert kept == encode(clip, 10)
    back = decode(kept)
    assert back.shape == clip.frames_THWC.shape and back.dtype == np.uint8
    assert np.sqrt(((back.astype(float) - clip.frames_THWC) ** 2).mean()) < limit
    if frames > 1:
        assert len(encode(clip, 30)) < len(kept)
        with av.open(io.BytesIO(kept)) as container:
            assert container.streams.video[0].codec_context.pix_fmt == pixels


@pytest.mark.parametrize("codec,pixels,kept", [
    ("libx264", "yuv420p", "yuv420p"), ("libx264", "yuv422p10le", "yuv422p"), ("libx264", "yuv444p", "yuv444p"),
    ("mjpeg", "yuvj420p", "yuv420p"), ("mjpeg", "yuvj422p", "yuv422p"), ("ffv1", "bgr0", "yuv444p")])
def test_colours_are_kept_as_the_source_samples_them(tmp_path, codec, pixels, kept):
    """And black and white are what they were, whatever range the source has."""
    stripes = np.zeros((6, 32, 48, 3), np.uint8)
    stripes[:, :, 16:32], stripes[:, :, 32:] = 255, (200, 30, 90)
    write_as(tmp_path / "v.mkv", stripes, codec, pixels)
    clip, = made(tmp_path / "v.mkv", buckets=(Bucket(32, 48, "3:2"),))
    for shown in (clip.frames_THWC, decode(encode(clip, 10))):
        for columns, colour in ((slice(2, 14), 0), (slice(18, 30), 255), (slice(34, 46), (200, 30, 90))):
            np.testing.assert_allclose(shown[:, :, columns].mean((0, 1, 2)), np.broadcast_to(colour, 3), atol=4)
    with av.open(io.BytesIO(encode(clip, 10))) as container:
        assert container.streams.video[0].codec_context.pix_fmt == kept == clip.frames[0].format.name


def test_real_videos_are_kept_as_well_as_by_way_of_rgb():
    """At most 0.5 dB worse than 4:4:4 of RGB frames by x264's "veryfast", which takes several times as long."""
    for name, size in (("carphone_pristine", (144, 176)), ("bikes", (272, 640))):
        with av.open(str(real_videos()[name])) as container:
            source = list(itertools.islice(container.decode(video=0), 9))
        fitter = Fitter(*size)
        seen, shown = to_rgb(source), [fitter(frame) for frame in source]
        file = io.BytesIO()
        writer = Mp4Writer(file, 16, 1, {}, {"crf": "10", "preset": "veryfast", "threads": "1"}, "yuv444p")
        writer.write(seen)
        writer.close()
        ours, by_rgb = (decode(media).astype(float) for media in (
            encode(Clip(shown, Bucket(*size, ""), 16, 0.0), CRF), file.getvalue()))
        assert 10 * np.log10(((by_rgb - seen) ** 2).mean() / ((ours - seen) ** 2).mean()) > -0.5


SIZES = [(16, 24), (18, 86), (62, 30), (66, 150), (94, 112), (130, 66)]


def test_clips_of_mixed_sizes_are_the_same_bytes_in_any_order():
    """Memory is not clean: what earlier clips left in it must not show."""
    clips = [Clip(frames_of(textured(17 + index, *size)), WIDE, 16 + index, 0.0) for index, size in enumerate(SIZES)]
    first = [encode(clip, 10) for clip in clips]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(clips))
        junk = [np.full(size, seed * 80 + 15, np.uint8) for size in (1_000, 40_000, 300_000, 2_000_000)]
        del junk
        assert {index: encode(clips[index], 10) for index in order} == dict(enumerate(first))


def test_every_cpu_encodes_the_same_bytes(monkeypatch):
    """As those without x86's vector instructions do."""
    clips = [Clip(frames_of(textured(9, *size), pixels), WIDE, 16, 0.0) for size in SIZES for pixels in KEPT_AS]
    usual = [encode(clip, 10) for clip in clips]
    monkeypatch.setattr(video_io, "X264_PARAMS", video_io.X264_PARAMS + ":asm=0")
    assert [encode(clip, 10) for clip in clips] == usual


@pytest.mark.parametrize("codec,pixels,frames", [("mpeg4", "yuv420p", 30), ("mjpeg", "yuvj422p", 6)])
def test_every_cpu_decodes_and_resizes_to_the_same_frames(tmp_path, codec, pixels, frames):
    loaded = re.search(r"\S*/libavutil\S*", Path("/proc/self/maps").read_text())
    if not loaded:
        pytest.skip("needs ffmpeg's library by its name")
    libavutil = ctypes.CDLL(loaded.group())
    buckets = tuple(Bucket(height, width, "1:1") for height, width in SIZES)
    made_by = {}
    for flags in (-1, 0):  # all that the CPU has; none
        libavutil.av_force_cpu_flags(flags)
        try:
            for size in ((288, 352), (198, 140)):
                path = tmp_path / f"{size[0]}.mkv"
                if not path.exists():
                    write_as(path, textured(frames, *size), codec, pixels)
                for bucket in buckets:
                    clips = made(path, buckets=(bucket,), max_upscale=9.0)
                    made_by[flags, size, bucket] = b"".join(clip.frames_THWC.tobytes() for clip in clips)
        finally:
            libavutil.av_force_cpu_flags(-1)
    differ = [key for key, frames in made_by.items() if frames != made_by[-1, *key[1:]]]
    assert len(made_by) == 24 and not differ


def test_playlists_and_what_is_too_large_are_left_out(tmp_path):
    video(tmp_path, scene(6), name="real.mp4")
    (tmp_path / "v.mp4").write_text("ffconcat version 1.0\nfile real.mp4\n")
    reason = "not a video file of a known kind; playlists are not followed"
    assert made(tmp_path / "v.mp4") == made((tmp_path / "v.mp4").read_bytes()) == [Rejected("key", reason)]
    video(tmp_path, scene(2, 1008, 1008), name="large.mp4")
    Image.new("RGB", (1008, 1008)).save(tmp_path / "large.png")
    for name in ("large.mp4", "large.png"):
        assert "1008x1008" in made(tmp_path / name, name.endswith("png"), max_megapixels=1)[0].reason
        assert "1008x1008" not in str(made(tmp_path / name, name.endswith("png"), max_megapixels=2))


def test_real_videos_give_the_clips_their_length_allows():
    videos = real_videos()
    changes = dict(frames=17, fps=16, cut_threshold=25.0, min_motion=0.2, min_brightness=10.0, buckets=(SQUARE, WIDE))
    # 120 frames at 29.97 fps are 64.06 frames' time at 16: three whole clips.
    assert len(made(videos["carphone_pristine"], **changes)) == 3
    bikes = made(videos["bikes"], **changes)
    starts = [clip.start for clip in bikes if isinstance(clip, Clip)]
    # Scenes of the film begin at 1.25, 3.0625, 5.5 and 7.5 s.
    assert {0.0, 1.25, 3.0625, 5.5, 7.5} <= set(starts)
    assert {clip.bucket for clip in bikes if isinstance(clip, Clip)} == {WIDE}
