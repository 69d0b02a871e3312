"""Attention over devices that each hold some of the tokens: what one device gives, and what moves for it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax import config as settings_of
from starflow_jax import sharding
from starflow_jax.config import SEQUENCE_PARALLEL
from starflow_jax.kernels import attention as core
from starflow_jax.kernels import reference
from starflow_jax.kernels.mask import Causal, FrameWindow, Mask, bounds, piece
from starflow_jax.nn.sequence_parallel import sequence_parallel_attention, zigzag_runs
from starflow_jax.planning import program_cost

# 36 slots: 3 of text, 4 frames of 8 tokens, one of padding.
SLOTS, DENOISER = 36, FrameWindow(prefix=3, tokens=8, window=2, lookahead=1, frames=4)
BOTH = (Causal(), DENOISER)


def run_on(devices: int, function: Callable, *arrays: jax.Array):
    """The compiled function on a mesh that shards the tokens, and what it returns."""
    mesh = sharding.make_mesh(settings_of.Mesh(data=1, sequence=devices), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, jax.NamedSharding(mesh, sharding.spec((None, "tokens", None, None))))
                  for x in arrays]
        compiled = jax.jit(function).lower(*placed).compile()
        return compiled, compiled(*placed)


def arrays(slots: int = SLOTS, heads: int = 4) -> list[jax.Array]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=(2, slots, heads, 8)), jnp.float32) for _ in range(4)]


def with_gradients(masks: tuple[Mask, ...], which: int, choice: str) -> Callable:
    def run(dout, q, k, v):
        index = None if len(masks) == 1 else jnp.int32(which)
        out, pull_back = jax.vjp(lambda *x: sequence_parallel_attention(choice, *x, masks, index, None), q, k, v)
        return [out, *pull_back(dout)]

    return run


def assert_those_of_one_device(found: list[jax.Array], mask: Mask, dout, *inputs: jax.Array) -> None:
    out, pull_back = jax.vjp(lambda *x: reference.attention(*x, mask), *inputs)
    for ours, theirs in zip(found, [out, *pull_back(dout)], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("choice", SEQUENCE_PARALLEL)
@pytest.mark.parametrize(("devices", "masks", "which"), [
    (2, (Causal(),), 0), (4, (DENOISER,), 0), (4, BOTH, 0), (2, BOTH, 1)])
def test_values_and_gradients(choice: str, devices: int, masks: tuple[Mask, ...], which: int) -> None:
    inputs = arrays()
    _, found = run_on(devices, with_gradients(masks, which, choice), *inputs)
    assert_those_of_one_device(found, masks[which], *inputs)


@pytest.mark.parametrize("choice", ["all_gather", "ring"])
def test_more_devices_than_heads_and_odd_shards(choice: str) -> None:
    inputs = arrays(slots=33, heads=1)
    _, found = run_on(3, with_gradients((Causal(),), 0, choice), *inputs)
    assert_those_of_one_device(found, Causal(), *inputs)


@pytest.mark.parametrize("choice", ["all_gather", "ring"])
def test_long_sequences_go_through_the_kernels(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this CPU the reference, block by block; each device its own piece of the mask."""
    for name, size in (("SHORT", 0), ("Q_CHUNK", 16), ("K_CHUNK", 16)):
        monkeypatch.setattr(core if name == "SHORT" else reference, name, size)
    inputs = arrays()
    _, found = run_on(2, with_gradients((DENOISER,), 0, choice), *inputs)
    assert_those_of_one_device(found, DENOISER, *inputs)


@pytest.mark.parametrize(("choice", "kinds", "parts"), [
    ("ulysses", {"all-to-all"}, 4 * 3 / 4), ("all_gather", {"all-gather", "collective-permute"}, 2 * 3 + 2),
    ("ring", {"collective-permute"}, 2 * 3 + 2)])
def test_what_moves(choice: str, kinds: set[str], parts: float) -> None:
    """Forward, among 4 devices, in units of a device's queries: what the module says."""
    devices, (_, *inputs) = 4, arrays()

    def run(q, k, v):  # and back to the tokens' devices, as in a layer
        out = sequence_parallel_attention(choice, q, k, v, (Causal(),), None, None)
        return sharding.constrain(out, "batch", "tokens", None, None)

    compiled, _ = run_on(devices, run, *inputs)
    sent = program_cost.count(compiled).collective_bytes
    part = inputs[0].nbytes / devices
    assert set(sent) == kinds and sum(sent.values()) == parts * part


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_causal_work_is_the_same_on_all_devices(devices: int) -> None:
    count, work, slots_seen = 6, [], []
    for device in range(devices):
        runs = zigzag_runs(device, devices, count)
        cut = piece(Causal(), devices * count, runs, 0, devices * count)
        _, low_S, high_S = bounds(cut, count, devices * count)
        work.append(int((high_S - low_S).sum()))
        slots_seen += [slot for first, length in runs for slot in range(first, first + length)]
    assert len(set(work)) == 1 and sorted(slots_seen) == list(range(devices * count))
