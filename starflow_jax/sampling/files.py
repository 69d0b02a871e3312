"""The files of one sampled video (MP4, contact sheet or timeline, JSON), what they are called, and whose they are."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from starflow_jax.config import Config, UserError
from starflow_jax.io.files import write_text
from starflow_jax.io.pictures import contact_sheet
from starflow_jax.io.video import write_mp4
from starflow_jax.sampling.batches import Made
from starflow_jax.sampling.identity import Recipe, facts_of, plain
from starflow_jax.sampling.origin import Origin
from starflow_jax.sampling.requests import Request

Row = tuple[object, ...]  # of the table that sampling prints
SHOWN_PIXELS = 240  # small models' frames are enlarged to about this height


@dataclasses.dataclass(frozen=True)
class Files:
    """Of one video."""

    video: Path
    details: Path  # the JSON: there, without an outcome, before the video is, and again once all else is
    picture: Path  # the contact sheet, or a stream's timeline


def output_folder(config: Config, workdir: Path) -> Path:
    """Where the videos are written."""
    settings = config.sample
    return Path(settings.output_file).parent if settings.output_file else Path(settings.output or workdir / "samples")


def name_of(recipe: Recipe, request: Request) -> str:
    """That was given, or one that no other video has; without an ending."""
    stream = "_stream" if recipe.config.sample.stream else ""
    return request.given_name or f"{request.slug}_{recipe.identity(request)[:8]}{stream}"


def names_there(recipe: Recipe, folder: Path) -> set[str]:
    """Of the videos whose JSON is there."""
    return {path.name.removesuffix(".json") for path in _beside(recipe, folder).glob("*.json")}


def files_of(recipe: Recipe, folder: Path, request: Request) -> Files:
    """Under the video's name."""
    settings, name, beside = recipe.config.sample, name_of(recipe, request), _beside(recipe, folder)
    picture = beside / f"{name}.{'timeline.png' if settings.stream else 'png'}"
    return Files(folder / f"{name}.mp4", beside / f"{name}.json", picture)


def named_files(recipe: Recipe, folder: Path, requests: Sequence[Request]) -> list[str]:
    """Names, in the folder, of the files of a video whose name was given; none where none was."""
    given = next((request for request in requests if request.given_name), None)
    return [] if given is None or recipe.config.sample.vbench else [
        path.name for path in dataclasses.astuple(files_of(recipe, folder, given))]


def _beside(recipe: Recipe, folder: Path) -> Path:
    """Where all but the videos lies. VBench takes the extension of any one file for that of all in the folder, which
    must hold only videos."""
    return folder.with_name(f"{folder.name}_details") if recipe.config.sample.vbench else folder


def made_by_others(recipe: Recipe, folder: Path, requests: Sequence[Request]) -> dict[Request, UserError]:
    """Requests under a given name that files of other videos have already, and what to say of each; none with
    sample.overwrite."""
    if recipe.config.sample.overwrite:
        return {}
    found, own = {}, dict[Path, set[str]]()
    named = [(request, files_of(recipe, folder, request)) for request in requests if request.given_name]
    for request, files in named:  # of the seeds from which the likeliest is kept, each may have the name
        own.setdefault(files.video, set()).add(recipe.identity(request))
    for request, files in named:
        there = next((path for path in dataclasses.astuple(files) if path.exists()), None)
        if there and facts_of(files.details).get("identity") not in own[files.video]:
            found[request] = UserError(
                f"{there}: is there, of another run (another prompt, seed, setting or model); name another "
                "--config.sample.output, or replace it with --config.sample.overwrite=true")
    return found


def shown_scale(height: int) -> int:
    """The factor by which frames of this height are enlarged in a file."""
    return max(1, SHOWN_PIXELS // height)


def file_rate(config: Config) -> int:
    """Frames per second of a file."""
    return config.sample.fps or config.text.fps or 1


def begin(files: Files, recipe: Recipe, origin: Origin, request: Request) -> None:
    """Write the JSON that says whose the files are: a run that is interrupted knows them again."""
    write_text(files.details, json.dumps(described(recipe, origin, request), indent=1))


def write_video(files: Files, recipe: Recipe, origin: Origin, made: Made, log_likelihood: float) -> Row:
    """Write the files of one video, `log_likelihood` in nats; returns its row of the table."""
    frames, scale = made.frames_THWC, shown_scale(made.frames_THWC.shape[1])
    begin(files, recipe, origin, made.request)
    write_mp4(files.video, frames, file_rate(recipe.config), scale)
    contact_sheet(files.picture, frames[None], [made.request.prompt], scale=max(1, scale // 2))
    facts = describe(recipe, origin, made, log_likelihood)
    write_text(files.details, json.dumps(facts, indent=1))
    return video_row(files.video, facts)


def video_row(path: Path, facts: dict[str, Any]) -> Row:
    """(path, bits per dimension, solver steps, how they ended, seconds) of a video, from what its JSON file says."""
    return (str(path), f"{facts['bits_per_dim']:.3f}", sum(facts["deep_steps_per_block"]), facts["outcome"],
            f"{facts['seconds']:.1f}")


def describe(recipe: Recipe, origin: Origin, made: Made, log_likelihood: float) -> dict[str, Any]:
    """What the JSON beside a video says."""
    request, clips, index = made.request, made.clips, made.index
    return {
        **described(recipe, origin, request),
        "frames": int(clips.frames_BTHWC.shape[1]),
        "log_likelihood_nats": log_likelihood,
        "log_likelihood_of": f"the sampled latents with noise {recipe.config.model.noise_std}, given the prompt",
        "bits_per_dim": -log_likelihood / clips.noisy_BNhwC[index].size / np.log(2),
        **clips.solved.facts(index),
        "certificate": None if clips.certificate_B is None else float(clips.certificate_B[index]),
        "seconds": round(made.seconds, 3),
    }


def described(recipe: Recipe, origin: Origin, request: Request) -> dict[str, Any]:
    """What it says of every video, a stream's too."""
    return {"prompt": request.prompt, "prompt_given": request.given or request.prompt, "seed": request.seed,
            "identity": recipe.identity(request), "settings": plain(recipe.config.sample), **dataclasses.asdict(origin)}
