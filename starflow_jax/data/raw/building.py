"""Raw input to shards of clips, in two passes of independent tasks: cut every unit, then gather the pieces.

`cut_unit` makes of a unit of the input a folder FOLDER/.parts/NUMBER with its clips by bucket and split, and a
summary; `write_shard` copies clips of many units, in the input's order, into one shard. Both write whole files
or none and do nothing where theirs is there, so a run that was killed resumes where it was, and the result
depends neither on that nor on how many processes or machines took part. In the end FOLDER holds

    clips/BUCKET/1.0.0/  the shards (shards.py), and cameras/BUCKET/1.0.0/ beside them; without prepare.media also
                         latents/BUCKET/1.0.0/ (encoder.py)
    prepared.json        settings, sizes, counts; written last
    rejected.jsonl       what was left out: key, reason, and of a stretch its start and end in seconds
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from etils import epath

from starflow_jax.config import UserError
from starflow_jax.data.raw import clips, shards, tasks
from starflow_jax.data.raw.encoder import LatentWriter
from starflow_jax.data.raw.items import Rejected
from starflow_jax.data.raw.job import MADE_BY, VERSION, Job, by_setting
from starflow_jax.data.raw.sources import Unit, list_units, read_unit
from starflow_jax.io.files import ARRIVING, atomic_path, parse_json, read_json, write_text

SUMMARY = "summary.json"  # of a part; sent last
PREPARED, REJECTED = "prepared.json", "rejected.jsonl"
_PARTS, _UNITS, _JOB = ".parts", "units.jsonl", "job.json"
_CHUNK = 16  # records copied at once


@dataclasses.dataclass(frozen=True)
class Gathering:
    """A shard and the clips that go into it: (part, first, end) each."""

    shard: shards.Shard
    pieces: tuple[tuple[int, int, int], ...]


def prepare_clips(job: Job, *, processes: int = 0, beam: str | None = None, share: tuple[int, int] = (0, 1),
                  meet: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Make the clips, or resume making them, and return what prepared.json holds.

    share: this process's number, and of how many, which all call this; meet: returns once all of them have called it.
    The folder is theirs alone. Raises UserError where the input is missing, the folder holds something prepared with
    other settings, the disk is full, or not one clip comes out.
    """
    if beam is None:
        tasks.check_processes("prepare.processes", processes)
    first = share[0] == 0
    with shards.work_in(job.path):
        if (job.path / PREPARED).exists():
            _check_done(job)
            if first:
                _clean(job)
        else:
            if first:
                _open_parts(job)
            meet()
            units = _units(job)
            _cut(job, units[share[0]::share[1]], processes, beam)
            meet()
            if first:
                _gather(job, units, processes, beam)
        meet()
        return read_prepared(job.path)


def read_prepared(folder: epath.Path) -> dict[str, Any]:
    """What PREPARED holds. Raises UserError for a damaged one."""
    try:
        held = read_json(folder / PREPARED)
        for bucket in held["buckets"].values():
            int(bucket["frames"]), str(bucket["aspect_ratio"]), dict(bucket["clips"])
        by_setting(dict(held["job"]))
        return held
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise shards.damaged(str(folder / PREPARED), error) from error


def keeps_media(prepared: dict[str, Any]) -> bool:
    """Whether the clips of such a folder can be seen; prepared: what PREPARED holds."""
    return bool(by_setting(prepared["job"])["media"])


def _check_done(job: Job) -> None:
    """Raises UserError where the folder was made with other settings, or lacks what can't be made again."""
    held = read_prepared(job.path)
    _check_same(job, held["job"])
    if job.encoder is not None:
        if set(held["buckets"]) - {shard.bucket for shard in shards.written_shards(job.path, shards.LATENTS)}:
            raise UserError(f"{job.path / shards.LATENTS}: is missing, or not whole, and prepare.media=false kept no "
                            "media to make it of; copy it again, or give another prepare.output")


def _cut(job: Job, units: Sequence[Unit], processes: int, beam: str | None) -> None:
    left = [unit for unit in units if not (_part(job, unit.index) / SUMMARY).exists()]
    tasks.run(partial(cut_unit, job), left, what="cut", processes=processes, beam=beam,
              crashed=partial(_skip_what_crashes, job))


def _gather(job: Job, units: Sequence[Unit], processes: int, beam: str | None) -> None:
    summaries = [_noted(job, _part(job, unit.index) / SUMMARY) for unit in units]
    rejected = [entry for summary in summaries for entry in summary["rejected"]]
    write_text(job.path / REJECTED, "".join(json.dumps(entry) + "\n" for entry in rejected))
    gatherings = plan_shards(job, [summary["clips"] for summary in summaries])
    if not gatherings:
        _clean(job)  # so that the input is read again once it is corrected
        reason, count = _reasons(rejected).most_common(1)[0]
        raise UserError(f"{job.settings.input}: not one clip came out of it; {count} times: {reason} "
                        f"(all of it in {job.path / REJECTED})")
    left_shards = [task for task in gatherings if not task.shard.path(job.path).exists()]
    tasks.run(partial(write_shard, job), left_shards, what="gather", processes=processes, beam=beam)
    _finish(job, summaries, rejected, [task.shard for task in gatherings])


def cut_unit(job: Job, unit: Unit) -> None:
    """Read a unit's items and write its part, unless it is there."""
    part = _part(job, unit.index)
    if (part / SUMMARY).exists():
        return
    items, rejected = 0, list[Rejected]()
    with atomic_path(part, keep=True) as local, contextlib.ExitStack() as stack:
        local.mkdir()
        clips_of, cameras_of = _Writers(local, shards.CLIPS, stack), _Writers(local, shards.CAMERAS, stack)
        latents = None
        if job.encoder is not None:
            latents = LatentWriter(job.encoder, _Writers(local, shards.LATENTS, stack))
        skipped = _crashing(job, unit)
        for item in read_unit(unit, job.settings):
            items += 1
            if isinstance(item, Rejected):
                rejected.append(item)
                continue
            if item.key in skipped:
                rejected.append(Rejected(item.key, "unreadable: it ends the process that decodes it"))
                continue
            _mark(job, unit, item.key)
            for made in clips.cut(item, job):
                if isinstance(made, Rejected):
                    rejected.append(made)
                    continue
                bucket, split = bucket_name(made), split_of(job, item.key)
                name = f"{bucket}.{split}"
                text = {"caption_long": item.caption_long, "caption_short": item.caption_short, "fps": made.fps}
                if latents is None:
                    media = {"media": clips.encode(made, job.settings.crf)}
                else:
                    media = {}
                    latents.add(bucket, split, text, made.frames)
                clips_of[name].write(shards.serialize_clip({**media, **text, "key": item.key, "start": made.start}))
                if made.camera is not None:
                    cameras_of[name].write(shards.serialize(shards.camera_features(), {
                        "intrinsics": made.camera.intrinsics_T4, "world_to_camera": made.camera.world_to_camera_T34}))
        if latents is not None:
            latents.finish()
        stack.close()
        written = {name: writer.count for name, writer in sorted(clips_of.items())}
        summary = {"items": items, "clips": written, "rejected": [_as_json(entry) for entry in rejected],
                   **({} if latents is None else {"latents": latents.shapes})}
        (local / SUMMARY).write_text(json.dumps(summary))


class _Writers(dict[str, shards.RecordWriter]):
    """Writers of one kind of a part's records, by BUCKET.SPLIT, opened when they are first asked for."""

    def __init__(self, part: Any, kind: str, stack: contextlib.ExitStack) -> None:
        super().__init__()
        self._part, self._kind, self._stack = part, kind, stack

    def __missing__(self, name: str) -> shards.RecordWriter:
        self[name] = self._stack.enter_context(shards.RecordWriter(_part_file(self._part, self._kind, name)))
        return self[name]


def bucket_name(clip: clips.Clip) -> str:
    return f"{clip.bucket.name}_{len(clip.frames)}f"


def split_of(job: Job, key: str) -> str:
    """By a hash of the video's name: all clips of a video, and of its rows in a list, are in the same split."""
    video = key.rpartition("#")[0] or key
    place = int.from_bytes(hashlib.sha256(video.encode()).digest()[:8]) / 2**64
    if place < job.settings.test_share:
        return "test"
    return "validation" if place < job.settings.test_share + job.settings.validation_share else "train"


def plan_shards(job: Job, clips_of_parts: Sequence[dict[str, int]]) -> list[Gathering]:
    """Which clips go into which shard, those of a bucket and split in order, an equal number each; what is beside them
    too."""
    by_name: dict[str, list[tuple[int, int]]] = {}
    for index, counts in enumerate(clips_of_parts):
        for name, count in counts.items():
            by_name.setdefault(name, []).append((index, count))
    plan = []
    for name, parts in sorted(by_name.items()):
        bucket, split = name.split(".")
        total = sum(count for _, count in parts)
        number = -(-total // job.settings.clips_per_shard)
        ends = [total * (index + 1) // number for index in range(number)]
        for index, (begin, end) in enumerate(zip([0, *ends], ends)):
            shard = shards.Shard(shards.CLIPS, bucket, split, index, number, end - begin)
            pieces = tuple(_pieces(parts, begin, end))
            plan.append(Gathering(shard, pieces))
            beside = [shards.CAMERAS] * (job.settings.camera and not shards.is_of_pictures(bucket))
            beside += [shards.LATENTS] * (job.encoder is not None)
            plan += [Gathering(dataclasses.replace(shard, kind=kind), pieces) for kind in beside]
    return plan


def _pieces(parts: Iterable[tuple[int, int]], begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """What of each part lies between two positions of all of them laid end to end."""
    before = 0
    for index, count in parts:
        first, last = max(begin - before, 0), min(end - before, count)
        if first < last:
            yield index, first, last
        before += count


def write_shard(job: Job, task: Gathering) -> None:
    """Write a shard unless it is there."""
    path = task.shard.path(job.path)
    if path.exists():
        return
    with atomic_path(path, keep=True) as local, shards.RecordWriter(local) as writer:
        for index, first, end in task.pieces:
            file = _part_file(_part(job, index), task.shard.kind, f"{task.shard.bucket}.{task.shard.split}")
            with shards.records(file) as records:
                for begin in range(first, end, _CHUNK):
                    for record in records.__getitems__(range(begin, min(begin + _CHUNK, end))):
                        writer.write(record)


def _part(job: Job, index: int) -> epath.Path:
    return job.path / _PARTS / f"{index:07d}"


def _part_file(part: Any, kind: str, name: str) -> Any:
    return part / f"{'' if kind == shards.CLIPS else f'{kind}.'}{name}.{shards.SUFFIX}"


def _open_parts(job: Job) -> None:
    """List the units, once: a run that resumes must not see what was added to the input since."""
    parts = job.path / _PARTS
    if (parts / _JOB).exists():
        begun = _noted(job, parts / _JOB)
        _check_same(job, begun)
        if by_setting(begun)["version"] != VERSION:
            raise UserError(f"{job.folder}: was begun by another version of this program, whose clips have other "
                            "bytes; end it with that one, or give another prepare.output")
        for leftover in itertools.chain.from_iterable(job.path.glob(f"{where}{ARRIVING}*") for where in (
                "", f"{_PARTS}/", *(f"{kind}/*/*/" for kind in (shards.CLIPS, shards.CAMERAS, shards.LATENTS)))):
            leftover.rmtree(missing_ok=True)  # of processes that were killed; or of the lease, which comes and goes
    else:
        lines = [json.dumps(dataclasses.asdict(unit), default=str)
                 for unit in list_units(job.settings.input, job.settings.items_per_part)]
        write_text(parts / _UNITS, "".join(line + "\n" for line in lines))
        write_text(parts / _JOB, json.dumps(job.described()))


def _units(job: Job) -> list[Unit]:
    return [Unit(entry["index"], entry["kind"], entry["where"], tuple(entry["entries"]))
            for entry in _noted(job, job.path / _PARTS / _UNITS, lines=True)]


def _noted(job: Job, path: epath.Path, lines: bool = False) -> Any:
    """What a run noted of its progress, as JSON or a line each. Raises UserError where that is damaged."""
    try:
        text = path.read_text()
        return [parse_json(line) for line in text.splitlines()] if lines else parse_json(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); delete {job.path / _PARTS} and start again: all is cut anew"
                        ) from error


def _check_same(job: Job, begun: dict[str, Any]) -> None:
    before = by_setting(begun)
    for name, value in job.described().items():
        if name != "version" and before.get(name) != value:
            what = "latents made by" if name == MADE_BY else f"prepare.{name}"
            raise UserError(f"{job.folder}: was begun with {what} {before.get(name)}, not {value}; "
                            "give the same settings to resume, or another prepare.output")


def _finish(job: Job, summaries: Sequence[dict[str, Any]], rejected: Sequence[dict[str, Any]],
            written: Sequence[shards.Shard]) -> None:
    if job.encoder is not None:
        write_text(job.path / shards.LATENTS / shards.MADE_BY, json.dumps(job.encoder.made_by))
    shapes = {name: shape for summary in summaries for name, shape in summary.get("latents", {}).items()}
    buckets: dict[str, dict[str, Any]] = {}
    aspect_ratios = {bucket.name: bucket.aspect_ratio for bucket in job.buckets}
    for name in sorted({shard.bucket for shard in written}):
        of_bucket, cameras, latents = ([shard for shard in written if shard.bucket == name and shard.kind == kind]
                                       for kind in (shards.CLIPS, shards.CAMERAS, shards.LATENTS))
        shards.write_metadata(job.path, of_bucket, shards.clip_features(job.settings.media),
                              "Clips with captions, prepared by starflow_jax.")
        if cameras:
            shards.write_metadata(job.path, cameras, shards.camera_features(), "Cameras of prepared clips.")
        if latents:
            shards.write_metadata(job.path, latents, shards.latent_features(shapes[name]), shards.LATENTS_ARE)
        size, _, frames = name.partition("_")
        counts: collections.Counter[str] = collections.Counter()
        for shard in of_bucket:
            counts[shard.split] += shard.count
        height, width = map(int, size.split("x"))
        buckets[name] = {"height": height, "width": width, "frames": int(frames.removesuffix("f")),
                         "aspect_ratio": aspect_ratios[size], "clips": dict(counts)}
    prepared = {"job": job.described(), "buckets": buckets, "items": sum(summary["items"] for summary in summaries),
                "clips": sum(shard.count for shard in written if shard.kind == shards.CLIPS),
                "rejected": dict(_reasons(rejected).most_common())}
    write_text(job.path / PREPARED, json.dumps(prepared, indent=1))
    _clean(job)


def _clean(job: Job) -> None:
    if (job.path / _PARTS).exists():
        (job.path / _PARTS).rmtree()


def _reasons(rejected: Iterable[dict[str, Any]]) -> collections.Counter[str]:
    """How often each reason is given, details left out."""
    return collections.Counter(entry["reason"].partition(":")[0] for entry in rejected)


def _as_json(rejected: Rejected) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(rejected).items() if value is not None}


def _skip_what_crashes(job: Job, unit: Unit) -> None:
    """Find the items that end their process, one after the other, and leave them out."""
    while not (_part(job, unit.index) / SUMMARY).exists():
        crashing = _crashing(job, unit)
        key = _marks(job, unit).read_text() if _marks(job, unit).exists() else ""
        if not key or key in crashing:
            raise UserError(f"cut: the process ends at part {unit.index} ({unit.where}) of the input, "
                            "before or after an item; is there enough memory?")
        write_text(_marks(job, unit, "crashing"), json.dumps([*crashing, key]))
        tasks.attempt(partial(cut_unit, job), unit)


def _crashing(job: Job, unit: Unit) -> list[str]:
    path = _marks(job, unit, "crashing")
    return _noted(job, path) if path.exists() else []


def _mark(job: Job, unit: Unit, key: str) -> None:
    """Note which item is begun. On an object store it is not: there a crash is the runner's to report."""
    if "://" not in job.folder:
        Path(os.fspath(_marks(job, unit))).write_text(key)


def _marks(job: Job, unit: Unit, what: str = "at") -> epath.Path:
    return _part(job, unit.index).with_suffix(f".{what}")
