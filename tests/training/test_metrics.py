"""What a run reports: the file of a resumed run, progress, tables and measures."""

import io
import json
import sys

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from starflow_jax.evaluation.measures import temporal_flickering
from starflow_jax.io.progress import ProgressBar, table
from starflow_jax.training.metrics import MetricWriter, read_metrics


def write_steps(writer: MetricWriter, first: int, last: int) -> None:
    for step in range(first, last + 1):
        writer.scalars(step, {"loss": np.float32(1 / step), "skipped": np.int32(step // 3)})


def test_one_flushed_json_object_per_line(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.scalars(1, {"loss": np.float32(0.5), "skipped": np.int64(2), "grad_norm": float("nan")})
    text = (tmp_path / "metrics.jsonl").read_text()  # before close
    writer.close()
    assert text == '{"step": 1, "loss": 0.5, "skipped": 2, "grad_norm": null}\n'
    assert json.loads(text)["loss"] == 0.5


def test_resumed_file_equals_an_uninterrupted_one(tmp_path):
    whole = MetricWriter(tmp_path / "whole")
    write_steps(whole, 1, 12)
    whole.close()

    killed = MetricWriter(tmp_path / "killed")
    write_steps(killed, 1, 8)
    killed.close()
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # killed while it wrote
    resumed = MetricWriter(tmp_path / "killed", resume_step=5)
    write_steps(resumed, 6, 12)
    resumed.close()

    expected = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == expected
    assert [line["step"] for line in read_metrics(tmp_path / "killed")] == list(range(1, 13))


def test_lines_are_on_the_disk_once_they_are_synced(tmp_path, unsynced):
    writer = MetricWriter(tmp_path)
    write_steps(writer, 1, 3)
    assert "metrics.jsonl" in unsynced(tmp_path)
    writer.sync()
    assert "metrics.jsonl" not in unsynced(tmp_path)
    writer.close()


def test_new_run_starts_an_empty_file(tmp_path):
    first = MetricWriter(tmp_path)
    write_steps(first, 1, 3)
    first.close()
    MetricWriter(tmp_path).close()
    assert read_metrics(tmp_path) == []


def events(workdir) -> list[event_pb2.Event]:
    """TensorBoard's records: 8 bytes of length, 4 of checksum, an Event, 4 of checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_gets_scalars_and_images(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.scalars(7, {"loss": 0.25, "grad_norm": float("inf")})
    writer.image(7, "samples", np.full((4, 6, 3), 200, np.uint8))
    writer.close()
    values = [(event.step, value) for event in events(tmp_path) for value in event.summary.value]
    assert [(step, value.tag) for step, value in values] == [(7, "loss"), (7, "samples")]
    assert values[0][1].simple_value == 0.25
    assert (values[1][1].image.height, values[1][1].image.width) == (4, 6)


def test_progress_in_a_log_is_a_few_lines(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with ProgressBar("train", total=5000, initial=1000) as bar:
        for _ in range(4000):
            bar.update(loss="1.2346 bits/dim")
    text = log.getvalue()
    assert "train" in text and "5000/5000" in text and "1.2346 bits/dim" in text and "step/s" in text
    assert text.count("\r") + text.count("\n") < 12


def test_table_is_aligned():
    rows = [["flow", 1.5, 12], ["a Gaussian", 3.14159265, 7]]
    assert table(rows, ["model", "bits", "n"]) == (
        "model        bits   n\n"
        "----------  -----  --\n"
        "flow          1.5  12\n"
        "a Gaussian  3.142   7"
    )


def test_temporal_flickering():
    still_THWC = np.full((5, 4, 4, 3), 77, np.uint8)
    assert temporal_flickering(still_THWC) == 1.0
    blinking_THWC = np.zeros((5, 4, 4, 3), np.uint8)
    blinking_THWC[1::2] = 255  # differences of both signs: unsigned arithmetic would wrap
    assert temporal_flickering(blinking_THWC) == 0.0
    steps_THWC = np.zeros((3, 4, 4, 3), np.uint8)
    steps_THWC[1], steps_THWC[2] = 51, 0
    assert temporal_flickering(steps_THWC) == pytest.approx(0.8, abs=1e-12)
    both_BTHWC = np.stack([still_THWC, blinking_THWC])
    assert temporal_flickering(both_BTHWC) == pytest.approx(0.5, abs=1e-12)
    with pytest.raises(ValueError, match="T ≥ 2"):
        temporal_flickering(still_THWC[:1])
