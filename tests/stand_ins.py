"""Stand-ins for commands: they note their arguments and answer as scripted."""

import json
import subprocess
import sys
from pathlib import Path

from tests.small_run import ROOT

LAUNCH = ROOT / "launch"

# What was asked, in short (`verb`), picks the answer; the last answer of a script is given again and again.
STAND_IN = f"#!{sys.executable} -SE" + """
import json, os, re, sys
from pathlib import Path

here = Path(os.environ["STAND_INS"])
name, words = Path(sys.argv[0]).name, sys.argv[1:]
if words[:2] == ["compute", "tpus"]:
    said = re.search(r"worker.sh (\\w+)", " ".join(words))
    verb = ("queued " if words[2] == "queued-resources" else "") + words[3]
    verb += (" " + (said[1] if said else "log")) * (words[3] == "ssh")
else:
    verb = " ".join([name, *words[:2]])
with open(here / "calls", "a") as file:
    file.write(json.dumps([verb, name, *words]) + "\\n")
answers = json.loads((here / "answers").read_text())
script = answers.get(verb) or [{}]
answer = script.pop(0) if len(script) > 1 else script[0]
(here / "answers").write_text(json.dumps(answers))
sys.stdout.write(answer.get("out", ""))
sys.stderr.write(answer.get("err", ""))
sys.exit(answer.get("code", 0))
"""


class StandIns:
    """A folder of commands that comes first on the PATH, and is the HOME, of what it runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        self.answer({})

    def add(self, *names: str, script: str = STAND_IN) -> "StandIns":
        for name in names:
            (self.folder / name).write_text(script)
            (self.folder / name).chmod(0o755)
        return self

    def answer(self, scripts: dict[str, list[dict]]) -> None:
        """scripts: {verb: [answer of the first call, of the second, ...]}; an answer may have out, err and code."""
        (self.folder / "answers").write_text(json.dumps(scripts))

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
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

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
