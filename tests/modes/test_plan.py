"""The plan: which mesh suits which step, what is accounted for, and what is said of what does not fit."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from configs.t2v import get_config
from starflow_jax import config as settings_of
from starflow_jax.codec.wan_weights import abstract_params
from starflow_jax.config import Config, UserError, from_config_dict
from starflow_jax.planning import codec as plan_codec
from starflow_jax.planning import plan, roofline
from tests.codec.test_wan_vae import SMALL
from tests.helpers import tiny_model
from tests.small_run import run

KEYS = {"topology", "chips", "device_kind", "mesh", "parameters", "tokens_per_step", "hbm_bytes_per_chip",
        "peak_bytes_per_chip", "fits", "model_flops_per_step", "compiler_flops_per_step", "bound_seconds_per_step",
        "bound_mfu", "compile_seconds"}


def paper() -> Config:
    return from_config_dict(get_config("7b"))


def with_plan(config: Config, **changes) -> Config:
    return dataclasses.replace(config, plan=settings_of.Plan(**changes))


@pytest.mark.parametrize(("chips", "mesh"), [(64, (1, 64, 1, 1)), (256, (1, 64, 1, 4)), (3, (1, 3, 1, 1))])
def test_training_parts_the_batch_first_then_the_tokens(chips: int, mesh: tuple[int, ...]) -> None:
    """192 clips: 64 or 3 parts of them, and what is left over goes to the tokens."""
    assert dataclasses.astuple(plan.suited(paper(), chips)) == mesh


def test_sampling_keeps_weights_where_they_are() -> None:
    """64 deep heads and 48 shallow ones have 16 for their greatest common divisor."""
    assert dataclasses.astuple(plan.suited(with_plan(paper(), step="sample"), 8)) == (1, 1, 8, 1)
    assert dataclasses.astuple(plan.suited(with_plan(paper(), step="sample"), 64)) == (4, 1, 16, 1)


def test_a_mesh_that_was_asked_for_is_kept() -> None:
    asked = dataclasses.replace(paper(), mesh=settings_of.Mesh(data=1, fsdp=16, tensor=4))
    assert plan.chosen(asked, 64).mesh == asked.mesh
    assert plan.chosen(paper(), 64).mesh == settings_of.Mesh(1, 64, 1, 1)


def test_a_search_tries_only_what_divides() -> None:
    tried = list(plan.candidates(paper(), 256))
    assert len(tried) == len({(one.mesh, one.model.remat) for one in tried}) > 10
    for one in tried:
        data, fsdp, tensor, sequence = dataclasses.astuple(one.mesh)
        assert data * fsdp * tensor * sequence == 256
        assert 192 % (data * fsdp) == 0 and 64 % (tensor * sequence) == 0 and 48 % (tensor * sequence) == 0


def test_what_does_not_fit_says_by_how_much_and_what_helps() -> None:
    row = {"step": "train", "peak_bytes_per_chip": 40 * 2**30, "hbm_bytes_per_chip": 32 * 2**30,
           "mesh": {"data": 1, "fsdp": 64, "tensor": 1, "sequence": 4}}
    advice = plan._advice(paper(), row)
    assert "8.0 GiB" in advice and "accumulate=3" in advice and "remat=layer" not in advice
    kept = dataclasses.replace(paper(), model=dataclasses.replace(paper().model, remat="none"))
    assert "remat=layer" in plan._advice(kept, row)


@pytest.mark.parametrize(("words", "gib"), [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (46.96G) exceeds "
     "available HBM (15.75G).", 46.96),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.50G of "
     "15.75G hbm. Exceeded hbm capacity by 1.75G.", 17.5)])
def test_the_compilers_own_words_tell_how_much_is_needed(words: str, gib: float) -> None:
    assert plan.bytes_needed(words) == int(gib * 2**30)
    assert plan.bytes_needed("INVALID_ARGUMENT: (1G)") is None


def test_what_the_compiler_refuses_is_a_plan_that_does_not_fit(tmp_path) -> None:
    """Six million videos at once: refused by the compiler, told by the plan."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    asked = with_plan(small(tmp_path), topology="v5e:2x2", step="sample", videos=6_000_000)
    plan.plan(asked, tmp_path)
    row = json.loads((tmp_path / "plan.json").read_text())
    assert KEYS <= set(row) and not row["fits"] and "does not fit by" in row["advice"]


def test_a_topology_that_is_none_is_named() -> None:
    with pytest.raises(UserError, match="plan.topology='v5p'"):
        plan.topology("v5p")


def small(tmp_path, **changes) -> Config:
    model = tiny_model(deep_width=80, shallow_width=80, denoiser="first_layer", denoiser_layers=1, **changes)
    train = settings_of.Train(batch_size=4, steps=10, warmup_steps=1)
    return Config("small", model, settings_of.Text(encoder="frozen"), train=train)


def test_a_plan_accounts_for_memory_work_and_time(tmp_path, capsys) -> None:
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    config = small(tmp_path)
    asked = with_plan(config, topology="v5e:2x2")
    plan.plan(asked, tmp_path)
    row = json.loads((tmp_path / "plan.json").read_text())
    assert KEYS <= set(row)
    assert row["chips"] == 4 and row["fits"] and row["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "sequence": 1}
    assert row["tokens_per_step"] == 4 * 12
    assert row["model_flops_per_step"] == roofline.model_flops(config.model, 4, training=True)
    memory, = row["memory"]
    assert row["peak_bytes_per_chip"] == memory["peak"] > memory["temporaries"] > 0
    assert row["compiler_flops_per_step"] >= row["model_flops_per_step"]
    times = [row["compute_seconds"], row["hbm_seconds"], row["ici_seconds"]]
    assert row["bound_seconds_per_step"] == max(times)
    assert math.isclose(row["bound_mfu"] * row["bound_seconds_per_step"] * 4 * 197e12, row["model_flops_per_step"])
    assert "fits" in capsys.readouterr().out


@pytest.mark.slow
def test_sampling_is_planned_program_by_program(tmp_path) -> None:
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    asked = with_plan(small(tmp_path), topology="v5e:2x2", step="sample")
    plan.plan(asked, tmp_path)
    row = json.loads((tmp_path / "plan.json").read_text())
    assert row["fits"] and row["mesh"]["tensor"] == 4 and len(row["memory"]) == 3


def test_without_libtpu_it_says_how_to_install_it(tmp_path) -> None:
    try:
        import libtpu  # noqa: F401
    except ImportError:
        result = run(tmp_path / "work", tmp_path, "--mode=plan")
        assert result.returncode == 2 and 'pip install "jax[tpu]"' in result.stderr, result.stderr
        return
    pytest.skip("libtpu is installed")


def codec_config(tmp_path, monkeypatch, **changes) -> Config:
    """The small VAE of test_wan_vae in place of the released one, for four latent frames of 6 x 8."""
    monkeypatch.setattr(plan_codec, "wan_config", lambda settings, channels: SMALL)
    config = with_plan(small(tmp_path, channels=3, frames=4, height=6, width=8), topology="v6e:1x1", step="codec")
    return dataclasses.replace(config, codec=settings_of.Codec(**({"kind": "wan"} | changes)))


def test_the_codec_is_planned_on_one_chip(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    plan.plan(codec_config(tmp_path, monkeypatch, dtype="bfloat16"), tmp_path)
    row = json.loads((tmp_path / "plan.json").read_text())
    assert KEYS <= set(row)
    assert row["chips"] == 1 and row["fits"] and (row["dtype"], row["tile"]) == ("bfloat16", 0)
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(SMALL, jnp.bfloat16))]
    assert row["parameters"] == sum(sizes)
    encode, decode, following = row["memory"]
    assert row["peak_bytes_per_chip"] == max(encode["peak"], decode["peak"], following["peak"])
    assert following["aliased"] > 0 == decode["aliased"]  # the stream's cache is written in its place
    seconds = {part["program"]: part["bound_seconds"] for part in row["programs"]}
    assert [part["runs"] for part in row["programs"]] == [1, 1, 0]
    assert 3 * seconds["decode, a stream's next frame"] < 2 * seconds["decode, a video"]
    assert row["bound_seconds_per_step"] <= seconds["encode, a video"] + seconds["decode, a video"]
    assert 0 < row["model_flops_per_step"] == row["compiler_flops_per_step"]
    out = capsys.readouterr().out
    assert "bfloat16, whole frames: fits" in out and "bound, seconds: decode, a video" in out


def test_a_search_over_the_codec_tries_dtypes_and_tiles(tmp_path, monkeypatch) -> None:
    tried = list(plan.candidates(codec_config(tmp_path, monkeypatch, tile_overlap=4), 1))
    assert [(one.codec.dtype, one.codec.tile) for one in tried] == [
        ("bfloat16", 0), ("bfloat16", 8), ("float32", 0), ("float32", 8)]
    assert all(one.mesh == settings_of.Mesh(1, 1, 1, 1) for one in tried)
    row = {"step": "codec", "peak_bytes_per_chip": 40 * 2**30, "hbm_bytes_per_chip": 32 * 2**30, "mesh": {}}
    advice = plan._advice(tried[2], row)
    assert "8.0 GiB" in advice and "codec.dtype=bfloat16" in advice and "codec.tile (now whole frames)" in advice


def test_only_the_vae_has_a_codec_to_plan(tmp_path) -> None:
    with pytest.raises(UserError, match="codec.kind='patch': plan.step=codec plans the Wan VAE"):
        plan_codec.abstract_codec(small(tmp_path))
