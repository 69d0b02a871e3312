"""A workdir written when settings had other names, and none were kept in a file, still loads."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.t2v import tiny
from starflow_jax.checkpoints.parameters import save_params
from starflow_jax.config import Solver
from starflow_jax.io.arrays import import_arrays
from starflow_jax.model.own_settings import PRETRAINED, settings_of
from starflow_jax.model.store import load_model

# WORKDIR/checkpoints/model.json and WORKDIR/system/decoding.json as version 0.1 wrote them for configs/t2v.py.
MODEL = """{"model": {"channels": 48, "frames": 4, "height": 6, "width": 6, "shallow_layers": [1, 1],
"shallow_width": 128, "deep_layers": 4, "deep_width": 192, "head_dim": 64, "patch_size": 1, "rope_extent": 0.0,
"local_shallow": true, "text_length": 28, "text_dim": 128, "denoiser": "first_layer", "denoiser_layers": 2,
"denoiser_window": 10, "denoiser_lookahead": 1, "noise_std": 0.15},
"text": {"encoder": "trained", "vocab_size": 256, "layers": 2, "d_model": 128, "d_kv": 32, "d_ff": 256, "heads": 4,
"fps": 8, "aspect_ratio": "1:1"},
"codec": {"kind": "patch", "stride": 4, "time_stride": 4, "later_frames_scale": 1.0}}"""
DECODING = """{"block_size": 36, "frames_per_step": 1, "updates": 0, "start": "previous"}"""


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """With the pretrained model's parameters."""
    flat = {"/".join(str(key.key) for key in path): array for path, array in
            jax.tree_util.tree_leaves_with_path(import_arrays(PRETRAINED / "model.safetensors"))}
    save_params(tmp_path / "checkpoints", flat, {})
    (tmp_path / "checkpoints" / "model.json").write_text(MODEL)
    of_later_versions = shutil.ignore_patterns("model.*", "settings.json", "checksums")
    shutil.copytree(PRETRAINED, tmp_path / "system", ignore=of_later_versions)
    (tmp_path / "system" / "decoding.json").write_text(DECODING)
    return tmp_path


def test_its_model_is_the_one_that_was_saved(workdir: Path) -> None:
    config = tiny()
    system, params, source, _ = load_model(config, workdir)
    assert source == f"{workdir}, step 0"
    packaged = load_model(config, workdir / "none")[1]
    jax.tree.map(np.testing.assert_array_equal, params, {name: packaged[name] for name in params})
    assert set(packaged) - set(params) == {"control"}
    assert system.calibration.solver == Solver("jacobi", 36, 1, start="previous")
    assert json.loads((workdir / "checkpoints" / "model.json").read_text()) == json.loads(MODEL)


def test_its_settings_are_those_that_it_holds(workdir: Path) -> None:
    held, config = settings_of(workdir), tiny()
    assert (held.text, held.codec, held.model.deep_width) == (config.text, config.codec, config.model.deep_width)
