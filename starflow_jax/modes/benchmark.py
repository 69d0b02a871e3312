"""--mode=benchmark: times of starting, data, attention, decoding, cameras, VAE, flow and training; benchmark.json and
tables."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from starflow_jax.benchmarks import attention as benchmark_attention
from starflow_jax.benchmarks import camera as benchmark_camera
from starflow_jax.benchmarks import data as benchmark_data
from starflow_jax.benchmarks import decoding as benchmark_decode
from starflow_jax.benchmarks import flow as benchmark_flow
from starflow_jax.benchmarks import start as benchmark_start
from starflow_jax.benchmarks import vae as benchmark_vae
from starflow_jax.benchmarks.random_flow import BENCHMARK_MODEL
from starflow_jax.benchmarks.training import train_step_ratio
from starflow_jax.config import Config
from starflow_jax.io.files import write_text
from starflow_jax.io.progress import table


def benchmark(config: Config, workdir: Path) -> None:
    """Time what config.benchmark.parts names (attention only on a GPU, VAE and flow beside PyTorch only on a CPU);
    write WORKDIR/benchmark.json and, for decoding, benchmark_decoding.png."""
    parts = config.benchmark.named
    results: dict[str, Any] = {}
    if "start" in parts:  # before this process takes the accelerator
        results["start"] = benchmark_start.report()
        _print("start", results["start"])
    results["device"] = jax.devices()[0].device_kind
    if "data" in parts:
        results["data"] = benchmark_data.report()
        _print("data", results["data"])
    if "attention" in parts and jax.default_backend() == "gpu":
        results["attention"] = benchmark_attention.against_cudnn()
    if "decoding" in parts:
        results["decoding"] = {"trained": benchmark_decode.trained_model(config, workdir),
                               "lengths": benchmark_decode.lengths(config, workdir),
                               "random": benchmark_decode.random_model(BENCHMARK_MODEL)}
        benchmark_decode.plot(workdir / "benchmark_decoding.png", results["decoding"]["trained"])
        _print("decoding", results["decoding"])
    if "camera" in parts:
        if rows := benchmark_camera.beside_none(config, workdir):
            results["camera"] = {"whole videos": rows}
            _print("camera", results["camera"])
        else:
            print("camera: this model follows none\n")
    if "vae" in parts and (rows := benchmark_vae.beside_torch()):
        results["vae"] = {"beside PyTorch": rows}
        _print("vae", results["vae"])
    if "flow" in parts and (rows := benchmark_flow.beside_torch()):
        results["flow"] = {"beside PyTorch": rows}
        _print("flow", results["flow"])
    if "training" in parts:
        results |= train_step_ratio(dataclasses.replace(config, model=BENCHMARK_MODEL))
        _print_training(results)
    write_text(workdir / "benchmark.json", json.dumps(results, indent=1))
    print(f"written: {workdir / 'benchmark.json'}")


def _print(part: str, tables: dict[str, list[dict[str, Any]]]) -> None:
    for name, rows in tables.items():
        print(f"{part}, {name}:")
        print(table([list(row.values()) for row in rows], list(rows[0])) + "\n")


def _print_training(results: dict[str, Any]) -> None:
    rows = [("forward pass", f"{results['forward_seconds']:.3f} s", "1.00"),
            ("training step", f"{results['step_seconds']:.3f} s", f"{results['step_in_forward_passes']:.2f}"),
            ("matrix products alone", f"{results['matrix_seconds']:.3f} s",
             f"{results['matrix_seconds'] / results['forward_seconds']:.2f}")]
    print(table(rows, ("", "median", "forward passes")))
    print(f"\nthe forward pass reaches {results['forward_matrix_fraction']:.0%} of this machine's measured float32 "
          f"matrix rate ({results['matrix_gflops']:.0f} GFLOP/s)")
