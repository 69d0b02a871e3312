"""Run by tests/sampling/test_mesh.py with eight simulated devices: what users ask of a model, on several meshes.

python -m tests.sharded_sampling FOLDER MESH ...: of meshes such as 2x1x4x1. Writes results.json.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

import starflow_jax as sf
from starflow_jax import sharding
from starflow_jax.checkpoints.parameters import save_params
from starflow_jax.config import Config, Sample, Solver, Train
from starflow_jax.model.beside import fingerprint_of, open_checkpoints
from starflow_jax.model.control import fresh_module
from starflow_jax.model.system import save_system
from tests.helpers import random_params, random_variables
from tests.small_model import CAPTIONS, CONFIG, small_system
from tests.small_run import run_here

PROMPTS = [CAPTIONS[index % 3] for index in range(8)]
# Four heads; steps of the solver that do not depend on rounding.
MODEL = dataclasses.replace(CONFIG.model, deep_width=80, shallow_width=80, deep_layers=2)
CONFIG_OF_TEST = dataclasses.replace(CONFIG, model=MODEL, sample=Sample(
    guidance=1.5, solver=Solver(block_size=2, tolerance=0.0), batch_size=8))


def write_workdir(workdir: Path, config: Config = CONFIG_OF_TEST) -> None:
    """A workdir with a model of random parameters, as --mode=convert leaves one."""
    system = dataclasses.replace(small_system(config), config=config)
    save_system(system, workdir / "system")
    arrays = traverse_util.flatten_dict(jax.tree.map(np.asarray, random_params(config, scale=0.3)), sep="/")
    save_params(workdir / "checkpoints", arrays, {})


def write_module(workdir: Path, backbone: Config) -> str:
    """The workdir of a control module of random parameters, beside the model that `write_workdir` writes."""
    config = dataclasses.replace(backbone, train=Train(target="control"),
                                 data=dataclasses.replace(backbone.data, camera=True, image_probability=0.0))
    whole = traverse_util.flatten_dict(random_params(backbone, scale=0.3), sep="/")
    save_system(dataclasses.replace(small_system(config), config=config), workdir / "system")
    module = random_variables(jax.eval_shape(lambda: fresh_module(config, jax.random.key(0))), scale=0.3)
    save_params(workdir / "checkpoints", {name: np.asarray(value) for name, value in traverse_util.flatten_dict(
        module, sep="/").items()}, {})
    open_checkpoints(config, workdir, fingerprint_of(whole)).close()
    return str(workdir)


def asked(workdir: Path, module: str, mesh: dict[str, int]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(what a user gets of the model on a mesh, its bytes a device)."""
    model = sf.load(workdir, control=module, mesh=mesh)
    many = model.generate(PROMPTS, seed=3)
    single = model.generate(PROMPTS[0], seed=3, batch_size=1)
    stream = np.concatenate(list(model.stream(PROMPTS[1], seed=4, frames=17, renoise=True)))
    longer = model.extend(single, PROMPTS[1], frames=17)
    steered = model.generate(PROMPTS, seed=3, camera="orbit")
    kernel = model.params["flow"]["deep"]["transformer"]["layers"]["layer"]["mlp_in"]["kernel"]
    qkv = model.params["control"]["layers"]["qkv"]["kernel"]
    return ({"many": np.stack([video.frames for video in many]), "single": single.frames, "stream": stream,
             "extended": longer.frames, "steered": np.stack([video.frames for video in steered]),
             "nats": np.array([video.log_likelihood for video in many]),
             "steered_nats": np.array([video.log_likelihood for video in steered]),
             "given": np.array(model.log_likelihood(single, PROMPTS[0], draws=8))},
            {"kernel_part": kernel.addressable_shards[0].data.size / kernel.size,
             "module_part": qkv.addressable_shards[0].data.size / qkv.size})


def difference(ours: np.ndarray, reference: np.ndarray) -> float:
    """The largest: of frames in shades, of likelihoods as a share."""
    scale = 1.0 if reference.dtype == np.uint8 else np.abs(reference).max()
    return float(np.abs(ours.astype(np.float64) - reference).max() / scale)


def main(folder: Path, names: list[str]) -> None:
    workdir, results = folder / "model", {}
    write_workdir(workdir)
    module = write_module(folder / "module", CONFIG_OF_TEST)
    expected, _ = asked(workdir, module, dict.fromkeys(sharding.AXES, 1))
    for name in names:
        shape = dict(zip(sharding.AXES, map(int, name.split("x"))))
        assert math.prod(shape.values()) == jax.device_count()
        found, held = asked(workdir, module, shape)
        output = folder / name
        code, out, error = run_here(["--config=configs/t2v.py", "--mode=sample", f"--workdir={workdir}",
                                     f"--config.sample.prompt={PROMPTS[0]}", "--config.sample.count=8",
                                     "--config.sample.batch_size=8", f"--config.sample.output={output}",
                                     *(f"--config.mesh.{axis}={size}" for axis, size in shape.items())])
        assert code == 0, (out, error)
        facts = [json.loads(path.read_text()) for path in sorted(output.glob("*.json"))]
        results[name] = held | {"videos": len(facts), "facts": facts[0]} | {
            key: difference(found[key], expected[key]) for key in expected}
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
