"""--mode=plan: what a step will need on a pod that is not there; plan.json and a table."""

import json
import math
from pathlib import Path
from typing import Any

from starflow_jax.config import Config
from starflow_jax.io.files import atomic_path
from starflow_jax.io.progress import ProgressBar, table
from starflow_jax.planning.meshes import candidates, chosen
from starflow_jax.planning.plan import GIB, plan_of
from starflow_jax.planning.topology import topology


def plan(config: Config, workdir: Path) -> None:
    """Write WORKDIR/plan.json and print the table; with plan.search, of every mesh and rematerialisation tried."""
    devices = topology(config.plan.topology)
    if config.plan.step == "codec":
        devices = devices[:1]  # each chip has videos of its own
    rows = []
    choices = list(candidates(config, len(devices)) if config.plan.search else [chosen(config, len(devices))])
    with ProgressBar("compiling", len(choices), unit="plan") as progress:
        for choice in choices:
            rows.append(plan_of(choice, devices))
            progress.update()
            if config.plan.search:
                progress.write(_line(rows[-1]))
    rows.sort(key=lambda row: (not row["fits"], row["bound_seconds_per_step"] or math.inf, row["peak_bytes_per_chip"]))
    best = rows[0] | ({"searched": rows} if config.plan.search else {})
    with atomic_path(workdir / "plan.json") as path:
        path.write_text(json.dumps(best, indent=1))
    print(_table(rows[0]))
    if config.plan.search:
        what = ("dtype", "tile") if config.plan.step == "codec" else ("mesh", "remat")
        keys = (*what, "fits", "peak_gib", "bound_seconds_per_step", "bound_mfu", "limited_by")
        print("\n" + table([_cells(row, keys) for row in rows], keys))
    print(f"\n{_line(rows[0])}\nwritten: {workdir / 'plan.json'}")


def _line(row: dict[str, Any]) -> str:
    where = f"{row['name']} {row['step']} on {row['topology']}, "
    if row["step"] == "codec":
        where += f"{row['dtype']}, " + (f"tiles of {row['tile']}" if row["tile"] else "whole frames")
    else:
        where += "mesh " + " x ".join(
            f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1) + f", remat {row['remat']}"
    if not row["fits"]:
        return f"{where}: {row['advice']}"
    used, there = row["peak_bytes_per_chip"] / GIB, row["hbm_bytes_per_chip"] / GIB
    return (f"{where}: fits, {used:.1f} of {there:.0f} GiB a chip, "
            f"at least {row['bound_seconds_per_step']:.2f} s a step, MFU at most {row['bound_mfu']:.2f}")


def _cells(row: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    values = row | {"peak_gib": row["peak_bytes_per_chip"] / GIB, "mesh": "x".join(map(str, row["mesh"].values()))}
    return [f"{values[key]:.3g}" if isinstance(values[key], float) else str(values[key]) for key in keys]


def _table(row: dict[str, Any]) -> str:
    """Every figure of a plan, a line each."""
    rows: list[tuple[str, str]] = []
    for key, value in row.items():
        if key == "memory":
            for part in value:
                sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in part.items() if name != "program")
                rows.append((f"memory, GiB a chip: {part['program']}", sizes))
        elif key == "programs":
            rows += [(f"bound, seconds: {part['program']}", f"{part['bound_seconds']:.3g}, runs {part['runs']:g}")
                     for part in value]
        elif isinstance(value, dict):
            rows.append((key, ", ".join(f"{name} {size:.4g}" for name, size in value.items())))
        else:
            rows.append((key, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return table(rows, ("plan", ""))
