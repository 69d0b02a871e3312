"""The runs of configs/ablations.py read together: what is there, what is missing, and what each ablation changes.

Runs lie in one folder as VARIANT-SEED, each with what --mode=evaluate wrote into it. Likelihoods are compared between
runs of the same seed, and only where they are of the same latents: with another training noise they are not.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from starflow_jax.config import UserError
from starflow_jax.data.digits.captions import ATTRIBUTES
from starflow_jax.evaluation.measures import interval
from starflow_jax.io.charts import Chart, series
from starflow_jax.io.files import first_line, read_json

BASE = "base"
SEEDS = 3  # of each variant, where all are there
NOISE = ("noise_0", "noise_0.05", BASE, "noise_0.3")
LEVELS = (0.001, 0.05, 0.15, 0.3)  # theirs
WIDTHS = ("width_128", "width_192", "width_256", "width_384")
PLAIN = ("global_shallow", "no_images", "no_drop")  # compared with the base alone
COMPARED_WITH = {name: BASE for name in PLAIN} | {name: "width_192" for name in WIDTHS if name != "width_192"}
VARIANTS = (BASE, *PLAIN, *(name for name in NOISE if name != BASE), *WIDTHS)
MEASURES = ("bits_per_dim", "bits_below_gaussian", *ATTRIBUTES, "temporal_flickering", "parameters")


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained and measured run."""

    variant: str
    seed: int
    figures: dict[str, float]  # of MEASURES
    horizon: dict[str, float] | None  # of the last training length of horizon.json, where that is there


class Found(NamedTuple):
    """The runs of a folder."""

    runs: list[Run]
    missing: list[str]  # VARIANT-SEED of those that are not trained

    def of(self, variant: str) -> dict[int, Run]:
        """Those of a variant, by seed."""
        return {run.seed: run for run in self.runs if run.variant == variant}


def trained(folder: Path) -> list[Path]:
    """The workdirs VARIANT-SEED in a folder that hold a model, in the order of VARIANTS."""
    return [folder / f"{variant}-{seed}" for variant in VARIANTS for seed in range(SEEDS)
            if (folder / f"{variant}-{seed}" / "checkpoints").is_dir()]


def read_run(workdir: Path, parameters: int) -> Run:
    """A run from its evaluate.json and, where it is there, its horizon.json. Raises UserError for damaged ones."""
    variant, _, seed = workdir.name.rpartition("-")
    try:
        held = read_json(workdir / "evaluate.json")
        figures = {"bits_per_dim": held["bits_per_dim"], **held["adherence"],
                   "bits_below_gaussian": held["baselines"]["gaussian"] - held["bits_per_dim"],
                   "temporal_flickering": held["temporal_flickering"]}
        figures = {name: float(value) for name, value in figures.items()} | {"parameters": parameters}
        path = workdir / "horizon.json"
        horizon = read_json(path)["stretches"][-1] if path.exists() else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise UserError(f"{workdir}: its evaluate.json or horizon.json can't be read ({first_line(error)}); delete "
                        "both, and they are measured again") from error
    return Run(variant, int(seed), figures, horizon)


def measured_model(workdir: Path) -> str:
    """What a run's evaluate.json calls the model that it is of; "" where there is none that can be read."""
    try:
        return str(read_json(workdir / "evaluate.json")["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def collect(folder: Path, parameters: Mapping[Path, int]) -> Found:
    """The runs of a folder, each with its number of parameters."""
    runs = [read_run(workdir, count) for workdir, count in parameters.items()]
    there = {f"{run.variant}-{run.seed}" for run in runs}
    wanted = [f"{variant}-{seed}" for variant in VARIANTS for seed in range(SEEDS)]
    return Found(runs, [name for name in wanted if name not in there])


def summary(found: Found) -> dict[str, dict[str, Any]]:
    """{variant: {"seeds": [...], measure: (mean, half of its 95 % interval over seeds)}, ...}; bits_above: of
    the differences in bits per dimension from the run of the same seed that COMPARED_WITH names."""
    rows: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        runs, others = found.of(variant), found.of(COMPARED_WITH.get(variant, ""))
        if not runs:
            continue
        rows[variant] = {"seeds": sorted(runs), **{
            name: interval([run.figures[name] for run in runs.values()]) for name in MEASURES}}
        if both := sorted(runs.keys() & others.keys()):
            rows[variant]["bits_above"] = interval(
                [runs[seed].figures["bits_per_dim"] - others[seed].figures["bits_per_dim"] for seed in both])
        far = [run.horizon for run in runs.values() if run.horizon is not None]
        if far:
            rows[variant]["last_training_length"] = {name: interval([one[name] for one in far]) for name in far[0]}
    return rows


def charts(rows: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """The comparisons that the runs allow."""
    found = []
    if plain := [name for name in PLAIN if "bits_above" in rows.get(name, ())]:
        found.append(Chart("bits per dimension above the base of the same seed", plain,
                           {"": series([rows[name]["bits_above"] for name in plain])}, level=0.0))
    # The widths' models, from random parameters, draw nothing yet that could be read.
    if there := [name for name in VARIANTS if name in rows and name not in WIDTHS]:
        found.append(Chart("read as asked", there, {name: series([rows[one][name] for one in there])
                                                    for name in ATTRIBUTES}))
    if len(noises := [name for name in NOISE if name in rows]) > 1:
        levels = [LEVELS[NOISE.index(name)] for name in noises]
        found += [_over("bits per dimension below a Gaussian's", rows, noises, levels, ("bits_below_gaussian",),
                        "noise"),
                  _over("read as asked", rows, noises, levels, ATTRIBUTES, "noise")]
    if widths := [name for name in WIDTHS if name in rows]:
        counts = [rows[name]["parameters"][0] for name in widths]
        label = "parameters, at equal compute"
        found.append(_over("bits per dimension", rows, widths, counts, ("bits_per_dim",), label, log=True))
    return found


def _over(title: str, rows: Mapping[str, Mapping[str, Any]], variants: Sequence[str], x: Sequence[float],
          names: Sequence[str], label: str, log: bool = False) -> Chart:
    return Chart(title, x, {name: series([rows[one][name] for one in variants]) for name in names}, label, log)


def cells(name: str, row: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    pairs = [row.get(measure) for measure in ("bits_per_dim", "bits_above", "bits_below_gaussian", *ATTRIBUTES,
                                              "temporal_flickering")]
    digits = (4, 4, 4, 3, 3, 3, 4)
    return [name, ",".join(map(str, row["seeds"])), f"{row['parameters'][0]:,.0f}", *map(in_words, pairs, digits)]


HEADERS = ("variant", "seeds", "parameters", "bits/dim", "above the base or width_192", "below a Gaussian", *ATTRIBUTES,
           "flickering")


def in_words(pair: Sequence[float] | None, digits: int = 3) -> str:
    """A mean with its interval."""
    if pair is None:
        return ""
    mean, half = pair
    return f"{mean:.{digits}f}" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"
