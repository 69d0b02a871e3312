"""A compiled program of a step."""

import dataclasses
from typing import Any

from starflow_jax.planning.array_kinds import UNKNOWN, Contents


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program and how often it runs in a step."""

    name: str
    compiled: Any
    times: float = 1
    updates: float | None = None  # of a solver's block of tokens, the first of which stands before its loop
    filled: float = 1  # of the cache that its attention reads, the share that holds anything, on the average
    held: int = 0  # bytes a device of its arguments and of all that stays there meanwhile, where that is known
    lowered: Any = None
    contents: Contents = UNKNOWN  # which of its arguments and results are weights or a cache
