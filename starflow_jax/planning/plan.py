"""A plan before you rent: the real step, compiled for a pod that is not there; its memory, work and time bound.

Nothing runs: libtpu compiles for a topology that it is told the name of, from shapes alone. What a pod then measures
will be slower than the bound, which takes products, memory and links each at their full rate.
"""

import re
import time
from typing import Any

import jax

from starflow_jax import sharding
from starflow_jax.config import Config
from starflow_jax.planning import codec as plan_codec
from starflow_jax.planning import program_cost, roofline
from starflow_jax.planning.programs import Program, abstract_params_of, compile_step

GIB = 2**30


def plan_of(config: Config, devices: list[Any]) -> dict[str, Any]:
    """Compile the step of config.plan.step on config.mesh and account for it."""
    mesh, chip = sharding.make_mesh(config.mesh, devices), roofline.chip_of(devices[0])
    sharding.check_model(config.model, mesh)
    model, train, codec = config.model, config.plan.step == "train", config.plan.step == "codec"
    videos = config.train.batch_size if train else config.plan.videos
    branches = 2 if config.sample.guidance and not train else 1
    flops = None if codec else roofline.model_flops(model, videos, training=train, branches=branches)
    row: dict[str, Any] = {
        "name": config.name, "step": config.plan.step, "topology": config.plan.topology, "chips": len(devices),
        "device_kind": devices[0].device_kind, "mesh": dict(mesh.shape), "remat": model.remat,
        "sequence_parallel": model.sequence_parallel,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(
            plan_codec.abstract_codec(config).params if codec else abstract_params_of(config))),
        "tokens_per_step": videos * model.frames * model.tokens_per_frame, "hbm_bytes_per_chip": int(chip.hbm_bytes),
        "model_flops_per_step": flops}
    if codec:
        row |= {name: getattr(config.codec, name) for name in ("dtype", "tile", "tile_overlap")}
    began = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            programs = compile_step(config, mesh)
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_needed(str(error))
        if needed is None:
            raise
        row |= {"peak_bytes_per_chip": needed,
                "fits": False, "compiler_flops_per_step": None, "bound_seconds_per_step": None, "bound_mfu": None,
                "limited_by": None, "compile_seconds": time.perf_counter() - began}
        return row | {"advice": _advice(config, row)}
    row |= _account(programs, chip, flops, len(devices))
    row |= {"compile_seconds": time.perf_counter() - began, "fits": row["peak_bytes_per_chip"] <= chip.hbm_bytes}
    return row | ({} if row["fits"] else {"advice": _advice(config, row)})


def bytes_needed(error: str) -> int | None:
    """What a program that the compiler refused would take of a chip's memory, of its words; None: refused for other
    reasons."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm|memory required[^(]*\(([\d.]+)([KMGT])\)", error)
    if "RESOURCE_EXHAUSTED" not in error or found is None:
        return None
    size, unit = found[1] or found[3], found[2] or found[4]
    return int(float(size) * 2 ** (10 * (1 + "KMGT".index(unit))))


def _account(programs: list[Program], chip: roofline.Chip, flops: float | None, devices: int) -> dict[str, Any]:
    """What the programs need and the bound that follows; memory of the one that needs most. flops: the model's; None:
    the programs' own products."""
    total, raw, parts, seconds = program_cost.Cost(), 0.0, [], []
    for program in programs:
        cost = program_cost.count(program.compiled, program.unknown_trips)
        total += cost.times(program.times)
        raw += program.times * float((program.compiled.cost_analysis() or {}).get("flops", 0))
        memory = program.compiled.memory_analysis()
        part = {"program": program.name, "arguments": memory.argument_size_in_bytes,
                "temporaries": memory.temp_size_in_bytes, "output": memory.output_size_in_bytes,
                "aliased": memory.alias_size_in_bytes, "code": memory.generated_code_size_in_bytes}
        part["peak"] = sum(part[name] for name in ("arguments", "temporaries", "output", "code")) - part["aliased"]
        parts.append(part)
        seconds.append({"program": program.name, "runs": program.times,
                        "bound_seconds": roofline.bound(cost, chip, 0.0).seconds})
    flops = total.flops * devices if flops is None else flops
    limit = roofline.bound(total, chip, flops / devices)
    largest = max(parts, key=lambda part: part["peak"])
    return {"peak_bytes_per_chip": largest["peak"], "memory": parts, "programs": seconds, "model_flops_per_step": flops,
            "compiler_flops_per_step": total.flops * devices,
            "compiler_flops_loops_once": raw * devices, "hbm_traffic_bytes_per_chip": total.hbm_bytes,
            "collective_bytes_per_chip": total.collective_bytes, "bound_seconds_per_step": limit.seconds,
            "compute_seconds": limit.compute_seconds, "hbm_seconds": limit.hbm_seconds,
            "ici_seconds": limit.ici_seconds, "limited_by": limit.limited_by, "bound_mfu": limit.mfu}


def _advice(config: Config, row: dict[str, Any]) -> str:
    over = (row["peak_bytes_per_chip"] - row["hbm_bytes_per_chip"]) / GIB
    mesh, helps = row["mesh"], []
    if row["step"] == "train":
        if config.model.remat != "layer":
            helps.append("--config.model.remat=layer")
        clips = config.train.batch_size // config.train.accumulate // (mesh["data"] * mesh["fsdp"])
        if clips > 1:
            helps.append(f"--config.train.accumulate={config.train.accumulate * clips} (one clip at a time on a chip)")
        if mesh["data"] > 1:
            helps.append("mesh.fsdp instead of mesh.data")
        helps.append("a larger mesh.sequence or mesh.tensor")
    elif row["step"] == "codec":
        if config.codec.dtype != "bfloat16":
            helps.append("--config.codec.dtype=bfloat16")
        helps.append(f"for whole videos a smaller --config.codec.tile (now {config.codec.tile or 'whole frames'})")
        if config.plan.videos > 1:
            helps.append("--config.plan.videos=1")
    else:
        helps.append("a larger mesh.tensor")
        if config.plan.videos > 1:
            helps.append("--config.plan.videos=1")
        if config.model.dtype != "bfloat16":
            helps.append("--config.model.dtype=bfloat16")
    return f"does not fit by {over:.1f} GiB a chip; what would help: {'; '.join(helps)}; or more or larger chips"


