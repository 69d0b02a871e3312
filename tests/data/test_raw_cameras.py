"""Cameras beside videos: read with them, brought to their clips' frames, and trained on with them."""

import dataclasses
import json
import tarfile

import av
import numpy as np
import pytest
from PIL import Image

from starflow_jax.config import Prepare, UserError
from starflow_jax.data import prepared
from starflow_jax.data.raw import clips, latents
from starflow_jax.data.raw.building import prepare_clips
from starflow_jax.data.raw.items import Item, Rejected, Unusable
from starflow_jax.data.raw.job import Bucket, Job, by_setting
from starflow_jax.data.raw.poses import Moves, Poses
from starflow_jax.data.raw.sources import list_units, read_unit
from starflow_jax.io.cameras import Cameras, named_cameras
from starflow_jax.io.video import write_mp4
from tests.data.test_pipeline import take
from tests.data.test_pipeline import train as train_of
from tests.data.test_prepared import TEXT, encode, latent_shape
from tests.prepared_input import changed, scene, write_at

FPS, FRAMES = 8, 9
SETTINGS = Prepare(camera=True, fps=0, max_upscale=1.0, min_brightness=0.0, min_motion=0.0, cut_threshold=0.0,
                   long_captions="long", short_captions="txt,caption", validation_share=0.0, test_share=0.0,
                   items_per_part=1, clips_per_shard=2)
JOB = Job(SETTINGS, folder="", buckets=(Bucket(16, 24, "3:2"), Bucket(16, 16, "1:1")), frames=FRAMES)


def path(count, begin=0.0, rate=FPS):
    """Pose n at x = n."""
    pose_T34 = np.tile(np.eye(3, 4, dtype=np.float32), (count, 1, 1))
    pose_T34[:, 0, 3] = -np.arange(count)
    return Cameras(np.tile(np.float32([0.5, 0.75, 0.5, 0.5]), (count, 1)), pose_T34, begin + np.arange(count) / rate)


def text(cameras):
    lines = []
    for second, four, pose_34 in zip(cameras.seconds_T, cameras.intrinsics_T4, cameras.world_to_camera_T34):
        numbers = [round(second * 1e6), *four, 0, 0, *pose_34.ravel()]
        lines.append(" ".join(map(str, numbers)))
    return "https://example.org/video\n" + "\n".join(lines)


def as_json(cameras):
    return json.dumps({"intrinsics": cameras.intrinsics_T4.tolist(),
                       "world_to_camera": cameras.world_to_camera_T34.tolist()})


def places(cameras):
    return -cameras.world_to_camera_T34[:, 0, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two videos with cameras, one without, one whose camera is faulty, and a picture."""
    inputs = tmp_path_factory.mktemp("inputs")
    for index, name in enumerate(("long", "cut", "bare", "faulty")):
        write_mp4(inputs / f"{name}.mp4", scene(20, seed=index), FPS)
        (inputs / f"{name}.txt").write_text(f"a block, {name}")
    (inputs / "long.camera.json").write_text(as_json(path(20)))
    (inputs / "cut.camera.txt").write_text(text(path(12, begin=52.125)))  # it ends before the second clip does
    (inputs / "faulty.camera.txt").write_text(text(path(20)).replace(" 0 0 ", " 0.1 0 ", 1))
    Image.fromarray(scene(1, 32, 32)[0]).save(inputs / "picture.png")
    (inputs / "picture.txt").write_text("a block, still")
    return inputs


def items(source, settings=SETTINGS):
    return [item for unit in list_units(str(source), 5) for item in read_unit(unit, settings)]


FAULT = "unreadable camera: camera.txt, line 2: fields 6 and 7 are 0.1 and 0"


def check_items(found):
    by_key = {item.key.rpartition("/")[2].split("#")[0].removesuffix(".mp4").removesuffix(".png"): item
              for item in found}
    np.testing.assert_array_equal(places(by_key["long"].camera), np.arange(20))
    assert by_key["long"].camera.seconds_T is None
    np.testing.assert_allclose(by_key["cut"].camera.seconds_T, 52.125 + np.arange(12) / FPS)
    assert by_key["bare"].reason == "no camera" and by_key["faulty"].reason.startswith(FAULT)
    assert by_key["picture"].camera is None and by_key["picture"].is_image


def test_cameras_lie_beside_videos_in_folders_lists_and_tars(folder, tmp_path):
    check_items(items(folder))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    check_items(items(tmp_path / "a.tar"))
    names = [file.name for file in sorted(folder.iterdir()) if file.suffix in (".mp4", ".png")]
    rows = [json.dumps({"path": str(folder / name), "caption": "a block"}) for name in names]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    check_items(items(tmp_path / "a.jsonl"))


def test_a_list_names_cameras(folder, tmp_path):
    (tmp_path / "a.csv").write_text("path,caption,camera\n" + "".join(
        f"{folder}/bare.mp4,a block,{camera}\n" for camera in (folder / "long.camera.json", "none.txt", "")))
    named, missing, none = items(tmp_path / "a.csv")
    assert len(named.camera.intrinsics_T4) == 20
    assert (missing.reason, none.reason) == (
        "camera neither a file that is there nor moves", "no camera")


def write_moves(folder, moves):
    write_mp4(folder / "clip.mp4", scene(20), FPS)
    (folder / "clip.txt").write_text("a block")
    (folder / "clip.camera.txt").write_text(moves)
    return folder


def check_moves(clip, begin):
    """The poses of "pan_right:10; zoom_in" from frame `begin` on, as the first of them sees the scene at distance 1."""
    poses_T44 = named_cameras("pan_right:10; zoom_in", 40, *scene(1).shape[1:3]).homogeneous_T44[begin:begin + FRAMES]
    expected_T44 = poses_T44 @ np.linalg.inv(poses_T44[0])
    expected_T44[:, :3, 3] /= np.exp(-0.015 * max(0, begin - 9))
    np.testing.assert_allclose(clip.camera.homogeneous_T44, expected_T44, atol=1e-5)


def test_moves_by_name_lie_beside_videos_and_in_lists(folder, tmp_path):
    moves = "pan_right:10; zoom_in"
    (tmp_path / "a.csv").write_text(
        f'path,caption,camera,start\n{folder}/bare.mp4,a block,"{moves}",\n{folder}/bare.mp4,a block,"{moves}",0.5\n')
    (beside,), (listed, stretch) = items(write_moves(tmp_path, moves.replace("; ", "\n"))), items(tmp_path / "a.csv")
    for item in (beside, listed):
        first, second = clips.cut(item, JOB)
        check_moves(first, 0)
        check_moves(second, 9)
        fx, fy = first.camera.intrinsics_T4[0, :2]
        np.testing.assert_allclose(fx * first.bucket.width, fy * first.bucket.height, rtol=1e-6)  # square pixels
    (only, *_) = clips.cut(stretch, JOB)  # moves begin where the stretch does
    assert only.start == 0.5
    check_moves(only, 0)
    (only,) = clips.cut(beside, changed(JOB, fps=4))  # moves count the video's own frames
    np.testing.assert_allclose(only.camera.world_to_camera_T34[:5, 0, 3], -0.05 * np.arange(5), atol=1e-6)


def test_moves_see_square_pixels_of_a_video_that_is_shown_turned(tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width = scene(1).shape[1:3]
        stream.set_display_rotation(90)
        for frame in scene(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    job = dataclasses.replace(JOB, buckets=(*JOB.buckets, Bucket(24, 16, "2:3")))
    first, _ = clips.cut(Item("clip", str(tmp_path / "clip.mp4"), False, "", "", camera="orbit"), job)
    assert first.frames_THWC.shape == (FRAMES, 24, 16, 3)
    np.testing.assert_allclose(first.camera.intrinsics_T4[0], [1.5, 1, 0.5, 0.5], rtol=1e-6)


def test_moves_go_on_as_long_as_a_video_does():
    """Without its length, and into no number that is not finite."""
    moves = Moves("zoom_out*5", 24, 0.0)
    for begin in (0, 10**7):
        found = moves.of_clip((begin + np.arange(5)) / 24, 32, 48, JOB.buckets[0])
        np.testing.assert_allclose(found.world_to_camera_T34[:, 2, 3], np.exp(0.075 * np.arange(5)) - 1, rtol=1e-4)
    still = Moves("pan_left:4", 24, 0.0).of_clip(np.arange(2, 7) / 24, 32, 48, JOB.buckets[0])
    np.testing.assert_allclose(still.world_to_camera_T34[:, 0, 3], [0, 0.025, 0.025, 0.025, 0.025], atol=1e-6)


@pytest.mark.parametrize("moves, words", [
    ("pan_right:ten", 'camera.txt: camera "pan_right:ten": "ten" is not a number of frames'),
    ("pan_rihgt", 'camera.txt: camera "pan_rihgt": no such move; there are still, pan_left'),
    ("pan_left; zoom_in", "only the last move may go on without a number of frames")])
def test_what_are_no_moves_is_said(tmp_path, moves, words):
    (faulty,) = items(write_moves(tmp_path, moves))
    assert faulty.reason.startswith("unreadable camera: ") and words in faulty.reason


def test_unless_they_are_asked_for_cameras_are_not_read(folder):
    found = items(folder, dataclasses.replace(SETTINGS, camera=False))
    assert len(found) == 5 and all(isinstance(item, Item) and item.camera is None for item in found)


def cut(folder, name, camera, **settings):
    job = changed(JOB, **settings)
    return list(clips.cut(Item(name, str(folder / f"{name}.mp4"), False, "", "", camera=camera), job))


def test_each_frame_has_the_camera_of_its_time(folder):
    for camera in (path(20), path(20, begin=52.125), dataclasses.replace(path(20), seconds_T=None)):
        first, second = cut(folder, "long", camera)
        np.testing.assert_allclose(places(first.camera), np.arange(9), atol=1e-4)
        np.testing.assert_allclose(places(second.camera), np.arange(9, 18), atol=1e-4)
    # Half as many poses as frames: between poses. Fewer frames: that of the frame which is shown at a time.
    (first, _) = cut(folder, "long", path(10, rate=FPS / 2))
    np.testing.assert_allclose(places(first.camera), np.arange(9) / 2, atol=1e-4)
    (only,) = cut(folder, "long", path(20), fps=4)
    np.testing.assert_allclose(places(only.camera), 2 * np.arange(9), atol=1e-4)
    (only,) = cut(folder, "long", path(20), fps=5)
    np.testing.assert_allclose(places(only.camera), np.floor(1.6 * np.arange(9)), atol=1e-4)


def test_a_video_that_does_not_begin_at_zero_has_its_own_time(tmp_path):
    write_at(tmp_path / "late.mp4", scene(20), 0.5 + np.arange(20) / FPS)
    (first, _) = cut(tmp_path, "late", path(20))
    np.testing.assert_allclose(places(first.camera), np.arange(9), atol=0.02)


def test_a_stretch_has_the_times_of_its_whole_video(folder):
    item = Item("long", str(folder / "long.mp4"), False, "", "", 1.0, 2.25, path(12, begin=1.0))
    (clip,) = clips.cut(item, JOB)
    np.testing.assert_allclose(places(clip.camera), np.arange(9), atol=1e-4)


def test_what_the_path_does_not_reach_is_left_out(folder):
    first, second = cut(folder, "long", path(12, begin=52.125))
    np.testing.assert_allclose(places(first.camera), np.arange(9), atol=1e-4)
    assert second == Rejected("long", "outside the camera's path: its poses are from 0.000 to 1.375 seconds",
                              1.125, 2.125)
    early, late = cut(folder, "long", path(9, begin=1.125))
    assert isinstance(early, Rejected) and late.camera is not None


def test_intrinsics_are_those_of_the_crop(folder):
    """A point of the scene is on the same pixel of the source: its middle is cut out after resizing."""
    (wide, *_), (square, *_) = (cut(folder, "long", path(20), buckets=(bucket,))
                                for bucket in (Bucket(16, 24, "3:2"), Bucket(16, 16, "1:1")))
    np.testing.assert_allclose(wide.camera.intrinsics_T4, np.tile([0.5, 0.75, 0.5, 0.5], (9, 1)), atol=1e-6)
    np.testing.assert_allclose(square.camera.intrinsics_T4, np.tile([0.75, 0.75, 0.5, 0.5], (9, 1)), atol=1e-6)
    off_middle = Cameras(np.float32([[0.5, 0.5, 0.6, 0.3]]), path(1).world_to_camera_T34)
    (found,) = Poses(off_middle, 1.0, 0.0, 1.0).of_clip([0.0], 40, 60, Bucket(20, 20, "1:1")).intrinsics_T4
    pixels = found * 20 + [0, 0, 5, 0]  # of a frame of 20 x 30, of which 5 columns are cut off
    np.testing.assert_allclose(pixels / [30, 20, 30, 20], [0.5, 0.5, 0.6, 0.3], atol=1e-6)
    with pytest.raises(Unusable, match="outside the camera's path"):
        Poses(path(3), 8.0, 0.0, 1.0).of_clip([0.0, 0.9], 40, 60, Bucket(20, 20, "1:1"))


def test_from_files_to_batches_in_pixels_and_in_latents(folder, tmp_path):
    job = changed(JOB, input=str(folder), folder=str(tmp_path / "out"))
    done = prepare_clips(job, processes=1)
    assert done["clips"] == 4 and {name: bucket["clips"] for name, bucket in done["buckets"].items()} == {
        "16x24_9f": {"train": 3}, "16x16_1f": {"train": 1}}
    assert done["rejected"] == {"no camera": 1, "unreadable camera": 1, "outside the camera's path": 1}
    latents.write_latents(job.folder, encode, latent_shape, batch_size=2, made_by="means")
    for derived in ({}, {"latents_by": "means"}):
        source = prepared.source(job.folder, "train", **derived)
        (videos,), (pictures,) = source.videos, source.images
        assert "world_to_camera" not in pictures[0]
        for record in (videos[index] for index in range(3)):
            begin = 9 * round(float(videos._clips[_index(videos, record)]["start"]) * FPS / 9)
            np.testing.assert_allclose(-record["world_to_camera"][:, 0, 3], begin + np.arange(9), atol=1e-4)
        settings = dict(batch_size=2, image_batch_size=1, image_probability=0.3)
        for batch in take(train_of(source, 5, TEXT, **settings), 8):
            if batch.is_image:
                assert batch.world_to_camera_BT34 is None
            else:
                assert batch.intrinsics_BT4.shape == (2, 9, 4)
                np.testing.assert_allclose(np.diff(batch.world_to_camera_BT34[:, :, 0, 3]), -1, atol=1e-4)
                assert batch.cameras_of_latents(4).world_to_camera_BNR44.shape == (2, 2, 4, 4, 4)


def _index(bucket, record):
    return next(index for index in range(len(bucket))
                if np.array_equal(bucket[index]["world_to_camera"], record["world_to_camera"]))


def test_prepared_folders_from_before_cameras_are_taken_up(folder, tmp_path):
    job = changed(JOB, input=str(folder), folder=str(tmp_path / "out"), camera=False)
    described = job.described()
    assert by_setting({name: value for name, value in described.items() if name != "camera"}) == described
    assert prepare_clips(job, processes=1)["clips"] == 9
    assert not (tmp_path / "out" / "cameras").exists()
    assert "world_to_camera" not in prepared.source(job.folder, "train")[0]
    with pytest.raises(UserError, match="was begun with prepare.camera False, not True"):
        prepare_clips(changed(job, camera=True), processes=1)
