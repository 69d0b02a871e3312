"""Training runs, one or a sweep of settings, as an XManager experiment: here, or on Vertex AI's GPUs.

    uv run launch/xmanager.py --workdir=DIR [OPTIONS] -- --config=configs/t2v.py [FLAGS of starflow_jax.main]

`uv run` gives XManager the environment named below, apart from starflow_jax's: it needs an older protobuf. (Without uv:
a virtual environment of its own, `pip install xmanager`, and that environment's python instead of `uv run`.)
Started again with the same --workdir, every run resumes from its last checkpoint. XManager knows no TPU beyond v3:
pods are for tpu_vm.sh and gke.sh.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["xmanager>=0.8.5"]
# ///

import argparse
import itertools
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
GPUS = ("a100", "l4_24th", "t4", "v100", "p100")  # for which XManager finds a Vertex AI machine

# Python puts this file's folder first, where `import xmanager` would find this very file.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT / "launch"]


def fail(message: str) -> NoReturn:
    print(f"xmanager.py: {message}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see --help")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options with .flags, those of the training; what is left for XManager's own --xm_... flags)."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--executor", choices=("local", "vertex"), default="local",
                        help="local: processes on this machine, all at once; vertex: containers on Vertex AI")
    parser.add_argument("--workdir", required=True,
                        help="checkpoints and results; a folder, or gs://BUCKET/FOLDER for vertex; a run of a sweep "
                             "gets a folder of its own in it")
    parser.add_argument("--sweep", action="append", default=[], metavar="FIELD=VALUE,VALUE",
                        help="a run for each value, such as train.learning_rate=1e-4,3e-4; repeated: for each pair")
    parser.add_argument("--name", default="starflow_jax", help="of the experiment")
    parser.add_argument("--gpu", default="a100", choices=GPUS, help="vertex: the kind of GPU")
    parser.add_argument("--gpus", type=int, default=1, help="vertex: how many of them per run")
    parser.add_argument("--image", help="vertex: where to push the image, such as us-docker.pkg.dev/PROJECT/REPO/X:1")
    parser.add_argument("--python", default=str(ROOT / ".venv/bin/python"), help="local: the Python of starflow_jax")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
    options, rest = parser.parse_known_args(argv[:split])
    for argument in rest:
        if not argument.startswith("--xm_"):
            fail(f"{argument}: not an option; training flags come after --; see --help")
    options.flags = argv[split + 1:]
    check(options)
    return options, rest


def check(options: argparse.Namespace) -> None:
    if not any(flag.startswith("--config=") for flag in options.flags):
        fail("no training flags: end with -- --config=configs/t2v.py")
    if any(flag.startswith("--workdir") for flag in options.flags):
        fail("--workdir belongs before the --")
    if options.gpus < 1:
        fail(f"--gpus={options.gpus}: must be 1 or more")
    if options.executor == "local":
        if options.workdir.startswith("gs://"):
            fail(f"--workdir={options.workdir}: on this machine it must be a folder")
        if not options.dry_run and not os.access(options.python, os.X_OK):
            fail(f"--python={options.python}: no such program; install starflow_jax as README says")
    elif not options.workdir.startswith("gs://") or options.workdir.count("/") < 3:
        fail(f"--workdir={options.workdir}: on Vertex AI it must be gs://BUCKET/FOLDER")
    elif not options.image:
        fail("--image is missing: where Vertex AI gets the image from")
    elif not options.dry_run and not shutil.which("docker"):
        fail("docker is not installed; see https://docs.docker.com/engine/install")


def runs(options: argparse.Namespace) -> list[list[str]]:
    """The arguments of each run: --workdir and the training's flags."""
    axes = []
    for sweep in options.sweep:
        field, equals, values = sweep.partition("=")
        if not equals or not all(values.split(",")):
            fail(f"--sweep={sweep}: must be FIELD=VALUE,VALUE, such as train.learning_rate=1e-4,3e-4")
        axes.append([(field, value) for value in values.split(",")])
    # Vertex AI mounts every bucket of the project at /gcs.
    base = options.workdir.replace("gs://", "/gcs/", 1) if options.executor == "vertex" else options.workdir
    arguments = []
    for point in itertools.product(*axes):
        folder = "".join(f"/{field}={value}" for field, value in point)
        arguments.append([f"--workdir={base}{folder}", *options.flags,
                          *(f"--config.{field}={value}" for field, value in point)])
    return arguments


def dry_run(options: argparse.Namespace) -> None:
    if options.executor == "vertex":
        print(f"docker build --file {shlex.quote(str(ROOT / 'launch/Dockerfile'))} --tag {shlex.quote(options.image)} "
              f"{shlex.quote(str(ROOT))}")
        print(f"docker push {shlex.quote(options.image)}")
    for arguments in runs(options):
        if options.executor == "vertex":
            workdir, *flags = arguments
            print(f"Vertex AI, {options.gpus} x {options.gpu}, {options.image}:",
                  shlex.join([workdir.removeprefix("--workdir="), *flags]))
        else:
            print(shlex.join([options.python, "-m", "starflow_jax.main", *arguments]))


def launch(options: argparse.Namespace, xm: Any, xm_local: Any) -> None:
    """One work unit per run; waits for local ones. Raises what XManager raises, RuntimeError for a failed run."""
    os.chdir(ROOT)
    with xm_local.create_experiment(experiment_title=options.name) as experiment:
        if options.executor == "vertex":
            # Where XManager asks Vertex AI to stage.
            os.environ.setdefault("GOOGLE_CLOUD_BUCKET_NAME", options.workdir.split("/")[2])
            packageable = xm.dockerfile_container(
                executor_spec=xm_local.Vertex.Spec(push_image_tag=options.image), path=str(ROOT),
                dockerfile=str(ROOT / "launch/Dockerfile"))
            executor = xm_local.Vertex(requirements=xm.JobRequirements(**{options.gpu: options.gpus}))
        else:
            packageable = xm.binary(executor_spec=xm_local.Local.Spec(), path=options.python,
                                    args=["-m", "starflow_jax.main"])
            executor = xm_local.Local()
        [executable] = experiment.package([packageable])
        for arguments in runs(options):
            if options.executor == "vertex":  # the image's entry point takes the workdir first
                arguments[0] = arguments[0].removeprefix("--workdir=")
            experiment.add(xm.Job(executable=executable, executor=executor, args=arguments))


def main(argv: list[str]) -> None:
    options, rest = parse(argv[1:])
    if options.dry_run:
        dry_run(options)
        return
    runs(options)  # before anything is built
    try:
        from absl import app
        from xmanager import xm, xm_local
    except ImportError:
        fail("the package xmanager is not installed; run `uv run launch/xmanager.py`, or see --help")

    def run(_: list[str]) -> None:
        from google.auth.exceptions import DefaultCredentialsError

        try:
            launch(options, xm, xm_local)
        except DefaultCredentialsError:
            fail("no Google Cloud credentials; run `gcloud auth application-default login`")
        except RuntimeError as error:
            print(f"xmanager.py: {error}", file=sys.stderr)
            sys.exit(1)

    app.run(run, argv=[argv[0], *rest])


if __name__ == "__main__":
    main(sys.argv)
