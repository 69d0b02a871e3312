"""Operations and bytes of compiled programs, against hand counts, the compiler's own analysis and unrolled loops."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from starflow_jax.config import Model
from starflow_jax.flow import jacobi
from starflow_jax.flow.likelihood import nll_mean
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.kernels import attention as core
from starflow_jax.kernels.mask import Causal
from starflow_jax.model.parameters import flow_variables
from starflow_jax.planning.program_cost import count
from starflow_jax.planning.program_text import parse
from starflow_jax.training.losses import gradients_from_features
from tests.helpers import tiny_model

SIDE = 64
PRODUCT = 2 * SIDE**3


def compiled(function, *shapes: tuple[int, ...], dtype=jnp.float32):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).compile()


def without_trip_counts(text: str) -> str:
    """As TPUs' compiler writes it: how often a loop runs must be read from its condition."""
    without = re.sub(r'"known_trip_count":\{[^}]*\},?', "", text)
    assert without != text
    return without


def repeated(x: jax.Array, w_LKN: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w_KN: (jnp.tanh(x @ w_KN), None), x, w_LKN)[0]


def test_a_loops_body_counts_as_often_as_it_runs() -> None:
    program = compiled(repeated, (SIDE, SIDE), (7, SIDE, SIDE))
    assert count(program).flops == 7 * PRODUCT
    assert count(program).transcendentals == 7 * SIDE**2
    assert count(without_trip_counts(program.as_text())) == count(program)


def test_loops_in_loops() -> None:
    def function(x, w_MLKN):
        return lax.scan(lambda x, w_LKN: (repeated(x, w_LKN) @ w_LKN[0], None), x, w_MLKN)[0]

    program = compiled(function, (SIDE, SIDE), (3, 5, SIDE, SIDE))
    assert count(program).flops == 3 * (5 + 1) * PRODUCT
    assert count(without_trip_counts(program.as_text())) == count(program)


def test_a_solvers_loop_counts_as_often_as_it_is_said_to() -> None:
    def function(x_BNC, w):
        return jacobi.solve(lambda x: (jnp.tanh(x @ w), x), x_BNC, tolerance=1e-3, max_steps=50).x

    program = compiled(function, (1, SIDE, SIDE), (SIDE, SIDE))
    assert count(program).flops == (1 + 1) * PRODUCT
    assert count(program, unknown_trips=12.5).flops == (1 + 12.5) * PRODUCT


LOOP = """HloModule loop, is_scheduled=true

%body (state.1: (s32[], f32[64,64], s32[])) -> (s32[], f32[64,64], s32[]) {
  %state.1 = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %step = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i, %step), backend_config={"flag_configs":[]}
  %x = f32[64,64]{1,0:T(8,128)} get-tuple-element(%state.1), index=1
  %limit.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=2
  %y = f32[64,64]{1,0:T(8,128)} convolution(%x, %x), dim_labels=bf_io->bf
  ROOT %out = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)}, /*index=2*/s32[]{:T(128)}) tuple(%next, %y, %limit.1)
}

%fused (a: s32[], b: s32[]) -> pred[] {
  %a = s32[]{:T(128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  ROOT %test.1 = pred[]{:T(512)} compare(%a, %b), direction=TEST
}

%condition (state.2: (s32[], f32[64,64], s32[])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  %limit.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=2
  ROOT %test.2 = pred[]{:T(512)} fusion(ORDER), kind=kLoop, calls=%fused
}

ENTRY %main (p: f32[64,64]) -> f32[64,64] {
  %p = f32[64,64]{1,0:T(8,128)} parameter(0)
  %start = s32[]{:T(128)} constant(START)
  %limit = s32[]{:T(128)} constant(LIMIT)
  %copied = s32[]{:T(128)S(6)} copy(%limit)
  %begin = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%start, %p, %copied)
  %loop = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)}, s32[]{:T(128)}) while(%begin), condition=%condition, body=%body
  ROOT %result = f32[64,64]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""

@pytest.mark.parametrize("start, limit, step, test, turned", [
    (0, 10, 1, "LT", False), (0, 10, 3, "LT", False), (0, 9, 3, "LE", False), (4, 4, 1, "LT", False),
    (9, -1, -1, "GT", False), (10, 0, -4, "GE", False), (0, 10, 3, "GT", True), (0, 9, 3, "GE", True)])
def test_trips_of_a_condition(start: int, limit: int, step: int, test: str, turned: bool) -> None:
    order = "%limit.2, %j" if turned else "%j, %limit.2"
    text = LOOP
    for name, value in {"START": start, "LIMIT": limit, "STEP": step, "TEST": test, "ORDER": order}.items():
        text = text.replace(name, str(value))
    holds = {"LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__}[test]
    trips, i = 0, start
    while holds(limit, i) if turned else holds(i, limit):
        trips, i = trips + 1, i + step
    assert count(text).flops == trips * PRODUCT
    endless = text.replace("tuple(%next, %y, %limit.1)", "tuple(%next, %y, %next)")  # its limit is not fixed
    assert count(endless, unknown_trips=0.5).flops == 0.5 * PRODUCT


def test_of_the_branches_of_a_conditional_the_costliest_counts() -> None:
    def function(choice, x):
        return lax.switch(choice, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    text = jax.jit(function).lower(jax.ShapeDtypeStruct((), jnp.int32), jnp.zeros((SIDE, SIDE))).compile()
    assert " conditional(" in text.as_text()
    assert count(text).flops == 2 * PRODUCT


@pytest.mark.parametrize("shape, kernel, settings", [
    ((2, 6, 9), (4, 6, 3), dict(window_strides=(2,), padding=[(1, 2)])),
    ((2, 6, 9), (4, 6, 3), dict(window_strides=(1,), padding=[(2, 2)], rhs_dilation=(2,))),
    ((3, 4, 7, 5), (8, 2, 3, 2), dict(window_strides=(1, 2), padding="SAME", feature_group_count=2)),
    ((2, 4, 5, 5), (6, 4, 3, 3), dict(window_strides=(1, 1), padding=[(2, 2), (1, 2)], lhs_dilation=(2, 3))),
    ((4, 3, 6), (8, 3, 4), dict(window_strides=(1,), padding=[(0, 0)], batch_group_count=2)),
])
def test_convolutions_count_as_the_compiler_counts_them(shape, kernel, settings) -> None:
    program = compiled(functools.partial(lax.conv_general_dilated, **settings), shape, kernel)
    assert "convolution(" in program.as_text()
    total = count(program)
    assert total.flops + total.elementwise == program.cost_analysis()["flops"]


def test_products_by_hand() -> None:
    program = compiled(lambda a, b: jnp.einsum("bik,bkj->bij", a, b), (5, 8, 16), (5, 16, 32), dtype=jnp.bfloat16)
    assert count(program).flops == 2 * 5 * 8 * 16 * 32


def test_products_that_gpus_leave_to_their_library() -> None:
    text = """HloModule gpu

ENTRY %main (a: bf16[5,8,16], b: bf16[5,16,32]) -> bf16[5,8,32] {
  %a = bf16[5,8,16]{2,1,0} parameter(0)
  %b = bf16[5,16,32]{2,1,0} parameter(1)
  %c = (bf16[5,8,32]{2,1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],\
"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %out = bf16[5,8,32]{2,1,0} get-tuple-element(%c), index=0
}
"""
    assert count(text).flops == 2 * 5 * 8 * 16 * 32


def test_memory_traffic_takes_slices_for_what_they_are() -> None:
    """Layers of weights are read, and results written, one of many at a time."""
    layers = 50

    def function(x, w_LKN):
        return lax.scan(lambda x, w_KN: (x @ w_KN, x), x, w_LKN)

    total = count(compiled(function, (SIDE, SIDE), (layers, SIDE, SIDE))).hbm_bytes
    matrix = 4 * SIDE**2
    # x read, w read, x written; x stored; and at the most copied once each on the way.
    assert 5 * layers * matrix <= total < 11 * layers * matrix


def test_traffic_of_one_fusion() -> None:
    program = compiled(lambda x, y: jnp.tanh(x) * y + 1, (300, 50), (300, 50))
    assert count(program).hbm_bytes == 3 * 4 * 300 * 50
    program = compiled(lambda x: jnp.tanh(x[7:9]), (300, 50))
    assert count(program).hbm_bytes == 2 * 4 * 2 * 50


def test_a_slice_of_what_a_fusion_within_lays_out_anew_is_a_slice() -> None:
    """As TPUs read a layer of int8 weights: of 8 layers of 1 KiB one is read and one written."""
    text = """HloModule m

%relaid (whole: s8[8,1024]) -> s8[8,1024] {
  %whole = s8[8,1024]{1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copy = s8[8,1024]{1,0:T(8,128)(4,1)} copy(%whole)
}

%layer (stack: s8[8,1024], index: s32[]) -> s8[1,1024] {
  %stack = s8[8,1024]{1,0:T(32,128)(4,1)} parameter(0)
  %index = s32[] parameter(1)
  %zero = s32[] constant(0)
  %again = s8[8,1024]{1,0:T(8,128)(4,1)} fusion(%stack), kind=kLoop, calls=%relaid
  ROOT %slice = s8[1,1024]{1,0} dynamic-slice(%again, %index, %zero), dynamic_slice_sizes={1,1024}
}

ENTRY %e (stack: s8[8,1024], index: s32[]) -> s8[1,1024] {
  %stack = s8[8,1024]{1,0:T(32,128)(4,1)} parameter(0)
  %index = s32[] parameter(1)
  ROOT %out = s8[1,1024]{1,0} fusion(%stack, %index), kind=kLoop, calls=%layer
}
"""
    read_and_written = count(text).hbm_bytes
    assert 2 * 1024 <= read_and_written < 4 * 8 * 1024  # tiles of 32 rows are padded
    assert count(text.replace("T(32,128)(4,1)", "T(1,128)").replace("T(8,128)(4,1)", "T(1,128)")).hbm_bytes == (
        pytest.approx(2 * 1024, abs=8))


def array_bytes(text: str) -> tuple[float, int]:
    module = parse(f"HloModule m\n\nENTRY %e (p: {text}) -> {text} {{\n  ROOT %p = {text} parameter(0)\n}}\n")
    array, = module.computations["e"].root.arrays
    return array.bytes, array.space


def test_shapes_are_as_large_as_they_are_laid_out() -> None:
    assert array_bytes("f32[3,5]{1,0}") == (60, 0)
    assert array_bytes("bf16[12,120,60]{2,1,0:T(8,128)(2,1)}") == (12 * 120 * 128 * 2, 0)
    assert array_bytes("bf16[12,120,60]{0,1,2:T(8,128)(2,1)S(1)}") == (128 * 120 * 60 * 2, 1)
    assert array_bytes("f32[]{:T(128)}") == (512, 0)
    assert array_bytes("s4[10,16]{1,0}") == (80, 0)
    assert array_bytes("pred[7]{0:T(512)(128)(4,1)S(1)}") == (512, 1)


ASYNC = """HloModule gather, num_partitions=8

%start (p0: bf16[128,256]) -> (bf16[128,256], bf16[512,256], u32[]) {
  %p0 = bf16[128,256]{1,0} parameter(0)
  %gather.0 = bf16[512,256]{1,0} all-gather(%p0), channel_id=3, GROUPS, frontend_attributes={chain_id="0"}
  ROOT %started = (bf16[128,256]{1,0}, bf16[512,256]{1,0}, u32[]{:S(2)}) custom-call(%gather.0), \
custom_call_target="AsyncCollectiveStart"
}

%beside (p1: bf16[128,256], p2: bf16[512,256], p3: f32[64,64]) -> (f32[64,64], bf16[512,256], bf16[512,256]) {
  %p1 = bf16[128,256]{1,0} parameter(0)
  %p2 = bf16[512,256]{1,0} parameter(1)
  %p3 = f32[64,64]{1,0} parameter(2)
  %gather.1 = bf16[512,256]{1,0} all-gather(%p1), channel_id=3, GROUPS, frontend_attributes={chain_id="0"}
  %y = f32[64,64]{1,0} convolution(%p3, %p3), dim_labels=bf_io->bf
  ROOT %both = (f32[64,64]{1,0}, bf16[512,256]{1,0}, bf16[512,256]{1,0}) tuple(%y, %p2, %gather.1)
}

%end (p4: bf16[128,256], p5: bf16[512,256]) -> bf16[512,256] {
  %p4 = bf16[128,256]{1,0} parameter(0)
  %p5 = bf16[512,256]{1,0} parameter(1)
  %gather.2 = bf16[512,256]{1,0} all-gather(%p4), channel_id=3, GROUPS, frontend_attributes={chain_id="0"}
  ROOT %done = bf16[512,256]{1,0} custom-call(%p4, %p5, %gather.2), custom_call_target="AsyncCollectiveDone"
}

%scatter (p6: bf16[512,256]) -> bf16[128,256] {
  %p6 = bf16[512,256]{1,0} parameter(0)
  %sum = bf16[512,256]{1,0} all-reduce(%p6), channel_id=4, GROUPS, to_apply=%add
  %at = s32[] constant(0)
  ROOT %part = bf16[128,256]{1,0} dynamic-slice(%sum, %at, %at), dynamic_slice_sizes={128,256}
}

ENTRY %main (x: bf16[128,256], m: f32[64,64]) -> bf16[128,256] {
  %x = bf16[128,256]{1,0} parameter(0)
  %m = f32[64,64]{1,0} parameter(1)
  %f0 = (bf16[128,256]{1,0}, bf16[512,256]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%start
  %g0 = bf16[512,256]{1,0} get-tuple-element(%f0), index=1
  %f1 = (f32[64,64]{1,0}, bf16[512,256]{1,0}, bf16[512,256]{1,0}) fusion(%x, %g0, %m), kind=kCustom, calls=%beside
  %g1 = bf16[512,256]{1,0} get-tuple-element(%f1), index=1
  %f2 = bf16[512,256]{1,0} fusion(%x, %g1), kind=kCustom, calls=%end
  %s0 = (bf16[512,256]{1,0:S(1)}, bf16[512,256]{1,0}, u32[]{:S(2)}) copy-start(%f2)
  %s1 = bf16[512,256]{1,0:S(1)} copy-done(%s0)
  ROOT %out = bf16[128,256]{1,0} fusion(%s1), kind=kCustom, calls=%scatter
}
"""


@pytest.mark.parametrize("groups, size", [
    ("replica_groups=[2,4]<=[4,2]T(1,0)", 4), ("replica_groups={{0,2,4,6},{1,3,5,7}}", 4),
    ("replica_groups=mesh['a'=4,'b'=2] {'a'}", 4), ("replica_groups=mesh['a'=4,'b'=2] {'a', 'b'}", 8),
    ("replica_groups=mesh['a'=8] {'a':(1)2}", 2), ("replica_groups={}", 8)])
def test_collectives_as_tpus_have_them(groups: str, size: int) -> None:
    """A gather spread over three fusions counts once, an all-reduce of which each takes its part is a scatter, and
    what lies in the fast memory (S(1)) costs no memory traffic."""
    total = count(ASYNC.replace("GROUPS", groups))
    shard, whole, matrix = 128 * 256 * 2, 512 * 256 * 2, 64 * 64 * 4
    assert total.collective_bytes == {"all-gather": (size - 1) * shard, "reduce-scatter": (size - 1) / size * whole}
    assert total.flops == PRODUCT and total.collectives == 2
    # The gather, the product beside it, the prefetch, the scattered part.
    assert total.hbm_bytes == (shard + whole) + 2 * matrix + whole + shard


@pytest.mark.parametrize("kind, function, per_device", [
    ("all-reduce", lambda x: lax.psum(x, "a"), 2 * 0.5), ("all-reduce", lambda x: lax.psum(x, ("a", "b")), 2 * 0.75),
    ("all-gather", lambda x: lax.all_gather(x, "b", tiled=True), 1.0),
    ("reduce-scatter", lambda x: lax.psum_scatter(x, ("a", "b"), tiled=True), 0.75),
    ("all-to-all", lambda x: lax.all_to_all(x, "a", 0, 1), 0.5),
    ("collective-permute", lambda x: lax.ppermute(x, "a", [(0, 1), (1, 0)]), 1.0)])
def test_links_by_the_rings_formulas(kind: str, function, per_device: float) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    spec = PartitionSpec(("a", "b"))
    shared = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((32 if kind != "all-to-all" else 8, 48), jnp.float32,
                             sharding=jax.sharding.NamedSharding(mesh, spec))
    total = count(jax.jit(shared).lower(x).compile())
    assert total.collective_bytes == {kind: per_device * x.size // 4 * 4} and total.collectives == 1


def test_collectives_in_a_loop_count_as_often_as_it_runs() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), "a")
    summed = jax.shard_map(lambda x: lax.scan(lambda x, _: (jnp.tanh(lax.psum(x, "a")), None), x, None, length=7)[0],
                           mesh=mesh, in_specs=PartitionSpec("a"), out_specs=PartitionSpec("a"), check_vma=False)
    assert count(jax.jit(summed).lower(jax.ShapeDtypeStruct((4,), jnp.float32)).compile()).collectives == 7


# A little of everything.
LAYERS = dict(denoiser="first_layer", denoiser_layers=2, shallow_layers=(1,), deep_layers=2)


def lowered(model: Model, training: bool, batch: int = 2, sharding=None):
    flow = STARFlow(model)

    def shaped(shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    x = shaped((batch, model.frames, model.height, model.width, model.channels))
    text = shaped((batch, model.text_length, model.text_dim))
    weights = dict(jax.tree.map(lambda leaf: shaped(leaf.shape, leaf.dtype),
                                jax.eval_shape(flow.init, jax.random.key(0), x, text)["params"]))
    params = {"flow": weights, **({"denoiser": weights.pop("denoiser")} if model.denoiser != "none" else {})}

    def forward(params, x, text):
        variables = flow_variables(params)
        loss = nll_mean(apply_flow(flow, variables, STARFlow.forward, x, text)).loss
        return loss, None if model.denoiser == "none" else apply_flow(flow, variables, STARFlow.score, x, text)

    def gradients(params, x, text):
        return gradients_from_features(flow, params, x, lambda _: text)

    return jax.jit(gradients if training else forward).lower(params, x, text)


@pytest.mark.parametrize("training", [False, True])
def test_a_scanned_model_costs_what_the_unrolled_one_does(training: bool) -> None:
    scanned, unrolled = (lowered(tiny_model(**LAYERS, unroll_layers=unroll), training).compile()
                         for unroll in (False, True))
    ours, theirs = count(scanned), count(unrolled)
    assert " while(" in scanned.as_text() and " while(" not in unrolled.as_text()
    assert ours.flops == pytest.approx(theirs.flops, rel=0.01)
    assert ours.transcendentals == pytest.approx(theirs.transcendentals, rel=0.02)
    # The compiler's own analysis counts a loop's body once: of the unrolled program it is right.
    assert scanned.cost_analysis()["flops"] < 0.75 * (ours.flops + ours.elementwise)
    assert theirs.flops + theirs.elementwise == pytest.approx(unrolled.cost_analysis()["flops"], rel=0.01)
    assert theirs.hbm_bytes == pytest.approx(unrolled.cost_analysis()["bytes accessed"], rel=0.1)


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> jax.sharding.Sharding:
    """A TPU that is not here."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, TPUs' compiler, is not installed: pip install -e '.[tpu]'")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setattr(core, "SHORT", 0)  # the kernel, however short
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_scanned_model_costs_what_the_unrolled_one_does_on_a_tpu(chip, training: bool) -> None:
    """With the attention kernels inside, which count by what they declare."""
    def model(unroll: bool) -> Model:
        layers = LAYERS if training else dict(shallow_layers=(1,), deep_layers=2)
        return tiny_model(**layers, unroll_layers=unroll, dtype="bfloat16", shallow_width=64, deep_width=128,
                          head_dim=64, height=8, width=16)

    scanned, unrolled = (lowered(model(unroll), training, sharding=chip).compile() for unroll in (False, True))
    few, many = (text.count('custom_call_target="tpu_custom_call"') for text in (scanned.as_text(), unrolled.as_text()))
    assert 0 < few < many
    ours, theirs = count(scanned), count(unrolled)
    assert ours.flops == pytest.approx(theirs.flops, rel=0.01)
    assert scanned.cost_analysis()["flops"] < 0.75 * (ours.flops + ours.elementwise)
    assert theirs.flops + theirs.elementwise == pytest.approx(unrolled.cost_analysis()["flops"], rel=0.01)


def test_of_a_cache_its_filled_share_counts(chip) -> None:
    """Attention to a cache of four blocks, a quarter of which is read; attention among the queries counts whole."""
    def of(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=chip)

    queries, cached = of(1, 128, 2, 64), of(1, 4096, 2, 64)
    compiled = jax.jit(lambda q, k, length: core.attention(q, q, q, Causal(), (k, k, length))).lower(
        queries, cached, of(dtype=jnp.int32)).compile()
    whole, quarter = count(compiled), count(compiled, filled=0.25)
    keys_and_values, products = 2 * 4096 * 2 * 64 * 2, 4 * 128 * 4096 * 2 * 64
    assert whole.hbm_bytes - quarter.hbm_bytes == pytest.approx(0.75 * keys_and_values, rel=0.05)
    assert whole.flops - quarter.flops == pytest.approx(0.75 * products, rel=0.01)
