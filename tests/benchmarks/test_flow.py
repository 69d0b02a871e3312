"""The flow beside PyTorch: both compute the same, and the figures belong together (without PyTorch: test_vae.py)."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from configs.t2v import tiny
from starflow_jax.benchmarks import flow
from starflow_jax.benchmarks.random_flow import RandomFlow
from starflow_jax.config import Benchmark, Model
from starflow_jax.modes import benchmark

SMALL = Model(channels=4, frames=3, height=4, width=4, shallow_layers=(1, 1), shallow_width=40, deep_layers=2,
              deep_width=60, head_dim=20, text_length=6, text_dim=16, denoiser_layers=2, denoiser_window=2,
              noise_std=0.3)


def test_the_figures_are_of_both_results_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoVideos:
        def __init__(self, model: Model) -> None:
            assert model == SMALL

        def cases(self) -> dict:
            return {"a video": (lambda: np.full((2, 3), 2.0), lambda: np.full((2, 3), 3.0))}

    def timed(_, cases, rounds):
        assert rounds == 2 and list(cases) == ["PyTorch", "ours"]
        return {name: (run(), seconds) for (name, run), seconds in zip(cases.items(), (3.0, 2.0))}

    monkeypatch.setattr(flow, "can_be_timed", lambda _: True)
    monkeypatch.setattr(flow, "_product", lambda: {})
    monkeypatch.setattr(flow, "_layers", lambda model, tokens: {})
    monkeypatch.setattr(flow, "_whole", lambda model: {"step": (lambda: (1.0, 2.0), lambda: (1.0, 1.0))})
    monkeypatch.setattr(flow, "Videos", NoVideos)
    monkeypatch.setattr(flow, "timed", timed)
    step, video = flow.beside_torch(SMALL, rounds=2)
    assert step == {"what": "step", "PyTorch, s": 3.0, "ours, s": 2.0, "times as fast": 1.5, "squared difference": 0.25}
    assert video["what"] == "a video" and video["squared difference"] == 0.25


@pytest.mark.slow
def test_pytorch_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    small = flow.beside_torch
    monkeypatch.setattr(flow, "beside_torch", lambda: small(SMALL, (64, 200), rounds=1))
    benchmark.benchmark(dataclasses.replace(tiny(), benchmark=Benchmark(parts="flow")), tmp_path)
    rows = json.loads((tmp_path / "benchmark.json").read_text())["flow"]["beside PyTorch"]
    apart = {row["what"]: row["squared difference"] for row in rows}
    exact = ("a product of matrices, 2,048 x 2,048", "a layer, 64 tokens", "a layer, 200 tokens", "forward pass",
             "a video, one token after another")
    assert all(apart.pop(what) < 1e-10 for what in exact)
    assert apart.pop("training step") < 1e-4  # of a second step, whose learning rate differs a little
    assert apart.pop("a video, at equal error") < 4e-3  # each within 1e-3 of one token after another
    assert len(apart) == 2 and max(apart.values()) < 1e-4  # blocks: the last pass may differ
    for row in rows:
        assert row["times as fast"] == row["PyTorch, s"] / row["ours, s"] > 0
    assert "flow, beside PyTorch:" in capsys.readouterr().out


@pytest.mark.slow
def test_pytorchs_gradients_are_ours() -> None:
    """Of both losses of a training step, for every weight."""
    pytest.importorskip("torch")
    from starflow_jax.benchmarks.flow_torch import TorchFlow, TorchTraining
    from starflow_jax.benchmarks.vae_torch import to_tensor
    from starflow_jax.config import Train
    from starflow_jax.training.losses import gradients_from_features

    of = RandomFlow(SMALL)
    params, x, text = of.params, of.x, of.text
    parts = {name: part for name, part in params.items() if name != "denoiser"}
    nested = {"denoiser": params["denoiser"], "flow": parts}
    grads, losses = gradients_from_features(of.flow, nested, x, lambda _: text)
    theirs = TorchTraining(TorchFlow(SMALL, params), Train())
    found = theirs.gradients(to_tensor(x), to_tensor(text))
    np.testing.assert_allclose(found, (losses["loss"], losses["denoiser_loss"]), rtol=1e-4)
    expected = TorchFlow(SMALL, {**grads["flow"], "denoiser": grads["denoiser"]}).weights
    for name, weight in theirs.flow.weights.items():
        gradient = weight.grad.numpy()
        assert np.linalg.norm(gradient - expected[name].numpy()) < 1e-3 * np.linalg.norm(gradient) + 1e-9, name
