"""python -m starflow_jax.main --config=configs/t2v.py[:variant] --workdir=DIR --mode=MODE"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from starflow_jax.config import UserError, from_config_dict

# Each mode is the function of its own name in the module of its own name: (config, workdir) -> None.
MODES = ("train", "calibrate", "sample", "evaluate", "benchmark", "package", "plan", "convert", "prepare")

CONFIG = config_flags.DEFINE_config_file("config", None, "Settings: configs/t2v.py[:tiny|tiny_gpu|3b|7b].")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints and results; default: runs/NAME.")
DISTRIBUTED = flags.DEFINE_string(
    "distributed", "", "One of several processes of a run: true (on TPU pods, Slurm, Kubernetes the others are found) "
    "or HOST:PORT,COUNT,INDEX: the first one's address, how many there are, which this is.")
MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"{argv[1]}: not an option; settings are given as --config.sample.guidance=2.5")
    config = from_config_dict(CONFIG.value)
    workdir = Path(WORKDIR.value or f"runs/{config.name}")
    prepare_jax()
    join(DISTRIBUTED.value)
    module = importlib.import_module(f"starflow_jax.modes.{MODE.value}")
    getattr(module, MODE.value)(config, workdir)


def prepare_jax() -> None:
    """Keep compiled programs for the next run."""
    import jax

    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "starflow_jax", "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def join(distributed: str) -> None:
    """Meet the other processes of this run. Raises UserError for what can't be read or reached."""
    import jax

    if distributed in ("", "false"):
        return
    given: dict[str, Any] = {}
    if distributed != "true":
        address, *numbers = distributed.split(",")
        if len(numbers) != 2 or not all(number.isdigit() for number in numbers) or ":" not in address:
            raise UserError(f"--distributed={distributed}: must be true or HOST:PORT,COUNT,INDEX")
        given = dict(coordinator_address=address, num_processes=int(numbers[0]), process_id=int(numbers[1]))
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed={distributed}: the processes did not meet ({str(error).splitlines()[0]}); "
                        "start all of them with the same HOST:PORT and COUNT") from error


def parse_flags(argv: list[str]) -> list[str]:
    """Read the command line. Raises UserError naming what is wrong with it."""
    try:
        rest = flags.FLAGS(argv)
    except OSError as error:
        given = next((arg for arg in reversed(argv) if arg.startswith("--config=")), "--config")
        raise UserError(f"{given}: this file can't be read; try --config=configs/t2v.py") from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if flags.FLAGS["config"].value is None:
        raise UserError("--config is missing; try --config=configs/t2v.py")
    return rest


def run() -> None:
    """Run; a UserError becomes one line and exit code 2."""
    logging.set_verbosity(logging.ERROR)  # orbax and TFDS tell every step they take
    try:
        app.run(main, flags_parser=parse_flags)
    except UserError as error:
        print(f"starflow_jax: {error}", file=sys.stderr, flush=True)
        if flags.FLAGS.is_parsed() and DISTRIBUTED.value:
            os._exit(2)  # leaving as usual waits for the other processes, which may be gone, and then aborts
        sys.exit(2)


if __name__ == "__main__":
    run()
