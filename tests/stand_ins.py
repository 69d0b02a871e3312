"""Stand-ins for commands: they note their arguments and answer as scripted."""

import shlex
import subprocess
import sys
from pathlib import Path

from tests.small_run import ROOT

LAUNCH = ROOT / "launch"

# What was asked, in short (`verb`), picks the answer; the last answer of a script is given again and again.
# In bash: it starts ten times as fast as Python, and is started hundreds of times.
STAND_IN = r"""#!/bin/bash
name=${0##*/} verb="${0##*/} $1 $2" code=0 out='' err=''
if [[ $1 == compute ]]; then
    verb=$4
    [[ $3 != queued-resources ]] || verb="queued $4"
    if [[ $4 == ssh && $* =~ worker.sh\ ([a-z]+) ]]; then verb="ssh ${BASH_REMATCH[1]}"; fi
fi
noted=$(printf '%s\x1f' "$verb" "$name" "$@")
printf '%s\n' "$noted" >> "$STAND_INS/calls"  # at once: others may be called at the same time
answers=("$STAND_INS/answers/$verb"/*)
if [[ -e ${answers[0]} ]]; then
    source "${answers[0]}"
    ((${#answers[@]} == 1)) || rm "${answers[0]}"
fi
printf '%s' "$out"
printf '%s' "$err" >&2
exit "$code"
"""

class StandIns:
    """A folder of commands that comes first on the PATH, and is the HOME, of what it runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()

    def add(self, *names: str, script: str = STAND_IN) -> "StandIns":
        for name in names:
            (self.folder / name).write_text(script)
            (self.folder / name).chmod(0o755)
        return self

    def answer(self, scripts: dict[str, list[dict]]) -> None:
        """scripts: {verb: [answer of the first call, of the second, ...]}; an answer may have out, err and code."""
        for verb, script in scripts.items():
            folder = self.folder / "answers" / verb
            folder.mkdir(parents=True)
            for number, answer in enumerate(script):
                (folder / f"{number:03d}").write_text(
                    "".join(f"{field}={shlex.quote(str(value))}\n" for field, value in answer.items()))

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": f"{self.folder}:/usr/local/bin:/usr/bin:/bin", "HOME": str(self.folder), "LC_ALL": "C.UTF-8",
                "STAND_INS": str(self.folder), **more}

    def run(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
        """Run a script of launch/."""
        program = sys.executable if script.endswith(".py") else "bash"
        return subprocess.run([program, LAUNCH / script, *words], cwd=ROOT, env=self.environment(**environment),
                              capture_output=True, text=True, timeout=120)

    def _noted(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [line.split("\x1f")[:-1] for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def calls(self) -> list[list[str]]:
        """Every command with its arguments."""
        return [words for _, *words in self._noted()]

    def verbs(self) -> list[str]:
        """What was asked, in short: create, ssh start, queued delete, gcloud storage rsync, ..."""
        return [verb for verb, *_ in self._noted()]


def one_line(result: subprocess.CompletedProcess, code: int, told: str) -> None:
    """It failed with this code and one line that says so."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == code, result.stderr
    assert len(lines) == 1 and told in lines[0], result.stderr
