"""A plan before you rent: the real step, compiled for a pod that is not there; its memory, work and time bound.

Nothing runs: libtpu compiles for a topology that is named to it, from shapes alone. What a pod then measures will be
slower than the bound, which takes products, memory and links each at their full rate.
"""

import dataclasses
import math
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from starflow_jax import sharding
from starflow_jax.config import Config
from starflow_jax.io.compiled import nothing_kept
from starflow_jax.planning import codec as plan_codec
from starflow_jax.planning import program_cost, roofline
from starflow_jax.planning.meshes import USES
from starflow_jax.planning.program import Program
from starflow_jax.planning.programs import abstract_params_of, compile_step, training_bytes
from starflow_jax.planning.roofline import GIB
from starflow_jax.planning.topology import gpu_memory


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """Bytes that a program takes of a chip's memory."""

    program: str
    arguments: int
    temporaries: int
    output: int
    aliased: int  # output that is written where an argument was
    code: int
    resident: int  # what stays beside the arguments: other parts of the model, the cache
    peak: int


@dataclasses.dataclass(frozen=True)
class ProgramBound:
    """How often a program runs in a step; of one run the least time, where the bytes of a chip's memory go (by
    program_cost's parts) and what is sent over its links."""

    program: str
    runs: float
    updates: float | None  # of each block of tokens, assumed; None: there is no solver in it
    bound_seconds: float
    hbm_bytes: dict[str, float]
    link_bytes: float
    collectives: float  # how many run in it


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Work and time bound of a step, of its programs together."""

    memory: tuple[ProgramMemory, ...]
    programs: tuple[ProgramBound, ...] = ()  # none, like what follows, where a chip's rates are not known
    compiler_flops_per_step: float | None = None  # counted in the compiled programs, each loop as often as it runs
    compiler_flops_loops_once: float | None = None  # the compiler's own count, with each loop's body once
    hbm_traffic_bytes_per_chip: float | None = None
    hbm_parts_per_chip: dict[str, float] | None = None  # the same, by where the bytes go
    collective_bytes_per_chip: dict[str, float] | None = None
    bound_seconds_per_step: float | None = None
    compute_seconds: float | None = None
    hbm_seconds: float | None = None
    ici_seconds: float | None = None
    limited_by: str | None = None
    bound_mfu: float | None = None
    dispatches: float | None = None  # programs that are started
    collectives: float | None = None  # of one chip
    overhead_seconds: float | None = None  # of these two, as roofline.py assumes for each; not in the bound
    estimated_seconds_per_step: float | None = None  # the programs' bounds, one after the other, and the overhead


@dataclasses.dataclass(frozen=True)
class CodecChoice:
    """The settings of the codec that a plan of plan.step=codec is for."""

    dtype: str
    tile: int
    tile_overlap: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What a step needs of each chip, and how long it takes at the least."""

    name: str
    step: str
    topology: str
    chips: int
    device_kind: str
    mesh: dict[str, int]
    remat: str
    sequence_parallel: str
    parameters: int
    tokens_per_step: int
    model_flops_per_step: float | None
    hbm_bytes_per_chip: int
    peak_bytes_per_chip: int
    fits: bool
    compile_seconds: float
    cost: StepCost | None  # None: the compiler refused the step for want of memory
    codec: CodecChoice | None = None
    trained_bytes: int | None = None  # of a training: what is trained, with its moments and averages, over all chips
    frozen_bytes: int | None = None  # and the model beside it that stays as it is
    advice: str = ""  # for a step that does not fit

    def to_json(self) -> dict[str, Any]:
        """What plan.json holds: one flat table; what is not known of a refused step is None."""
        row = dataclasses.asdict(self)
        cost, codec, advice = row.pop("cost"), row.pop("codec"), row.pop("advice")
        row |= cost or dict.fromkeys(field.name for field in dataclasses.fields(StepCost))
        training = {name: row.pop(name) for name in ("trained_bytes", "frozen_bytes")}
        row |= training if self.trained_bytes is not None else {}
        return row | (codec or {}) | ({"advice": advice} if advice else {})


def plan_of(config: Config, devices: list[Any]) -> StepPlan:
    """Compile the step of config.plan.step on config.mesh and account for it.

    Raises UserError for a mesh that does not suit the devices, the model or the batch, and for a device kind whose
    limits are not known.
    """
    mesh = mesh_of(config, devices)
    devices, chip = list(mesh.devices.flat), roofline.chip_of(devices[0], gpu_memory(config.plan.topology))
    model, train, codec = config.model, config.plan.step == "train", config.plan.step == "codec"
    videos = (config.train.batch_size if train else config.evaluate.draws if config.plan.step == "likelihood"
              else config.plan.videos)
    branches = 2 if config.sample.guided and not train else 1
    flops = None  # of a codec, of a likelihood and of LoRA those of their programs
    if config.plan.step == "sample" or (train and config.train.target == "all"):
        flops = roofline.model_flops(model, videos, training=train, branches=branches)
    began, cost = time.perf_counter(), None
    try:
        with jax.set_mesh(mesh), nothing_kept():
            programs = compile_step(config, mesh)
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_needed(str(error))
        if needed is None:
            raise
        peak = needed
    else:
        cost, flops = _cost(programs, chip, flops, len(devices))
        peak = max(part.peak for part in cost.memory)
    abstract_params = plan_codec.abstract_codec(config).params if codec else abstract_params_of(config)
    fits = cost is not None and peak <= chip.hbm_bytes
    trained, frozen = training_bytes(config, mesh) if train else (None, None)
    return StepPlan(
        name=config.name, step=config.plan.step, topology=config.plan.topology, chips=len(devices),
        device_kind=devices[0].device_kind, mesh=dict(mesh.shape), remat=model.remat,
        sequence_parallel=model.sequence_parallel,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(abstract_params)),
        tokens_per_step=videos * model.frames * model.tokens_per_frame, model_flops_per_step=flops,
        hbm_bytes_per_chip=int(chip.hbm_bytes), peak_bytes_per_chip=peak, fits=fits,
        compile_seconds=time.perf_counter() - began, cost=cost,
        trained_bytes=trained, frozen_bytes=frozen,
        codec=CodecChoice(config.codec.dtype, config.codec.tile, config.codec.tile_overlap) if codec else None,
        advice="" if fits else advice(config, dict(mesh.shape), peak - chip.hbm_bytes))


def mesh_of(config: Config, devices: list[Any]) -> Mesh:
    """config.mesh over the devices, of which a trained model may leave some unused. Raises UserError where it does not
    suit them, the model or the batch."""
    if config.plan.step in USES:
        devices = devices[:math.prod(dataclasses.astuple(config.mesh)) or None]
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_model(config.model, mesh)
    if config.plan.step == "train":
        clips = config.train.batch_size // config.train.accumulate
        sharding.check_batch("train.batch_size / train.accumulate", clips, mesh)
    return mesh


def bytes_needed(error: str) -> int | None:
    """Memory that a refused program would have taken of a chip, from the compiler's message; None: refused for another
    reason."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm|memory required[^(]*\(([\d.]+)([KMGT])\)", error)
    if "RESOURCE_EXHAUSTED" not in error or found is None:
        return None
    size, unit = found[1] or found[3], found[2] or found[4]
    return int(float(size) * 2 ** (10 * (1 + "KMGT".index(unit))))


def _cost(programs: list[Program], chip: roofline.Chip, model_flops: float | None, devices: int
          ) -> tuple[StepCost, float | None]:
    """The programs' work and the bound that follows, and the model's operations; model_flops=None: the programs' own
    products are taken for those."""
    memory = tuple(map(_memory, programs))
    if not chip.peak_flops:
        return StepCost(memory), model_flops
    total, raw, bounds = program_cost.Cost(), 0.0, list[ProgramBound]()
    for program in programs:
        trips = 1.0 if program.updates is None else program.updates - 1
        cost = program_cost.count(program.compiled, trips, program.filled, program.contents)
        total += cost.times(program.times)
        raw += program.times * float((program.compiled.cost_analysis() or {}).get("flops", 0))
        least = roofline.bound(cost, chip, 0.0).seconds
        bounds.append(ProgramBound(program.name, program.times, program.updates, least, cost.hbm_parts,
                                   sum(cost.collective_bytes.values()), cost.collectives))
    flops = total.flops * devices if model_flops is None else model_flops
    limit = roofline.bound(total, chip, flops / devices)
    dispatches = sum(part.runs for part in bounds)
    overhead = roofline.overhead_seconds(dispatches, total.collectives)
    return StepCost(
        memory=memory, programs=tuple(bounds), compiler_flops_per_step=total.flops * devices,
        compiler_flops_loops_once=raw * devices, hbm_traffic_bytes_per_chip=total.hbm_bytes,
        hbm_parts_per_chip=total.hbm_parts,
        collective_bytes_per_chip=total.collective_bytes, bound_seconds_per_step=limit.seconds,
        compute_seconds=limit.compute_seconds, hbm_seconds=limit.hbm_seconds, ici_seconds=limit.ici_seconds,
        limited_by=limit.limited_by, bound_mfu=limit.mfu, dispatches=dispatches, collectives=total.collectives,
        overhead_seconds=overhead,
        estimated_seconds_per_step=sum(part.runs * part.bound_seconds for part in bounds) + overhead), flops


def _memory(program: Program) -> ProgramMemory:
    memory = program.compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    output, aliased, code = (memory.output_size_in_bytes, memory.alias_size_in_bytes,
                             memory.generated_code_size_in_bytes)
    resident = max(0, program.held - arguments)
    return ProgramMemory(program.name, arguments, temporaries, output, aliased, code, resident,
                         peak=arguments + temporaries + output + code - aliased + resident)


def advice(config: Config, mesh: dict[str, int], excess_bytes: float) -> str:
    """What would help a step of config.plan.step that needs that much more than a chip has. mesh: sizes of its axes."""
    helps = []
    if config.plan.step == "train":
        if config.model.remat != "layer":
            helps.append("--config.model.remat=layer")
        if config.train.target == "lora" and not config.lora.weights:
            helps.append("--config.lora.weights=int8")
        clips = config.train.batch_size // config.train.accumulate // (mesh["data"] * mesh["fsdp"])
        if clips > 1:
            helps.append(f"--config.train.accumulate={config.train.accumulate * clips} (one clip at a time on a chip)")
        if mesh["data"] > 1:
            helps.append("mesh.fsdp instead of mesh.data")
        helps.append("a larger mesh.sequence or mesh.tensor")
    elif config.plan.step == "codec":
        if config.codec.dtype != "bfloat16":
            helps.append("--config.codec.dtype=bfloat16")
        helps.append(f"for whole videos a smaller --config.codec.tile (now {config.codec.tile or 'whole frames'})")
        if config.plan.videos > 1:
            helps.append("--config.plan.videos=1")
    else:
        helps.append("a larger mesh.tensor")
        if config.plan.step == "likelihood" and min(config.evaluate.draws, config.evaluate.batch_size) > 1:
            helps.append("--config.evaluate.batch_size=1")
        if config.plan.step == "sample" and config.plan.videos > 1:
            helps.append("--config.plan.videos=1")
        if config.model.dtype != "bfloat16":
            helps.append("--config.model.dtype=bfloat16")
        helps += [f"--config.sample.{name}=int8" for name in ("weights", "cache") if not getattr(config.sample, name)]
        if config.plan.step == "sample" and not config.sample.offload:
            helps.append("--config.sample.offload=true")
    # A compiler keeps some of a chip's memory back.
    said = f"exceeds a chip's memory by {excess_bytes / GIB:.1f} GiB" if excess_bytes > 0 else "the compiler refuses it"
    return (f"{said}; what would help: {'; '.join(helps)}; "
            "or more or larger chips")
