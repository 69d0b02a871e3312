"""Safetensors one tensor at a time: what the library reads of ours and ours of the library's."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from starflow_jax.config import UserError
from starflow_jax.io.tensor_files import StoredArray, is_safetensors, open_safetensors, write_safetensors

TENSORS = {
    "odd": np.arange(3, dtype=np.uint8), "half": np.arange(5).astype(np.float16),
    "brain": np.arange(6).reshape(2, 3).astype(jnp.bfloat16), "wide": np.arange(4, dtype=np.float64).reshape(2, 2).T,
    "scalar": np.array(3.5, np.float32), "none": np.zeros((0, 2), np.float32), "flag": np.array([True, False]),
}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    reads = []

    def lazy(name: str) -> StoredArray:
        return StoredArray(TENSORS[name].shape, TENSORS[name].dtype, lambda: reads.append(name) or TENSORS[name])

    path = tmp_path / "deep" / "model.safetensors"
    write_safetensors(path, {name: lazy(name) for name in TENSORS}, {"made_by": "a test"})
    found = load_file(path)
    assert set(found) == set(reads) == set(TENSORS) and len(reads) == len(TENSORS)
    for name, value in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, np.shape(value))
        np.testing.assert_array_equal(found[name], value)
    with pytest.raises(UserError, match="bad is of type complex64"):
        write_safetensors(tmp_path / "no.safetensors", {"bad": np.ones(2, np.complex64)})
    assert [entry.name for entry in tmp_path.iterdir()] == ["deep"]


def test_reads_what_the_library_writes_when_it_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    contiguous = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in TENSORS.items()}
    save_file(contiguous, path)
    for found in (open_safetensors(path), open_safetensors(tmp_path)):
        for name, value in TENSORS.items():
            assert (found[name].dtype, found[name].shape, found[name].size) == (value.dtype, value.shape, value.size)
            np.testing.assert_array_equal(np.asarray(found[name]), value)
        assert np.asarray(found["brain"], np.float32).dtype == np.float32
    save_file({"brain": contiguous["brain"] + 1}, path)
    np.testing.assert_array_equal(np.asarray(found["brain"], np.float32), TENSORS["brain"].astype(np.float32) + 1)


def test_folders_that_are_no_one_model(tmp_path: Path) -> None:
    assert not is_safetensors(tmp_path)
    with pytest.raises(UserError, match="0 safetensors files and 0 index files"):
        open_safetensors(tmp_path)
    for name in ("a", "b"):
        save_file({name: np.ones(2, np.float32)}, tmp_path / f"{name}.safetensors")
    assert is_safetensors(tmp_path)
    with pytest.raises(UserError, match="2 safetensors files and 0 index files"):
        open_safetensors(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "c": "b.safetensors"}}))
    with pytest.raises(UserError, match="not in their shards: c"):
        open_safetensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "z.safetensors"}}))
    with pytest.raises(UserError, match=r"z\.safetensors"):
        open_safetensors(tmp_path)
    index.write_text("{")
    with pytest.raises(UserError, match="can't be read as an index"):
        open_safetensors(tmp_path)
