"""--mode=plan: what a step will need on a pod that is not there; plan.json and a table."""

import json
import math
from pathlib import Path
from typing import Any

from starflow_jax.config import Config, UserError
from starflow_jax.io.files import write_text
from starflow_jax.io.progress import ProgressBar, table
from starflow_jax.planning.array_kinds import PARTS
from starflow_jax.planning.meshes import candidates, chosen
from starflow_jax.planning.plan import StepCost, StepPlan, mesh_of, plan_of
from starflow_jax.planning.roofline import GB, GIB
from starflow_jax.planning.topology import topology


def plan(config: Config, workdir: Path) -> None:
    """Write WORKDIR/plan.json and print its table; with plan.search, also those of all that was tried.

    Raises UserError for a topology that is unknown, and for what does not divide over its devices.
    """
    config.plan.require("step", config.plan.step != "train" or config.train.target != "decoder",
                        "plans train.target=all, lora, control or student, not decoder")
    devices = topology(config.plan.topology)
    if config.plan.step == "codec":
        devices = devices[:1]  # each chip has videos of its own
    choices = list(candidates(config, len(devices)) if config.plan.search else [chosen(config, len(devices))])
    if not choices:
        raise UserError(f"plan.search: no mesh of {len(devices)} devices suits the model's heads and the batch; change "
                        "train.batch_size, set model.sequence_parallel=all_gather, or plan for other devices")
    for choice in choices:
        mesh_of(choice, devices)
    plans = []
    with ProgressBar("compiling", len(choices), unit="plan") as progress:
        for choice in choices:
            plans.append(plan_of(choice, devices))
            progress.update()
            if config.plan.search:
                progress.write(_line(plans[-1]))
    plans.sort(key=_order)
    best = plans[0]
    searched = {"searched": [plan.to_json() for plan in plans]} if config.plan.search else {}
    write_text(workdir / "plan.json", json.dumps(best.to_json() | searched, indent=1))
    print(_table(best))
    if best.cost and best.cost.programs:
        print("\n" + _bytes(best.cost))
    if config.plan.search:
        what = ("dtype", "tile") if best.codec else ("mesh", "remat")
        keys = (*what, "fits", "peak_gib", "bound_seconds_per_step", "bound_mfu", "limited_by")
        print("\n" + table([_cells(plan, keys) for plan in plans], keys))
    print(f"\n{_line(best)}\nwritten: {workdir / 'plan.json'}")


def _order(plan: StepPlan) -> tuple[bool, float, int]:
    """The fastest that fits comes first."""
    bound = plan.cost.bound_seconds_per_step if plan.cost else None
    return not plan.fits, math.inf if bound is None else bound, plan.peak_bytes_per_chip


def _line(plan: StepPlan) -> str:
    where = f"{plan.name} {plan.step} on {plan.topology}, "
    if plan.codec:
        where += f"{plan.codec.dtype}, " + (f"tiles of {plan.codec.tile}" if plan.codec.tile else "whole frames")
    else:
        where += "mesh " + " x ".join(
            f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) + f", remat {plan.remat}"
    if not plan.fits or plan.cost is None:
        return f"{where}: {plan.advice}"
    used, there = plan.peak_bytes_per_chip / GIB, plan.hbm_bytes_per_chip / GIB
    line = f"{where}: fits, {used:.1f} of {there:.0f} GiB a chip"
    if plan.cost.bound_seconds_per_step is None:
        return f"{line}, by {_compiler(plan)}"
    return (f"{line}, at least {plan.cost.bound_seconds_per_step:.2f} s a step, estimated "
            f"{plan.cost.estimated_seconds_per_step:.2f} s, MFU at most {plan.cost.bound_mfu:.2f}")


def _compiler(plan: StepPlan) -> str:
    """Of a plan without a bound."""
    if plan.device_kind == "cpu":
        return ("the buffers of this machine's CPU, which takes more; for those of XLA's compiler for GPUs, "
                'pip install "jax[cuda12]"')
    return f"XLA's compiler for a {plan.device_kind}"


def _cells(plan: StepPlan, keys: tuple[str, ...]) -> list[str]:
    mesh = "x".join(map(str, plan.mesh.values()))
    values = plan.to_json() | {"peak_gib": plan.peak_bytes_per_chip / GIB, "mesh": mesh}
    return [_figure(values[key]) for key in keys]


def _table(plan: StepPlan) -> str:
    """Every figure of a plan, one per line."""
    rows: list[tuple[str, str]] = []
    for key, value in plan.to_json().items():
        if key not in ("memory", "programs"):
            rows.append((key, _figure(value)))
    if plan.cost:
        for part in plan.cost.memory:
            sizes = [f"{name} {size / GIB:.2f}" for name, size in vars(part).items() if name != "program"]
            rows.append((f"memory, GiB a chip: {part.program}", ", ".join(sizes)))
        rows += [(f"bound, seconds: {part.program}", f"{part.bound_seconds:.3g}, runs {part.runs:g}"
                  + (f", {part.updates:.3g} updates of a block assumed" if part.updates else ""))
                 for part in plan.cost.programs]
    return table(rows, ("plan", ""))


def _bytes(cost: StepCost) -> str:
    """Where the bytes of a step go, of each program in all its runs."""
    figures = [[part.runs, *(part.runs * part.hbm_bytes[name] / GB for name in PARTS),
                part.runs * part.link_bytes / GB, part.runs * part.collectives] for part in cost.programs]
    names = [*(part.program for part in cost.programs), "total"]
    rows = [(name, *row) for name, row in zip(names, [*figures, [sum(column) for column in zip(*figures)]])]
    return table(rows, ("GB a chip and step", "runs", *(name.replace("_", " ") for name in PARTS),
                                  "over links", "collectives"))


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {size:.4g}" for name, size in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
