"""The inverse of the flow: exactness, prefixes, windows, guidance, and one sample beside another."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.flow import decode, generation
from starflow_jax.flow.inversion import SEQUENTIAL, Solver
from starflow_jax.flow.jacobi import Outcome
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.nn.transformer import unstacked
from tests.helpers import latents, random_flow, text, tiny_model

MODEL = tiny_model(frames=3, deep_layers=1)
GRID = (2, 3)


@pytest.fixture(scope="module")
def setting() -> tuple[STARFlow, Any]:
    return random_flow(MODEL)


def noise(batch: int = 1, frames: int = 3) -> jax.Array:
    """(B, T, S, K)."""
    return jnp.asarray(np.random.default_rng(4).normal(size=(batch, frames, 6, 2)), jnp.float32)


def run(setting: tuple[STARFlow, Any], z: jax.Array, texts: jax.Array | None = None, **options: Any) -> np.ndarray:
    """All frames that `generate` yields, (B, T, S, K)."""
    flow, variables = setting
    texts = text(MODEL, z.shape[0])[None] if texts is None else texts
    frames = generation.generate(flow, variables, z, texts, token_grid=GRID, **options)
    return np.concatenate([np.asarray(made) for made, _ in frames], axis=1)


@pytest.mark.parametrize("solver", [SEQUENTIAL, Solver(block_size=4, tolerance=1e-12)], ids=["one", "blocks"])
def test_inverse_of_forward_is_the_input(setting: tuple[STARFlow, Any], solver: Solver) -> None:
    """Blocks of four do not divide a frame of six tokens."""
    flow, variables = setting
    x = latents(MODEL)
    forward: Callable[[jax.Array], Any] = jax.jit(
        lambda x: flow.apply(variables, x, text(MODEL), method=STARFlow.forward))
    out = forward(x)
    assert np.abs(flow.latents(out.z_BTSK, 2) - x).max() > 0.1
    u = run(setting, out.z_BTSK, solver=solver)
    np.testing.assert_allclose(u, out.block_outputs[-2], atol=1e-4)
    inverse, _ = decode.invert_shallow(flow, variables, jnp.asarray(u), solver=solver, token_grid=GRID)
    np.testing.assert_allclose(inverse, x, atol=1e-4)


def test_known_frames_are_continued_as_if_sampled(setting: tuple[STARFlow, Any]) -> None:
    whole = run(setting, noise())
    for known in (1, 2):
        rest = run(setting, noise()[:, known:], known_BTSK=jnp.asarray(whole[:, :known]))
        np.testing.assert_allclose(rest, whole[:, known:], atol=1e-4)
    other = run(setting, noise()[:, 1:], known_BTSK=jnp.asarray(whole[:, :1]) + 1.0)
    assert np.abs(other - whole[:, 1:]).max() > 1e-2


def test_a_sliding_window_restarts_from_its_last_frames(setting: tuple[STARFlow, Any]) -> None:
    plain, sliding = run(setting, noise()), run(setting, noise(), window=2, context=1)
    np.testing.assert_allclose(sliding[:, :2], plain[:, :2], atol=1e-4)
    assert np.abs(sliding[:, 2] - plain[:, 2]).max() > 1e-3  # it has forgotten the first frame
    restarted = run(setting, noise()[:, 2:], known_BTSK=jnp.asarray(plain[:, 1:2]))
    np.testing.assert_allclose(sliding[:, 2:], restarted, atol=1e-4)


@pytest.mark.parametrize("context", [0, 2])
def test_context_must_fit_the_window(setting: tuple[STARFlow, Any], context: int) -> None:
    with pytest.raises(ValueError, match=f"context={context}"):
        run(setting, noise(), window=2, context=context)


def test_guidance_of_weight_zero_is_none(setting: tuple[STARFlow, Any]) -> None:
    texts = jnp.stack([text(MODEL), text(MODEL, seed=30)])
    z = noise(frames=2)
    np.testing.assert_allclose(run(setting, z, texts, guidance=0.0), run(setting, z), atol=1e-4)
    assert np.abs(run(setting, z, texts, guidance=2.0) - run(setting, z)).max() > 1e-2


def test_a_sample_does_not_depend_on_its_batch_mates(setting: tuple[STARFlow, Any]) -> None:
    """With a tolerance that samples meet after different numbers of steps, and frames start from."""
    z = noise(batch=2, frames=2) * jnp.array([1.0, 3.0])[:, None, None, None]
    features, solver = text(MODEL, 2), Solver(block_size=6, tolerance=1e-3)
    together = run(setting, z, features[None], solver=solver)
    alone = run(setting, z[:1], features[None, :1], solver=solver)
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


def test_several_frames_a_step_are_the_same_frames(setting: tuple[STARFlow, Any]) -> None:
    z = noise(2, 4)
    one_by_one = run(setting, z)
    for frames, block in ((2, 12), (3, 18), (2, 5)):
        together = run(setting, z, solver=Solver(block_size=block, tolerance=0.0, frames=frames))
        np.testing.assert_allclose(together, one_by_one, atol=1e-4)


def test_one_program_serves_any_tolerance(setting: tuple[STARFlow, Any]) -> None:
    loose = run(setting, noise(1, 1), solver=Solver(block_size=6, tolerance=0.3))
    programs = decode.decode_frames._cache_size()
    exact = run(setting, noise(1, 1), solver=Solver(block_size=6, tolerance=0.0))
    assert decode.decode_frames._cache_size() == programs
    np.testing.assert_allclose(exact, run(setting, noise(1, 1)), atol=1e-4)
    assert np.abs(exact - loose).max() > 1e-2


@pytest.mark.parametrize("solver", [pytest.param(SEQUENTIAL, marks=pytest.mark.slow),
                                    Solver(block_size=4, tolerance=1e-12)], ids=["one", "blocks"])
def test_unstacked_layers_give_the_same(solver: Solver) -> None:
    """Also frames that are known, a restart, and both stacks; two layers and two heads."""
    model = tiny_model(frames=3)
    flow, variables = random_flow(model)
    texts = jnp.stack([text(model), text(model, seed=5)])
    found = []
    for of in (variables, unstacked(variables)):
        frames = generation.generate(flow, of, noise(frames=4), texts, token_grid=GRID, solver=solver, guidance=1.5,
                                     window=3, context=1)
        u = jnp.concatenate([made for made, _ in frames], axis=1)
        found.append((u, decode.invert_shallow(flow, of, u, solver=solver, token_grid=GRID)[0]))
    for stacked, one_by_one in zip(*found):
        np.testing.assert_allclose(one_by_one, stacked, atol=1e-5)
    layers = unstacked(variables)["params"]["deep"]["transformer"]["layers"]["layer"]
    assert isinstance(layers, tuple) and len(layers) == model.deep_layers


def test_a_guess_changes_where_the_solver_starts_and_not_where_it_ends(setting: tuple[STARFlow, Any]) -> None:
    flow, variables = setting
    exact = run(setting, noise(1, 1))

    def steps(guess: jax.Array | None) -> int:
        solver = Solver(block_size=6, tolerance=1e-10)
        (u, report), = generation.generate(flow, variables, noise(1, 1), text(MODEL, 1)[None], token_grid=GRID,
                                           solver=solver, guess_BSK=guess)
        np.testing.assert_allclose(u, exact, atol=1e-4)
        return int(report.steps.sum())

    assert steps(jnp.asarray(exact[:, 0])) < steps(None)


@pytest.mark.parametrize("stride", [*(pytest.param(stride, marks=pytest.mark.slow) for stride in (1, 4)), 5])
def test_a_wavefront_of_many_updates_is_exact(setting: tuple[STARFlow, Any], stride: int) -> None:
    """With as many updates as tokens, over strides that divide the tokens and ones that don't; then with few."""
    z = start = noise(batch=2, frames=2)
    exact = run(setting, z)
    many = Solver(block_size=12 * stride, updates=12, frames=2)
    np.testing.assert_allclose(run(setting, z, solver=many, start_BTSK=start), exact, atol=1e-4)
    few = Solver(block_size=2 * stride, updates=2, frames=2)
    error = np.abs(run(setting, z, solver=few, start_BTSK=start) - exact).max()
    assert error < 1e-4 if stride == 1 else error > 1e-4


def test_a_wavefront_updates_each_token_as_often_as_asked(setting: tuple[STARFlow, Any]) -> None:
    """Its last stride sees the final tokens in front of it: against updates written out one by one, in which slots in
    front of the window keep what they saw at their last update."""
    flow, variables = setting
    z, start, solver = noise(), 0.5 * noise(), Solver(block_size=8, updates=2, frames=3)
    features = text(MODEL, 1)

    @jax.jit
    def step(seen: jax.Array) -> jax.Array:  # of all tokens at once; slot n + 1 sees seen[n]
        rope = flow.rope((3, *GRID), features)
        forward, logdet = flow.apply(variables, method=lambda m: m.deep.forward(seen, rope, features))
        return seen + (z.reshape(seen.shape) - forward) * jnp.exp(-logdet)  # mu + sigma z

    u = seen = start.reshape(1, 18, 2)
    for low in range(-4, 18, 4):  # the window's first stride
        seen = seen.at[:, max(low - 1, 0):low + 7].set(u[:, max(low - 1, 0):low + 7])
        u = u.at[:, max(low, 0):low + 8].set(step(seen)[:, max(low, 0):low + 8])
    (found, report), = generation.generate(flow, variables, z, features[None], token_grid=GRID, solver=solver,
                                           start_BTSK=start)
    np.testing.assert_allclose(found.reshape(1, 18, 2), u, atol=1e-5)
    assert report.steps.shape == (5, 1) and (np.asarray(report.steps) == 2).all()
    assert Outcome.OUT_OF_STEPS in np.asarray(report.outcome)


def test_the_wavefront_of_unstacked_layers_with_guidance(setting: tuple[STARFlow, Any]) -> None:
    flow, variables = setting
    texts = jnp.stack([text(MODEL), text(MODEL, seed=5)])
    solver = Solver(block_size=6, updates=3, frames=2)
    stacked, layers = (np.concatenate([made for made, _ in generation.generate(
        flow, of, noise(frames=2), texts, token_grid=GRID, solver=solver, guidance=1.5)], axis=1)
        for of in (variables, unstacked(variables)))
    np.testing.assert_allclose(layers, stacked, atol=1e-5)


def test_where_the_solver_starts_changes_its_steps_and_not_its_end(setting: tuple[STARFlow, Any]) -> None:
    exact, solver = run(setting, noise()), Solver(block_size=6, tolerance=1e-10)
    flow, variables = setting

    def steps(start: jax.Array | None) -> int:
        made, reports = zip(*generation.generate(flow, variables, noise(), text(MODEL, 1)[None], token_grid=GRID,
                                                 solver=solver, start_BTSK=start))
        np.testing.assert_allclose(np.concatenate(made, axis=1), exact, atol=1e-4)
        return sum(int(report.steps.sum()) for report in reports)

    assert steps(jnp.asarray(exact)) < min(steps(None), steps(noise()))


def test_another_text_holds_from_its_frame_on(setting: tuple[STARFlow, Any]) -> None:
    first, second = text(MODEL, 1)[None], text(MODEL, 1)[None] + 1.0
    plain = run(setting, noise(1, 4), texts=first, window=4, context=2)
    changed = run(setting, noise(1, 4), texts={0: first, 2: second}, window=4, context=2)
    np.testing.assert_array_equal(changed[:, :2], plain[:, :2])
    assert np.abs(changed[:, 2:] - plain[:, 2:]).max() > 1e-3
    alone = run(setting, noise(1, 4)[:, 2:], texts=second, known_BTSK=jnp.asarray(plain[:, :2]), window=4)
    np.testing.assert_allclose(changed[:, 2:], alone, atol=1e-5)


DRAFTER = dataclasses.replace(MODEL, deep_width=20)


def drafts(setting: tuple[STARFlow, Any], tolerance: float = 1e-2) -> generation.Draft:
    """By a deep block of another size, beside the same shallow ones."""
    flow, variables = setting
    return generation.Draft(flow, {"params": {"deep": variables["params"]["deep"]}}, tolerance)


def test_a_draft_is_where_the_solver_starts_and_not_where_it_ends(setting: tuple[STARFlow, Any]) -> None:
    """Two guided samples: exactly the same frames where the solver goes on to the end, whatever is drafted, also where
    that is not finite; a draft of the model itself saves all updates but the one that confirms it."""
    flow, variables = setting
    texts, z = jnp.stack([text(MODEL, 2), text(MODEL, 2, seed=30)]), noise(2, 2)

    def found(draft: generation.Draft | None, tolerance: float) -> tuple[np.ndarray, list[Any]]:
        made, reports = zip(*generation.generate(
            flow, variables, z, texts, guidance=1.5, token_grid=GRID, draft=draft,
            solver=Solver(block_size=4, tolerance=tolerance)))
        return np.concatenate(made, axis=1), list(reports)

    small, smaller = random_flow(DRAFTER)
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), smaller)
    exact, plain = found(None, 0.0), found(None, 1e-6)
    assert all(report.steps.max() > 1 and report.draft is None for report in plain[1])
    for params in (smaller, broken):
        np.testing.assert_array_equal(found(drafts((small, params)), 0.0)[0], exact[0])
    np.testing.assert_array_equal(found(drafts((small, broken)), 1e-6)[0], plain[0])  # it starts as without
    reports = found(drafts(setting, 0.0), 1e-6)[1]
    assert all((report.steps == 1).all() and report.draft.steps.shape == report.steps.shape for report in reports)
