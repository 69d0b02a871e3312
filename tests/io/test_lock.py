"""A folder has one run at a time, whatever becomes of it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from starflow_jax.config import UserError
from starflow_jax.io import lock

HOLDER = """
import subprocess, sys, time
from starflow_jax.io.lock import held
with held(sys.argv[1]):
    worker = subprocess.Popen(["sleep", "300"])
    print(worker.pid, flush=True)
    time.sleep(300)
"""


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder is on a network file system, where leases take tenths of seconds."""
    monkeypatch.setattr(lock, "file_system", lambda folder: "nfs4")
    for name, seconds in (("RENEWED", 0.05), ("SETTLED", 0.01), ("EXPIRES", 0.3), ("POLLED", 0.01)):
        monkeypatch.setattr(lock, name, seconds)


def holder(folder: Path) -> dict:
    return json.loads((folder / lock.IN_USE).read_text())


def test_the_second_is_refused_and_hears_who_is_there(tmp_path: Path) -> None:
    with lock.held(tmp_path / "run"):
        there = holder(tmp_path / "run")
        assert there["pid"] == os.getpid()
        with pytest.raises(UserError) as refused, lock.held(tmp_path / "run"):
            pass
    assert str(refused.value) == (
        f"{tmp_path / 'run'}: another run (host {there['host']}, process {there['pid']}, since {there['since']}) is "
        "using it; wait for its end, stop it, or name another --workdir")
    with lock.held(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / lock.IN_USE).read_text() == ""


def test_a_lease_ends_a_minute_after_its_last_renewal() -> None:
    assert lock.EXPIRES == 60
    assert 3 * lock.RENEWED < lock.EXPIRES, "two renewals in a row may come to nothing"


def test_what_a_lock_left_is_no_lease(tmp_path: Path, shared, monkeypatch) -> None:
    (tmp_path / lock.IN_USE).touch()
    monkeypatch.setattr(lock, "EXPIRES", 300.0)
    with lock.held(tmp_path):
        assert holder(tmp_path)["pid"] == os.getpid()


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    """Killed, it is free at once, also where a program that it started lives on."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())  # type: ignore[union-attr]
    try:
        with pytest.raises(UserError, match=f"process {process.pid}"), lock.held(tmp_path):
            pass
        process.kill()
        process.wait()
        with lock.held(tmp_path):
            assert holder(tmp_path)["pid"] == os.getpid()
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)


def test_a_damaged_file_frees_nothing(tmp_path: Path) -> None:
    with lock.held(tmp_path):
        (tmp_path / lock.IN_USE).write_text("[")
        with pytest.raises(UserError, match="another run .host unknown"), lock.held(tmp_path):
            pass


def test_which_file_systems_have_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = ("/dev/a / ext4 rw 0 0\n" f"server:/x {tmp_path}/on\\040server nfs4 rw 0 0\n"
              f"bucket {tmp_path}/bucket fuse.gcsfuse rw 0 0\n")
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **more: mounts if str(path) == "/proc/self/mounts"
                        else read(path, **more))
    found = [lock.file_system(str(tmp_path / name)) for name in ("here", "on server/run", "bucket/run")]
    assert found == ["ext4", "nfs4", "fuse.gcsfuse"] and "ext4" in lock.LOCAL and not {"nfs4", ""} & lock.LOCAL
    assert lock.file_system("gs://bucket/run") == ""


def test_a_lease_that_is_renewed_is_refused_and_a_released_one_is_gone(tmp_path: Path, shared, monkeypatch) -> None:
    monkeypatch.setattr(lock, "EXPIRES", 300.0)
    with lock.held(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()}, since .* is using it"), lock.held(tmp_path):
            pass
        assert holder(tmp_path)["renewals"] > 0
    assert not (tmp_path / lock.IN_USE).exists()


def test_a_lease_that_was_left_is_taken_over_after_a_while(tmp_path: Path, shared, capsys) -> None:
    left = {"host": "gone", "pid": 7, "since": "2026-01-01", "token": "x"}
    (tmp_path / lock.IN_USE).write_text(json.dumps(left))
    with lock.held(tmp_path):
        assert holder(tmp_path)["pid"] == os.getpid()
    assert capsys.readouterr().err == (f"{tmp_path}: another run (host gone, process 7, since 2026-01-01) has it or "
                                       "was killed; waiting up to 0 seconds for a sign of its life\n")


def test_of_two_that_take_a_lease_at_once_the_last_writer_has_it(tmp_path: Path, shared, monkeypatch) -> None:
    other = {"host": "other", "pid": 7, "since": "now", "token": "x"}
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: (tmp_path / lock.IN_USE).write_text(json.dumps(other)))
    with pytest.raises(UserError, match="host other, process 7"), lock.held(tmp_path):
        pass
    assert holder(tmp_path) == other


def test_a_lease_that_another_has_taken_ends_its_run(tmp_path: Path, shared, monkeypatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(lock, "_end", ended.append)
    other = {"host": "other", "pid": 7, "since": "now", "token": "x"}
    with lock.held(tmp_path):
        while not ended:
            lock.write_text(tmp_path / lock.IN_USE, json.dumps(other))
            time.sleep(0.01)
    assert "another run (host other, process 7, since now) has the folder" in ended[0]
    assert holder(tmp_path) == other  # what is the other's stays


def test_a_lease_that_cannot_be_renewed_ends_its_run(tmp_path: Path, shared, monkeypatch) -> None:
    ended, done = [], threading.Event()
    monkeypatch.setattr(lock, "_end", lambda why: (ended.append(why), done.set()))

    def fail(path: str, text: str) -> None:
        raise OSError(5, "Input/output error")

    with lock.held(tmp_path):
        monkeypatch.setattr(lock, "write_text", fail)
        assert done.wait(60)
    assert "can't be written" in ended[0] and "Input/output error" in ended[0]
