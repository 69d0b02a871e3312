"""python -m starflow_jax.main --config=configs/t2v.py[:VARIANT] --workdir=DIR --mode=MODE [--config.SETTING=VALUE ...]

In short:  starflow MODE [PROMPT] [--config=configs/t2v.py[:VARIANT]] [--workdir=DIR] [--SETTING=VALUE ...]
"""

import errno
import os
import signal
import sys
import threading
import time
import traceback
from logging import LogRecord
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from starflow_jax import modes
from starflow_jax.config import Config, UserError, from_config_dict, whole_number
from starflow_jax.io import command_line, supervised
from starflow_jax.io.files import first_line
from starflow_jax.io.memory import keep_freed_memory
from starflow_jax.modes import MODES
from starflow_jax.settings.help import entry, settings_text

# What storage may answer, whatever is written: no room, no right, no such place.
OF_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
              errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ESTALE, errno.EEXIST, errno.ELOOP}
# Seconds without a sign of life, after which another process counts as lost: where each works alone, and where all work
# together and then end.
LOST_AFTER, LOST_TOGETHER_AFTER = 20, 40
LEAVES_AFTER = 2.0  # seconds from an error to the end of one of several processes
AGAIN_AFTER = 0.05  # seconds from a Ctrl-C that a callback lost to another one
CONFIG = config_flags.DEFINE_config_file("config", None, "A config (configs/t2v.py) and, after a colon, its variant.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints and results; default: runs/NAME.")
DISTRIBUTED = flags.DEFINE_string(
    "distributed", "", "This is one of several processes of a run: true (TPU pods, Slurm and Kubernetes are detected), "
    "or HOST:PORT,COUNT,INDEX: the first one's address, the number of processes, and which one this is.")
ALONE = ("", "false")  # of DISTRIBUTED: no others
MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")
REPEATING = ("train", "benchmark")  # modes that run a step of one size again and again


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"{argv[1]}: not an option; settings are given as --config.sample.guidance=2.5")
    config = from_config_dict(CONFIG.value)
    modes.check(MODE.value, config)
    workdir = Path(WORKDIR.value or f"runs/{config.name}")
    if DISTRIBUTED.value not in ALONE:
        coordinator(DISTRIBUTED.value)  # what can't be read needs no child
        supervised.run_in_child()
    if MODE.value in REPEATING:
        keep_freed_memory()
    # Imported after the settings are checked: JAX takes longer than everything above.
    from starflow_jax.io.compiled import keep_compiled_programs

    keep_compiled_programs()
    join(DISTRIBUTED.value, alone=MODE.value == "sample")
    modes.run(MODE.value, config, workdir)


def join(distributed: str, alone: bool = False) -> None:
    """Connect to the other processes of this run. alone: go on, should one of them be lost.

    Raises UserError for what can't be read or reached.
    """
    if distributed in ALONE:
        return
    import jax

    jax.config.update("jax_enable_recoverability", alone)
    try:
        jax.distributed.initialize(**coordinator(distributed),
                                   heartbeat_timeout_seconds=LOST_AFTER if alone else LOST_TOGETHER_AFTER)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed={distributed}: can't connect to the other processes "
                        f"({first_line(error)}); start all with the same HOST:PORT and COUNT") from error


def coordinator(distributed: str) -> dict[str, Any]:
    """What jax.distributed takes of HOST:PORT,COUNT,INDEX; of "true" nothing. Raises UserError for anything else."""
    if distributed == "true":
        return {}
    address, *numbers = distributed.split(",")
    host, _, port = address.rpartition(":")
    count, index = map(whole_number, numbers) if len(numbers) == 2 else (None, None)
    if not host or not 0 < (whole_number(port) or 0) < 2**16 or not count or index is None or index >= count:
        raise UserError(f"--distributed={distributed}: must be true or HOST:PORT,COUNT,INDEX, with ports of 1 to 65535 "
                        "and an INDEX from 0 to COUNT - 1")
    return dict(coordinator_address=address, num_processes=count, process_id=index)


def parse_flags(argv: list[str]) -> list[str]:
    """Read the command line, or print --help and exit. Raises UserError naming what is wrong with it."""
    asked = [argument for argument in argv[1:] if argument == "-h" or argument.startswith("--help")]
    arguments = command_line.with_config([argument for argument in argv[1:] if argument not in asked])
    command_line.check_names(arguments)
    try:
        rest = flags.FLAGS([argv[0], *arguments])
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a config is a program: whatever it raises
        raise command_line.in_words(error) from error
    if asked:
        topic = asked[0].partition("=")[2] or (MODE.value if flags.FLAGS["mode"].present else "")
        _show(help_text(topic))
        sys.exit(0)
    if CONFIG.value is None:
        raise UserError(f"--config is missing; try --config={command_line.DEFAULT_CONFIG}")
    return rest


def help_text(topic: str = "") -> str:
    """What --help prints: the settings of a mode or a section, or everything; with --config the values of that config.

    Raises UserError for a topic that is neither a mode nor a section.
    """
    sections = MODES[topic][1] if topic in MODES else (topic,) if topic else ()
    config = None if CONFIG.value is None else from_config_dict(CONFIG.value)
    settings = settings_text(Config, sections, config)
    if not settings:
        raise UserError(f"--help={topic}: no such mode or section of settings; --help lists all")
    options = [entry(f"--{name}", flags.FLAGS[name].help) for name in ("config", "workdir", "mode", "distributed")]
    which = "their defaults; --config=FILE shows its own" if config is None else f"the values of {config.name}"
    listed = [entry(mode, does) for mode, (does, _) in MODES.items()]
    return "\n".join([(__doc__ or "").strip(), "", "modes", *listed, "", "options", *options,
                      entry("--help[=TOPIC]", "This text, or that of one mode or section alone."), "",
                      f"settings (--config.SECTION.NAME=VALUE) with {which}", "", settings])


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # piped into `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run() -> None:
    """Run; a UserError becomes one line and exit code 2."""
    logging.set_verbosity(logging.ERROR)  # orbax and TFDS log every step they take
    logging.get_absl_logger().addFilter(is_ours)
    sys.unraisablehook = _unless_too_late
    try:
        app.run(main, flags_parser=parse_flags)
    except UserError as error:
        _leave(error)
    except KeyboardInterrupt:
        print("starflow_jax: interrupted", file=sys.stderr, flush=True)
        sys.exit(command_line.INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_STORAGE:
            where = f"{error.filename}: " if error.filename else ""
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            _leave(UserError(f"{where}{(error.strerror or str(error)).lower()}; "
                             f"{'make room there' if full else 'check that path'}, or name another"))
        if not _has_others() or MODE.value == "sample":
            raise
        time.sleep(LOST_TOGETHER_AFTER + 10)  # where another one's loss is the cause, JAX ends this process meanwhile
        traceback.print_exc()
        os._exit(1)  # a normal exit waits for the others


def is_ours(record: LogRecord) -> bool:
    """Not orbax's, which logs the traceback of what it then raises."""
    return "orbax" not in record.pathname


def _unless_too_late(unraisable: Any) -> None:
    """Says what nothing could catch, but for tensorstore's writes that end once orbax has given a checkpoint up. A
    Ctrl-C that came while a callback ran, of the garbage collector for instance, comes again: there it was lost."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        again = threading.Timer(AGAIN_AFTER, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()
    elif str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def starflow() -> None:
    """The console script `starflow`."""
    try:
        own = {mode: sections[0] for mode, (_, sections) in MODES.items()}
        sys.argv[1:] = command_line.written_out(sys.argv[1:], own, set(flags.FLAGS))
    except UserError as error:
        _leave(error)
    run()


def _leave(error: UserError) -> None:
    print(f"starflow_jax: {error}", file=sys.stderr, flush=True)
    if _has_others():
        time.sleep(LEAVES_AFTER)  # the first process takes the others with it, which may be about to say the same
        os._exit(2)  # a normal exit waits for the other processes, which may be gone, and aborts
    sys.exit(2)


def _has_others() -> bool:
    return flags.FLAGS.is_parsed() and DISTRIBUTED.value not in ALONE


if __name__ == "__main__":
    run()
