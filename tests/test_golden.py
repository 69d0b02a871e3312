"""Reference numbers: pytest tests/test_golden.py --golden-dir=DIR runs over every case of DIR."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from starflow_jax.checkpoints.released import from_released, released_model, to_released
from starflow_jax.flow import decode, generation
from starflow_jax.flow.control import plucker_rays
from starflow_jax.flow.likelihood import nll_mean
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.text.prompt import format_prompt, frame_size
from starflow_jax.text.t5 import T5Encoder, load_t5, mask_padding
from starflow_jax.training.losses import weighted_loss
from tests.codec.test_wan_vae import check_golden_wan
from tests.golden_pipeline import check_pipeline
from tests.text.test_t5 import golden_config, golden_weights

# pipeline/t2v is the quick one; a picture, a long video and its windows are in the quick case `video`, too.
SLOW = {"pipeline/ti2v", "pipeline/long"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_path" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--golden-dir"))
        patterns = ("*.json", "*/case.json", "*/*/case.json")
        paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        names = [path.stem if path.parent == folder else str(path.parent.relative_to(folder)) for path in paths]
        metafunc.parametrize("case_path", [
            pytest.param(path, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
            for path, name in zip(paths, names)])


def test_golden(case_path: Path, tmp_path: Path) -> None:
    case = json.loads(case_path.read_text())
    assert case["kind"] in {*CHECKS, "pipeline"}, f"unknown kind {case['kind']!r}"
    if case["kind"] == "pipeline":
        compare = Comparison(load_file(case_path.with_name("tensors.safetensors")))
        check_pipeline(case_path.parent, case, compare, tmp_path / "work")
        assert not compare.left, f"not compared: {sorted(compare.left)}"
        return
    tensors_path = case_path.with_suffix(".safetensors")
    CHECKS[case["kind"]](case, load_file(tensors_path) if tensors_path.exists() else {})


class Comparison:
    """Compares our numbers with a case's `out/` tensors and knows which are left."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.golden = {name[4:]: value for name, value in tensors.items() if name.startswith("out/")}
        self.left = set(self.golden)

    def __call__(self, name: str, ours) -> None:
        if name not in self.golden:
            return
        self.left.discard(name)
        golden, ours = self.golden[name], np.asarray(ours)
        if golden.dtype == np.uint8:
            assert_nearly_same_bytes(name, ours, golden)
            return
        if np.issubdtype(golden.dtype, np.integer):
            np.testing.assert_array_equal(ours, golden, err_msg=name)
            return
        if golden.shape == (1,):
            np.testing.assert_allclose(ours.reshape(1), golden, rtol=1e-5, err_msg=name)
            return
        assert ours.shape == golden.shape, f"{name}: {ours.shape} != {golden.shape}"
        largest = np.abs(golden).max()
        relative = name.startswith("grad") or name == "score_target"
        tolerance = 1e-3 * largest if relative else 2e-4 * max(1.0, largest)
        error = np.abs(ours - golden).max()
        assert error <= tolerance, f"{name}: max|ours - golden| = {error:.3g} > {tolerance:.3g}"


def assert_nearly_same_bytes(name: str, ours: np.ndarray, golden: np.ndarray) -> None:
    """At most a level apart, and equal in all but half a percent of the values."""
    assert ours.dtype == np.uint8 and ours.shape == golden.shape, f"{name}: {ours.dtype} {ours.shape}"
    apart = np.abs(ours.astype(np.int32) - golden)
    assert apart.max() <= 1 and np.mean(apart > 0) < 0.005, f"{name}: {apart.max()} levels, {np.mean(apart > 0):.2%}"


class FlowCase:
    """A flow case's model, weights and layouts."""

    def __init__(self, case: dict, tensors: dict[str, np.ndarray]):
        self.case, self.tensors = case, tensors
        self.config = released_model(case["model"])
        self.model = STARFlow(self.config)
        weights = {name[7:]: value for name, value in tensors.items() if name.startswith("params/")}
        self.params = from_released(weights, self.config)
        self.image = case["layout"] == "b c h w"
        self.x_BTHWC = self.to_ours("in/x")
        self.text = jnp.asarray(tensors["in/text"])
        self.null = jnp.broadcast_to(tensors["in/null_text"], self.text.shape)
        self.grid = self.model.grid(self.x_BTHWC.shape)

    def apply(self, method, *args):
        return jax.jit(lambda params, *args: self.model.apply(params, *args, method=method))(self.params, *args)

    def to_ours(self, name: str) -> jax.Array:
        value = self.tensors[name]
        value = value[:, None] if self.image else value
        return jnp.asarray(np.moveaxis(value, 2, -1))

    def to_golden(self, x_BTHWC) -> np.ndarray:
        value = np.moveaxis(np.asarray(x_BTHWC), -1, 2)
        return value[:, 0] if self.image else value

    def tokens_to_golden(self, x_BTSK) -> np.ndarray:
        frames, height, width = x_BTSK.shape[1], *self.grid[1:]
        value = np.asarray(x_BTSK).reshape(x_BTSK.shape[0], frames, height, width, -1)
        return value[:, 0] if self.image else value

    def sample(self, noise_name: str, guidance: float, solver=generation.SEQUENTIAL, first=None, **window):
        """(video, video after the deep block) in the golden layout."""
        noise = self.model.tokens(self.to_ours(noise_name))
        known = None
        if first is not None:
            known = self.apply(STARFlow.shallow_forward, self.to_ours(first))[0][-1]
            noise = noise[:, known.shape[1]:]
        texts = jnp.stack([self.text, self.null]) if guidance else self.text[None]
        frames = generation.generate(self.model, self.params, noise, texts, guidance=guidance, solver=solver,
                                     token_grid=self.grid[1:], known_BTSK=known, **window)
        u = jnp.concatenate([made for made, _ in frames], axis=1)
        u = u if known is None else jnp.concatenate([known, u], axis=1)
        x, _ = decode.invert_shallow(self.model, self.params, u, solver=generation.SEQUENTIAL, token_grid=self.grid[1:])
        return self.to_golden(x), self.to_golden(self.model.latents(u, self.grid[1]))


def check_flow(case: dict, tensors: dict[str, np.ndarray]) -> None:
    flow, compare = FlowCase(case, tensors), Comparison(tensors)
    check_forward(flow, compare)
    check_gradients(flow, compare)
    check_samples(flow, compare)
    not_compared = {"jacobi_th0.001"}  # the release's approximation, given for its error and pass counts
    assert compare.left <= not_compared, f"not compared: {sorted(compare.left - not_compared)}"


def check_forward(flow: FlowCase, compare: Comparison) -> None:
    out = flow.apply(STARFlow.forward, flow.x_BTHWC, flow.text)
    for index, tokens in enumerate(out.block_outputs):
        compare(f"block_output_{index}", flow.tokens_to_golden(tokens))
    for index, logdet in enumerate(out.logdets):
        flat = logdet[:, 0] if flow.image and logdet.ndim == 4 else logdet
        compare(f"logdet_{index}", flat)
    compare("z", flow.to_golden(flow.model.latents(out.z_BTSK, flow.grid[1])))
    loss = nll_mean(out)
    compare("loss", loss.loss)
    compare("loss_z", loss.loss_z)
    compare("loss_logdet", loss.loss_logdet)
    u, _ = zip(*generation.generate(flow.model, flow.params, out.z_BTSK, flow.text[None], token_grid=flow.grid[1:]))
    x, _ = decode.invert_shallow(flow.model, flow.params, jnp.concatenate(u, axis=1),
                                 solver=generation.SEQUENTIAL, token_grid=flow.grid[1:])
    compare("reverse_of_z", flow.to_golden(x))
    if flow.config.denoiser != "none":
        score = flow.apply(STARFlow.score, flow.x_BTHWC, flow.text)
        compare("denoiser", flow.to_golden(score))
        compare("denoised", flow.to_golden(flow.x_BTHWC - 0.3 * score))


def check_gradients(flow: FlowCase, compare: Comparison) -> None:
    def loss(params, x):
        return nll_mean(flow.model.apply(params, x, flow.text, method=STARFlow.forward)).loss

    value, (grads, grad_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(flow.params, flow.x_BTHWC)
    compare("grad_x", flow.to_golden(grad_x))
    for name, grad in to_released(grads, flow.config).items():
        compare(f"grad/{name}", grad)
    noise_std = flow.case["noise_std"]
    weighted, slope = jax.value_and_grad(weighted_loss)(value, noise_std)
    compare("weighted_loss", weighted)
    compare("score_target", flow.to_golden(noise_std * grad_x.size * slope * grad_x))


def check_samples(flow: FlowCase, compare: Comparison) -> None:
    guidance = flow.case["guidance"]
    for name, weight in (("sample_cfg0", 0.0), ("sample_cfg", guidance)):
        video, deep = flow.sample("in/noise", weight)
        compare(name, video)
        compare(f"{name}_deep", deep)
    exact = decode.Solver(block_size=flow.case["jacobi_block_size"], tolerance=1e-9)
    compare("jacobi_th1e-09", flow.sample("in/noise", guidance, exact)[0])
    if "in/first_frame" in flow.tensors:
        video, deep = flow.sample("in/noise", guidance, first="in/first_frame")
        compare("i2v_sample_cfg", video)
        compare("i2v_sample_cfg_deep", deep)
    if "long" in flow.case:
        long = flow.case["long"]
        video, deep = flow.sample("in/long_noise", guidance,
                                  window=long["window_frames"], context=long["context_frames"])
        compare("long_sample_cfg", video)
        compare("long_sample_cfg_deep", deep)


def check_prompt_format(case: dict, _: dict) -> None:
    for entry in case["cases"]:
        ours = format_prompt(entry["caption"], entry["fps"], entry["noise_std"], entry["aspect_ratio"])
        assert ours == entry["text"]


def check_aspect_ratio(case: dict, _: dict) -> None:
    for entry in case["cases"]:
        assert list(frame_size(entry["target"], entry["aspect_ratio"], entry["multiple"])) == entry["size"]


def check_plucker(case: dict, tensors: dict[str, np.ndarray]) -> None:
    compare = Comparison(tensors)
    for name, relative in (("plucker_world", False), ("plucker_relative_to_first", True)):
        compare(name, plucker_rays(tensors["in/intrinsics"], tensors["in/world_to_camera"], case["height"],
                                   case["width"], relative_to_first=relative))
    assert not compare.left, f"not compared: {sorted(compare.left)}"


def check_t5(case: dict, tensors: dict[str, np.ndarray]) -> None:
    compare, config = Comparison(tensors), golden_config(case)
    ids_BS, mask_BS = tensors["in/input_ids"], tensors["in/attention_mask"]
    params = load_t5(golden_weights(tensors), config)
    features_BSD = jax.jit(T5Encoder(config).apply)({"params": params}, ids_BS, mask_BS)
    compare("last_hidden_state", features_BSD)
    compare("masked", mask_padding(features_BSD, mask_BS))
    assert not compare.left, f"not compared: {sorted(compare.left)}"


def check_wan(case: dict, tensors: dict[str, np.ndarray]) -> None:
    compare = Comparison(tensors)
    for name, ours in check_golden_wan(case, tensors).items():
        compare(name, ours)
    assert not compare.left, f"not compared: {sorted(compare.left)}"


CHECKS = {
    "flow": check_flow,
    "prompt_format": check_prompt_format,
    "aspect_ratio": check_aspect_ratio,
    "plucker": check_plucker,
    "t5_encoder": check_t5,
    "wan22_vae": check_wan,
}
