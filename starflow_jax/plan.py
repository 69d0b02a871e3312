"""A plan before you rent: the real step, compiled for a pod that is not there; its memory, work and time bound.

Nothing runs: libtpu compiles for a topology that it is told the name of, from shapes alone. What a pod then measures
will be slower than the bound, which takes products, memory and links each at their full rate.
"""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from starflow_jax import config as settings_of
from starflow_jax import hlo_cost, plan_codec, roofline, sharding
from starflow_jax.config import REMAT, Config, UserError
from starflow_jax.flow import decode
from starflow_jax.flow.decode import Solver, WindowState
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.metrics import ProgressBar, table
from starflow_jax.nn.cache import KVCache, rounded_slots
from starflow_jax.system import System, abstract_state, flow_variables, init_params
from starflow_jax.train_step import make_train_step
from starflow_jax.video_io import atomic_path

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program and how often it runs in a step."""

    name: str
    compiled: Any
    times: float = 1
    unknown_trips: float = 1  # of the solver's loops


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


def topology(name: str) -> list[Any]:
    """Devices to compile for, of a name such as v5p:4x4x4. Raises UserError where libtpu is missing or declines."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    kind, _, shape = name.partition(":")
    if not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"plan.topology={name!r}: has to be a kind and a shape, such as v5p:4x4x4 or v6e:16x16")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if set(shape.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = [1, 1, 1]  # else libtpu takes a host to have four
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:  # whatever the plug-in raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if importlib.util.find_spec("libtpu") is None:
            raise UserError('plan compiles with libtpu, which is not installed: pip install "jax[tpu]"') from error
        raise UserError(f"plan.topology={name!r}: {reason[:300]}") from error


def chosen(config: Config, devices: int) -> Config:
    """The configuration on its own mesh where that fits the devices, else on the one that suits its step."""
    sizes = [getattr(config.mesh, axis) for axis in sharding.AXES]
    explicit = config.mesh != settings_of.Mesh() and devices % math.prod(size for size in sizes if size) == 0
    return config if explicit else dataclasses.replace(config, mesh=suited(config, devices))


def suited(config: Config, devices: int) -> settings_of.Mesh:
    """Training: as many parts of the batch as divide it, the rest over tokens. Sampling: weights stay on the chips
    that hold them, as many as divide the heads, the rest takes other videos."""
    heads = math.gcd(config.model.deep_width, config.model.shallow_width) // config.model.head_dim
    if config.plan.step == "sample":
        tensor = math.gcd(devices, heads)
        return settings_of.Mesh(data=devices // tensor, tensor=tensor)
    fsdp = math.gcd(devices, config.train.batch_size // config.train.accumulate)
    return settings_of.Mesh(data=1, fsdp=fsdp, sequence=devices // fsdp)


def candidates(config: Config, devices: int) -> Iterator[Config]:
    """Meshes over powers of two and rematerialisations that the model and batch divide over; of a codec its dtypes,
    with whole frames and with tiles."""
    if config.plan.step == "codec":
        for dtype, tile in itertools.product(("bfloat16", "float32"), (0, 2 * config.codec.tile_overlap)):
            yield dataclasses.replace(chosen(config, devices),
                                      codec=dataclasses.replace(config.codec, dtype=dtype, tile=tile))
        return
    remats = REMAT[1:] if config.plan.step == "train" else ("none",)
    for tensor, sequence in itertools.product((1, 2, 4, 8), repeat=2):
        for fsdp in {devices // (tensor * sequence), math.gcd(devices // (tensor * sequence), 64)} - {0}:
            data = devices // (tensor * sequence * fsdp)
            if data * fsdp * tensor * sequence != devices or (config.plan.step == "sample" and fsdp * sequence > 1):
                continue
            mesh = settings_of.Mesh(data, fsdp, tensor, sequence)
            abstract = jax.sharding.AbstractMesh((data, fsdp, tensor, sequence), sharding.AXES)
            try:
                sharding.check_model(config.model, abstract)
                if config.plan.step == "train":
                    sharding.check_batch("", config.train.batch_size // config.train.accumulate, abstract)
            except UserError:
                continue
            for remat in remats:
                yield dataclasses.replace(config, mesh=mesh, model=dataclasses.replace(config.model, remat=remat))


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
        "parted_attention": model.parted_attention,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(
            plan_codec.abstract_codec(config).params if codec else _abstract_params(config))),
        "tokens_per_step": videos * model.frames * model.tokens_per_frame, "hbm_bytes_per_chip": int(chip.hbm_bytes),
        "model_flops_per_step": flops}
    if codec:
        row |= {name: getattr(config.codec, name) for name in ("dtype", "tile", "tile_overlap")}
    began = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            programs = _compile(config, mesh)
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


def _abstract_params(config: Config) -> Any:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def _compile(config: Config, mesh: Mesh) -> list[Program]:
    if config.plan.step == "train":
        return [Program("train", _compile_train(config, mesh))]
    if config.plan.step == "sample":
        return _compile_sample(config, mesh)
    return [Program(*program) for program in plan_codec.compile_codec(config, sharding.replicated(mesh))]


def _compile_train(config: Config, mesh: Mesh) -> Any:
    """The training step on latents and text features that were prepared before."""
    model, clips = config.model, config.train.batch_size
    sharding.check_batch("train.batch_size / train.accumulate", clips // config.train.accumulate, mesh)
    by_clip = sharding.batch_sharding(mesh)
    system = System(config, tokenizer=None, codec=None)  # type: ignore[arg-type]
    batch = {"latents_BNhwC": jax.ShapeDtypeStruct(
        (clips, model.frames, model.height, model.width, model.channels), jnp.bfloat16, sharding=by_clip)}
    batch["features_BSD"] = jax.ShapeDtypeStruct((clips, model.text_length, model.text_dim), jnp.bfloat16,
                                                 sharding=by_clip)
    state = sharding.abstract(abstract_state(config), mesh)
    return make_train_step(system, mesh).lower(state, batch).compile()


def _compile_sample(config: Config, mesh: Mesh) -> list[Program]:
    """The programs that make a video: a frame of the deep block, its shallow blocks, the denoiser over the window."""
    model, videos = config.model, config.plan.videos
    flow, grid = STARFlow(model), (model.height // model.patch_size, model.width // model.patch_size)
    branches, tokens = 2 if config.sample.guidance else 1, model.tokens_per_frame
    block = min(config.sample.block_size or tokens, tokens)
    dtype, whole = jnp.dtype(model.dtype), sharding.replicated(mesh)

    def array(shape: tuple[int, ...], dtype: Any = jnp.float32, placed: Any = whole) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    params = jax.tree.map(lambda leaf: array(leaf.shape, dtype, leaf.sharding),
                          sharding.abstract(_abstract_params(config), mesh))
    variables = flow_variables(params)
    slots = rounded_slots(model.text_length + model.frames * tokens)
    heads = model.deep_width // model.head_dim
    keys = array((model.deep_layers, branches * videos, slots, heads, model.head_dim), dtype,
                 sharding.cache_sharding(mesh, branches * videos, heads))
    state = WindowState(KVCache(keys, keys, array((), jnp.int32)), array((videos, 1, model.token_channels)),
                        array((videos, tokens, model.token_channels)), array((), jnp.int32))
    deep = decode.decode_frames.lower(
        flow, variables, state, array((videos, 1, tokens, model.token_channels)), array(()),
        solver=Solver(block, config.sample.tolerance), window=model.frames, token_grid=grid, branches=branches)
    shallow = decode.invert_shallow.lower(
        flow, variables, array((videos, 1, tokens, model.token_channels)),
        solver=Solver(1 << 30, config.sample.tolerance / 10), token_grid=grid)
    updates = config.plan.updates
    programs = [Program("deep block, a frame", deep.compile(), model.frames, updates),
                Program("shallow blocks, a frame", shallow.compile(), model.frames, updates)]
    if model.denoiser != "none":
        x = array((videos, model.frames, model.height, model.width, model.channels))
        text = array((videos, model.text_length, model.text_dim), dtype)
        run = jax.jit(lambda v, x, text: apply_flow(flow, v, STARFlow.score, x, text))
        programs.append(Program("denoiser, a window", run.lower(variables, x, text).compile()))
    return programs


def _account(programs: list[Program], chip: roofline.Chip, flops: float | None, devices: int) -> dict[str, Any]:
    """What the programs need and the bound that follows; memory of the one that needs most. flops: the model's; None:
    the programs' own products."""
    total, raw, parts, seconds = hlo_cost.Cost(), 0.0, [], []
    for program in programs:
        cost = hlo_cost.count(program.compiled, program.unknown_trips)
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


