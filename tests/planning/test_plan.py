"""The plan of a step: what is accounted for, and what is said of a step that does not fit."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util

from starflow_jax import config as settings_of
from starflow_jax import sharding
from starflow_jax.codec.wan_weights import abstract_params
from starflow_jax.config import Config, UserError
from starflow_jax.flow.control import ray_channels
from starflow_jax.model.control import fresh_module
from starflow_jax.model.parameters import init_params
from starflow_jax.modes.plan import _bytes, plan
from starflow_jax.planning import codec as plan_codec
from starflow_jax.planning import roofline
from starflow_jax.planning import topology as topologies
from starflow_jax.planning.array_kinds import PARTS
from starflow_jax.planning.plan import StepPlan, advice, bytes_needed, plan_of
from starflow_jax.planning.programs import compile_step
from starflow_jax.planning.roofline import GIB, Chip
from starflow_jax.planning.sampling import UPDATES
from starflow_jax.planning.topology import topology
from tests.codec.test_wan_vae import SMALL
from tests.helpers import HEAD_DIM, tiny_model
from tests.planning.test_meshes import paper, with_plan

CHIP = Chip("a", 1, hbm_bytes=GIB, peak_flops=1e12, hbm_bandwidth=1e11, ici_bandwidth=1e10)
ALWAYS_KNOWN = {"name", "step", "topology", "chips", "device_kind", "mesh", "remat", "sequence_parallel", "parameters",
                "tokens_per_step", "model_flops_per_step", "hbm_bytes_per_chip", "peak_bytes_per_chip", "fits",
                "compile_seconds"}
COST = {"memory", "programs", "compiler_flops_per_step", "compiler_flops_loops_once", "hbm_traffic_bytes_per_chip",
        "hbm_parts_per_chip", "dispatches", "collectives", "overhead_seconds", "estimated_seconds_per_step",
        "collective_bytes_per_chip", "bound_seconds_per_step", "compute_seconds", "hbm_seconds", "ici_seconds",
        "limited_by", "bound_mfu"}


SMALL_TEXT = settings_of.Text(d_model=4, d_kv=4, d_ff=8, layers=1, heads=1)


def small(**changes) -> Config:
    model = tiny_model(deep_width=80, shallow_width=80, denoiser="first_layer", denoiser_layers=1, **changes)
    train = settings_of.Train(batch_size=4, steps=10, warmup_steps=1)
    return Config("small", model, settings_of.Text(encoder="frozen"), train=train)


def small_codec(monkeypatch: pytest.MonkeyPatch, **changes) -> Config:
    """The small VAE of test_wan_vae in place of the released one, for four latent frames of 6 x 8."""
    monkeypatch.setattr(plan_codec, "wan_config", lambda settings, channels: SMALL)
    config = with_plan(small(channels=3, frames=4, height=6, width=8), topology="v6e:1x1", step="codec")
    return dataclasses.replace(config, codec=settings_of.Codec(**({"kind": "wan"} | changes)))


@pytest.fixture(scope="module")
def planned() -> StepPlan:
    """A training step over four of this machine's devices, as if each were a chip."""
    config = dataclasses.replace(with_plan(small(), step="train"), mesh=settings_of.Mesh(data=1, fsdp=4))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(roofline, "chip_of", lambda device, memory=0: CHIP)
        return plan_of(config, jax.devices()[:4])


def test_a_plan_accounts_for_memory_work_and_time(planned: StepPlan) -> None:
    assert planned.chips == 4 and planned.mesh == {"data": 1, "fsdp": 4, "tensor": 1, "sequence": 1}
    assert planned.tokens_per_step == 4 * 12
    assert planned.model_flops_per_step == roofline.model_flops(small().model, 4, training=True)
    assert planned.cost is not None and planned.fits and not planned.advice
    memory, = planned.cost.memory
    assert planned.peak_bytes_per_chip == memory.peak > memory.temporaries > 0
    assert memory.peak == memory.arguments + memory.temporaries + memory.output + memory.code - memory.aliased
    assert planned.cost.compiler_flops_per_step >= planned.model_flops_per_step
    times = {"compute": planned.cost.compute_seconds, "hbm": planned.cost.hbm_seconds, "ici": planned.cost.ici_seconds}
    assert planned.cost.bound_seconds_per_step == times[planned.cost.limited_by] == max(times.values()) > 0
    assert math.isclose(planned.cost.bound_mfu * planned.cost.bound_seconds_per_step * 4 * 1e12,
                        planned.model_flops_per_step)


def test_a_plan_says_where_bytes_go_and_what_starting_programs_takes(planned: StepPlan) -> None:
    """Of a training step over four devices: each holds a quarter of the weights, and gathers the others' parts."""
    cost = planned.cost
    program, = cost.programs
    assert program.hbm_bytes == cost.hbm_parts_per_chip and set(program.hbm_bytes) == set(PARTS)
    assert math.isclose(sum(program.hbm_bytes.values()), cost.hbm_traffic_bytes_per_chip)
    # Parameters, averages and moments are read and written.
    assert program.hbm_bytes["weights"] > 2 * 4 * planned.parameters / 4 and program.hbm_bytes["activations"] > 0
    assert program.link_bytes == sum(cost.collective_bytes_per_chip.values()) > 0
    assert (cost.dispatches, cost.collectives) == (1, program.collectives) and program.collectives >= 1
    assert math.isclose(cost.overhead_seconds, 10e-6 + cost.collectives * 5e-6)
    assert math.isclose(cost.estimated_seconds_per_step, cost.bound_seconds_per_step + cost.overhead_seconds)


def test_a_plan_of_sampling_has_the_text_encoder_the_codec_and_the_score_in_all_that_it_adds_up(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "chip_of", lambda device, memory=0: CHIP)
    config = dataclasses.replace(with_plan(small(), step="sample"), text=SMALL_TEXT, mesh=settings_of.Mesh(1, 1, 1, 1),
                                 sample=settings_of.Sample(denoise="score"))
    cost = plan_of(config, jax.devices()[:1]).cost
    parts = {part.program: part for part in cost.programs}
    for name, runs in (("text encoder", 1), ("score, a window", 1), ("codec, the first frame", 1),
                       ("codec, a frame", config.model.frames - 1)):
        assert parts[name].runs == runs and parts[name].bound_seconds > 0 and parts[name].hbm_bytes["weights"] > 0
    assert parts["deep block, the text"].hbm_bytes["cache_written"] > 0
    step = parts["deep block, a step"].hbm_bytes
    assert step["cache_read"] > 0 and step["cache_written"] > 0
    assert step["weights"] > UPDATES * 4 * 12 * config.model.deep_layers * config.model.deep_width**2
    for name, total in cost.hbm_parts_per_chip.items():
        assert math.isclose(total, sum(part.runs * part.hbm_bytes[name] for part in cost.programs))
    assert cost.dispatches == sum(part.runs for part in cost.programs)
    assert math.isclose(cost.estimated_seconds_per_step, cost.dispatches * 10e-6 + sum(
        part.runs * part.bound_seconds for part in cost.programs))
    assert cost.estimated_seconds_per_step >= cost.bound_seconds_per_step + cost.overhead_seconds
    table = _bytes(cost)
    assert "cache written" in table and all(name in table for name in (*parts, "total"))


def test_a_plan_of_lora_has_one_copy_of_the_backbone_and_a_state_of_factors_alone(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "chip_of", lambda device, memory=0: CHIP)
    config = with_plan(small(), step="train")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, target="lora"),
                                 lora=settings_of.Lora(rank=1), mesh=settings_of.Mesh(data=1))
    planned = plan_of(config, jax.devices()[:1])
    memory, = planned.cost.memory
    backbone = 4 * planned.parameters
    factors = 4 * config.model.deep_layers * config.model.deep_width * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1))
    clips = 2 * 4 * (2 * 2 * 3 * 2 + 3 * 4)  # latents and text features in bfloat16
    # The denoiser, which is not trained, is no argument of the program, and stays on the chip.
    assert memory.arguments < backbone
    assert 0 <= memory.arguments + memory.resident - backbone - 4 * factors - clips < 64
    assert memory.output < 4 * factors + 512  # and scalars
    row = planned.to_json()
    assert row["frozen_bytes"] == backbone and 0 <= row["trained_bytes"] - 4 * factors < 64
    assert "--config.lora.weights=int8" in advice(config, dict.fromkeys(("data", "fsdp"), 1), GIB)


def test_a_plan_of_a_student_has_its_whole_teacher_and_a_state_of_its_own_block(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sizes that the settings give: the teacher need not be there."""
    monkeypatch.setattr(roofline, "chip_of", lambda device, memory=0: CHIP)
    teacher = dataclasses.replace(with_plan(small(), step="train"), mesh=settings_of.Mesh(data=1))
    config = dataclasses.replace(
        teacher, train=dataclasses.replace(teacher.train, target="student"),
        student=settings_of.Student(teacher_layers=teacher.model.deep_layers, teacher_width=teacher.model.deep_width),
        model=dataclasses.replace(teacher.model, deep_layers=1, deep_width=HEAD_DIM))
    planned = plan_of(config, jax.devices()[:1])
    memory, = planned.cost.memory

    def bytes_of(config: settings_of.Config, part: str) -> int:
        return sum(4 * leaf.size for name, leaf in traverse_util.flatten_dict(
            jax.eval_shape(lambda: init_params(config, jax.random.key(0))), sep="/").items() if name.startswith(part))

    backbone, block = bytes_of(teacher, ""), bytes_of(config, "flow/deep/")
    clips = 2 * 4 * (2 * 2 * 3 * 2 + 3 * 4)
    assert 0 <= memory.arguments + memory.resident - backbone - 4 * block - clips < 64
    assert memory.output < 4 * block + 1024  # and scalars
    assert planned.frozen_bytes == backbone and 0 <= planned.trained_bytes - 4 * block < 64


def test_a_plan_of_a_control_module_has_its_whole_backbone_and_a_state_of_its_own(monkeypatch: pytest.MonkeyPatch
                                                                                    ) -> None:
    monkeypatch.setattr(roofline, "chip_of", lambda device, memory=0: CHIP)
    config = dataclasses.replace(with_plan(small(), step="train"), mesh=settings_of.Mesh(data=1))
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, target="control"),
        data=dataclasses.replace(config.data, camera=True, image_probability=0.0))
    planned = plan_of(config, jax.devices()[:1])
    memory, = planned.cost.memory
    module = sum(4 * leaf.size for leaf in jax.tree.leaves(jax.eval_shape(
        lambda: fresh_module(config, jax.random.key(0)))))
    assert planned.frozen_bytes == 4 * planned.parameters and 0 <= planned.trained_bytes - 4 * module < 64
    clip = config.model.frames * config.model.tokens_per_frame
    clips = 2 * config.train.batch_size * (clip * (config.model.channels + ray_channels(
        config.model, config.codec.time_stride)) + config.model.text_length * config.model.text_dim)
    assert 0 <= memory.arguments + memory.resident - 4 * planned.parameters - 4 * module - clips < 64
    assert memory.output < 4 * module + 1024  # and scalars


@pytest.mark.slow  # quick: tests/flow/test_int8_cache.py and tests/nn/test_quantized.py, of single programs
def test_int8_takes_less_of_a_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "chip_of", lambda device, memory=0: CHIP)
    model = tiny_model(deep_width=240, shallow_width=80, deep_layers=4, text_length=256, dtype="bfloat16")
    config = dataclasses.replace(with_plan(small(), step="sample"), model=model, text=SMALL_TEXT,
                                 mesh=settings_of.Mesh(1, 1, 1, 1))

    def arguments(**settings: str) -> int:
        """Bytes that decoding a frame is given."""
        sample = dataclasses.replace(config.sample, **settings)
        found = plan_of(dataclasses.replace(config, sample=sample), jax.devices()[:1])
        assert found.cost is not None
        return next(part.arguments for part in found.cost.memory if part.program == "deep block, a step")

    whole, heads, slots = arguments(), 240 // model.head_dim, model.text_length + 12
    of_weights, scales = 4 * 12 * 240**2, 4 * 4 * 9 * 240
    assert math.isclose(whole - arguments(weights="int8"), of_weights - scales, rel_tol=0.03)
    of_cache = 4 * 2 * 2 * slots * (240 - 4 * heads)  # of two branches
    assert math.isclose(whole - arguments(cache="int8"), of_cache, rel_tol=0.03)


def test_a_gpus_memory_is_planned_by_the_buffers_of_a_cpu(
        tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without libtpu and XLA for CUDA; times are not known."""
    monkeypatch.setattr(topologies, "cuda_is_installed", lambda: False)
    asked = dataclasses.replace(with_plan(small(), step="sample", topology="gpu:24GB"), text=SMALL_TEXT)
    plan(asked, tmp_path)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["hbm_bytes_per_chip"] == 24e9 and found["fits"] and found["bound_seconds_per_step"] is None
    parts = {part["program"]: part for part in found["memory"]}
    assert found["peak_bytes_per_chip"] == max(part["peak"] for part in parts.values())
    deep, text = parts["deep block, a step"], parts["text encoder"]
    assert deep["aliased"] > 0 and deep["resident"] > text["arguments"] / 2 > 0  # the encoder stays beside it
    assert "by the buffers of this machine's CPU" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "kernels"), [("gpu:24GB", "triton"), ("gpu:80GB", "mosaic_gpu")])
def test_a_gpu_that_is_not_there_is_planned_by_its_own_compiler(name: str, kernels: str) -> None:
    """Its kernels are those of its kind: of a Hopper from 80 GB on."""
    if not topologies.cuda_is_installed():
        pytest.skip('compiling for GPUs needs "jax[cuda12]"')
    device, = topology(name)
    model = tiny_model(deep_width=128, shallow_width=128, head_dim=64, frames=2, height=24, width=24,
                       dtype="bfloat16", denoiser="none")
    config = dataclasses.replace(with_plan(small(), step="sample", topology=name), model=model, text=SMALL_TEXT,
                                 mesh=settings_of.Mesh(1, 1, 1, 1))
    found = plan_of(config, [device])
    assert found.fits and found.device_kind == device.device_kind != "cpu"
    with jax.set_mesh(sharding.make_mesh(config.mesh, [device])):
        deep = next(part for part in compile_step(config, jax.sharding.get_mesh()) if part.name == "deep block, a step")
    assert kernels in deep.lowered.as_text()


def test_its_json_is_one_flat_table(planned: StepPlan) -> None:
    row = planned.to_json()
    assert set(row) == ALWAYS_KNOWN | COST | {"trained_bytes", "frozen_bytes"}
    assert row["memory"][0]["peak"] == row["peak_bytes_per_chip"] and row["fits"] is True
    assert row["programs"][0] == {
        "program": "train", "runs": 1, "updates": None, "bound_seconds": row["bound_seconds_per_step"],
        "hbm_bytes": row["hbm_parts_per_chip"], "link_bytes": sum(row["collective_bytes_per_chip"].values()),
        "collectives": row["collectives"]}
    refused = dataclasses.replace(planned, cost=None, fits=False, advice="smaller").to_json()
    assert set(refused) == set(row) | {"advice"}
    assert all(refused[key] is None for key in COST) and refused["advice"] == "smaller"


def test_a_step_that_needs_more_than_a_chip_has_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "chip_of", lambda device, memory=0: dataclasses.replace(CHIP, hbm_bytes=1000.0))
    found = plan_of(dataclasses.replace(with_plan(small()), mesh=settings_of.Mesh(1, 1, 1, 1)), jax.devices()[:1])
    assert not found.fits and found.cost is not None and found.peak_bytes_per_chip > 1000
    assert "exceeds a chip's memory by" in found.advice and "accumulate=4" in found.advice


def test_what_does_not_fit_says_by_how_much_and_what_helps() -> None:
    mesh = {"data": 1, "fsdp": 64, "tensor": 1, "sequence": 4}
    helps = advice(with_plan(paper()), mesh, 8.0 * GIB)
    assert "8.0 GiB" in helps and "accumulate=3" in helps and "remat=layer" not in helps
    kept = dataclasses.replace(paper(), model=dataclasses.replace(paper().model, remat="none"))
    assert "remat=layer" in advice(with_plan(kept), mesh, 8.0 * GIB)
    helps = advice(with_plan(paper(), step="likelihood"), mesh, 8.0 * GIB)
    assert "evaluate.batch_size=1" in helps and "offload" not in helps
    codec = settings_of.Codec(kind="wan", dtype="float32")
    helps = advice(dataclasses.replace(with_plan(small(), step="codec"), codec=codec), {}, 8.0 * GIB)
    assert "8.0 GiB" in helps and "codec.dtype=bfloat16" in helps and "codec.tile (now whole frames)" in helps


@pytest.mark.parametrize(("words", "gib"), [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (46.96G) exceeds "
     "available HBM (15.75G).", 46.96),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.50G of "
     "15.75G hbm. Exceeded hbm capacity by 1.75G.", 17.5)])
def test_the_compilers_message_says_how_much_is_needed(words: str, gib: float) -> None:
    assert bytes_needed(words) == int(gib * 2**30)
    assert bytes_needed("INVALID_ARGUMENT: (1G)") is None


def test_a_topology_without_a_shape_is_named() -> None:
    with pytest.raises(UserError, match="plan.topology='v5p'"):
        topology("v5p")


def test_the_codec_is_planned_on_one_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    config = dataclasses.replace(small_codec(monkeypatch, dtype="bfloat16"), mesh=settings_of.Mesh(1, 1, 1, 1))
    found = plan_of(config, topology("v6e:1x1")[:1])
    assert found.cost is not None and found.codec is not None
    assert found.chips == 1 and found.fits and (found.codec.dtype, found.codec.tile) == ("bfloat16", 0)
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(SMALL, jnp.bfloat16))]
    assert found.parameters == sum(sizes)
    encode, decode, following = found.cost.memory
    assert found.peak_bytes_per_chip == max(encode.peak, decode.peak, following.peak)
    assert following.aliased > 0 == decode.aliased  # the stream's cache is written in its place
    seconds = {part.program: part.bound_seconds for part in found.cost.programs}
    assert [part.runs for part in found.cost.programs] == [1, 1, 0]
    assert 3 * seconds["decode, a stream's next frame"] < 2 * seconds["decode, a video"]
    assert found.cost.bound_seconds_per_step <= seconds["encode, a video"] + seconds["decode, a video"]
    assert 0 < found.cost.compiler_flops_per_step == found.model_flops_per_step
    assert found.to_json()["dtype"] == "bfloat16"


def test_only_the_vae_has_a_codec_to_plan() -> None:
    with pytest.raises(UserError, match="codec.kind='patch': plan.step=codec plans the Wan VAE"):
        plan_codec.abstract_codec(small())
