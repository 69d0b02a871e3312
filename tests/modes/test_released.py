"""A release's files, converted and sampled from the command line and from Python, with nothing to remember."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import starflow_jax as sf
from starflow_jax import modes
from starflow_jax.checkpoints.licences import KEPT, carry_licence, find_licences
from starflow_jax.checkpoints.torch_files import open_weights
from starflow_jax.codec.kl_vae import KLConfig
from starflow_jax.config import changed
from starflow_jax.io.checksums import CHECKSUMS
from starflow_jax.io.command_line import load_config
from starflow_jax.io.video import read_video
from starflow_jax.text import pretrained
from tests.codec.test_kl_vae import random_tensors
from tests.helpers import flipped_bits
from tests.hub_server import serving
from tests.modes.test_convert import random_released
from tests.small_run import ROOT, environment, run_here

CASE = Path(__file__).parents[1] / "golden" / "pipeline" / "t2v"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted with copies of all, its sources gone, and moved."""
    folder = tmp_path_factory.mktemp("released")
    shutil.copytree(CASE, folder / "files")
    (folder / "files" / "LICENSE_MODEL").write_text("A Model License\nfor research")
    (folder / "files" / "t5" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# T5\n")
    config = load_config(
        f"configs/released.py:{folder / 'files' / 'starflow-v.yaml'}", model={"dtype": "float32"},
        convert=dict(source=str(folder / "files" / "model.pth"), codec=str(folder / "files" / "Wan2.2_VAE.pth"),
                     text=str(folder / "files" / "t5"), copy=True))
    modes.run("convert", config, folder / "made")
    shutil.rmtree(folder / "files")
    (folder / "made").rename(folder / "moved")
    return folder / "moved"


def test_it_samples_with_nothing_but_a_prompt(workdir: Path) -> None:
    code, said, complained = run_here(
        ["--mode=sample", f"--workdir={workdir}", "--config.sample.prompt=a corgi", "--config.sample.frames=5",
         "--config.sample.aspect_ratio=9:16"])
    assert code == 0, complained
    assert "warning" not in said and "of its own" not in said
    path, = (workdir / "samples").glob("a_corgi_seed0_*.mp4")
    frames, rate = read_video(path)
    assert frames.shape[0] == 5 and frames.shape[1] / frames.shape[2] == 48 / 32 and rate == 16
    told = json.loads(path.with_suffix(".json").read_text())
    assert told["settings"]["guidance"] == 3.5 and told["settings"]["solver"]["first_block_size"] == 32


def test_two_flipped_bits_in_any_of_its_files_are_one_line(workdir: Path) -> None:
    files = [workdir / "checkpoints" / "model.json", *(path for path in (workdir / "system").rglob("*") if (
        path.is_file() and path.suffix not in (".md", ".txt") and path.name != CHECKSUMS))]  # but licences
    names = {path.name for path in files}
    assert names >= {"settings.json", "vae.safetensors", "spiece.model", "config.json", "model.safetensors"}
    for path in files:
        pretrained._encoder_config.cache_clear()
        with flipped_bits(path):
            code, _, complained = run_here(["--mode=sample", f"--workdir={workdir}", "--config.sample.prompt=a corgi"])
        assert code == 2 and complained.startswith(f"starflow_jax: {path}") and "is damaged" in complained
        assert len(complained.splitlines()) == 1


def test_the_models_settings_win_in_one_line(workdir: Path) -> None:
    """And the size that is asked for is another one than the model's."""
    (workdir / "other").mkdir()
    code, said, _ = run_here(
        ["--config=configs/t2v.py:7b", "--mode=sample", f"--workdir={workdir}", "--config.sample.prompt=a corgi",
         "--config.model.dtype=float32", "--config.sample.frames=1", "--config.sample.side=32",
         "--config.sample.aspect_ratio=1:1", f"--config.sample.output={workdir / 'other' / 'corgi.mp4'}"])
    line = said.splitlines()[0]
    assert code == 0 and line.startswith(f"{workdir} holds a model with settings of its own, which are used: ")
    assert "model.denoiser=every_layer (not first_layer)" in line and "dtype" not in line and "weights" not in line
    assert {path.name for path in (workdir / "other").iterdir()} == {"corgi.mp4", "corgi.png", "corgi.json"}


@pytest.mark.slow  # quick: tests/sampling/test_stream.py
def test_a_stream_has_the_whole_clips_frames(workdir: Path) -> None:
    """Beyond the window, where overlapping frames are denoised already."""
    model = sf.load(workdir)
    assert model.config.sample.as_released
    whole = model.generate("a corgi", frames=33, guidance=1.0).frames
    streamed = np.concatenate(list(model.stream("a corgi", frames=33, guidance=1.0)))
    difference = np.abs(streamed.astype(np.int32) - whole)
    assert difference.max() <= 1 and (difference > 0).mean() < 5e-3
    ours = model.generate("a corgi", frames=33, guidance=1.0, as_released=False).frames
    difference = np.abs(ours.astype(np.int32) - whole)
    assert difference.max() > 1 and 0.3 < (difference[:17] > 0).mean() < 0.7  # there, rounding alone


def test_licences_go_along(workdir: Path, tmp_path: Path) -> None:
    kept = (workdir / KEPT).read_text()
    assert "the flow, from " in kept and "--- LICENSE_MODEL\nA Model License\nfor research" in kept
    assert "--- README.md\nlicense: apache-2.0" in kept
    assert "A Model License" in (workdir / "system" / f"vae.{KEPT}").read_text()
    target = tmp_path / "back.safetensors"
    modes.run("convert", load_config(f"configs/workdir.py:{workdir}", convert={"target": str(target)}), workdir)
    assert "A Model License" in (tmp_path / f"back.{KEPT}").read_text()
    assert find_licences(workdir) == {KEPT: kept}
    for source in (workdir, workdir / "checkpoints" / "0"):  # of train.init_from
        carry_licence(source, tmp_path / source.name)
        assert (tmp_path / source.name / KEPT).read_text() == kept
    back, held = load_file(target), open_weights(CASE / "model.pth")
    for name, value in back.items():
        np.testing.assert_array_equal(value, np.asarray(held[name]))


def test_what_is_known_is_said_where_no_licence_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(f"configs/released.py:{CASE / 'starflow-v.yaml'}", convert=dict(
        codec=str(CASE / "Wan2.2_VAE.pth")), codec={"weights": str(tmp_path / "vae.safetensors")})
    modes.run("convert", config, tmp_path / "none")
    assert "licence of the VAE: no licence file was found beside these weights" in capsys.readouterr().out
    assert "read it where they were published" in (tmp_path / f"vae.{KEPT}").read_text()
    np.testing.assert_allclose(load_file(tmp_path / "vae.safetensors")["std"][:2], [0.4765, 1.0364])


def test_the_image_model_samples_pictures(tmp_path: Path) -> None:
    """configs/t2i.py:released, narrow: random weights under the published names of the flow and of its VAE."""
    whole = load_config("configs/t2i.py:released", sample={"side": 32}, model=dict(
        height=4, width=4, shallow_layers=(1, 1), shallow_width=64, deep_layers=1, deep_width=64, text_length=8,
        text_dim=24, dtype="float32"))
    save_file({name: np.ascontiguousarray(np.asarray(value))
               for name, value in random_released(whole.model).items()}, tmp_path / "flow.safetensors")
    sizes = KLConfig(widths=(4, 8, 8, 8), residuals=1, norm_groups=2)
    (tmp_path / "vae").mkdir()
    save_file(random_tensors(sizes), tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"norm_num_groups": 2, "scaling_factor": 0.2}))
    config = changed(whole, "convert", dict(source=str(tmp_path / "flow.safetensors"), text=str(CASE / "t5"),
                                            codec=str(tmp_path / "vae")))
    modes.run("convert", config, tmp_path / "work")
    model = sf.load(tmp_path / "work")
    assert model.system.prompt("a boat", is_image=True) == "a boat"  # a bare caption
    picture = model.generate("a boat")
    assert picture.frames.shape == (1, 32, 32, 3) and picture.frames.std() > 1
    assert not np.array_equal(picture.frames, model.generate("a train").frames)
    code, said, complained = run_here(["--mode=sample", f"--workdir={tmp_path / 'work'}",
                                       "--config.sample.prompt=a boat"])
    assert code == 0, complained
    assert list((tmp_path / "work" / "samples").glob("a_boat_seed0_*.png"))


def test_names_on_a_hub(tmp_path: Path) -> None:
    """The release's files from a hub, by one command, with the licence beside them."""
    pytest.importorskip("huggingface_hub")
    flow = {name: (CASE / name).read_bytes() for name in ("model.pth", "Wan2.2_VAE.pth", "vae.json")}
    t5 = {path.name: path.read_bytes() for path in (CASE / "t5").iterdir()}
    with serving({"someone/flow": {**flow, "LICENSE": b"A Model License"}, "someone/t5": t5}) as (address, _):
        done = subprocess.run(
            [sys.executable, "-m", "starflow_jax.main", "--mode=convert", f"--workdir={tmp_path / 'work'}",
             f"--config=configs/released.py:{CASE / 'starflow-v.yaml'}",
             "--config.convert.source=hub:someone/flow:model.pth", "--config.convert.text=hub:someone/t5",
             "--config.convert.codec=hub:someone/flow:Wan2.2_VAE.pth", "--config.convert.copy"],
            cwd=ROOT, env=environment(HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hub")), capture_output=True,
            text=True)
    assert done.returncode == 0, done.stderr
    assert "licence of the flow, the VAE: LICENSE (A Model License)" in done.stdout
    assert sf.load(tmp_path / "work").config.model.text_dim == 24
