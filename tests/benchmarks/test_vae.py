"""The VAE beside PyTorch: both compute the same, the figures belong together, and without PyTorch a line says so."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs.t2v import tiny
from starflow_jax.benchmarks import vae, vae_torch
from starflow_jax.codec.wan_stream import WanCodec
from starflow_jax.codec.wan_vae import WanConfig
from starflow_jax.config import Benchmark
from starflow_jax.modes import benchmark
from tests.codec.test_wan_vae import SMALL

NARROW = WanConfig(dim=4, dec_dim=6, z_dim=4)  # the released structure


class OursMoved:
    """In PyTorch's place: our VAE, whose results are 0.25 too large."""

    def __init__(self, codec: WanCodec) -> None:
        self.codec = codec

    def encode(self, x: np.ndarray) -> SimpleNamespace:
        return self._moved(WanCodec.encode, x)

    def decode(self, x: np.ndarray) -> SimpleNamespace:
        return self._moved(WanCodec.decode, x)

    def _moved(self, step, x: np.ndarray) -> SimpleNamespace:
        result = np.moveaxis(np.asarray(jax.jit(step)(self.codec, np.moveaxis(x, 1, -1))), -1, 1)
        return SimpleNamespace(numpy=lambda: result + 0.25)


def test_the_figures_are_of_both_results_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []

    def timed(_, cases, rounds):
        assert rounds == 2 and list(cases) == ["PyTorch", "ours"]
        results.append({name: run() for name, run in cases.items()})
        return {name: (result, seconds) for (name, result), seconds in zip(results[-1].items(), (3.0, 2.0))}

    monkeypatch.setattr(vae, "can_be_timed", lambda _: True)
    monkeypatch.setattr(vae, "TorchVAE", OursMoved)
    monkeypatch.setattr(vae, "to_tensor", lambda array: array.astype(np.float32))
    monkeypatch.setattr(vae, "timed", timed)
    rows = vae.beside_torch(SMALL, frames=3, side=8, rounds=2)
    assert [result["ours"].shape for result in results] == [(2, 2, 2, 2, 3), (2, 3, 8, 8, 3)]
    assert [row["step"] for row in rows] == ["encode", "decode"]
    for row, result in zip(rows, results):
        assert (row["PyTorch, s"], row["ours, s"], row["times as fast"]) == (3.0, 2.0, 1.5)
        moved = 0.25 / np.std(result["ours"])
        assert row["largest difference, deviations"] == pytest.approx(moved, rel=1e-3) and 0.01 < moved < 10


@pytest.mark.parametrize("part, what", [("vae", "the VAE"), ("flow", "the flow")])
def test_without_pytorch_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str, what: str
) -> None:
    monkeypatch.setattr(vae_torch, "find_spec", lambda _: None)
    benchmark.benchmark(dataclasses.replace(tiny(), benchmark=Benchmark(parts=part)), tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == (f"{what} beside PyTorch is not timed: it needs PyTorch (pip install 'starflow_jax[convert]') "
                          "and JAX_PLATFORMS=cpu")
    assert set(json.loads((tmp_path / "benchmark.json").read_text())) == {"device"}


@pytest.mark.slow
def test_pytorch_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nine frames, so that every convolution meets its own past."""
    pytest.importorskip("torch")
    small = vae.beside_torch
    monkeypatch.setattr(vae, "beside_torch", lambda: small(NARROW, frames=9, side=32, rounds=1))
    benchmark.benchmark(dataclasses.replace(tiny(), benchmark=Benchmark(parts="vae")), tmp_path)
    rows = json.loads((tmp_path / "benchmark.json").read_text())["vae"]["beside PyTorch"]
    assert [row["step"] for row in rows] == ["encode", "decode"]
    for row in rows:
        assert 0 < row["largest difference, deviations"] < 1e-4
        assert row["times as fast"] == row["PyTorch, s"] / row["ours, s"] > 0
    assert "vae, beside PyTorch:" in capsys.readouterr().out
