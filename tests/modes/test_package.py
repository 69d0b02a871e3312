"""--mode=package: a workdir's model where workdirs without one find it, with the licence of its weights."""

from pathlib import Path

import jax
import numpy as np
import pytest

from configs.t2v import tiny
from starflow_jax.checkpoints.licences import KEPT
from starflow_jax.io.arrays import import_arrays
from starflow_jax.model.store import PRETRAINED
from starflow_jax.modes import run
from tests.model.test_old_workdirs import workdir as workdir


def test_a_model_is_packaged_with_its_licence(workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    for module in ("starflow_jax.model.store", "starflow_jax.modes.package"):
        monkeypatch.setattr(f"{module}.PRETRAINED", package)
    (workdir / KEPT).write_text("=== the flow\n\nuse it well")
    run("package", tiny(), workdir)
    assert (package / KEPT).read_text() == "=== the flow\n\nuse it well"
    jax.tree.map(np.testing.assert_array_equal,
                 *(import_arrays(folder / "model.safetensors") for folder in (package, PRETRAINED)))
    (workdir / KEPT).unlink()  # weights of one's own: the licence of those before goes with them
    run("package", tiny(), workdir)
    assert not (package / KEPT).exists() and (package / "model.safetensors").exists()
