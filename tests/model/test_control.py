"""Reading a control module: over a mesh as a plan has it, and one line for what is of another form."""

from pathlib import Path

import jax
import numpy as np
import pytest

from configs.t2v import tiny
from starflow_jax import config as settings_of
from starflow_jax import sharding
from starflow_jax.config import UserError, changed
from starflow_jax.io.arrays import export_arrays, import_with_metadata
from starflow_jax.io.checksums import checksums_of
from starflow_jax.model.control import PACKAGED, packaged_module
from starflow_jax.model.own_settings import PRETRAINED
from starflow_jax.planning.abstract import abstract_model
from tests.sharded_sampling import CONFIG_OF_TEST, write_module, write_workdir
from tests.small_run import run_here

MESH = settings_of.Mesh(data=1, fsdp=4)  # the package's model has no number of heads that divides over mesh.tensor


def test_the_packages_module_lies_over_a_mesh_as_it_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's mesh may be of devices that are not there, on which nothing is put."""
    config, mesh = changed(tiny(), "sample", {"camera": "orbit"}), sharding.make_mesh(MESH, jax.devices())
    with jax.set_mesh(mesh):
        module = packaged_module(config, PRETRAINED)
        assert module is not None and (PRETRAINED / PACKAGED).stat().st_size <= 3e6
        with monkeypatch.context() as patched:
            patched.setattr(jax, "device_put", lambda *_: pytest.fail("a plan puts nothing on devices"))
            planned = abstract_model(config, mesh)[0]["control"]
            assert "control" not in abstract_model(tiny(), mesh)[0]  # without a camera it has no part in what runs
    jax.tree.map(lambda leaf, plan: (
        np.testing.assert_equal((leaf.shape, leaf.dtype), (plan.shape, plan.dtype)),
        np.testing.assert_(leaf.sharding.is_equivalent_to(plan.sharding, leaf.ndim))), module.params, planned)
    shares = {name: of["kernel"].addressable_shards[0].data.size / of["kernel"].size
              for name, of in module.params["layers"].items()}
    assert shares == dict.fromkeys(("qkv", "out", "hidden", "tokens"), 1 / 4)
    alone = packaged_module(config, PRETRAINED)
    assert alone is not None and alone.checksum == module.checksum  # however it lies
    jax.tree.map(np.testing.assert_array_equal, module.params, alone.params)


def test_a_module_of_another_form_is_one_line(tmp_path: Path) -> None:
    """As a user meets it; nothing is made."""
    model = tmp_path / "model"
    write_workdir(model)
    for name, size in (("deep_layers", 1), ("deep_width", 40)):
        module = write_module(tmp_path / name, changed(CONFIG_OF_TEST, "model", {name: size}))
        code, _, error = run_here([
            "--config=configs/t2v.py", "--mode=sample", f"--workdir={model}", f"--config.sample.control={module}",
            "--config.sample.prompt=a red seven", "--config.sample.camera=orbit",
            f"--config.sample.output={tmp_path / 'videos'}"])
        assert code == 2, error
        assert error.splitlines()[-1].endswith(f"{module}, step 0: its control module belongs to another model")
        assert "Traceback" not in error and not list((tmp_path / "videos").glob("*.mp4"))


def test_a_packaged_module_of_another_version_is_one_line(tmp_path: Path) -> None:
    params, metadata = import_with_metadata(PRETRAINED / PACKAGED)
    forms = {"has the form of another version of this program; train it again": {
        **params, "layers": {"kernel": np.zeros((4, 8, 8), np.float32)}},
        "belongs to another model": {name: part for name, part in params.items() if name != "proj_out"},
        "takes 40 numbers of a token's rays where this model's have 48: it is of another model, .*": {
            **params, "proj_in": {**params["proj_in"], "kernel": params["proj_in"]["kernel"][:40]}}}
    for line, other in forms.items():
        with checksums_of(tmp_path, [PACKAGED]):
            export_arrays(tmp_path / PACKAGED, other, np.float16, metadata)
        with pytest.raises(UserError, match=f"{PACKAGED}: its control module {line}$"):
            packaged_module(tiny(), tmp_path)
    assert packaged_module(tiny(), tmp_path / "none") is None
