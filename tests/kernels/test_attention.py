"""The attention core: every implementation against a dense float64 computation, dispatch, and what it compiles to."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.kernels import attention as core
from starflow_jax.kernels import pallas_gpu, pallas_tpu, pallas_triton, reference
from starflow_jax.kernels.int8 import Int8Slots
from starflow_jax.kernels.mask import HIDDEN, WHOLLY, Causal, FrameWindow, Full, Mask, piece, seen, visible_blocks
from starflow_jax.kernels.stacked import Stacked
from starflow_jax.kernels.unsupported import Unsupported

# Relative error (Frobenius) of outputs and gradients; inputs are rounded to the dtype first.
TOLERANCE = {"float64": 1e-13, "float32": 1e-6, "float16": 7e-4, "bfloat16": 5e-3}
WINDOW = FrameWindow(prefix=21, tokens=37, window=3, lookahead=1)
MASKS = [Causal(), Full(), WINDOW, FrameWindow(prefix=0, tokens=48, window=1, lookahead=0),
         FrameWindow(prefix=130, tokens=50, window=2, lookahead=2),
         FrameWindow(prefix=21, tokens=37, window=3, lookahead=1, frames=4)]
# The 7B model: 256 text tokens and 21 frames of 30 x 53, deep block and denoiser.
SLOTS, HEADS, HEAD_DIM = 256 + 21 * 1590, 64, 64
DENOISER, DENOISER_HEADS = FrameWindow(prefix=256, tokens=1590, window=10, lookahead=1), 48


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in a few hundred slots, and Pallas kernels that a CPU can run (as `... on CPU`)."""
    monkeypatch.setattr(core, "SHORT", 0)
    monkeypatch.setattr(reference, "Q_CHUNK", 64)
    monkeypatch.setattr(reference, "K_CHUNK", 96)
    for name, kernel in (("tpu", pallas_tpu), ("triton", pallas_triton)):
        on_cpu = types.SimpleNamespace(
            TAKES_INT8=kernel.TAKES_INT8, TAKES_STACKS=kernel.TAKES_STACKS, check=kernel.check,
            forward=functools.partial(kernel.forward, interpret=True),
            backward=functools.partial(kernel.backward, interpret=True))
        monkeypatch.setitem(core.IMPLEMENTATIONS, f"{name} on CPU", on_cpu)


@pytest.fixture
def small_tpu_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_tpu, "BLOCK", 128)
    monkeypatch.setattr(pallas_tpu, "FORWARD_PART", 64)
    monkeypatch.setattr(pallas_tpu, "BACKWARD_PART", 64)


def allowed(mask: Mask, queries: int, keys: int) -> np.ndarray:
    """(S, K) from the words of the definition, one pair at a time."""
    def sees(query: int, key: int) -> bool:
        if isinstance(mask, Full):
            return True
        if isinstance(mask, Causal):
            return key <= query
        query_frame = max(query - mask.prefix, 0) // mask.tokens
        if key < mask.prefix:
            return True
        key_frame = (key - mask.prefix) // mask.tokens
        if mask.frames and key_frame >= mask.frames:
            return False
        return query_frame - mask.window < key_frame <= query_frame + mask.lookahead

    return np.array([[sees(query, key) for key in range(keys)] for query in range(queries)])


def dense(q, k, v, allowed_BSK, dout) -> list[np.ndarray]:
    """[out, dq, dk, dv] in float64 by the formulas, everything at once."""
    group, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
    k_BKHD, v_BKHD = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.einsum("bshd,bkhd->bhsk", q, k_BKHD) * scale
    scores = np.where(allowed_BSK[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhsk,bkhd->bshd", weights, v_BKHD)
    dweights = np.einsum("bshd,bkhd->bhsk", dout, v_BKHD)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * scale
    dk, dv = np.einsum("bhsk,bshd->bkhd", dscores, q), np.einsum("bhsk,bshd->bkhd", weights, dout)
    dk, dv = (x.reshape(*k.shape[:3], group, -1).sum(3) for x in (dk, dv))
    return [out, np.einsum("bhsk,bkhd->bshd", dscores, k_BKHD), dk, dv]


def arrays(dtype: str, *shapes: tuple[int, ...], seed: int = 0) -> list[jax.Array]:
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def assert_near(ours, theirs, dtype: str) -> None:
    names = ("out", "dq", "dk", "dv")
    wide = [np.asarray(x, np.float64) for x in ours]
    errors = {name: np.linalg.norm(a - b) / np.linalg.norm(b) for name, a, b in zip(names, wide, theirs)}
    assert all(error < TOLERANCE[dtype] for error in errors.values()), errors


def with_gradients(function, dout, *inputs):
    out, pull_back = jax.vjp(function, *inputs)
    return [out, *pull_back(dout)]


# implementation, dtype, (S, H, G, D), mask
CASES = [
    ("reference", "float32", (301, 2, 2, 64), Causal()),
    ("reference", "bfloat16", (280, 4, 2, 20), WINDOW),
    ("reference", "float16", (240, 1, 1, 64), MASKS[3]),
    ("reference", "float64", (333, 2, 1, 128), MASKS[4]),
    ("tpu on CPU", "float32", (301, 2, 2, 64), Causal()),
    ("tpu on CPU", "bfloat16", (280, 4, 2, 20), WINDOW),
    ("tpu on CPU", "bfloat16", (384, 1, 1, 64), MASKS[3]),
    ("tpu on CPU", "float32", (333, 2, 1, 128), MASKS[4]),
    ("triton on CPU", "float32", (301, 2, 2, 64), Causal()),
    ("triton on CPU", "bfloat16", (280, 4, 2, 20), WINDOW),
    ("triton on CPU", "float16", (240, 1, 1, 64), MASKS[3]),
    ("triton on CPU", "float32", (333, 2, 1, 128), MASKS[4]),
]


@pytest.mark.parametrize("implementation, dtype, shape, mask", CASES)
@pytest.mark.usefixtures("small_tpu_blocks")
def test_values_and_gradients(implementation: str, dtype: str, shape: tuple[int, ...], mask: Mask) -> None:
    slots, heads, kv_heads, dim = shape
    of_keys = (2, slots, kv_heads, dim)
    with jax.enable_x64(dtype == "float64"):
        q, k, v, dout = arrays(dtype, (2, slots, heads, dim), of_keys, of_keys, (2, slots, heads, dim))
        function = functools.partial(core.attention, mask=mask, implementation=implementation)
        ours = jax.jit(functools.partial(with_gradients, function))(dout, q, k, v)
        assert all(x.dtype == dtype for x in ours)
        expected = dense(*(np.asarray(x, np.float64) for x in (q, k, v)), allowed(mask, slots, slots)[None],
                         np.asarray(dout, np.float64))
        assert_near(ours, expected, dtype)


@pytest.mark.parametrize("implementation", ["reference", "tpu on CPU", "triton on CPU"])
@pytest.mark.usefixtures("small_tpu_blocks")
def test_each_sample_sees_its_own_length_of_the_cache(implementation: str) -> None:
    slots, capacity, lengths = 70, 300, [0, 131, 300]
    q, k, v, past_k, past_v = arrays(
        "float32", (3, slots, 2, 64), *2 * [(3, slots, 1, 64)], *2 * [(3, capacity, 1, 64)])
    past = (past_k, past_v, jnp.asarray(lengths))
    dout, = arrays("float32", q.shape, seed=1)

    def function(q, k, v):
        return core.attention(q, k, v, Causal(), past, implementation)

    ours = jax.jit(functools.partial(with_gradients, function))(dout, q, k, v)
    cached = np.arange(capacity) < np.reshape(lengths, (3, 1, 1))
    allowed_BSK = np.concatenate([np.broadcast_to(cached, (3, slots, capacity)),
                                  np.broadcast_to(allowed(Causal(), slots, slots), (3, slots, slots))], axis=2)
    keys, values = np.concatenate([past_k, k], axis=1), np.concatenate([past_v, v], axis=1)
    out, dq, dk, dv = dense(*(np.asarray(x, np.float64) for x in (q, keys, values)), allowed_BSK, np.asarray(dout))
    assert_near(ours, [out, dq, dk[:, capacity:], dv[:, capacity:]], "float32")


@pytest.mark.parametrize("implementation, dtype", [
    ("at once", "float32"), ("at once", "bfloat16"), ("reference", "float32"), ("reference", "bfloat16"),
    ("tpu on CPU", "float32"), ("tpu on CPU", "bfloat16"), ("triton on CPU", "float32")])
@pytest.mark.usefixtures("small_tpu_blocks")
def test_a_cache_of_int8_is_seen_at_its_scales(implementation: str, dtype: str, monkeypatch) -> None:
    """Slots and heads of different sizes, a head of 20 channels, and a cache of no whole blocks."""
    capacity, lengths = 300, jnp.asarray([131, 300])
    q, k, v, past_k, past_v = arrays(dtype, (2, 40, 4, 20), *2 * [(2, 40, 2, 20)], *2 * [(2, capacity, 2, 20)])
    sizes = np.exp(np.random.default_rng(2).normal(scale=0.5, size=(2, 2, capacity, 2, 1)))
    cached = [Int8Slots.of(x * jnp.asarray(size, dtype)) for x, size in zip((past_k, past_v), sizes)]
    scaled_back = [x.q_BPGD * np.moveaxis(x.scale_BG1P, -1, 1) for x in cached]
    if implementation == "at once":
        monkeypatch.setattr(core, "SHORT", 1024)
    found = jax.jit(lambda *past: core.attention(
        q, k, v, Causal(), (*past, lengths), None if implementation == "at once" else implementation))(*cached)
    sees = np.concatenate([np.broadcast_to(np.arange(capacity) < lengths[:, None, None], (2, 40, capacity)),
                           np.broadcast_to(allowed(Causal(), 40, 40), (2, 40, 40))], axis=2)
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    keys, values = (np.concatenate([past, own], axis=1) for past, own in zip(scaled_back, wide[1:]))
    expected = dense(wide[0], keys, values, sees, np.zeros(q.shape))[0]
    assert found.dtype == dtype
    assert_near([found], [expected], dtype)


@pytest.mark.parametrize("capacity", [256, 300])  # whole blocks, which the TPU kernel takes from the stack, and not
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("implementation", ["at once", "reference", "tpu on CPU", "triton on CPU"])
@pytest.mark.usefixtures("small_tpu_blocks")
def test_a_layer_of_a_stack_is_that_layer(implementation: str, quantized: bool, capacity: int, monkeypatch) -> None:
    """Which one is known when the program runs."""
    q, k, v, past_k, past_v = arrays("float32", (2, 40, 4, 32), *2 * [(2, 40, 2, 32)], *2 * [(3, 2, capacity, 2, 32)])
    lengths = jnp.asarray([131, capacity])
    stacks = [Int8Slots.of(x) if quantized else x for x in (past_k, past_v)]
    kernel = None if implementation == "at once" else implementation
    if implementation == "at once":
        monkeypatch.setattr(core, "SHORT", 1024)

    @jax.jit
    def of_stack(layer: jax.Array) -> jax.Array:
        past = (*(Stacked(stack, layer) for stack in stacks), lengths)
        return core.attention(q, k, v, Causal(), past, kernel)

    for layer in (0, 2):
        own = [jax.tree.map(lambda leaf, layer=layer: leaf[layer], stack) for stack in stacks]
        expected = core.attention(q, k, v, Causal(), (*own, lengths), kernel)
        np.testing.assert_allclose(of_stack(jnp.int32(layer)), expected, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "tpu on CPU", "triton on CPU"])
@pytest.mark.parametrize("mask, seeing", [(Full(), 40), (FrameWindow(prefix=0, tokens=8, window=1, lookahead=0), 8)])
def test_a_query_that_sees_nothing_gets_nothing(implementation: str, mask: Mask, seeing: int) -> None:
    """Sample 0 has no keys; of sample 1 only the first `seeing` queries see one of its 7."""
    q, k, v, dout = arrays("float32", *4 * [(2, 40, 1, 16)])
    kernel, length_B = core.IMPLEMENTATIONS[implementation], jnp.asarray([0, 7])
    out, lse = kernel.forward(q, k, v, mask=mask, length_B=length_B)
    dq, dk, dv = kernel.backward(q, k, v, lse, jnp.einsum("bshd,bshd->bhs", out, dout), dout, mask=mask,
                                 length_B=length_B)
    assert all((x[0] == 0).all() for x in (out, dq, dk, dv))
    assert all((x[1, seeing:] == 0).all() for x in (out, dq)) and all((x[1, 7:] == 0).all() for x in (dk, dv))
    lowest = np.float32(reference.MASKED)
    assert (lse[0] == lowest).all() and (lse[1, :, seeing:] == lowest).all()
    # The kernels take queries already scaled.
    scale = 16**-0.5
    expected = dense(q[1:, :seeing] / scale, k[1:, :7], v[1:, :7], np.ones((1, seeing, 7), bool), dout[1:, :seeing])
    expected[1] = expected[1] / scale
    assert_near([out[1:, :seeing], dq[1:, :seeing], dk[1:, :7], dv[1:, :7]], expected, "float32")


@pytest.mark.usefixtures("small_tpu_blocks")
def test_tpu_queries_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head whose dq is too large for the memory of the core."""
    monkeypatch.setattr(pallas_tpu, "DQ_BYTES", 2 * 64 * 128 * 12)  # two blocks of queries of five
    mask = FrameWindow(prefix=50, tokens=53, window=2, lookahead=0)
    q, k, v, dout = arrays("float32", *4 * [(1, 580, 1, 64)])
    run = functools.partial(with_gradients, functools.partial(core.attention, mask=mask, implementation="tpu on CPU"))
    assert "f32[1,1,3,64,640]" in str(jax.make_jaxpr(run)(dout, q, k, v))  # dk of each chunk
    expected = dense(*(np.asarray(x, np.float64) for x in (q, k, v)), allowed(mask, 580, 580)[None], np.asarray(dout))
    assert_near(jax.jit(run)(dout, q, k, v), expected, "float32")


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: Mask) -> None:
    """Elementwise and in blocks, both as defined; block sizes that divide nothing."""
    slots, q_block, k_block = 321, 48, 80
    expected = allowed(mask, slots, slots)
    for xp in (np, jnp):
        sees_SK = seen(mask, xp.arange(slots)[:, None], xp.arange(slots), slots, xp)
        np.testing.assert_array_equal(np.broadcast_to(sees_SK, expected.shape), expected)
    visible = visible_blocks(mask, slots, slots, q_block, k_block)
    for (row, column), sees in np.ndenumerate(visible):
        block = expected[row * q_block:(row + 1) * q_block, column * k_block:(column + 1) * k_block]
        assert (sees == HIDDEN) == (not block.any())
        assert sees != WHOLLY or (block.all() and block.shape[1] == k_block)
    assert isinstance(mask, Full) or (visible == HIDDEN).any()


RUNS = ((40, 53), (200, 31))  # queries of a piece: slots 40 .. 92 and 200 .. 230


@pytest.mark.parametrize("first_key, keys", [(0, 321), (75, 90), (10, 7)])
@pytest.mark.parametrize("mask", MASKS)
def test_pieces_of_masks(mask: Mask, first_key: int, keys: int) -> None:
    """Some of the rows and columns, elementwise and in blocks."""
    rows = np.concatenate([np.arange(first, first + count) for first, count in RUNS])
    expected = allowed(mask, 321, 321)[rows, first_key:first_key + keys]
    cut = piece(mask, 321, RUNS, first_key, keys)
    assert (cut is None) == (not expected.any()) and (cut == Full()) == expected.all()
    if cut is None:
        return
    for xp in (np, jnp):
        sees_SK = seen(cut, xp.arange(len(rows))[:, None], xp.arange(keys), keys, xp)
        np.testing.assert_array_equal(np.broadcast_to(sees_SK, expected.shape), expected)
    for (row, column), sees in np.ndenumerate(visible_blocks(cut, len(rows), keys, 16, 24)):
        block = expected[row * 16:(row + 1) * 16, column * 24:(column + 1) * 24]
        both_runs = row * 16 < RUNS[0][1] < (row + 1) * 16  # sees what is between them too
        assert not block.any() if sees == HIDDEN else block.any() or both_runs
        assert sees != WHOLLY or (block.all() and block.shape[1] == 24)


@pytest.mark.parametrize("implementation", ["reference", "tpu on CPU", "triton on CPU"])
@pytest.mark.usefixtures("small_tpu_blocks")
def test_the_mask_is_chosen_when_the_program_runs(implementation: str) -> None:
    """Two pieces of masks and nothing at all; as many queries as the pieces have, and other keys."""
    q, k, v, dout = arrays("float32", (2, 84, 2, 64), *2 * [(2, 170, 1, 64)], (2, 84, 2, 64))
    masks = (piece(WINDOW, 321, RUNS, 0, 170), None, piece(Causal(), 321, RUNS, 30, 170))

    def function(q, k, v, which):
        return core.attention(q, k, v, masks, implementation=implementation, which=which)

    run = jax.jit(lambda which, dout, q, k, v: with_gradients(lambda *x: function(*x, which), dout, q, k, v))
    rows = np.concatenate([np.arange(first, first + count) for first, count in RUNS])
    for which, mask, first_key in ((0, WINDOW, 0), (2, Causal(), 30)):
        sees = allowed(mask, 321, 321)[rows, first_key:first_key + 170]
        expected = dense(*(np.asarray(x, np.float64) for x in (q, k, v)), sees[None], np.asarray(dout))
        assert_near(run(which, dout, q, k, v), expected, "float32")
    assert all((x == 0).all() for x in run(1, dout, q, k, v))


def test_gpu_kernels_take_pieces_of_masks() -> None:
    for implementation in ("gpu", "triton"):
        assert lowered("cuda", jnp.bfloat16, slots=84, mask=piece(WINDOW, 321, RUNS, 0, 84),
                       implementation=implementation, backward=True) == {implementation}


def test_masks_of_queries_need_as_many_keys() -> None:
    with pytest.raises(ValueError, match="not 5 and 7"):
        visible_blocks(Causal(), 5, 7, 4, 4)


# For Triton kernels jax 0.12 asks which GPU a program is lowered for.
H100 = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"))
# What the text of a lowered program has of each kernel.
MARKS = {"gpu": "@mosaic_gpu", "triton": "__gpu$xla.gpu.triton", "tpu": "@tpu_custom_call"}


def lowered(platform: str, dtype, heads: int = 2, dim: int = 64, slots: int = 1000, mask: Mask = Causal(),  # noqa: B008
            implementation: str | None = None, backward: bool = False) -> set[str]:
    """The kernels in the program that is lowered for that platform, without one at hand."""
    x = jax.ShapeDtypeStruct((1, slots, heads, dim), dtype)
    function = functools.partial(core.attention, mask=mask, implementation=implementation)
    program = jax.jit(functools.partial(with_gradients, function) if backward else function)
    with jax.sharding.use_abstract_mesh(H100) if platform == "cuda" else contextlib.nullcontext():
        text = program.trace(*(3 + backward) * [x]).lower(lowering_platforms=(platform,)).as_text()
    return {name for name, mark in MARKS.items() if mark in text}


@pytest.mark.parametrize("platform, dtype, dim, kernels", [
    ("cuda", "bfloat16", 64, {"gpu"}), ("cuda", "float32", 64, {"triton"}), ("cuda", "bfloat16", 20, {"triton"}),
    ("cuda", "float32", 256, set()), ("tpu", "bfloat16", 64, {"tpu"}), ("tpu", "float32", 20, {"tpu"}),
    ("tpu", "float16", 64, set()), ("cpu", "bfloat16", 64, set()),
])
def test_dispatch_takes_the_first_that_serves(platform: str, dtype: str, dim: int, kernels: set[str]) -> None:
    assert lowered(platform, dtype, dim=dim) == kernels


def test_dispatch_can_be_forced() -> None:
    assert lowered("cuda", "bfloat16", implementation="triton") == {"triton"}
    assert lowered("tpu", "bfloat16", implementation="reference") == set()
    with pytest.raises(Unsupported, match="float32"):
        lowered("cuda", "float32", implementation="gpu")
    with pytest.raises(ValueError, match="abacus.*reference"):
        lowered("cpu", "float32", implementation="abacus")


def test_short_sequences_take_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lowered("tpu", "float32", slots=64) == {"tpu"}
    monkeypatch.setattr(core, "SHORT", 64)
    assert lowered("tpu", "float32", slots=64) == set()
    assert lowered("tpu", "float32", slots=65) == {"tpu"}


@pytest.mark.parametrize("slots, kv_heads", [(127, 2), (128, 2), (172, 1), (512, 2)])
def test_short_causal_sequences_in_parts(monkeypatch: pytest.MonkeyPatch, slots: int, kv_heads: int) -> None:
    monkeypatch.setattr(core, "SHORT", 1024)
    with jax.enable_x64(True):
        shapes = (2, slots, 2, 20), *2 * [(2, slots, kv_heads, 20)], (2, slots, 2, 20)
        q, k, v, dout = arrays("float64", *shapes)
        function = functools.partial(core.attention, mask=Causal())
        ours = jax.jit(functools.partial(with_gradients, function))(dout, q, k, v)
        expected = dense(*(np.asarray(x) for x in (q, k, v)), allowed(Causal(), slots, slots)[None], np.asarray(dout))
        assert_near(ours, expected, "float64")


@pytest.mark.parametrize("slots, share", [(127, 1), (128, 3 / 4), (172, 2 / 3), (1024, 36 / 64)])
def test_parts_leave_out_most_of_what_is_hidden(monkeypatch: pytest.MonkeyPatch, slots: int, share: float) -> None:
    """None, two, three and eight parts: the blocks of the scores on and below the diagonal."""
    monkeypatch.setattr(core, "SHORT", 1024)
    x = jax.ShapeDtypeStruct((1, slots, 2, 64), jnp.float32)

    def operations(mask: Mask, **options: jax.Array) -> float:
        attend = functools.partial(core.attention, mask=mask, **options)
        return jax.jit(attend).lower(x, x, x).compile().cost_analysis()["flops"]

    assert operations(Causal()) / operations(Full()) == pytest.approx(share, abs=0.02)
    assert operations(Causal(), count=jnp.int32(9)) >= operations(Full())


def test_parts_of_bfloat16_and_of_counted_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SHORT", 1024)
    q, k, v, dout = arrays("bfloat16", *4 * [(2, 200, 2, 20)])
    attend = functools.partial(core.attention, mask=Causal())
    sees, wide = allowed(Causal(), 200, 200), [np.asarray(x, np.float64) for x in (q, k, v, dout)]
    ours = jax.jit(functools.partial(with_gradients, attend))(dout, q, k, v)
    assert_near(ours, dense(*wide[:3], sees[None], wide[3]), "bfloat16")
    counted = jax.jit(functools.partial(with_gradients, functools.partial(attend, count=jnp.int32(150))))(dout, q, k, v)
    assert_near(counted, dense(*wide[:3], (sees & (np.arange(200) < 150))[None], wide[3]), "bfloat16")
    assert jax.jit(attend)(q, k[:, :150], v[:, :150]).shape == q.shape  # fewer keys than queries


@pytest.mark.parametrize("kernel, dtype, dim, reason", [
    (pallas_gpu, "float32", 64, "float32: .*bfloat16"), (pallas_gpu, "bfloat16", 80, r"head_dim 80: .*\[64, 128\]"),
    (pallas_triton, "float32", 192, "head_dim 192: at most 128"), (pallas_triton, "int8", 64, "int8"),
    (pallas_tpu, "float16", 64, "float16"), (pallas_tpu, "bfloat16", 512, "head_dim 512: at most 256"),
])
def test_kernels_decline_with_a_reason(kernel, dtype: str, dim: int, reason: str) -> None:
    x = jnp.zeros((1, 8, 1, dim), dtype)
    with pytest.raises(Unsupported, match=reason):
        kernel.check(x, x)


def test_shapes_that_do_not_fit() -> None:
    q, k = arrays("float32", (1, 8, 3, 16), (1, 8, 2, 16))
    with pytest.raises(ValueError, match="3, 16.*2, 16"):
        core.attention(q, k, k, Causal())


def test_memory_of_the_reference_grows_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "Q_CHUNK", 256)
    monkeypatch.setattr(reference, "K_CHUNK", 512)

    def temporary_bytes(function, slots: int) -> int:
        x = jax.ShapeDtypeStruct((1, slots, 1, 64), jnp.float32)
        program = jax.jit(functools.partial(with_gradients, functools.partial(function, mask=Causal())))
        return program.lower(x, x, x, x).compile().memory_analysis().temp_size_in_bytes

    in_blocks = functools.partial(core.attention, implementation="reference")
    assert temporary_bytes(in_blocks, 32_768) < 32_768**2 / 16  # an array of scores has 4 bytes for each pair
    assert temporary_bytes(in_blocks, 65_536) < 2.1 * temporary_bytes(in_blocks, 32_768)
    assert temporary_bytes(reference.attention, 2048) > 4 * 2048**2  # else this test measures nothing


@pytest.mark.parametrize("heads, mask", [(HEADS, Causal()), (DENOISER_HEADS, DENOISER)])
def test_gpu_kernels_lower_at_full_size(heads: int, mask: Mask) -> None:
    for implementation in ("gpu", "triton"):
        assert lowered("cuda", jnp.bfloat16, heads, HEAD_DIM, SLOTS, mask, implementation, backward=True) == {
            implementation}
