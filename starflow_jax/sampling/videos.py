"""The videos of a list of prompts: what is there already is not made again, and one that fails stops no other."""

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from starflow_jax.config import UserError
from starflow_jax.io.files import sync, write_text
from starflow_jax.io.progress import ProgressBar
from starflow_jax.io.video import growing_mp4
from starflow_jax.model.codec import frame_size
from starflow_jax.model.parameters import Params
from starflow_jax.model.system import System
from starflow_jax.sampling.batches import (
    Made,
    filled,
    for_each,
    in_batches,
    log_likelihoods,
    make_batch,
    most_likely,
)
from starflow_jax.sampling.files import (
    Files,
    Row,
    begin,
    described,
    file_rate,
    files_of,
    made_by_others,
    name_of,
    names_there,
    shown_scale,
    video_row,
    write_video,
)
from starflow_jax.sampling.finite import check_finite
from starflow_jax.sampling.identity import Recipe, facts_of
from starflow_jax.sampling.origin import Origin
from starflow_jax.sampling.requests import Request, rewritten, unknown_word_lines
from starflow_jax.sampling.sizes import videos_together
from starflow_jax.sampling.solved import solved
from starflow_jax.sampling.stream import stream_clips
from starflow_jax.sampling.timeline import Timeline, draw_timeline
from starflow_jax.sharding import as_first_process_has_it, fetch

WHOLE = ("video", "bits/dim", "solver steps", "outcome", "seconds")
STREAMED = ("video", "outcome", "seconds to the first frame", "frames per second")
FAILURES = (UserError, jax.errors.JaxRuntimeError)


class Videos:
    """Makes videos of one system into a folder. `rows` has a table's row for each that is there, `failed` the others.

    together: all processes make the same videos, on a mesh over all of them; the first one writes them, and says which
    of them are there.
    """

    def __init__(self, system: System, params: Params, known_THWC: np.ndarray | None, folder: Path, recipe: Recipe,
                 origin: Origin, together: bool = False) -> None:
        self.system, self.params, self.known_THWC = system, params, known_THWC
        self.folder, self.recipe, self.origin, self.together = folder, recipe, origin, together
        self.writes = not together or jax.process_index() == 0
        self.rows: list[Row] = []
        self.failed: list[tuple[Request, Exception]] = []
        self.cut_short: list[tuple[Path, int]] = []  # streams that were interrupted, and their frames until then
        self._together = 1  # how many videos are made together, whatever is left to make

    @property
    def headers(self) -> tuple[str, ...]:
        """Of the rows."""
        return STREAMED if self.system.config.sample.stream else WHOLE

    def make(self, requests: Sequence[Request]) -> None:
        """Those that are not there yet. Raises UserError where nothing could be made, all for one reason."""
        config = self.system.config
        self._together = videos_together(len(requests), config.sample.batch_size)
        todo = self._without_those_made_before(requests)
        todo = rewritten(config, todo, lambda request, error: self.failed.append((request, error)), self.together)
        for line in unknown_word_lines(config, todo):
            print(f"warning: {line}")
        if config.sample.stream:
            self._stream_all(todo)
        else:
            self._make_all(todo)
        reasons = {str(error) for _, error in self.failed}
        if not self.rows and len(reasons) == 1:
            raise UserError(reasons.pop().splitlines()[0])

    def _without_those_made_before(self, requests: Sequence[Request]) -> list[Request]:
        settings, made = self.system.config.sample, {}
        others = made_by_others(self.recipe, self.folder, requests)
        self.failed += others.items()
        there = names_there(self.recipe, self.folder)
        for request in requests:
            # A name that was given may be that of a folder's file, or come back from the disk in another form.
            if not request.given_name and name_of(self.recipe, request) not in there:
                continue
            files = self._files(request)
            facts = facts_of(files.details)
            if "outcome" in facts and facts.get("identity") == self.recipe.identity(request) and files.video.exists():
                made[request] = facts
        enough = {request.prompt for request in made}
        if settings.keep:  # a prompt of which fewer were kept is made anew as a whole
            prompts = [request.prompt for request in made]
            enough = {prompt for prompt in enough if prompts.count(prompt) >= settings.keep}
            made = {request: facts for request, facts in made.items() if request.prompt in enough}
        for request, facts in made.items():
            path = self._files(request).video
            self.rows.append(_stream_row(path, facts) if settings.stream else video_row(path, facts))
        if made:
            print(f"{len(made)} of {len(requests)} videos are there already, of the same model and settings; delete "
                  "one to make it again")
        todo = [request not in others and not (request.prompt in enough if settings.keep else request in made)
                for request in requests]
        if self.together:
            todo = as_first_process_has_it(todo)
        return list(itertools.compress(requests, todo))

    def _files(self, request: Request) -> Files:
        return files_of(self.recipe, self.folder, request)

    def _make_all(self, requests: Sequence[Request]) -> None:
        """Whole clips, written batch by batch, or once the most likely of each prompt are known."""
        config = self.system.config
        made: list[Made] = []
        likelihoods: list[float] = []
        with ProgressBar("samples", len(requests), unit="video", compiles=True) as progress:
            for batch in in_batches(requests, self._together):
                for part in self._batches_that_work(batch, self._together):
                    of_batch = log_likelihoods(self.system, self.params, part)
                    part, of_batch = self._finite(part, of_batch)
                    if config.sample.keep:
                        made, likelihoods = [*made, *part], [*likelihoods, *of_batch]
                    else:
                        self._write(part, of_batch)
                progress.update(len(batch))
        kept = most_likely(made, likelihoods, config.sample.keep)
        self._write([made[index] for index in kept], [likelihoods[index] for index in kept])

    def _batches_that_work(self, batch: Sequence[Request], size: int) -> list[list[Made]]:
        """The batch, filled up to `size`; where it fails, each of its videos alone, but for those that fail alone too.
        """
        try:
            return [make_batch(self.system, self.params, batch, size, self.known_THWC)]
        except FAILURES as error:
            if size > 1:
                return [part for request in batch for part in self._batches_that_work([request], 1)]
            self.failed.append((batch[0], error))
            return []

    def _finite(self, made: Sequence[Made], likelihoods: Sequence[float]) -> tuple[list[Made], list[float]]:
        """Those that are finite; the others have failed."""
        kept: list[tuple[Made, float]] = []
        for video, likelihood in zip(made, likelihoods):
            try:
                video.check()
                kept.append((video, likelihood))
            except UserError as error:
                self.failed.append((video.request, error))
        return [video for video, _ in kept], [likelihood for _, likelihood in kept]

    def _write(self, made: Sequence[Made], likelihoods: Sequence[float]) -> None:
        if self.writes:
            with self._writing():
                self.rows += [write_video(self._files(video.request), self.recipe, self.origin, video, likelihood)
                              for video, likelihood in zip(made, likelihoods)]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"sample.output={self.folder}: can't be written to ({error})") from error

    def _stream_all(self, requests: Sequence[Request]) -> None:
        """Each batch's videos grow on disk while they are made; a timeline of the pipeline is drawn beside them."""
        for batch in in_batches(requests, self._together):
            try:
                self._stream_batch(batch)
            except FAILURES as error:
                self.failed += [(request, error) for request in batch]

    def _stream_batch(self, batch: Sequence[Request]) -> None:
        system, settings = self.system, self.system.config.sample
        scale = shown_scale(frame_size(system.config)[0])
        files = [self._files(request) for request in batch] if self.writes else []
        timeline, began, first, frames = Timeline(), time.perf_counter(), 0.0, 0
        whole = filled(batch, self._together)
        prompts, seeds = [request.prompt for request in whole], [request.seed for request in whole]
        with self._writing(), contextlib.ExitStack() as opened, ProgressBar(
                "stream", settings.frames or system.pixel_frames, unit="frame", compiles=True) as progress:
            opened.callback(timeline.close)
            for one, request in zip(files, batch):
                begin(one, self.recipe, self.origin, request)
            writers = [opened.enter_context(contextlib.closing(growing_mp4(one.video, file_rate(system.config), scale)))
                       for one in files]
            try:
                for part_BTHWC in stream_clips(system, self.params, prompts, seeds, settings,
                                               for_each(self.known_THWC, len(whole)), timeline):
                    first = first or time.perf_counter() - began
                    frames += part_BTHWC.shape[1]
                    for writer, part_THWC in zip(writers, part_BTHWC):
                        writer.write(part_THWC)
                    progress.update(part_BTHWC.shape[1])
            except KeyboardInterrupt:
                self.cut_short += [(one.video, frames) for one in files]
                raise
        seconds = time.perf_counter() - began
        events, ended = timeline.close(), solved(timeline.deep_reports, timeline.shallow_reports)
        finite_B = np.all([fetch(part_B) for part_B in timeline.finite], axis=0)
        for index, (one, request) in enumerate(zip(files, batch)):
            try:
                ended.check(index, f"{request.prompt!r}, seed {request.seed}")
                check_finite(finite_B[index], f"{request.prompt!r}, seed {request.seed}")
            except UserError as error:
                one.video.unlink()
                one.details.unlink()
                self.failed.append((request, error))
                continue
            facts = {**described(self.recipe, self.origin, request), "frames": frames, **ended.facts(index),
                     "seconds": round(seconds, 3), "seconds_to_first_frame": round(first, 3),
                     "timeline": [dataclasses.asdict(event) for event in events]}
            sync(one.video)
            draw_timeline(one.picture, events)
            write_text(one.details, json.dumps(facts, indent=1))
            self.rows.append(_stream_row(one.video, facts))


def _stream_row(path: Path, facts: dict) -> Row:
    return (str(path), facts["outcome"], f"{facts['seconds_to_first_frame']:.2f}",
            f"{facts['frames'] / facts['seconds']:.2f}")
