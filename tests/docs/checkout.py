"""A folder that looks like a checkout after its installation, in which the blocks of a page are run or rehearsed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.conftest import FAST_COMPILATION
from tests.small_run import ROOT
from tests.stand_ins import StandIns

# Blocks install nothing: pip's own parser reads what they ask for, and the tests' packages are what they find.
PIP = f"""#!{sys.executable}
import sys
from pip._internal.cli.main_parser import parse_command
from pip._internal.commands import create_command
name, arguments = parse_command(sys.argv[1:])
options, _ = create_command(name).parse_args(arguments)
for file in getattr(options, "requirements", []):
    open(file).close()
"""
PYTHON3 = """#!/bin/bash
[[ $1 == -m && $2 == venv ]] || exec .venv/bin/python "$@"
mkdir -p "$3/bin" && cp -fP .venv/bin/* "$3/bin/" 2>/dev/null || true
"""
# Scripts of launch/ read their own options and print what they would do.
DRY_RUN = """#!/bin/bash
note() { printf '%s\\x1f' launch launch "$@" >> "$STAND_INS/calls"; printf '\\n' >> "$STAND_INS/calls"; }
case "${0##*/} $*" in
    "bash launch/"*) note "$@"; exec /bin/bash "$1" "$2" --dry-run "${@:3}" ;;
    "uv run launch/"*) note "${@:2}"; exec PYTHON "$2" --python=PYTHON --dry-run "${@:3}" ;;
    bash*) exec /bin/bash "$@" ;;
esac
"""
ELSEWHERE = ("gcloud", "xpk", "docker", "huggingface-cli", "ssh-keygen", "ssh-agent", "ssh-add")
# Reads command lines, each in a process of its own since flags are global, and prints what is wrong with them.
PARSER = """
import json, os, sys
from starflow_jax import main
for arguments in json.load(sys.stdin):
    if os.fork() == 0:
        try:
            sys.argv = arguments  # ml_collections looks for overrides here
            if arguments[0] == "starflow":
                main.run = lambda: None  # it has then written the short form out, into sys.argv
                main.starflow()
            if "--workdir=" in str(arguments) and "config=" not in str(arguments):
                sys.argv.insert(1, "--config=configs/t2v.py")  # as the workdir, which is not there, says
            main.parse_flags(sys.argv)
            main.from_config_dict(main.CONFIG.value)
        except (main.UserError, SystemExit) as error:
            print(repr(error), arguments, flush=True)
        os._exit(0)
    os.wait()
"""


class Checkout:
    """Links to everything in this repository; what blocks write stays in the folder."""

    def __init__(self, folder: Path):
        self.folder = folder / "starflow_jax"
        self.folder.mkdir()
        for entry in ROOT.iterdir():
            if not entry.name.startswith(".") and entry.name not in ("runs", "build", "dist"):
                (self.folder / entry.name).symlink_to(entry)
        (self.folder / "runs").mkdir()
        self.environment = self.folder / ".venv"
        (self.environment / "bin").mkdir(parents=True)
        (self.environment / "lib").symlink_to(Path(sysconfig.get_path("purelib")).parents[1])
        self.tools = StandIns(folder / "tools").add("python3", script=PYTHON3)
        self._put("pip", PIP)

    def _put(self, name: str, script: str) -> None:
        (self.environment / "bin" / name).write_text(script)
        (self.environment / "bin" / name).chmod(0o755)

    def run(self, code: str, cache: Path, quick: bool) -> None:
        """The block as its reader runs it. Raises AssertionError with what it printed where it fails."""
        self._put("python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
        self._put("starflow", f'#!{sys.executable}\nimport sys\nsys.path.insert(0, "")\n'
                              "from starflow_jax.main import starflow\nstarflow()\n")
        environment = {**os.environ, "PATH": f"{self.tools.folder}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu",
                       "XDG_CACHE_HOME": str(cache), "XLA_FLAGS": " ".join(FAST_COMPILATION) if quick else ""}
        self._bash(code, environment, timeout=300 if quick else 3600)

    def rehearse(self, code: str) -> list[list[str]]:
        """Run the block with stand-ins for all that computes or is elsewhere.

        Returns the words of each starflow_jax command in it, the program's first. Raises AssertionError where the
        shell, pip or a script of launch/ does not take what the block says.
        """
        tools = self.tools.add("python", "starflow", *ELSEWHERE)
        tools.add("bash", "uv", script=DRY_RUN.replace("PYTHON", sys.executable))
        if not (tools.folder / "answers").exists():
            tools.answer({"gcloud config get-value": [dict(out="somewhere\n")]})
        for name in ("python", "starflow"):
            shutil.copy(tools.folder / name, self.environment / "bin" / name)
        before = len(tools.calls())
        kill = "kill() { wait; }\n"  # stand-ins end by themselves, and must get to note how they were called
        self._bash(kill + code, tools.environment(), timeout=60)
        commands = []
        for program, *words in tools.calls()[before:]:
            if words[:2] == ["-m", "starflow_jax.main"]:
                commands.append(["main", *words[2:]])
            elif program == "launch" and "--" in words:
                commands.append(["main", *words[words.index("--") + 1:]])
            elif program == "starflow":
                commands.append([program, *words])
        return commands

    def _bash(self, code: str, environment: dict[str, str], timeout: int) -> None:
        process = subprocess.Popen(["/bin/bash", "-euo", "pipefail", "-c", code], cwd=self.folder, env=environment,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what the block started, too
            raise
        assert process.returncode == 0, f"{code}\n{out[-4000:]}\n{err[-4000:]}"


def wrong_commands(commands: list[list[str]]) -> str:
    """What starflow_jax's own parser and settings say against these command lines; nothing where all are valid."""
    result = subprocess.run([sys.executable, "-c", PARSER], input=json.dumps(commands), cwd=ROOT, capture_output=True,
                            text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout
