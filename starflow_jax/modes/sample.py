"""--mode=sample: prompts -> videos; an MP4, a contact sheet and a JSON file for each.

A list of prompts that was interrupted goes on, and several processes share one.
"""

import contextlib
import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from starflow_jax.config import Config, UserError
from starflow_jax.io.files import check_writable
from starflow_jax.io.progress import ProgressBar, table
from starflow_jax.model.own_settings import check_there
from starflow_jax.model.store import load_model, system_checksum, weights_of
from starflow_jax.sampling.api import Model
from starflow_jax.sampling.files import made_by_others, named_files, output_folder
from starflow_jax.sampling.given import given_frames
from starflow_jax.sampling.identity import Recipe, checksum_of_given
from starflow_jax.sampling.memory import check_videos
from starflow_jax.sampling.mesh import on_mesh, sampling_mesh
from starflow_jax.sampling.offload import encode_ahead, takes_turns, with_parts_aside, with_tiles
from starflow_jax.sampling.origin import origin_of
from starflow_jax.sampling.record import read_record
from starflow_jax.sampling.requests import Request, read_requests, rewritten, share_of, with_length
from starflow_jax.sampling.sizes import at_asked_size, resized, videos_together
from starflow_jax.sampling.videos import Videos
from starflow_jax.text.rewrite import rewriter

GOODBYE = 2.0  # seconds


def sample(config: Config, workdir: Path) -> None:
    """Make config.sample's videos with the workdir's model, or with the one in the package.

    Raises UserError for what can't be, and where a video failed, once the others are made.
    """
    if config.sample.session:
        return _replay(config, workdir)
    requests = read_requests(config)  # what can't be is found before anything is loaded
    if config.sample.rewrite:
        rewriter(config.sample.rewrite)
    model_config, config = config, at_asked_size(config)
    known_THWC = given_frames(config)
    config = with_length(config, known_THWC, extends=bool(config.sample.video))
    mesh = sampling_mesh(config, videos=videos_together(len(requests), config.sample.batch_size))
    process, together = jax.process_index(), len({device.process_index for device in mesh.devices.flat}) > 1
    if not together:
        requests = share_of(requests, config.sample, process, jax.process_count())
    model_config, config = with_tiles(model_config), with_tiles(config)
    check_there(model_config, workdir)
    videos_at_once = videos_together(len(requests), config.sample.batch_size)
    check_videos(config, mesh, videos_at_once, kept=len(requests) if config.sample.keep else 0)
    failed: list[tuple[Request, Exception]] = []
    encoded: dict[str, np.ndarray] = {}
    folder = output_folder(config, workdir)
    try:
        given = checksum_of_given(known_THWC, config.sample.camera)
        recipe = Recipe(config, "", system_checksum(config, workdir), given)
        if jax.process_count() == 1:  # several load a model together, and wait for one that has left
            check_writable(folder, "sample.output", named_files(recipe, folder, requests))
            if any(request.given_name for request in requests) and folder.exists():
                _check_names(dataclasses.replace(recipe, weights=weights_of(model_config, workdir)), folder, requests)
        with on_mesh(mesh):
            if config.sample.offload:
                requests = rewritten(config, requests, lambda *failure: failed.append(failure), together)
                encoded = encode_ahead(config, workdir, [request.prompt for request in requests])
            loaded = load_model(model_config, workdir, encoder=not encoded)
            if takes_turns(config.sample):
                loaded = with_parts_aside(loaded, config.sample)
            system = dataclasses.replace(resized(loaded.system, config), encoded=encoded)
            print(f"model: {loaded.source}")
            recipe = dataclasses.replace(recipe, weights=loaded.weights)
            videos = Videos(system, loaded.params, known_THWC, folder, recipe,
                            origin_of(loaded, system, recipe, videos_at_once), together)
            videos.failed += failed
            try:
                videos.make(requests)
            except KeyboardInterrupt:
                _report_interrupted(videos, len(requests))
                raise
    except BaseException:
        if not together:  # the others go on, whatever happens here
            _wait_for_the_others()
        raise
    _wait_for_the_others()
    _report(videos)


def _replay(config: Config, workdir: Path) -> None:
    """Make the video of sample.session again."""
    read_record(config.sample.session)  # what can't be is found before anything is loaded
    path = output_folder(config, workdir) / f"{Path(config.sample.output_file or config.sample.session).stem}.mp4"
    check_writable(path.parent, "sample.output", [path.name, path.with_suffix(".json").name])
    for there in (path, path.with_suffix(".json")):
        if there.exists() and not config.sample.overwrite:
            raise UserError(f"{there}: is there already; name another --config.sample.output, or replace it with "
                            "--config.sample.overwrite=true")
    check_there(config, workdir)
    mesh = sampling_mesh(config, videos=1)
    with on_mesh(mesh):
        loaded = load_model(config, workdir)
    print(f"model: {loaded.source}")
    session = Model(loaded.system, loaded.params, loaded.source, loaded.weights, mesh).replay(config.sample.session)
    with ProgressBar("replay", session.asked, unit="frame", compiles=True) as progress, session:
        for frames_THWC in session:
            progress.update(len(frames_THWC))
    try:
        print(session.save(path))
    except OSError as error:
        raise UserError(f"sample.output={path}: can't be written to ({error})") from error


def _check_names(recipe: Recipe, folder: Path, requests: list[Request]) -> None:
    """Raises UserError where another run's files have the names that were given, before the model is loaded."""
    for error in made_by_others(recipe, folder, requests).values():
        raise error


def _wait_for_the_others() -> None:
    """Until they are done, or lost. The first process, which the others are connected to, leaves last."""
    if jax.process_count() == 1:
        return
    first, devices = jax.process_index() == 0, jax.devices()
    for _ in range(2 if first else 1):  # to the second call the others don't come: it returns once they have left
        with contextlib.suppress(multihost_utils.ProcessFailureError), multihost_utils.live_devices(devices):
            pass
    if first:
        time.sleep(GOODBYE)  # the others hear that they may go only a moment after they count as gone
    else:
        jax.distributed.shutdown()


def _report_interrupted(videos: Videos, asked: int) -> None:
    """What is there; the same command makes the rest."""
    if videos.rows:
        print(table(videos.rows, videos.headers))
    for path, frames in videos.cut_short:
        print(f"{path}: cut short after {frames} frames")
    print(f"interrupted: {len(videos.rows)} of {asked} videos are in {videos.folder}; the same command makes the rest",
          flush=True)


def _report(videos: Videos) -> None:
    if videos.rows:
        print(table(videos.rows, videos.headers))
    if len(videos.rows) > 1:
        print(f"all in {videos.folder}")
    lines = []
    for request, error in videos.failed:
        name, line = f"{request.prompt!r}, seed {request.seed}: ", str(error).splitlines()[0]
        lines.append(line if line.startswith(name) else name + line)
    for line in lines[1:]:
        print(f"failed: {line}")
    if lines:
        raise UserError(lines[0] + (f" (and {len(lines) - 1} more videos, listed above)" if lines[1:] else ""))
