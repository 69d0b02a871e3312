"""From recorded clips to training batches: shuffled, mixed, sharded, resumable to the exact example.

A batch of a source of several sizes (examples.py) is of one of them, the larger ones more often.
The n-th example of a seed is the same whatever the number of processes, workers and reading threads.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from starflow_jax.config import Data, UserError
from starflow_jax.data.batch import Batch
from starflow_jax.data.examples import ClipLength, Example, MakeExample, Source, TextInput, parts_of
from starflow_jax.data.raw.tasks import check_processes


def train_batches(
    source: Source,
    data: Data,
    length: ClipLength,
    text: TextInput,
    *,
    batch_size: int,
    image_batch_size: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
    read_threads: int = 2,
) -> "BatchIterator":
    """Endless batches of numpy arrays; every epoch is shuffled differently.

    Videos are as long as `length.with_one_more`, with drop_first_B; images have one frame, without it.

    data: of its settings the probabilities (those of captions and dropped first frames hold for each example; that of
    images is their share of the batches, spread evenly, at the same steps on all processes) and `workers`, the
    processes that decode, for which `text` is pickled. batch_size and image_batch_size are global: share=(i, n) gets
    the i-th of n equal parts of the same batch.

    Raises UserError for settings that don't fit each other or the source.
    """
    if not 0 <= seed < 2**31:
        raise UserError(f"seed is {seed}: must be between 0 and {2**31 - 1}")
    check_processes("data.workers", data.workers)
    make = MakeExample(data, length, text)
    streams, weights = [], []
    if data.image_probability < 1:
        videos = parts_of(source, "videos")
        for part in videos:
            _check_frames(part, length)
        streams.append(_mixed(videos, make.video, make.collate, _local_size(batch_size, share), 2 * seed, share))
        weights.append(1 - data.image_probability)
    if data.image_probability > 0:
        images, size = parts_of(source, "images"), _local_size(image_batch_size, share)
        streams.append(_mixed(images, make.image, make.collate, size, 2 * seed + 1, share))
        weights.append(data.image_probability)
    return BatchIterator(grain.MapDataset.mix(streams, weights), read_threads, data.workers)


def _mixed(
    parts: Sequence[Source],
    make_example: Callable[[dict[str, Any], np.random.Generator], Example],
    collate: Callable[[Sequence[Example]], Batch],
    local_size: int,
    seed: int,
    share: tuple[int, int],
) -> grain.MapDataset[Batch]:
    """This process's share of the batches: as many of each part of the source as its share of the examples."""
    seeds = [seed, *np.random.SeedSequence(seed).generate_state(len(parts) - 1).tolist()]
    streams = []
    for part, part_seed in zip(parts, seeds):
        records = grain.MapDataset.source(part).seed(part_seed).shuffle().repeat()
        batches = records.random_map(make_example).batch(local_size, drop_remainder=True, batch_fn=collate)
        # Part i, i + n, i + 2n ...: the i-th slice of each global batch.
        streams.append(batches[share[0]::share[1]])
    return grain.MapDataset.mix(streams, [len(part) for part in parts])


class BatchIterator(Iterator[Batch]):
    """Batches in order, read ahead. Its state is how many were taken, so that a run can resume with another number of
    workers or threads."""

    def __init__(self, batches: grain.MapDataset[Batch], read_threads: int, workers: int) -> None:
        self._all, self._read_threads, self._workers = batches, read_threads, workers
        self._ahead: grain.DatasetIterator[Batch] | None = None
        self.set_state({"batches": 0})

    def __next__(self) -> Batch:
        if self._ahead is None:
            self._ahead = self._open()
        batch = next(self._ahead)
        self._taken += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """JSON-serialisable."""
        return {"batches": self._taken}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue with the batch after the last one that was taken before `get_state` gave `state`. Raises UserError
        for what it never gives."""
        taken = state.get("batches") if isinstance(state, dict) else None
        if type(taken) is not int or not 0 <= taken < 2**40:
            raise UserError(f"a checkpoint's place in the data is {str(state)[:80]!r}, which is none; delete the "
                            "newest checkpoint, and the one before it is used")
        self.close()
        self._taken = taken

    def close(self) -> None:
        """Stop reading ahead and end its processes; the next batch would start them again."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _open(self) -> grain.DatasetIterator[Batch]:
        options = grain.ReadOptions(num_threads=self._read_threads, prefetch_buffer_size=8)
        batches = self._all[self._taken:].to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which a notebook never parses
            processes = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=4)
            batches = batches.mp_prefetch(processes)
        return iter(batches)


def _local_size(batch_size: int, share: tuple[int, int]) -> int:
    index, count = share
    if not 0 <= index < count:
        raise UserError(f"process {index} of {count}: count from 0 to {count - 1}")
    if batch_size < 1 or batch_size % count:
        raise UserError(f"a global batch of {batch_size} cannot be shared by {count} processes: use a multiple of "
                        f"{count}")
    return batch_size // count


def _check_frames(source: Source, length: ClipLength) -> None:
    first, stride = source[0], length.latent_stride
    recorded = 1 + (len(first["latents"]) - 1) * stride if "latents" in first else len(first["frames"])
    if recorded < length.with_one_more.pixel_frames:
        raise UserError(f"pixel_frames is {length.pixel_frames}: with {stride} more for examples without their first "
                        f"latent that is longer than the recorded {recorded} frames; use at most {recorded - stride}, "
                        "or record longer clips")
