"""Readers of formats of this project, with whole files for each: OWN."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from starflow_jax.config import UserError, from_dict
from tests.prepared_input import frames_of
from tests.robustness.foreign_readers import FPS, all_of, frames, package_config
from tests.robustness.trial import Reader, without_checksums

# Settings.


def _make_settings(folder: Path) -> None:
    from starflow_jax.model.parameters import model_fingerprint

    config = dataclasses.asdict(package_config())
    (folder / "a" / "system").mkdir(parents=True)
    (folder / "a" / "system" / "settings.json").write_text(json.dumps(config))
    (folder / "b" / "checkpoints").mkdir(parents=True)
    (folder / "b" / "checkpoints" / "model.json").write_text(json.dumps(model_fingerprint(package_config())))


def _read_settings(folder: Path, path: Path) -> None:
    from starflow_jax.checkpoints.training import check_fingerprint
    from starflow_jax.model.own_settings import own_settings, settings_of
    from starflow_jax.model.parameters import model_fingerprint

    settings_of(path.parents[1])
    own_settings(package_config(), path.parents[1])
    if path.name == "model.json":
        check_fingerprint(path, model_fingerprint(package_config()))


def _make_release_settings(folder: Path) -> None:
    from tests.make_release import SIZES

    (folder / "tiny.yaml").write_text(yaml.safe_dump(
        {"arguments": [{name: value} for name, value in SIZES["tiny"].arguments.items()]}))


def _read_release_settings(_: Path, path: Path) -> None:
    from starflow_jax.model.release import released_config

    from_dict(dataclasses.asdict(released_config(path)))


def _make_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({"step": step, "loss": 1 / (step + 1), "validation_bits_per_dim": None}) + "\n"
        for step in range(20)))


def _read_metrics(folder: Path, _: Path) -> None:
    from starflow_jax.training.metrics import MetricWriter

    writer = MetricWriter(folder, resume_step=10)
    writer.scalars(11, {"loss": 1.0})
    writer.close()


def _make_licences(folder: Path) -> None:
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "nothing").touch()
    text = "---\nlicense: other\nlicense_name: model–licence\n---\nA model.\n"
    for name in ("README.md", "LICENSE", "WEIGHTS_LICENSE.txt"):
        (folder / name).write_text(text, encoding="utf-8")


def _read_licences(folder: Path, path: Path) -> None:
    from starflow_jax.checkpoints.licences import KEPT, carry_licence, keep_licence, licence_text

    if path.name != KEPT:
        (folder / KEPT).unlink()
    text, _ = licence_text({"the flow": folder})
    keep_licence(text, folder / KEPT)
    carry_licence(folder, folder / "workdir")


def _make_cameras(folder: Path) -> None:
    rows = [[1, 0, 0, 0.1], [0, 1, 0, 0.2], [0, 0, 1, -0.5]]
    line = " ".join(map(str, (0.9, 1.6, 0.5, 0.5, 0, 0, *rows[0], *rows[1], *rows[2])))
    (folder / "a.txt").write_text("https://example.org/a\n" + "".join(f"{1000 * n} {line}\n" for n in range(4)))
    (folder / "b.json").write_text(json.dumps({"intrinsics": [0.9, 1.6, 0.5, 0.5], "world_to_camera": [rows] * 4,
                                               "timestamps": [0, 5, 6, 9]}))


def _read_cameras(_: Path, path: Path) -> None:
    from starflow_jax.io.cameras import read_cameras

    read_cameras(str(path), 5, 32, 48).relative_to_first()


def _make_lock(folder: Path) -> None:
    (folder / "in_use.json").write_text(json.dumps({"host": "a", "pid": 7, "since": "2026-11-01", "token": "1234"}))


def _read_lock(folder: Path, path: Path) -> None:
    """As a run that is refused, and as one that finds a lease."""
    import fcntl

    from starflow_jax.io import lock

    lock._who(lock._read(str(path)))
    with open(path) as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        try:
            with lock._lock(str(folder), "--workdir"):
                raise AssertionError("held twice")
        except UserError:
            pass


def _make_session(folder: Path) -> None:
    from starflow_jax.sampling.record import Record, write_record

    start = {"prompt": "a", "guidance": None, "camera": "orbit"}
    changes = {3: {"prompt": "b", "guidance": 1.5}, 5: {"camera": {"pose": [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]}}}
    write_record(folder / "session.json", Record("model", "1234", {"guidance": 2.0}, 7, start, changes,
                                                 np.zeros((1, 8, 8, 3), np.uint8), 21), time_stride=4)


def _read_session(_: Path, path: Path) -> None:
    from starflow_jax.sampling.record import read_record

    read_record(path)


def _make_details(folder: Path) -> None:
    (folder / "video.json").write_text(json.dumps({"prompt": "a", "seed": 1, "identity": "1234", "outcome": ["exact"],
                                                   "bits_per_dim": 1.5, "deep_steps_per_block": [3], "seconds": 2.0}))


def _read_details(_: Path, path: Path) -> None:
    from starflow_jax.sampling.identity import facts_of

    facts_of(path)


def _make_calibration(folder: Path) -> None:
    from starflow_jax.config import Solver
    from starflow_jax.flow.first_guess import FirstGuess, NoiseGuess
    from starflow_jax.model.calibration import Calibration, save_calibration
    from tests.helpers import tiny_model

    model = tiny_model()
    tokens, channels, one = model.tokens_per_frame, model.token_channels, np.float32(1)
    first: Any = FirstGuess(*(np.full(shape, one) for shape in (  # type: ignore[arg-type]
        (model.text_dim,), (tokens, channels), (model.text_dim, 3), (3, tokens, channels))))
    noise: Any = NoiseGuess(*(np.full(shape, one) for shape in (  # type: ignore[arg-type]
        (channels,), (channels, channels), (channels, channels))))
    save_calibration(Calibration(Solver("jacobi", block_size=4, start="noise"), first, noise), folder)


def _read_calibration(folder: Path, _: Path) -> Any:
    from starflow_jax.model.calibration import read_calibration
    from tests.helpers import tiny_model

    return read_calibration(folder, tiny_model())


# Prepared data.


def _examples() -> Iterator[dict[str, Any]]:
    from starflow_jax.data.raw.clips import Clip, encode
    from starflow_jax.data.raw.job import Bucket

    for index in range(3):
        media = encode(Clip(frames_of(frames(5)[:, :, :48]), Bucket(32, 48, "3:2"), FPS, 0.0), crf=20)
        yield {"media": media, "caption_long": f"a long caption {index}", "caption_short": "short", "key": f"{index}",
               "fps": FPS, "start": 0.5}


BUCKET = "32x48_5f"


def _make_prepared(folder: Path) -> None:
    from etils import epath

    from starflow_jax.data.raw import shards
    from starflow_jax.data.raw.building import PREPARED

    latents = [{"latents": np.ones((2, 4, 6, 2), np.float16),
                **{name: example[name] for name in ("caption_long", "caption_short", "fps")}}
               for example in _examples()]
    texts = [{"prompts": json.dumps(["a", "b"]), "lengths": np.array([1, 2]), "rows": np.ones((3, 4), np.float16)}
             for _ in latents]
    for kind, features, examples in ((shards.CLIPS, shards.clip_features(), list(_examples())),
                                     (shards.LATENTS, shards.latent_features((2, 4, 6, 2)), latents),
                                     (shards.FEATURES, shards.text_features(4), texts)):
        shard = shards.Shard(kind, BUCKET, "train", 0, 1, len(examples))
        path = Path(str(shard.path(epath.Path(folder))))
        path.parent.mkdir(parents=True)
        with shards.RecordWriter(path) as writer:
            for example in examples:
                writer.write(shards.serialize(features, example))
        shards.write_metadata(epath.Path(folder), [shard], features, "of a test")
        (folder / kind / shards.MADE_BY).write_text(json.dumps({"arrays": "1234"}))
    (folder / PREPARED).write_text(json.dumps({"job": {"frames": 5}, "buckets": {BUCKET: {
        "height": 32, "width": 48, "frames": 5, "aspect_ratio": "3:2", "clips": {"train": 3}}}}))


def _read_prepared(folder: Path, _: Path) -> None:
    from starflow_jax.data import prepared

    made_by = {"arrays": "1234"}
    found = prepared.source(str(folder), "train", latents_by=made_by, features_by=made_by)
    for bucket in (*found.videos, *found.images):
        for index in range(len(bucket)):
            record = bucket[index]
            record["frames"], record["latents"], record["text"]


def _make_records(folder: Path) -> None:
    from starflow_jax.data.raw import shards

    with shards.RecordWriter(folder / "clips.array_record") as writer:
        for example in _examples():
            writer.write(shards.serialize_clip(example))


def _read_records(_: Path, path: Path) -> None:
    from etils import epath

    from starflow_jax.data.raw import clips, shards

    with shards.records(epath.Path(path)) as records:
        for record in records.__getitems__(range(len(records))):
            clips.decode(shards.parse_clip(record)["media"])


def _make_example(folder: Path) -> None:
    from starflow_jax.data.raw import shards

    (folder / "clips.array_record").write_bytes(_record_file(shards.serialize_clip(next(iter(_examples())))))


def _record_file(record: bytes) -> bytes:
    import tempfile

    from starflow_jax.data.raw import shards

    with tempfile.NamedTemporaryFile() as file:
        with shards.RecordWriter(Path(file.name)) as writer:
            writer.write(record)
        return Path(file.name).read_bytes()


def _record_in(content: bytes) -> bytes:
    import tempfile

    from etils import epath

    from starflow_jax.data.raw import shards

    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content)
        with shards.records(epath.Path(file.name)) as records:
            return records[0]


# Checkpoints.

FINGERPRINT = {"model": {"channels": 4}}


def _state() -> dict[str, Any]:
    return {"ema": {"deep": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4)}}, "step": np.int32(7)}


def _make_checkpoints(folder: Path) -> None:
    import jax

    from starflow_jax.checkpoints.training import BEST, Checkpoints

    checkpoints = Checkpoints(folder / "checkpoints", keep=2, model_fingerprint=FINGERPRINT)
    checkpoints.save(7, jax.device_put(_state()), {"position": 7}, {BEST: 2.5})
    checkpoints.close()


def _read_checkpoints(folder: Path, _: Path) -> None:
    import jax

    from starflow_jax.checkpoints.parameters import restore_params, stored_params
    from starflow_jax.checkpoints.training import Checkpoints

    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), _state())
    checkpoints = Checkpoints(folder / "checkpoints", keep=2, model_fingerprint=FINGERPRINT)
    try:
        if checkpoints.restore(abstract) is None:
            return
    finally:
        checkpoints.close()
    step = checkpoints.directory / "7"
    restore_params(step, abstract["ema"])
    all_of(stored_params(step))


def _checksums_anew(folder: Path, path: Path) -> None:
    from starflow_jax.checkpoints.checksums import CHECKSUMS, write_checksums

    if path.name == "model.json":
        without_checksums(folder, path)
    elif path.name != CHECKSUMS and (folder / "checkpoints" / "7").is_dir():
        write_checksums(folder / "checkpoints" / "7")


def _make_lora(folder: Path) -> None:
    import jax

    from starflow_jax.checkpoints.training import Checkpoints

    checkpoints = Checkpoints(folder / "checkpoints", keep=1, model_fingerprint={
        "lora": {"alpha": 2.0, "rank": 2}, "backbone": "1234"})
    factors = {"lora_a": np.ones((1, 4, 2), np.float32), "lora_b": np.ones((1, 2, 4), np.float32)}
    checkpoints.save(7, jax.device_put({"ema": {"deep": factors}}), {"position": 7}, None)
    checkpoints.close()


def _read_lora(folder: Path, _: Path) -> None:
    from starflow_jax.model.lora import read_workdir

    read_workdir(folder, best=False)


def _make_measured(folder: Path) -> None:
    (folder / "base-0").mkdir()
    (folder / "base-0" / "evaluate.json").write_text(json.dumps({
        "model": "run, step 3", "bits_per_dim": 1.5, "adherence": {"digit": 0.5}, "baselines": {"gaussian": 2.0},
        "temporal_flickering": 0.9}))
    (folder / "base-0" / "horizon.json").write_text(json.dumps({"stretches": [{"frames": 8, "psnr": 20.5}]}))


def _read_measured(folder: Path, _: Path) -> None:
    from starflow_jax.evaluation.ablations import measured_model, read_run

    measured_model(folder / "base-0")
    read_run(folder / "base-0", 100)


OWN: dict[str, Reader] = {
    "calibration": Reader(_make_calibration, _read_calibration, seal=without_checksums),
    "settings": Reader(_make_settings, _read_settings),
    "release's settings": Reader(_make_release_settings, _read_release_settings),
    "metrics": Reader(_make_metrics, _read_metrics, writes=True),
    "measured runs": Reader(_make_measured, _read_measured),
    "licences": Reader(_make_licences, _read_licences, ("*.md", "LICENSE", "*.txt"), writes=True),
    "cameras": Reader(_make_cameras, _read_cameras),
    "lock": Reader(_make_lock, _read_lock),
    "session": Reader(_make_session, _read_session),
    "details of a video": Reader(_make_details, _read_details),
    "prepared data": Reader(_make_prepared, _read_prepared, crashes=True),
    "records": Reader(_make_records, _read_records, crashes=True),
    "example in a record": Reader(_make_example, _read_records, inner=_record_in, pack=_record_file, crashes=True),
    "checkpoint": Reader(_make_checkpoints, _read_checkpoints, writes=True, crashes=True),
    "checkpoint with right checksums": Reader(_make_checkpoints, _read_checkpoints, seal=_checksums_anew, writes=True,
                                              crashes=True),
    "lora": Reader(_make_lora, _read_lora, ("checkpoints/model.json",), seal=without_checksums),
}
