"""The benchmark does the work it times, and its figures belong together."""

import dataclasses
import json
import time

import numpy as np
import pytest

from configs.t2v import tiny
from starflow_jax.benchmarks import data as benchmark_data
from starflow_jax.benchmarks import decoding as benchmark_decode
from starflow_jax.config import Benchmark, UserError
from starflow_jax.data.raw.clips import decode
from starflow_jax.data.raw.job import Bucket
from starflow_jax.modes import benchmark


def test_decoding_is_timed_beside_bare_decoding(monkeypatch):
    """Each step does its work on the one before it; the table is of the seconds that are measured, here made up."""
    results, seconds = [], (0.5, 2.0, 2.5, 4.0, 8.0, 0.25)

    def once(_, cases, rounds, clock):
        assert rounds > 1 and clock is time.process_time  # per core, whatever else the machine does
        results.extend(run() for run in cases.values())
        return dict(zip(cases, seconds, strict=True))

    monkeypatch.setattr(benchmark_data, "median_seconds", once)
    rows = benchmark_data.decoding(size=(64, 96), bucket=Bucket(32, 48, "3:2"), frames=9)
    assert [row["clips per second and core"] for row in rows] == [2, 0.5, 0.4, 0.25, 0.125, 4]
    assert [row["times PyAV alone"] for row in rows] == [1, 4, 5, 8, 16, 0.5]
    assert [row["step"].split(":")[0] for row in rows] == [
        "PyAV alone", "cut", "without media", "prepare", "by way of RGB, 4", "read back"]
    _, clip, sent, encoded, by_rgb, read_back = results
    assert sent == [9 * 32 * 48 * 3 / 2]  # all of it came there, 4:2:0
    assert clip.frames_THWC.shape == read_back.shape == (9, 32, 48, 3)
    np.testing.assert_array_equal(decode(encoded), read_back)
    assert np.abs(read_back.astype(int) - clip.frames_THWC).mean() < 4
    kept = [(row["MB"], row["PSNR, dB"]) for row in rows if row["MB"]]
    assert [megabytes * 1e6 for megabytes, _ in kept] == [len(encoded), len(by_rgb)]
    error = ((read_back.astype(float) - clip.frames_THWC) ** 2).mean()
    assert kept[0][1] == pytest.approx(10 * np.log10(255**2 / error))


def test_reading_goes_through_the_training_pipeline():
    rate, megabytes = benchmark_data.reading(latents=(4, 2, 3, 5), batch_size=2, examples=4)
    # 8 prompts of 120 rows of 2,048 halves, 120 latents of 2 bytes.
    assert rate > 0 and megabytes == pytest.approx((120 + 8 * 120 * 2048) * 2 / 1e6)


def test_what_a_training_needs_of_its_hosts():
    found = benchmark_data.needed(25.0, 7.0, "some", clips_per_step=100, step_seconds=2.0, hosts=4)
    assert found == {"training": "some", "step, s": 2.0, "clips/s needed": 50.0, "clips/s and core": 25.0,
                     "cores, all hosts": 2.0, "cores a host": 0.5, "MB/s, all hosts": 350.0, "MB/s a host": 87.5}


def test_a_part_is_timed_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_data, "report", lambda: {"made up": [{"step": "cut", "rate": 2.5}]})
    for module, name in ((benchmark_decode, "trained_model"), (benchmark, "train_step_ratio")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("was not asked for"))
    benchmark.benchmark(dataclasses.replace(tiny(), benchmark=Benchmark(parts="data")), tmp_path)
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["data"] == {"made up": [{"step": "cut", "rate": 2.5}]} and set(written) == {"device", "data"}
    assert "data, made up:" in capsys.readouterr().out
    with pytest.raises(UserError, match="benchmark.parts='data,speed'"):
        Benchmark(parts="data,speed")
