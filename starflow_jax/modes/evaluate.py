"""Likelihood, adherence and denoising on the built-in test set: evaluate.json and a table."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from starflow_jax.config import Config
from starflow_jax.data.digits import reader
from starflow_jax.evaluation.classify import recognise
from starflow_jax.evaluation.likelihood import inspect_video
from starflow_jax.evaluation.quality import quality
from starflow_jax.evaluation.test_set import ADHERENCE, SHOWN, generate_and_read, read, real_clips, test_likelihood
from starflow_jax.io.files import atomic_path
from starflow_jax.io.pictures import contact_sheet, write_gif
from starflow_jax.io.progress import table
from starflow_jax.model.sources import fixed_captions
from starflow_jax.model.store import load_model


def evaluate(config: Config, workdir: Path) -> None:
    """Measure the workdir's model, or the one in the package, and write WORKDIR/evaluate.json; or do what
    config.evaluate asks for instead."""
    if config.evaluate.video:
        return inspect_video(config, workdir)
    if config.evaluate.recognise:
        return recognise(config, workdir)
    if config.evaluate.folder or config.evaluate.reference:
        return quality(config, workdir)
    began = time.perf_counter()
    system, params, source = load_model(config, workdir)
    print(f"model: {source}")
    captions = fixed_captions(system, "test", config.evaluate.prompts)
    labels = reader.labels_of(captions) if config.data.source == "digits" else None
    likelihood = test_likelihood(system, params)
    choices, shown = generate_and_read(system, params, captions, labels)
    contact_sheet(workdir / "evaluate_samples.png", shown, captions[:SHOWN], scale=3)
    write_gif(workdir / "evaluate_samples.gif", shown, captions[:SHOWN], config.text.fps or 1, columns=3, scale=8)
    results = {
        "model": source,
        **likelihood,
        "adherence": {key: value for key, value in choices[config.sample.denoise].items() if key in ADHERENCE},
        "temporal_flickering": choices[config.sample.denoise].get("temporal_flickering"),
        "denoising": choices,
        "real_clips": read(*real_clips(system, config.evaluate.prompts)),
        "prompts": len(captions),
        "sample_settings": dataclasses.asdict(config.sample),
        "seconds": round(time.perf_counter() - began, 1),
    }
    with atomic_path(workdir / "evaluate.json") as path:
        path.write_text(json.dumps(results, indent=1))
    _print(results, workdir)


def _print(results: dict[str, Any], workdir: Path) -> None:
    print(table([("this model", f"{results['bits_per_dim']:.4f}"),
                 *((f"baseline: {name}", f"{value:.4f}") for name, value in results["baselines"].items())],
                ("bits per dimension of noised test latents", "")))
    print()
    keys = tuple(results["real_clips"])
    rows = [(f"denoise={name}", *(f"{scores[key]:.3f}" for key in keys))
            for name, scores in results["denoising"].items()]
    rows.append(("real test clips", *(f"{results['real_clips'][key]:.3f}" for key in keys)))
    print(table(rows, (f"{results['prompts']} test prompts", *keys)))
    print(f"\nwritten to {workdir}: evaluate.json, evaluate_samples.png, evaluate_samples.gif")
