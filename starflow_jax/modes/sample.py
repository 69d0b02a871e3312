"""--mode=sample: prompts -> videos; an MP4, a contact sheet and a JSON file for each."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from starflow_jax.config import Config
from starflow_jax.io.files import write_text
from starflow_jax.io.progress import ProgressBar, table
from starflow_jax.io.video import growing_mp4
from starflow_jax.model.codec import frame_size
from starflow_jax.model.parameters import Params
from starflow_jax.model.store import load_model
from starflow_jax.model.system import System
from starflow_jax.sampling.batches import Made, for_each, generate, in_batches, most_likely
from starflow_jax.sampling.files import file_rate, shown_scale, write_video
from starflow_jax.sampling.generate import log_likelihood
from starflow_jax.sampling.given import given_frames
from starflow_jax.sampling.requests import Request, read_requests, rewritten, unknown_word_lines, with_length
from starflow_jax.sampling.sizes import at_asked_size, resized
from starflow_jax.sampling.stream import stream_clips
from starflow_jax.sampling.timeline import Timeline, draw_timeline


def sample(config: Config, workdir: Path) -> None:
    """Make config.sample's videos with the workdir's model, or with the one in the package."""
    requests = read_requests(config)  # what can't be is found before anything is loaded
    model_config, config = config, at_asked_size(config)
    known_THWC = given_frames(config)
    config = with_length(config, known_THWC, extends=bool(config.sample.video))
    requests = rewritten(config, requests)
    for line in unknown_word_lines(config, requests):
        print(f"warning: {line}")
    system, params, source = load_model(model_config, workdir)
    system = resized(system, config)
    folder = Path(config.sample.output or workdir / "samples")
    print(f"model: {source}")
    make = _stream_all if config.sample.stream else _make_all
    rows, headers = make(folder, system, params, requests, known_THWC)
    print(table(rows, headers))
    if len(rows) > 1:
        print(f"all in {folder}")


Table = tuple[list[tuple[object, ...]], tuple[str, ...]]  # rows and headers


def _make_all(folder: Path, system: System, params: Params, requests: list[Request], known_THWC: np.ndarray | None
              ) -> Table:
    """Whole clips, written batch by batch, or once the most likely of each prompt are known."""
    keep = system.config.sample.keep
    made: list[Made] = []
    log_likelihoods: list[float] = []
    rows: list[tuple[object, ...]] = []
    with ProgressBar("samples", len(requests), unit="video", compiles=True) as progress:
        for batch in generate(system, params, requests, known_THWC):
            of_batch = log_likelihood(system, params, batch[0].clips).tolist()
            if keep:
                made, log_likelihoods = [*made, *batch], [*log_likelihoods, *of_batch]
            else:
                rows += [write_video(folder, system.config, *video) for video in zip(batch, of_batch)]
            progress.update(len(batch))
    rows += [write_video(folder, system.config, made[index], log_likelihoods[index])
             for index in most_likely(made, log_likelihoods, keep)]
    return rows, ("video", "bits/dim", "Jacobi steps", "seconds")


def _stream_all(folder: Path, system: System, params: Params, requests: list[Request], known_THWC: np.ndarray | None
                ) -> Table:
    """Each batch's videos grow on disk while they are made; a timeline of the pipeline is drawn beside them."""
    settings = system.config.sample
    rows: list[tuple[object, ...]] = []
    for batch in in_batches(requests, settings.batch_size):
        scale = shown_scale(frame_size(system.config)[0])
        paths = [folder / f"{request.name}_stream.mp4" for request in batch]
        writers = [growing_mp4(path, file_rate(system.config), scale) for path in paths]
        timeline, began, first, frames = Timeline(), time.perf_counter(), 0.0, 0
        prompts, seeds = [request.prompt for request in batch], [request.seed for request in batch]
        with ProgressBar("stream", settings.frames or system.pixel_frames, unit="frame", compiles=True) as progress:
            for part_BTHWC in stream_clips(system, params, prompts, seeds, settings,
                                           for_each(known_THWC, len(batch)), timeline):
                first = first or time.perf_counter() - began
                frames += part_BTHWC.shape[1]
                for writer, part_THWC in zip(writers, part_BTHWC):
                    writer.write(part_THWC)
                progress.update(part_BTHWC.shape[1])
        seconds = time.perf_counter() - began
        events = timeline.close()
        for writer, path, request in zip(writers, paths, batch):
            writer.close()
            facts = {"prompt": request.prompt, "prompt_given": request.given or request.prompt,
                     "seed": request.seed, "frames": frames, "seconds": round(seconds, 3),
                     "seconds_to_first_frame": round(first, 3), "settings": dataclasses.asdict(settings),
                     "timeline": [dataclasses.asdict(event) for event in events]}
            write_text(path.with_suffix(".json"), json.dumps(facts, indent=1))
            draw_timeline(path.with_suffix(".timeline.png"), events)
            rows.append((str(path), f"{first:.2f}", f"{frames / seconds:.2f}"))
    return rows, ("video", "seconds to the first frame", "frames per second")
