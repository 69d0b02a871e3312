"""How the solver ended for each video of a batch."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from starflow_jax.config import UserError
from starflow_jax.flow.inversion import Report
from starflow_jax.flow.jacobi import Outcome
from starflow_jax.sharding import fetch


@dataclasses.dataclass(frozen=True)
class Solved:
    """B videos, K blocks of tokens of the deep block."""

    deep_steps_BK: np.ndarray  # solver steps of each block of tokens of the deep block
    deep_residual_BK: np.ndarray  # squared relative change in the last of them
    shallow_steps_B: np.ndarray  # summed over the shallow blocks' blocks of tokens; the frames' largest
    outcome_B: np.ndarray  # jacobi.Outcome: the worst of all blocks of tokens, the shallow blocks' too
    draft_steps_BK: np.ndarray | None = None  # as deep_steps_BK, of the block of sample.draft; None: there is none

    def check(self, index: int, what: str) -> None:
        """Raises UserError, which begins with `what`, where a video's solution is not finite."""
        if self.outcome_B[index] == Outcome.NOT_FINITE:
            raise UserError(f"{what}: the solver's result is not finite; lower sample.guidance and "
                            "sample.later_guidance, and use model.dtype=float32")

    def facts(self, index: int) -> dict[str, Any]:
        """What the JSON file of a video says of it."""
        drafted = None if self.draft_steps_BK is None else self.draft_steps_BK[index].tolist()
        return {"deep_steps_per_block": self.deep_steps_BK[index].tolist(),
                **({} if drafted is None else {"draft_steps_per_block": drafted}),
                "deep_residual_per_block": [float(f"{residual:.3g}") for residual in self.deep_residual_BK[index]],
                "shallow_steps": int(self.shallow_steps_B[index]),
                "outcome": Outcome(self.outcome_B[index]).words}


def solved(deep: Sequence[Report], shallow: Sequence[Sequence[Report]]) -> Solved:
    """From the deep block's reports, one for each of its steps, and those of the shallow blocks, for each part of the
    frames that they worked on together."""
    deep, shallow = jax.tree.map(fetch, (list(deep), list(shallow)))
    steps_BK, residual_BK = (np.concatenate([getattr(report, name) for report in deep]).T
                             for name in ("steps", "residual"))
    batch = len(steps_BK)

    def most(values_XF: Any) -> np.ndarray:
        """(B,) the largest of each video's, of values whose last axis has each video's frames one after the other."""
        return values_XF.reshape(len(values_XF), batch, -1).max(axis=(0, 2))

    worst = [most(report.outcome) for report in (*deep, *(report for part in shallow for report in part))]
    shallow_steps = [np.sum([most(report.steps.sum(axis=0, keepdims=True)) for report in part], axis=0)
                     for part in shallow]
    drafts = [report.draft.steps for report in deep if report.draft is not None]
    return Solved(steps_BK, residual_BK, np.max(shallow_steps, axis=0), np.max(worst, axis=0),
                  np.concatenate(drafts).T if drafts else None)
