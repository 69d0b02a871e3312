"""--mode=evaluate: a model on its test split, from the first frames of that, or far beyond its training length; one
video, captions by likelihood, folders of any system's videos, or one of the paper's experiments (experiments.py)."""

import dataclasses
import json
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from starflow_jax.config import Config, Evaluate, UserError
from starflow_jax.data.digits.captions import ATTRIBUTES
from starflow_jax.evaluation import camera, classify, horizon, likelihood, quality, ti2v
from starflow_jax.evaluation.denoising import denoised_real_clips
from starflow_jax.evaluation.measures import psnr
from starflow_jax.evaluation.memory import check_evaluation, check_given
from starflow_jax.evaluation.split import (
    SHOWN,
    denoise_choices,
    generate_and_read,
    prompts_to_read,
    read,
    real_clips,
    split_likelihood,
)
from starflow_jax.evaluation.two_sample import balanced_accuracy
from starflow_jax.evaluation.videos import folder_of_videos
from starflow_jax.io.files import write_text
from starflow_jax.io.pictures import contact_sheet, draw_diagrams, draw_heat_maps, write_gif
from starflow_jax.io.progress import ProgressBar, table
from starflow_jax.io.video import write_mp4
from starflow_jax.model.store import load_model
from starflow_jax.model.system import System
from starflow_jax.modes.experiments import (
    evaluate_ablations,
    evaluate_denoisers,
    evaluate_guidance,
    evaluate_students,
)
from starflow_jax.sampling import vbench
from starflow_jax.sampling.given import read_given
from starflow_jax.sampling.mesh import on_mesh, sampling_mesh

SHOWN_PIXELS = 96  # small models' frames are enlarged to about this height


def evaluate(config: Config, workdir: Path) -> None:
    """Measure what config.evaluate.task names: files in the workdir and a table."""
    tasks: dict[str, tuple[Callable[[Config, Path], None], int]] = {
        "test_set": (evaluate_test_set, config.evaluate.batch_size),
        "horizon": (evaluate_horizon, config.sample.batch_size),
        "ti2v": (evaluate_ti2v, config.sample.batch_size),
        "camera": (evaluate_camera, config.sample.batch_size),
        "video": (evaluate_video, min(config.evaluate.draws, config.evaluate.batch_size)),
        "classify": (classify_by_likelihood, config.evaluate.batch_size),
        "denoisers": (evaluate_denoisers, config.sample.batch_size),
        "guidance": (evaluate_guidance, config.sample.batch_size),
        "students": (evaluate_students, config.sample.batch_size),
        "ablations": (partial(evaluate_ablations, measure=evaluate_test_set), config.evaluate.batch_size),
        "quality": (evaluate_quality, 1)}
    measure, together = tasks[config.evaluate.task]
    mesh = sampling_mesh(config, together)
    check_evaluation(config, mesh)
    with on_mesh(mesh):
        measure(config, workdir)


def evaluate_test_set(config: Config, workdir: Path) -> None:
    """Likelihood, adherence and denoising of the workdir's model, or the one in the package: WORKDIR/evaluate.json."""
    began = time.perf_counter()
    system, params, source, _ = load_model(config, workdir)
    print(f"model: {source}")
    captions, labels = prompts_to_read(config)
    bits = split_likelihood(system, params)
    choices, shown, made_statistics = generate_and_read(system, params, captions, labels)
    contact_sheet(workdir / "evaluate_samples.png", shown, captions[:SHOWN], scale=3)
    write_gif(workdir / "evaluate_samples.gif", shown, captions[:SHOWN], config.text.fps or 1, columns=3, scale=8)
    real_labels, real_frames = real_clips(system, config.evaluate.prompts)
    quality_of_denoising, real_statistics = denoised_real_clips(system, params, captions, real_frames,
                                                                 denoise_choices(system))
    results = {
        "model": source,
        **bits,
        "adherence": {key: value for key, value in choices[config.sample.denoise].items() if key in ATTRIBUTES},
        "temporal_flickering": choices[config.sample.denoise].get("temporal_flickering"),
        "denoising": choices,
        "real_clips": read(real_labels, real_frames),
        "psnr_of_denoised_test_clips": quality_of_denoising,
        "two_sample_balanced_accuracy": balanced_accuracy(real_statistics, made_statistics),
        "prompts": len(captions),
        "sample_settings": dataclasses.asdict(config.sample),
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_text(workdir / "evaluate.json", json.dumps(results, indent=1))
    _print_test_set(results)
    print(f"\nwritten to {workdir}: evaluate.json, evaluate_samples.png, evaluate_samples.gif")


def _print_test_set(results: dict[str, Any]) -> None:
    print(table([("this model", f"{results['bits_per_dim']:.4f}"),
                 *((f"baseline: {name}", f"{value:.4f}") for name, value in results["baselines"].items())],
                ("bits per dimension of noised test latents", "")))
    keys = tuple(results["real_clips"])
    ways = [(f"denoise={name}", scores, f"{results['psnr_of_denoised_test_clips'][name]:.2f}")
            for name, scores in results["denoising"].items()]
    rows = [(name, *(f"{scores[key]:.3f}" for key in keys), decibels)
            for name, scores, decibels in (*ways, ("real test clips", results["real_clips"], ""))]
    print("\n" + table(rows, (f"{results['prompts']} test prompts", *keys, "noised test clips, PSNR in dB")))
    accuracy = results["two_sample_balanced_accuracy"]
    if accuracy is not None:
        print(f"\nsamples told from test clips that went through noise and denoiser, by size, motion, colour and "
              f"brightness: {accuracy:.3f} (0.5: not at all)")


def evaluate_horizon(config: Config, workdir: Path) -> None:
    """Samples far beyond the training length, stretch by stretch: WORKDIR/horizon.json and a picture."""
    began = time.perf_counter()
    horizon.stretches_in(config)  # before minutes of work
    system, params, source, _ = load_model(config, workdir)
    print(f"model: {source}")
    captions, labels = prompts_to_read(config)
    found, shown = horizon.measure(system, params, captions, labels)
    results = {"model": source, **found, "sample_settings": dataclasses.asdict(config.sample),
               "seconds": round(time.perf_counter() - began, 1)}
    write_text(workdir / "horizon.json", json.dumps(results, indent=1))
    draw_diagrams(workdir / "horizon.png", horizon.diagrams(results), shown.frames,
                  [f"training length {stretch}" for stretch in shown.stretches], found["captions"][:horizon.SHOWN],
                  f"{found['videos']} videos of {found['latent_frames']} latent frames; real clips in grey",
                  "training lengths from the start")
    _print_horizon(results)
    print(f"\nwritten to {workdir}: horizon.json, horizon.png")


def _print_horizon(results: dict[str, Any]) -> None:
    names = list(results["stretches"][0])
    rows = [(f"{kind}, {index}", *(f"{row[name]:.4g}" if name in row else "" for name in names))
            for kind, of_kind in (("samples", results["stretches"]), ("real clips", results["real_stretches"]))
            for index, row in enumerate(of_kind)]
    print(table(rows, ("training length", *names)))
    if results.get("change"):
        shares = {name: value for name, value in results["change"].items() if isinstance(value, float)}
        print(f"\nprompts that change every {results['change']['every_latent_frames']} latent frames: "
              + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in shares.items()))
    for line in results["missing"]:
        print(line)


def evaluate_ti2v(config: Config, workdir: Path) -> None:
    """Videos from the first frames of test clips: WORKDIR/ti2v.json and a sheet, each given picture before its video.
    """
    began = time.perf_counter()
    system, params, source, _ = load_model(config, workdir)
    print(f"model: {source}")
    found, shown = ti2v.measure(system, params, config.evaluate.prompts)
    contact_sheet(workdir / "ti2v.png", shown.frames_BTHWC, [f"given, then made: {one}" for one in shown.captions],
                  scale=max(1, SHOWN_PIXELS // 2 // shown.frames_BTHWC.shape[2]))
    results = {"model": source, **found, "sample_settings": dataclasses.asdict(config.sample),
               "seconds": round(time.perf_counter() - began, 1)}
    write_text(workdir / "ti2v.json", json.dumps(results, indent=1))
    names = tuple(found["real_clips"])
    print(table([("samples", *(f"{found['samples'][name]:.3f}" for name in names),
                  f"{found['psnr_of_the_first_frame']:.1f}"),
                 ("real clips", *(f"{found['real_clips'][name]:.3f}" for name in names), "")],
                (f"{found['clips']} given first frames; after them", *names, "the first frame, PSNR in dB")))
    print(f"\nwritten to {workdir}: ti2v.json, ti2v.png")


def evaluate_camera(config: Config, workdir: Path) -> None:
    """How well samples follow a camera: WORKDIR/camera.json and a picture of one prompt seen by four cameras.

    Raises UserError for a model that follows none, and for data without cameras.
    """
    began = time.perf_counter()
    if not (config.data.source == "digits" and config.data.camera):
        raise UserError("evaluate.task=camera: needs data whose cameras can be read back; set data.camera=true")
    system, params, source, _ = load_model(config, workdir)
    if "control" not in params:
        raise UserError(f"evaluate.task=camera: {source} follows no camera; train a control module beside it with "
                        "--config.train.target=control")
    print(f"model: {source}")
    captions, labels = prompts_to_read(config)
    assert labels is not None
    results = {"model": source, **camera.measure(system, params, captions, labels), "prompts": len(captions),
               "sample_settings": dataclasses.asdict(config.sample), "seconds": round(time.perf_counter() - began, 1)}
    write_text(workdir / "camera.json", json.dumps(results, indent=1))
    contact_sheet(workdir / "camera.png", camera.shown_moves(system, params, captions[0]), camera.SHOWN, scale=3)
    rows = [(f"samples, {length} x the training length", figures)
            for length, figures in results["training_lengths"].items()]
    rows += [("samples, turning in the middle", results["turning_in_the_middle"]),
             ("real clips", results["real_clips"])]
    names = tuple(results["real_clips"]["intervals"])
    print(table([(what, *(f"{figures[name]:.4f} ± {figures['intervals'][name]:.4f}" for name in names))
                 for what, figures in rows], (f"{len(captions)} test prompts", *names)))
    alone = results["backbone_alone"]
    print("\nwithout a camera, where nothing should change: " + ", ".join(
        f"{name} {alone[name]:.4f} ± {alone['intervals'][name]:.4f}" for name in alone["intervals"]))
    print("real clips are likelier with their own camera than with another one's: {:.3f} ± {:.3f}".format(
        results["right_camera_preferred"], results["intervals"]["right_camera_preferred"]))
    print(f"written to {workdir}: camera.json, camera.png")


def evaluate_video(config: Config, workdir: Path) -> None:
    """Exact likelihood of evaluate.video, its way to z and back and, with evaluate.other, what lies between the two;
    files in WORKDIR/inspected."""
    began, settings = time.perf_counter(), config.evaluate
    frames_THWC, left_out = read_given(config, settings.video)
    other_THWC = read_given(config, settings.other)[0] if settings.other else None
    if other_THWC is not None:
        likelihood.check_pair(config, frames_THWC, other_THWC)
    check_given(config, sampling_mesh(config, min(settings.draws, settings.batch_size)), len(frames_THWC))
    system, params, source, _ = load_model(config, workdir)
    print(f"model: {source}")
    with ProgressBar("inspect", 3 if settings.other else 2, unit="part", compiles=True) as progress:
        found = likelihood.likelihood(system, params, frames_THWC, settings.caption, settings.draws)
        progress.update()
        trip = likelihood.round_trip(system, params, frames_THWC, settings.caption)
        progress.update()
        if other_THWC is not None:
            other_caption = settings.other_caption or settings.caption
            between = likelihood.interpolate(system, params, (frames_THWC, other_THWC),
                                             (settings.caption, other_caption), settings.steps)
            progress.update()
    path = workdir / "inspected" / inspected_name(settings, frames_THWC)
    draw_surprise(path.with_name(f"{path.name}_surprise.png"), system, frames_THWC, found, settings.caption)
    scale = max(1, SHOWN_PIXELS // frames_THWC.shape[1])
    shown = frames_THWC[:len(trip.frames_THWC)]
    contact_sheet(path.with_name(f"{path.name}_round_trip.png"),
                  np.stack([shown, trip.codec_THWC, trip.frames_THWC]),
                  ["given", "codec there and back", "through z and back, denoised"], scale=scale)
    facts = {"model": source, "video": settings.video, "caption": settings.caption, "frames": len(frames_THWC),
             "frames_left_out": left_out, **likelihood.facts_of(found, config),
             "round_trip": {"latents_relative_error": trip.latents_error, "z_mean_square": trip.z_mean_square,
                            "psnr": psnr(shown, trip.frames_THWC),
                            "psnr_of_codec_alone": psnr(shown, trip.codec_THWC)}}
    if other_THWC is not None:
        facts["interpolation"] = {"other": settings.other, "other_caption": other_caption, "steps": settings.steps}
        _write_interpolation(path.with_name(f"{path.name}_to_{Path(settings.other).stem}.mp4"), config, between, scale)
    facts["seconds"] = round(time.perf_counter() - began, 1)
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=1))
    _print_video(facts, path)


def inspected_name(settings: Evaluate, frames_THWC: np.ndarray) -> str:
    """What the files of a video's likelihood are called: another video of the same name has others."""
    shown = f"{zlib.crc32(settings.caption.encode(), zlib.crc32(frames_THWC.tobytes())):08x}"
    return f"{Path(settings.video).stem}_{shown}"


def draw_surprise(
    path: Path, system: System, frames_THWC: np.ndarray, found: likelihood.Likelihood, caption: str
) -> None:
    """A PNG of three rows: the frames, each token's bits per dimension over them, and what the caption adds."""
    stride = system.config.codec.time_stride
    titles = [f"frame {index}" for index in range(0, len(frames_THWC), stride)]
    draw_heat_maps(path, frames_THWC[::stride], titles, likelihood.surprise_maps(found, system.token_grid),
                   likelihood.headline(found, caption))


def _write_interpolation(path: Path, config: Config, videos_KTHWC: np.ndarray, scale: int) -> None:
    """An MP4 of the videos side by side and a contact sheet."""
    labels = [f"{share:.2f}" for share in np.linspace(0, 1, len(videos_KTHWC))]
    write_mp4(path, np.concatenate(list(videos_KTHWC), axis=2), config.text.fps or 1, scale)
    contact_sheet(path.with_suffix(".png"), videos_KTHWC, labels, scale=max(1, scale // 2))


def _print_video(facts: dict[str, Any], path: Path) -> None:
    trip, per_frame = facts["round_trip"], facts["log_likelihood_nats_per_frame"]
    rows = [("log-likelihood, nats", f"{facts['log_likelihood_nats']:.1f}"),
            ("bits per dimension", f"{facts['bits_per_dim']:.4f}"),
            ("log-likelihood of each latent frame", " ".join(f"{value:.0f}" for value in per_frame)),
            ("what the caption adds, nats", f"{facts['caption_fit_nats']:+.1f}"),
            ("to z and back: relative error of latents", f"{trip['latents_relative_error']:.1e}"),
            ("to z and back, denoised: PSNR of frames", f"{trip['psnr']:.1f} dB"),
            ("the codec alone", f"{trip['psnr_of_codec_alone']:.1f} dB")]
    print(table(rows, (f"{facts['frames']} frames", facts["caption"])))
    print(f"\nwritten to {path.parent}: {', '.join(sorted(p.name for p in path.parent.glob(path.name + '*')))}")


def classify_by_likelihood(config: Config, workdir: Path) -> None:
    """The most likely captions of the first evaluate.clips test clips: WORKDIR/classified.json."""
    began = time.perf_counter()
    system, params, source, _ = load_model(config, workdir)
    print(f"model: {source}")
    labels_B3, frames_BTHWC = real_clips(system, config.evaluate.clips)
    if labels_B3 is None:
        raise UserError(f"evaluate.task=classify: needs clips of moving digits, not data.source={config.data.source}")
    scores = classify.score_captions(system, params, frames_BTHWC, config.evaluate.every_caption)
    chosen_B3 = classify.choose(scores)
    right_B3 = chosen_B3 == labels_B3
    scored = float(np.isfinite(scores).reshape(len(labels_B3), -1).sum(axis=1).mean())
    accuracy = {**dict(zip(ATTRIBUTES, map(float, right_B3.mean(axis=0)))),
                "all": float(right_B3.all(axis=1).mean())}
    results = {"model": source, "clips": len(labels_B3), "captions": int(np.prod(classify.CHOICES)),
               "captions_scored_per_clip": scored, "accuracy": accuracy, "chosen": chosen_B3.tolist(),
               "labels": labels_B3.tolist(), "seconds": round(time.perf_counter() - began, 1)}
    write_text(workdir / "classified.json", json.dumps(results, indent=1))
    print(table([[f"{share:.3f}" for share in accuracy.values()]], tuple(accuracy)))
    print(f"\nof {len(labels_B3)} test clips, {scored:.1f} of {results['captions']} captions scored for each, in "
          f"{results['seconds']} s: {workdir / 'classified.json'}")


def evaluate_quality(config: Config, workdir: Path) -> None:
    """Measure evaluate.folder, or the model's codec on evaluate.reference, and write WORKDIR/quality.json.

    Raises UserError where some videos can't be read, once the others are measured.
    """
    settings = config.evaluate
    reference = folder_of_videos(Path(settings.reference), settings.fps) if settings.reference else None
    sets = [folder_of_videos(Path(name.strip()), settings.fps) for name in settings.folder.split(",") if name.strip()]
    if not sets and reference is not None:
        system, _, source, _ = load_model(config, workdir)
        reference, coded = quality.codec_pair(system, source, reference)
        sets = [coded]
    prompts = vbench.read_prompts(settings.vbench) if settings.vbench else {}
    results, missing = quality.compare(sets, reference, prompts, settings.frames)
    facts = {"sets": results, "fvd_frames": settings.frames, "fps": settings.fps or "the videos' own",
             "reference": settings.reference, "missing": missing}
    write_text(workdir / "quality.json", json.dumps(facts, indent=1))
    print(table(*quality.rows_of(results)))
    for line in missing:
        print(line)
    print(f"\nwritten: {workdir / 'quality.json'}", flush=True)
    quality.check_all_were_read(results)
