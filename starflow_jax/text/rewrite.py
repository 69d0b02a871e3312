"""Prompts made longer before they are encoded: a hook, to be filled by a language model or a few lines of shell."""

import importlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable

from starflow_jax.config import UserError

FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


def rewriter(hook: str) -> Callable[[str], str]:
    """prompt -> longer prompt, by what `hook` names.

    "module:function" is a Python function of one string that returns one. Everything else is a command, started
    once for each prompt without a shell, which reads the prompt from its standard input and writes the longer one
    to its standard output. White space at the ends and line breaks in what comes out become single spaces.
    Raises UserError, here for a hook that there is not, and when called for one that fails or gives nothing.
    """
    named = FUNCTION.fullmatch(hook.strip())
    rewrite = _function(hook, *named.groups()) if named else _command(hook)

    def checked(prompt: str) -> str:
        longer = rewrite(prompt)
        if not isinstance(longer, str) or not longer.split():
            raise UserError(f"sample.rewrite={hook!r}: gave {longer!r} for the prompt {prompt!r}; it must give text")
        return " ".join(longer.split())

    return checked


def _function(hook: str, module: str, name: str) -> Callable[[str], str]:
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(f"sample.rewrite={hook!r}: there is no such function ({error}); its module must be "
                        "importable: set PYTHONPATH to its folder") from error
    except (Exception, SystemExit) as error:  # a module is a program: whatever it raises
        raise UserError(f"sample.rewrite={hook!r}: its module can't be imported ({type(error).__name__}: {error})"
                        ) from error

    def call(prompt: str) -> str:
        try:
            return function(prompt)
        except (Exception, SystemExit) as error:  # whatever the user's function raises
            raise UserError(f"sample.rewrite={hook!r}: failed on the prompt {prompt!r} "
                            f"({type(error).__name__}: {error})") from error

    return call


def _command(hook: str) -> Callable[[str], str]:
    try:
        words = shlex.split(hook)
    except ValueError as error:
        raise UserError(f"sample.rewrite={hook!r}: can't be read as a command ({error})") from error
    if not words:
        raise UserError(f"sample.rewrite={hook!r}: names no command")
    if shutil.which(words[0]) is None:
        raise UserError(f"sample.rewrite={hook!r}: there is no program {words[0]!r}; name one by its path, or one that "
                        "PATH leads to; a function is written module:function")

    def call(prompt: str) -> str:
        try:
            done = subprocess.run(words, input=prompt, capture_output=True, text=True, check=False)
        except (OSError, ValueError) as error:  # also what is no UTF-8
            raise UserError(f"sample.rewrite={hook!r}: can't be run ({error})") from error
        if done.returncode:
            said = " ".join(done.stderr.split()[-30:])
            raise UserError(f"sample.rewrite={hook!r}: ended with code {done.returncode} on the prompt {prompt!r} "
                            f"({said})")
        return done.stdout

    return call
