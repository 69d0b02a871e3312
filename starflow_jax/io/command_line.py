"""The command line before its flags are read: `starflow`'s short form, the config's file, names of settings."""

import re
import runpy
import signal
import sys
import types
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from starflow_jax.config import Config, UserError, changed, from_config_dict, unknown_setting
from starflow_jax.settings.listing import describe, sections

# An installed package has configs/ inside it, a checkout beside it.
PACKAGE = Path(__file__).parents[1]
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
DEFAULT_CONFIG = "configs/t2v.py"
NO_CONFIG = "its get_config must return settings, as in configs/t2v.py: to_config_dict(Config(...))"
HELP = ("--help", "-h")
INTERRUPTED = 128 + signal.SIGINT  # exit code, as a shell has it


def written_out(arguments: Sequence[str], modes: Mapping[str, str], flags: Container[str]) -> list[str]:
    """`starflow`'s MODE [PROMPT] [--SETTING=VALUE ...] as the flags of `python -m starflow_jax.main`.

    modes: the section of each, whose settings need no section's name. flags: the names of flags that are no settings.
    Raises UserError for an unknown mode or setting.
    """
    if not arguments or arguments[0] in HELP:
        return ["--help"]
    if arguments[0].startswith("--help="):
        return [arguments[0]]
    mode, *rest = arguments
    if mode not in modes:
        raise UserError(f"{mode}: no such mode; there are {', '.join(modes)}")
    written, remaining = [f"--mode={mode}"], iter(rest)
    for argument in remaining:
        if argument in HELP:
            written.append("--help")
        elif argument.startswith("-"):
            name, equals, value = argument.lstrip("-").partition("=")
            name, takes_value = _full_name(name, modes[mode], flags)
            written.append(f"--{name}={value if equals else next(remaining, '') if takes_value else 'true'}")
        elif mode == "sample":
            if any(one.startswith("--config.sample.prompt=") for one in written):
                raise UserError(f"{argument}: a second prompt; put one in quotes, or a list of them in a file for "
                                "--prompts_file=FILE")
            written.append(f"--config.sample.prompt={argument}")
        else:
            raise UserError(f"{argument}: only `starflow sample` takes a prompt; settings are --NAME=VALUE")
    return written if of_workdir(written) else [f"--config={DEFAULT_CONFIG}", *written]


def _full_name(name: str, section: str, flags: Container[str]) -> tuple[str, bool]:
    """(the flag's name, whether it takes a value) of --frames, --sample.frames, --config.sample.frames, --workdir."""
    kinds = {one.name: one.type for one in describe(Config)}
    for setting in (f"{section}.{name}", name.removeprefix("config.")):
        if setting in kinds:
            return f"config.{setting}", kinds[setting] != "true or false"
    if name in flags:
        return name, True
    raise unknown_setting(name.removeprefix("config.") if "." in name else f"{section}.{name}")


def with_config(arguments: Sequence[str]) -> list[str]:
    """The arguments with --config (the last one given) first, because the settings after it override its own, and with
    its file found: in the working directory, or else in the package. Without one, that of a workdir with a model.

    Raises UserError, listing the files there are, where it is in neither. Recipes import one another as
    `configs.NAME`, wherever they are.
    """
    others, given = _taken_out(arguments, "config")
    given = of_workdir(others) if given is None else given
    return others if given is None else [f"--config={_find_config(given)}", *others]


def of_workdir(arguments: Sequence[str]) -> str | None:
    """The config that a --workdir alone stands for: its model's own; None where it holds none."""
    workdir = _taken_out(arguments, "workdir")[1]
    held = workdir and (Path(workdir) / "system" / "settings.json").is_file()
    return f"configs/workdir.py:{workdir}" if held else None


def _taken_out(arguments: Sequence[str], flag: str) -> tuple[list[str], str | None]:
    """(the arguments without a flag, its value where it is given; the last one counts)."""
    others, given, remaining = [], None, iter(arguments)
    for argument in remaining:
        if argument in (f"--{flag}", f"-{flag}"):
            given = next(remaining, "")
        elif re.match(f"--?{flag}=", argument):
            given = argument.partition("=")[2]
        else:
            others.append(argument)
    return others, given


def load_config(given: str = DEFAULT_CONFIG, **changes: Mapping[str, Any]) -> Config:
    """The settings of configs/FILE.py[:VARIANT], with some of each named section changed: train={"steps": 60}.

    Raises UserError for an unknown file, variant or setting, and for a bad value.
    """
    file, _, variant = _find_config(given).partition(":")
    make = runpy.run_path(file)["get_config"]
    config = from_config_dict(make(variant) if variant else make())
    for section, of_section in changes.items():
        config = changed(config, section, of_section)
    return config


def _find_config(given: str) -> str:
    file, colon, variant = given.partition(":")
    path = Path(file)
    if not path.is_file() and path.parent == Path("configs"):
        path = CONFIGS / path.name
    if not path.is_file():
        there = ", ".join(f"configs/{config.name}" for config in sorted(CONFIGS.glob("*.py")))
        raise UserError(f"--config={given}: there is no file {file} here, nor in the package, which has {there}")
    if "configs" not in sys.modules:
        package = types.ModuleType("configs")
        package.__path__ = [str(path.absolute().parent), str(CONFIGS)]
        sys.modules["configs"] = package
    return f"{path}{colon}{variant}"


def in_words(error: BaseException) -> UserError:
    """absl's error about a flag, or Python's about a config, as one line about the setting."""
    line = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        return UserError(f"--config: {error.filename}, line {error.lineno}: {error.msg}")
    if isinstance(error, SystemExit):
        return UserError("--config: the config ended the program (sys.exit); it must return its settings")
    if "Attribute <class" in line or "has no attribute 'get_config'" in line:
        return UserError(f"--config: {NO_CONFIG}")
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", line)
    names = {section.__name__: f"{name}." for name, section in sections(Config)} | {Config.__name__: ""}
    if unknown and unknown[1] in names:
        return unknown_setting(names[unknown[1]] + unknown[2])
    if "Error whilst parsing config file" in line:
        return UserError(f"--config: the config can't be used: {str(error).strip().splitlines()[-1]}")
    if not isinstance(error, flags.Error):
        return UserError(f"--config: the config can't be used: {type(error).__name__}: {line}")
    found = re.match(r"flag --config\.([\w.]+)=(.*?): ", line)
    kinds = [one.type for one in describe(Config) if found and one.name == found[1]]
    return UserError(f"{found[1]}={found[2]}: must be {kinds[0]}" if found and kinds else line)


def check_names(arguments: Sequence[str]) -> None:
    """Raises UserError for a --config.NAME that is no setting."""
    known = {one.name for one in describe(Config)}
    for argument in arguments:
        name = re.match(r"--?(?:no)?config\.([^=\[]+)", argument)
        if name and name[1] not in known:
            raise unknown_setting(name[1])
