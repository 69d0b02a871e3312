"""Arrays as safetensors: what comes back, what is refused, who may read it."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from starflow_jax.config import UserError
from starflow_jax.io.arrays import export_arrays, import_arrays
from starflow_jax.io.tensor_files import write_safetensors


@pytest.mark.parametrize(("dtype", "stored", "tolerance"),
                         [(None, "F32", 0), (np.float16, "F16", 2**-11), (jnp.bfloat16, "BF16", 2**-8)])
def test_exported_arrays_come_back_as_float32(tmp_path: Path, dtype, stored: str, tolerance: float) -> None:
    params = {"block": {"kernel": np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32).T},
              "scale": np.float32(0.3), "table": np.arange(4, dtype=np.int32)}
    export_arrays(tmp_path / "model.safetensors", params, dtype=dtype, metadata={"made_by": "a test"})
    found = import_arrays(tmp_path / "model.safetensors")
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, params)
    for ours, expected in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        assert ours.dtype == expected.dtype and ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=0)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"made_by": "a test"}
        assert file.get_slice("block/kernel").get_dtype() == stored
        assert file.get_slice("table").get_dtype() == "I32"


def test_a_name_is_an_array_or_a_group(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"a": np.ones(2), "a/b": np.ones(2), "c/d": np.ones(2)})
    with pytest.raises(UserError, match=r"others are a part: a$"):
        import_arrays(tmp_path / "a.safetensors")


def test_bad_array_files_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.safetensors"):
        import_arrays(tmp_path / "none.safetensors")
    path = tmp_path / "model.safetensors"
    export_arrays(path, {"w": np.ones(1000, np.float32)})
    whole = path.read_bytes()
    for size in (0, 5, 30, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"model\.safetensors"):
            import_arrays(path)


def test_others_may_read_arrays_as_any_other_file(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        export_arrays(tmp_path / "model.safetensors", {"w": np.ones(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
