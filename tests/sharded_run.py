"""Run by test_sharding.py with eight simulated devices: a training step and samples on several meshes.

python -m tests.sharded_run FOLDER NAME ...: of meshes (2x2x2x1), ways to shard tokens (ring), and `control` for a
control module's training. Writes results.json with the largest relative differences from one device.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax import config as settings_of
from starflow_jax import sharding
from starflow_jax.checkpoints.training import Checkpoints
from starflow_jax.config import Config
from starflow_jax.data.batch import Batch
from starflow_jax.flow import decode, generation
from starflow_jax.flow.control import cameras_of_latents, window_rays
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.model.control import fresh_module
from starflow_jax.model.parameters import flow_variables, init_params
from starflow_jax.training.beside_target import beside_step
from starflow_jax.training.state import create_state
from starflow_jax.training.step import make_train_step
from tests.flow.test_control import random_cameras
from tests.helpers import random_params, random_variables, tiny_model
from tests.training.test_losses import config_of

ONE = (1, 1, 1, 1)
BY_TOKENS = {"all_gather": (1, 1, 1, 8), "ring": (2, 1, 1, 4)}  # of the model's four heads too few for eight devices
# Odd numbers of tokens (2 x 9, and 3 of text before them), which no axis divides.
MODEL = tiny_model(height=3, width=3, shallow_layers=(1,), deep_width=80, shallow_width=80, denoiser="first_layer",
                   denoiser_layers=1)
CONFIG = config_of(MODEL)
BATCH = 8
CONTROLLED = dataclasses.replace(
    CONFIG, train=dataclasses.replace(CONFIG.train, target="control"), control=settings_of.Control(width=8),
    data=settings_of.Data(camera=True, image_probability=0.0))


def batch() -> Batch:
    random = np.random.default_rng(0)
    shape = (BATCH, MODEL.frames, MODEL.height, MODEL.width, MODEL.channels)
    return Batch(latents_BNhwC=random.normal(size=shape).astype(np.float32),
                 text_ids_BS=random.integers(1, 8, (BATCH, 3)).astype(np.int32))


def abstract_state() -> Any:
    return jax.eval_shape(lambda: create_state(init_params(CONFIG, jax.random.key(0)), CONFIG.train))


def fresh_state() -> Any:
    """On one device, with parameters in which nothing is zero."""
    return jax.tree.map(np.asarray, jax.jit(lambda params: create_state(params, CONFIG.train))(random_params(CONFIG)))


def trained(mesh: Any, state: Any, config: Config = CONFIG) -> Any:
    """State after two steps, and the scalars of the second, the gradient's norm among them."""
    data = sharding.put_batch(batch(), mesh)
    step = make_train_step(config, mesh)
    state, _ = step(state, data)
    return step(state, data)


def sampled(params: Any, videos: int, config: Config = CONFIG) -> tuple[jax.Array, jax.Array]:
    """Guided Jacobi samples, exact."""
    random = np.random.default_rng(1)
    noise = random.normal(size=(videos, MODEL.frames, 9, MODEL.channels)).astype(np.float32)
    texts = random.normal(size=(2, videos, 3, MODEL.text_dim)).astype(np.float32)
    flow, solver, variables = STARFlow(config.model), decode.Solver(9, tolerance=0.0), flow_variables(params)
    made = [u for u, _ in generation.generate(flow, variables, jnp.asarray(noise), jnp.asarray(texts), guidance=1.5,
                                              solver=solver, token_grid=(3, 3))]
    u = jnp.concatenate(made, axis=1)
    return u, decode.invert_shallow(flow, variables, u, solver=solver, token_grid=(3, 3))[0]


def steered(shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state and scalars after two steps of a control module's training, how its arrays lie)."""
    mesh, stride = sharding.make_mesh(settings_of.Mesh(*shape), jax.devices()[:int(np.prod(shape))]), 4
    paths = [random_cameras(1 + stride * (MODEL.frames - 1), seed) for seed in range(BATCH)]
    intrinsics, world_to_camera = map(np.stack, zip(*paths))
    rays = window_rays(cameras_of_latents(intrinsics, world_to_camera[:, :, :3], stride), MODEL)
    module = random_variables(jax.eval_shape(lambda: fresh_module(CONTROLLED, jax.random.key(0))))
    with jax.set_mesh(mesh):
        backbone = random_params(CONFIG)
        backbone = jax.device_put(backbone, sharding.parameter_shardings(backbone, mesh))
        state = create_state(module, CONTROLLED.train)
        placed = sharding.parameter_shardings(state, mesh)
        data = sharding.put_batch(batch().replace(rays_BNSK=np.asarray(rays)), mesh)
        step = beside_step(CONTROLLED, mesh)
        state, _ = step(jax.device_put(state, placed), data, backbone)
        state, scalars = step(state, data, backbone)
    parts = {name: of["kernel"].addressable_shards[0].data.size / of["kernel"].size
             for name, of in state.params["control"]["layers"].items()}
    laid_out = all(leaf.sharding.is_equivalent_to(own, leaf.ndim) for leaf, own in zip(
        jax.tree.leaves(state), jax.tree.leaves(placed)))
    return jax.tree.map(np.asarray, {"state": state, "scalars": scalars}), {"parts": parts, "laid_out": laid_out}


def difference(ours: Any, reference: Any) -> float:
    """Largest over the leaves: norm of the difference over the norm."""
    def of(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)) if np.abs(b).max() > 0 else float(
            np.abs(a).max())

    return max(jax.tree.leaves(jax.tree.map(of, ours, reference)))


def main(folder: Path, names: list[str]) -> None:
    results: dict[str, Any] = {}
    expected, reference_folder = None, folder / "one"
    if "control" in names:
        expected_steered, _ = steered(ONE)
        for shape in ((2, 2, 2, 1), (1, 2, 2, 2)):
            found, held = steered(shape)
            results["control " + "x".join(map(str, shape))] = held | {
                name: difference(found[name], expected_steered[name]) for name in found}
    meshes = [tuple(map(int, name.split("x"))) for name in names if name not in BY_TOKENS and name != "control"]
    start = fresh_state()
    for shape in (ONE, *meshes):
        count = int(np.prod(shape))
        mesh = sharding.make_mesh(settings_of.Mesh(*shape), jax.devices()[:count])
        with jax.set_mesh(mesh):
            abstract = sharding.abstract(abstract_state(), mesh)
            placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
            state, scalars = trained(mesh, jax.device_put(start, placed))
            found = {"state": state, "scalars": scalars, "many": sampled(state.params, BATCH)}
            if shape[2] > 1 or expected is None:  # one video, spread by its heads and tokens
                found["single"] = sampled(state.params, 1)
            if expected is None:
                expected = jax.tree.map(np.asarray, found)
                checkpoints = Checkpoints(reference_folder, keep=1, model_fingerprint={})
                checkpoints.save(2, state, {"batches": 2}, None)
            else:
                checkpoints = Checkpoints(folder / "_".join(map(str, shape)), keep=1, model_fingerprint={})
                checkpoints.save(2, state, {"batches": 2}, None)
            checkpoints.wait()
            checkpoints.close()
            held = Checkpoints(reference_folder, keep=1, model_fingerprint={})
            restored = held.restore(abstract)
            held.close()
            assert restored is not None
            laid_out = all(a.sharding.is_equivalent_to(b, len(a.shape)) for a, b in zip(
                jax.tree.leaves((restored[0], state)), jax.tree.leaves((placed, placed))))
            kernel = state.params["flow"]["deep"]["transformer"]["layers"]["layer"]["mlp_in"]["kernel"]
            results["x".join(map(str, shape))] = {
                name: difference(found[name], expected[name]) for name in found} | {
                "restored": difference(restored[0], expected["state"]), "laid_out": laid_out,
                "kernel_part": kernel.addressable_shards[0].data.size / kernel.size}
    for choice, shape in ((name, BY_TOKENS[name]) for name in names if name in BY_TOKENS):
        by_tokens, mesh = config_of(dataclasses.replace(MODEL, sequence_parallel=choice)), sharding.make_mesh(
            settings_of.Mesh(*shape))
        sharding.check_model(by_tokens.model, mesh)
        with jax.set_mesh(mesh):
            placed = jax.tree.map(lambda leaf: leaf.sharding, sharding.abstract(abstract_state(), mesh))
            state, scalars = trained(mesh, jax.device_put(start, placed), by_tokens)
            found = {"state": state, "scalars": scalars}
            if choice == "all_gather":
                found["single"] = sampled(state.params, 1, by_tokens)
        results[choice] = {name: difference(found[name], expected[name]) for name in found}
    one = sharding.make_mesh(settings_of.Mesh(1, 1, 1, 1), jax.devices()[:1])
    for shape in meshes:
        held = Checkpoints(folder / "_".join(map(str, shape)), keep=1, model_fingerprint={})
        back = held.restore(sharding.abstract(abstract_state(), one))
        held.close()
        assert back is not None
        results["x".join(map(str, shape))]["back_on_one"] = difference(back[0], expected["state"])
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
