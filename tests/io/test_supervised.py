"""What a process of a distributed run says and returns, whatever ends it."""

import signal
import subprocess
import sys
import time

import pytest

from starflow_jax.io import supervised

# What JAX 0.10 writes when a process is lost: one that others work with, the first one, and one that never came.
UNHEALTHY = ("E1129 14:27:45.100168   16031 coordination_service.cc:1549] [17] Use error polling to propagate the "
             "following error to all tasks: UNAVAILABLE: The following tasks are unhealthy:\n1\nThey have crashed.\n")
PREEMPTION = "W1129 14:27:19.49 15857 preemption_sync_manager.cc:147] Failed to retrieve preemption notice: GONE\n"
FATAL = ("F1129 14:26:27.556987   14787 client.h:80] Terminating process because the JAX distributed service detected "
         "fatal errors.\n*** Check failure stack trace: ***\n    @     0x7fcff9c20634  absl::LogMessage::SendToLog()\n")
NEVER_CAME = FATAL.replace("errors.\n", "errors.\nRPC: /xla.coordination.CoordinationService/RegisterTask\n")
HARMLESS = "W1129 14:25:34.24   13924 coordination_service.cc:185] Using experimental recoverable task feature.\n"
BEFORE = """
import os, signal, subprocess, sys, time
from starflow_jax.io.supervised import run_in_child
"""
# One long sleep would not end by a signal that comes between Python's last look for one and the sleep.
FOR_LONG = "while True: time.sleep(0.1)"
PROGRAM = f"{BEFORE}run_in_child()\n"


def run(program: str) -> tuple[int, str]:
    process = subprocess.run([sys.executable, "-c", PROGRAM + program], capture_output=True, timeout=60)
    return process.returncode, process.stderr.decode()


def aborts_after(*written: str) -> str:
    return f"sys.stderr.write({''.join(written)!r}); sys.stderr.flush(); os.abort()"


@pytest.mark.parametrize("written", [UNHEALTHY + FATAL, PREEMPTION + FATAL, FATAL])
def test_a_lost_process_is_one_line(written: str) -> None:
    bar = "train:  0%\rtrain: 40%"
    code, said = run(aborts_after(HARMLESS, bar, written))
    assert (code, said) == (2, f"{HARMLESS}{bar}\nstarflow_jax: {supervised.LOST}\n")


def test_one_that_never_came_is_another_line() -> None:
    assert run(aborts_after(NEVER_CAME)) == (2, f"starflow_jax: {supervised.NOT_MET}\n")


def test_what_the_program_says_of_it_is_the_line() -> None:
    said = "starflow_jax: runs/x: another run is using it\n"
    assert run(aborts_after(said, UNHEALTHY, FATAL)) == (2, said)
    assert run(aborts_after(UNHEALTHY, said, FATAL)) == (2, said)


def test_any_other_end_is_passed_on() -> None:
    assert run("sys.stderr.write('one line'); sys.exit(3)") == (3, "one line")
    assert run("print('no newline', end='')") == (0, "")
    assert run("sys.stderr.write('its own fault\\n'); sys.stderr.flush(); os.abort()") == (-6, "its own fault\n")
    assert run("os.kill(os.getpid(), signal.SIGKILL)") == (-9, "")
    traceback = f"{UNHEALTHY}Traceback\n"
    assert run(f"sys.stderr.write({traceback!r}); sys.exit(1)") == (1, traceback)
    # A program that holds the child's stderr open is not waited for.
    assert run("subprocess.Popen(['sleep', '20'], stdout=subprocess.DEVNULL); sys.exit(4)") == (4, "")


def start(program: str, begin: str = PROGRAM) -> tuple[subprocess.Popen, int]:
    """(the parent, the child's process id), once the child runs."""
    process = subprocess.Popen([sys.executable, "-c", begin + program], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())  # type: ignore[union-attr]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_program(number: signal.Signals) -> None:
    process, _ = start(f"signal.signal({int(number)}, lambda *_: sys.exit(7)); print(os.getpid(), flush=True)\n"
                       f"{FOR_LONG}")
    process.send_signal(number)
    assert process.wait(60) == 7


@pytest.mark.parametrize("step", ["os.close", "signal.sigwait", "threading.Thread.start"])
def test_a_signal_before_the_parent_can_pass_it_on_waits(step: str) -> None:
    late = f"import threading; here = os.getpid(); step = {step}\n" + f"""
def slowly(*given):
    if os.getpid() == here:
        time.sleep(0.5)
    return step(*given)

{step} = slowly
run_in_child()
"""
    process, _ = start(f"signal.signal(15, lambda *_: sys.exit(7)); print(os.getpid(), flush=True)\n{FOR_LONG}",
                       BEFORE + late)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 7


def test_a_killed_parent_takes_the_program_along() -> None:
    process, child = start(f"print(os.getpid(), flush=True)\n{FOR_LONG}")
    process.kill()
    process.wait()
    while alive(child):
        time.sleep(0.01)


def alive(number: int) -> bool:
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
