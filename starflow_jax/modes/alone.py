"""Modes that change a workdir's model have it for themselves."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from starflow_jax import sharding
from starflow_jax.config import UserError
from starflow_jax.io.lock import held


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """Have a workdir for this run alone: its first process holds it for all, which are refused together.

    Raises UserError where another run has it.
    """
    with contextlib.ExitStack() as stack:
        refused = ""
        if jax.process_index() == 0:
            try:
                stack.enter_context(held(workdir))
            except UserError as error:
                refused = str(error)
        refused = sharding.as_first_process_has_it(refused)
        if refused:
            raise UserError(refused)
        yield
