"""A parent for a process of a distributed run, which says in one line that another process was lost.

JAX ends what is left of such a run by SIGABRT, with a stack trace, from a thread that Python can't reach. So the
program itself runs in a child.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading

LOST = ("another process of this run was lost; start all of them again with the same command: training goes on from "
        "the newest checkpoint")
NOT_MET = ("can't connect to the other processes of this run within five minutes; start all with the same HOST:PORT "
           "and COUNT")
OUR_LINE = b"starflow_jax: "  # begins what this program says at its end
# The beginning of JAX's account of a lost process; all that follows on stderr are details and a stack trace.
ACCOUNT = re.compile(rb"W\d{4} .*preemption_sync_manager|[EF]\d{4} .*(coordination_service|preemption_sync|client\.h)")
AWAITED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def run_in_child() -> None:
    """Returns in a child process. This process passes signals on to it, ends as it does, and takes it along if killed.

    Call it before anything starts threads.
    """
    read, write = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)  # whenever one comes, it waits until it is asked for
    parent, child = os.getpid(), os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before that
            os._exit(2)
        os.setpgid(0, 0)  # a terminal's Ctrl-C comes once, through the parent
        os.dup2(write, 2)
        os.close(read)
        os.close(write)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED)
        return
    os.close(write)
    stderr = _Stderr()
    passing = threading.Thread(target=stderr.pass_on, args=(read,), daemon=True)
    passing.start()
    code = _pass_signals_on(child)
    passing.join(timeout=2)  # programs that the child has started may hold its stderr for longer
    aborted = code == -signal.SIGABRT and stderr.account
    if aborted and not stderr.said:
        stderr.write_line(OUR_LINE + (NOT_MET if b"RegisterTask" in stderr.account else LOST).encode() + b"\n")
    elif code and not stderr.said:  # an end of another kind: what was left out may explain it
        stderr.write(stderr.account)
    _end_as(2 if aborted else code)


def _pass_signals_on(child: int) -> int:
    """Until the child ends; returns its exit code, negative where a signal ended it."""
    while True:
        number = signal.sigwait(AWAITED)
        if number != signal.SIGCHLD:
            os.kill(child, number)
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)


class _Stderr:
    """A child's stderr, copied to this process's without JAX's account of a lost process."""

    def __init__(self) -> None:
        self.account, self.said = b"", False  # what was left out; whether the child has said why it ends
        self._in_line = False  # where a progress bar is

    def pass_on(self, read: int) -> None:
        """Copy until it is closed."""
        while data := os.read(read, 2**16):
            for line in data.splitlines(keepends=True):
                found = ACCOUNT.search(line)
                if line.startswith(OUR_LINE):
                    self.said = True
                    self.write_line(line)
                elif self.account or found:
                    begin = found.start() if found and not self.account else 0
                    self.account += line[begin:]
                    self.write(line[:begin])
                else:
                    self.write(line)

    def write_line(self, line: bytes) -> None:
        """On a line of its own."""
        self.write(b"\n" * self._in_line + line)

    def write(self, text: bytes) -> None:
        """As it is."""
        with contextlib.suppress(OSError):  # nobody reads it any more; the child goes on
            os.write(2, text)
        self._in_line = not text.endswith(b"\n") if text else self._in_line


def _end_as(code: int) -> None:
    """Exit with the code, or by the signal that it is the negative of."""
    sys.stdout.flush()
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(os.getpid(), -code)
    os._exit(code)
