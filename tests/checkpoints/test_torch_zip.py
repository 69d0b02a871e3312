"""Files of torch.save read without torch: as torch reads them, where it is installed, and a file made by hand."""

import contextlib
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.checkpoints.torch_zip import open_pth
from starflow_jax.config import UserError
from tests.pth_files import Named, view, write, write_state_dict

PIPELINE = Path(__file__).parents[1] / "golden" / "pipeline"


def test_as_torch_reads_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    whole = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    tensors = {
        "whole": whole, "transposed": whole.transpose(0, 2), "part": whole[1, 1:, ::2],
        "expanded": whole[:, :1, :1].expand(2, 5, 1), "scalar": torch.tensor(7), "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(whole),
        **{str(dtype): whole.to(dtype) for dtype in (
            torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
            torch.uint8, torch.bool)}}
    torch.save({"state": OrderedDict(tensors), "step": 3, "list": [torch.ones(2)]}, tmp_path / "a.pth")
    found = open_pth(tmp_path / "a.pth")
    assert set(found) == {*(f"state.{name}" for name in tensors), "list.0"}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        ours = np.asarray(found[f"state.{name}"])
        if tensor.dtype == torch.bfloat16:
            assert ours.dtype == jnp.bfloat16
            tensor, ours = tensor.float(), ours.astype(np.float32)
        np.testing.assert_array_equal(ours, tensor.numpy(), err_msg=name, strict=True)


def test_what_is_written_without_torch_is_a_file_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    arrays = {"a.weight": random.normal(size=(2, 3, 4)).astype(jnp.bfloat16), "a.bias": np.arange(3.0),
              "scalar": np.ones((), np.float32)}
    write_state_dict(tmp_path / "a.pth", arrays)
    found = torch.load(tmp_path / "a.pth", weights_only=True)
    assert list(found) == list(arrays) and found["a.weight"].dtype == torch.bfloat16
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name].double().numpy(), array.astype(np.float64), strict=True)


def test_what_is_no_number_of_numpy_is_one_line(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth: x is of type ComplexFloatStorage, which can't be read"):
        open_pth(tmp_path / "a.pth")


def test_views_of_one_storage(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32)
    write(tmp_path / "a.pth", {"x": view("0", 0, (2, 3), (3, 1)), "y": view("0", 1, (2, 2), (1, 3))}, {"0": values})
    found = open_pth(tmp_path / "a.pth")
    np.testing.assert_array_equal(np.asarray(found["x"]), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(np.asarray(found["y"]), [[1, 4], [2, 5]])
    assert found["y"].shape == (2, 2) and found["y"].dtype == np.float32


def test_a_file_that_is_cut_off_or_asks_for_more(tmp_path: Path) -> None:
    write(tmp_path / "a.pth", {"x": view("0", 0, (2, 4), (4, 1))}, {"0": np.arange(6, dtype=np.float32)})
    with pytest.raises(UserError, match="a tensor's values are cut off"):
        np.asarray(open_pth(tmp_path / "a.pth")["x"])
    write(tmp_path / "a.pth", {"x": Named("builtins", "eval", "1 + 1")}, {})
    with pytest.raises(UserError, match=r"weights only \(it asks for builtins.eval\)"):
        open_pth(tmp_path / "a.pth")
    write(tmp_path / "a.pth", {"x": Named("torch._utils", "_rebuild_tensor_v2", 1)}, {})
    with pytest.raises(UserError, match="can't be read as weights only"):
        open_pth(tmp_path / "a.pth")


def test_a_tensor_lies_within_its_storage(tmp_path: Path) -> None:
    """Neither strides that lead out of it nor shapes that are none are followed into other memory."""
    for offset, shape, strides in ((5, (2,), (-5,)), (-1, (2,), (1,)), (0, (-2,), (1,)), (0, (2, 2), (1,)),
                                   (0, (2.0,), (1,)), (0, (2**62,), (0,))):
        write(tmp_path / "a.pth", {"x": view("0", offset, shape, strides)}, {"0": np.arange(6, dtype=np.float32)})
        with pytest.raises(UserError, match="can't be read as weights only .it has a tensor of shape"):
            open_pth(tmp_path / "a.pth")


def test_what_a_pickle_says_takes_no_memory_and_no_time(tmp_path: Path) -> None:
    """A number under which an object is to be kept, far beyond all that are there; and lists that hold, twice each, one
    another, a thousand million million in all."""
    nested: list = []
    for _ in range(50):
        nested = [nested, nested]
    far = b"\x80\x02Nr\xff\xff\x7f\x00."
    for pickled, message in ((far, None), (pickle.dumps(nested), "more than 100,000 values")):
        with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
            archive.writestr("a/data.pkl", pickled)
        tracemalloc.start()
        try:
            with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
                assert open_pth(tmp_path / "a.pth") == {}
            assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
        finally:
            tracemalloc.stop()
