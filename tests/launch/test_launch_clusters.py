"""launch/gke.sh and launch/xmanager.py against stand-ins for xpk, docker, kubectl and the package xmanager."""

import json
import shlex
import subprocess
import sys

import pytest

from tests.small_run import ROOT
from tests.stand_ins import LAUNCH, StandIns, one_line

FLAGS = ["--", "--config=configs/t2v.py:7b", "--config.sample.prompt=it's a red seven"]


@pytest.fixture
def stand_ins(tmp_path) -> StandIns:
    return StandIns(tmp_path / "bin").add("gcloud", "xpk", "docker", "kubectl")


# gke.sh

GKE = ["--cluster=pods", "--project=lab", "--zone=us-east5-a"]
WORKLOAD = [*GKE, "--name=flow-7b", "--type=v5p-128", "--image=us-docker.pkg.dev/lab/x/flow:1",
            "--workdir=gs://my.bucket/runs/7b"]


def test_gke_launch(stand_ins) -> None:
    result = stand_ins.run("gke.sh", "launch", *WORKLOAD, *FLAGS, "--config.train.init_from=gs://my.bucket/runs/3b")
    assert result.returncode == 0, result.stderr
    build, push, create, wait, logs, done = stand_ins.calls()
    image = "us-docker.pkg.dev/lab/x/flow:1"
    assert build == ["docker", "build", "--file", str(LAUNCH / "Dockerfile"), "--build-arg", "EXTRA=tpu", "--tag",
                     image, str(ROOT)]
    assert push == ["docker", "push", image]
    command = next(word for word in create if word.startswith("--command=")).removeprefix("--command=")
    assert shlex.split(command) == ["exec", "bash", "launch/worker.sh", "run", "/buckets/my.bucket/runs/7b", *FLAGS[1:],
                                    "--config.train.init_from=/buckets/my.bucket/runs/3b"]
    assert create[:3] == ["xpk", "workload", "create"]
    assert {"--workload=flow-7b", "--tpu-type=v5p-128", "--num-slices=1", f"--docker-image={image}",
            "--storage=my-bucket", "--max-restarts=100", "--restart-on-exit-codes=1", *GKE} <= set(create)
    assert wait[:2] == ["kubectl", "wait"] and logs[:2] == ["kubectl", "logs"]
    assert done == ["xpk", "workload", "list", "--wait-for-job-completion=flow-7b", *GKE]


def test_gke_failure_of_the_workload_is_the_exit_code(stand_ins) -> None:
    stand_ins.answer({"xpk workload list": [dict(code=125)]})
    assert stand_ins.run("gke.sh", "log", *GKE, "--name=flow-7b").returncode == 125


def test_gke_cluster_dry_run(stand_ins) -> None:
    result = stand_ins.run("gke.sh", "cluster", *GKE, "--type=v6e-256", "--spot", "--workdir=gs://my.bucket/runs",
                           "--dry-run")
    create, attach = [shlex.split(line) for line in result.stdout.splitlines()]
    assert create == ["xpk", "cluster", "create", "--tpu-type=v6e-256", "--num-slices=1", "--spot",
                      "--enable-gcsfuse-csi-driver", *GKE]
    assert attach[:4] == ["xpk", "storage", "attach", "my-bucket"]
    assert {"--type=gcsfuse", "--bucket=my.bucket", "--mount-point=/buckets/my.bucket"} <= set(attach)
    assert stand_ins.calls() == []


# xmanager.py

SWEEP = ["--sweep=train.learning_rate=1e-4,3e-4", "--sweep=train.seed=0,1"]
FAKE_XMANAGER = '''\
"""Notes what it is asked; a run whose arguments hold `fail` fails. The names and signatures are xmanager 0.8.5's."""
import contextlib, json, os, types

def note(kind, **what):
    with open(os.environ["STAND_INS"] + "/calls", "a") as file:
        file.write("\\x1f".join([kind, kind, json.dumps(what), "\\n"]))

class Experiment:
    def package(self, packageables):
        return packageables
    def add(self, job):
        note("add", **job)

@contextlib.contextmanager
def create_experiment(experiment_title):
    note("experiment", title=experiment_title)
    yield Experiment()
    if "fail" in experiment_title:
        raise RuntimeError("Process returned non-zero code: 3")

xm = types.SimpleNamespace(
    binary=lambda *, executor_spec, path, args: dict(spec=executor_spec, path=path, args=args),
    dockerfile_container=lambda *, executor_spec, path, dockerfile: dict(spec=executor_spec, file=dockerfile),
    JobRequirements=lambda **resources: resources,
    Job=lambda *, executable, executor, args: dict(executable=executable, executor=executor, args=args))

def executor(name):
    make = lambda requirements=None: [name, requirements]
    make.Spec = lambda push_image_tag=None: [name, push_image_tag]
    return make

xm_local = types.SimpleNamespace(create_experiment=create_experiment, Local=executor("Local"),
                                 Vertex=executor("Vertex"))
'''


def xmanager(tools: StandIns, *words: str) -> subprocess.CompletedProcess:
    (tools.folder / "packages/xmanager").mkdir(parents=True, exist_ok=True)
    (tools.folder / "packages/xmanager/__init__.py").write_text(FAKE_XMANAGER)
    google = tools.folder / "packages/google/auth"
    google.mkdir(parents=True, exist_ok=True)
    (google / "__init__.py").touch()
    (google / "exceptions.py").write_text("class DefaultCredentialsError(Exception): pass\n")
    return tools.run("xmanager.py", *words, PYTHONPATH=str(tools.folder / "packages"))


def test_xmanager_dry_run_of_a_sweep(stand_ins) -> None:
    result = xmanager(stand_ins, "--workdir=runs/sweep", *SWEEP, "--python=/env/python", "--dry-run", *FLAGS)
    assert result.returncode == 0, result.stderr
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    workdir = "--workdir=runs/sweep/train.learning_rate=1e-4/train.seed=1"
    assert lines[1] == ["/env/python", "-m", "starflow_jax.main", workdir, *FLAGS[1:],
                        "--config.train.learning_rate=1e-4", "--config.train.seed=1"]
    assert len({line[3] for line in lines}) == 4 and stand_ins.calls() == []


def test_xmanager_local_and_its_failure(stand_ins) -> None:
    result = xmanager(stand_ins, "--workdir=/w", "--sweep=train.seed=0,1", f"--python={sys.executable}", *FLAGS)
    assert result.returncode == 0, result.stderr
    (_, title), *added = stand_ins.calls()
    assert json.loads(title) == {"title": "starflow_jax"} and len(added) == 2
    job = json.loads(added[1][1])
    assert job["executable"] == {"spec": ["Local", None], "path": sys.executable, "args": ["-m", "starflow_jax.main"]}
    assert job["args"] == ["--workdir=/w/train.seed=1", *FLAGS[1:], "--config.train.seed=1"]
    one_line(xmanager(stand_ins, "--workdir=/w", "--name=fail", f"--python={sys.executable}", *FLAGS), 1, "code: 3")


def test_xmanager_vertex(stand_ins) -> None:
    result = xmanager(stand_ins, "--executor=vertex", "--workdir=gs://bucket/x", "--gpu=l4_24th", "--gpus=4",
                      "--image=I", *FLAGS)
    assert result.returncode == 0, result.stderr
    _, (_, noted) = stand_ins.calls()
    job = json.loads(noted)
    assert job["executable"] == {"spec": ["Vertex", "I"], "file": str(LAUNCH / "Dockerfile")}
    assert job["executor"] == ["Vertex", {"l4_24th": 4}]
    assert job["args"] == ["/gcs/bucket/x", *FLAGS[1:]]  # after the image's entry point: worker.sh run


@pytest.mark.parametrize("words, told", [
    (["--workdir=w"], "--config"), (["--workdir=w", "--colour=red", *FLAGS], "--colour=red"), (FLAGS, "--workdir"),
    (["--workdir=gs://b/x", *FLAGS], "gs://b/x"), (["--workdir=w", "--python=/no/python", *FLAGS], "/no/python"),
    (["--workdir=w", "--executor=vertex", *FLAGS], "gs://BUCKET"),
    (["--workdir=gs://b/x", "--executor=vertex", *FLAGS], "--image"),
    (["--workdir=w", "--sweep=train.seed", f"--python={sys.executable}", *FLAGS], "--sweep=train.seed")])
def test_xmanager_errors(words: list[str], told: str, stand_ins) -> None:
    one_line(xmanager(stand_ins, *words), 2, told)
