"""tests/make_release.py: what it makes has the release's names and sizes, and goes from files to frames."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs.released import video_7b
from starflow_jax.checkpoints.released import BUFFERS
from starflow_jax.checkpoints.torch_files import open_weights
from starflow_jax.io.video import read_video
from starflow_jax.model.release import released_config
from starflow_jax.text.pretrained import FLAN_T5_XL
from tests.make_release import (
    Shapes,
    make_release,
    random_tensor,
    shapes_of_decoder,
    shapes_of_encoder,
    shapes_of_flow,
    shapes_of_vae,
)
from tests.small_run import run_here

CASE = Path(__file__).parent / "golden" / "pipeline" / "t2v"


def counted(shapes: Shapes) -> tuple[int, int]:
    return len(shapes), sum(int(np.prod(shape)) for shape in shapes.values())


def test_full_size_is_that_of_the_published_files() -> None:
    config = video_7b()
    assert counted(shapes_of_flow(config.model)) == (549, 6_890_096_528)
    assert counted(shapes_of_vae(config.codec, config.model.channels)) == (196, 704_688_668)
    assert counted({**shapes_of_encoder(FLAN_T5_XL), **shapes_of_decoder(FLAN_T5_XL)}) == (558, 2_849_757_184)


def test_names_are_those_that_the_release_itself_wrote(tmp_path: Path) -> None:
    written = {name: tensor.shape for name, tensor in open_weights(CASE / "model.pth").items()
               if not BUFFERS.fullmatch(name)}
    text = {name: tensor.shape for name, tensor in open_weights(CASE / "t5").items()}
    config = released_config(CASE / "starflow-v.yaml")
    make_release(tmp_path, "tiny")
    made = open_weights(tmp_path / "starflow-v.pth")
    assert {name: tensor.dtype for name, tensor in made.items()} == dict.fromkeys(written, np.dtype("bfloat16"))
    assert set(open_weights(CASE / "Wan2.2_VAE.pth")) == set(open_weights(tmp_path / "Wan2.2_VAE.pth"))
    encoder = {name: tensor.shape for name, tensor in open_weights(tmp_path / "flan-t5-xl").items()
               if not name.startswith(("decoder.", "lm_head."))}
    assert encoder == text and config.model.text_dim == 2048


def test_values_keep_the_size_of_what_they_multiply() -> None:
    for name, shape, size in (("blocks.5.attn_blocks.0.mlp.main.0.weight", (512, 128), 128**-0.5),
                              ("blocks.5.proj_out.weight", (96, 128), 0.1 * 128**-0.5),
                              ("decoder.conv1.weight", (64, 8, 3, 3, 3), (8 * 27)**-0.5)):
        assert abs(random_tensor(name, shape).std() / size - 1) < 0.03
        np.testing.assert_array_equal(random_tensor(name, shape), random_tensor(name, shape))
    assert (random_tensor("blocks.5.final_norm.weight", (9,)) == 1).all()
    assert (random_tensor("blocks.5.proj_out.bias", (9,)) == 0).all()


@pytest.mark.slow  # quick: tests/modes/test_released.py, of a release that is made otherwise
def test_from_its_files_to_frames_in_int8(tmp_path: Path) -> None:
    files, workdir = tmp_path / "files", tmp_path / "made"
    make_release(files, "tiny")
    code, _, complained = run_here(
        [f"--config=configs/released.py:{files / 'starflow-v.yaml'}", "--mode=convert", f"--workdir={workdir}",
         f"--config.convert.source={files / 'starflow-v.pth'}", f"--config.convert.text={files / 'flan-t5-xl'}",
         f"--config.convert.codec={files / 'Wan2.2_VAE.pth'}"])
    assert code == 0, complained
    code, _, complained = run_here(
        ["--mode=sample", f"--workdir={workdir}", "--config.sample.prompt=a corgi", "--config.sample.frames=5",
         "--config.sample.side=64", "--config.sample.aspect_ratio=1:1", "--config.sample.weights=int8",
         "--config.sample.cache=int8", f"--config.sample.output={workdir / 'corgi.mp4'}"])
    assert code == 0, complained
    frames, _ = read_video(workdir / "corgi.mp4")
    said = json.loads((workdir / "corgi.json").read_text())
    assert frames.shape[0] == 5 and frames.std() > 1
    assert np.isfinite(said["bits_per_dim"]) and said["outcome"] in ("exact", "converged")
