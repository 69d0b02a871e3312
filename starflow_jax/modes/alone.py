"""Modes that change a workdir's model, or prepare data, have the folder for themselves."""

import contextlib
import os
from collections.abc import Iterator

import jax

from starflow_jax import sharding
from starflow_jax.config import UserError
from starflow_jax.io.lock import held


@contextlib.contextmanager
def alone_in(folder: str | os.PathLike[str], named: str = "--workdir") -> Iterator[None]:
    """Have a folder for this run alone: its first process holds it for all, which are refused together.

    named: the setting that names the folder. Raises UserError where another run has it.
    """
    with contextlib.ExitStack() as stack:
        refused = ""
        if jax.process_index() == 0:
            try:
                stack.enter_context(held(folder, named))
            except UserError as error:
                refused = str(error)
        refused = sharding.as_first_process_has_it(refused)
        if refused:
            raise UserError(refused)
        yield
