"""Tasks run on several processes, and what happens when one of these ends."""

import os
from functools import partial
from pathlib import Path

import pytest

from starflow_jax.config import UserError
from starflow_jax.data.raw import tasks


def leave_a_file(folder, task):
    """As a unit of work does; task 3's decoder ends its process."""
    if task == 3:
        os._exit(9)
    Path(folder, str(task)).write_text(str(os.getpid()))


def test_a_process_that_ends_costs_its_own_task_only(tmp_path):
    crashed = []
    tasks.run(partial(leave_a_file, str(tmp_path)), list(range(6)), what="test", processes=2, crashed=crashed.append)
    assert crashed == [3] and sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "4", "5"]
    assert str(os.getpid()) not in {path.read_text() for path in tmp_path.iterdir()}


def test_without_a_remedy_it_is_said_which_task_it_was(tmp_path):
    with pytest.raises(UserError, match="test: a process ended at 3"):
        tasks.run(partial(leave_a_file, str(tmp_path)), [2, 3], what="test", processes=2)


def fail(task):
    raise ValueError(f"task {task}")


def test_an_exception_is_passed_on():
    with pytest.raises(ValueError, match="task [01]"):  # whichever of the two processes was first
        tasks.run(fail, [0, 1], what="test", processes=2)


def test_one_process_is_this_one(tmp_path):
    tasks.run(partial(leave_a_file, str(tmp_path)), [0, 1], what="test", processes=1)
    assert {path.read_text() for path in tmp_path.iterdir()} == {str(os.getpid())}


def test_nothing_left_to_do_is_done():
    """As of a run that was killed between two kinds of tasks: neither processes nor Beam are started."""
    tasks.run(fail, [], what="test", processes=2, crashed=print)
    tasks.run(fail, [], what="test", beam="--runner=NoSuchRunner")


def test_more_processes_than_a_machine_can_bear_are_refused(monkeypatch):
    monkeypatch.setattr(tasks, "cores", lambda: 2)
    tasks.check_processes("data.workers", 16)
    with pytest.raises(UserError, match="data.workers=17: must be at most 16 here, 8 for each of 2 cores"):
        tasks.check_processes("data.workers", 17)
