"""The denoiser a frame at a time against the pass over the whole clip."""

import jax
import numpy as np
import pytest

from starflow_jax.flow.denoiser_stream import score_next
from starflow_jax.flow.starflow import STARFlow
from tests.helpers import latents, random_flow, text, tiny_model

FRAMES = 5


@pytest.mark.parametrize("layers,window,lookahead,text_length", [
    (2, 3, 1, 3), (3, 2, 2, 3), (2, 1, 1, 3), (2, 10, 0, 0), (1, 3, 1, 0)])
def test_a_frame_at_a_time_is_the_whole_clip(layers: int, window: int, lookahead: int, text_length: int) -> None:
    """More frames than the ring of the cache holds; the last ones have fewer ahead of them."""
    model = tiny_model(frames=FRAMES, denoiser="first_layer", denoiser_layers=layers, denoiser_window=window,
                       denoiser_lookahead=lookahead, text_length=text_length, deep_layers=1, shallow_layers=(1,))
    flow, variables = random_flow(model)
    x, features = latents(model, batch=2), text(model, batch=2)
    whole = jax.jit(lambda x: flow.apply(variables, x, features, method=STARFlow.score))(x)
    assert np.abs(whole).max() > 0.1
    state, params = None, variables["params"]["denoiser"]
    for frame in range(FRAMES):
        ahead = min(1 + lookahead, FRAMES - frame)
        score, state = score_next(flow, params, state, x, frame, features, frames=ahead)
        np.testing.assert_allclose(score[:, 0], whole[:, frame], atol=2e-5, err_msg=f"frame {frame}")
    assert state is not None and int(state.frame) == FRAMES


def test_the_cache_does_not_grow_and_nothing_is_compiled_anew() -> None:
    model = tiny_model(frames=FRAMES, denoiser="first_layer", denoiser_layers=2, denoiser_window=3, deep_layers=1,
                       shallow_layers=(1,))
    flow, variables = random_flow(model)
    x, state, sizes, programs = latents(model), None, [], []
    for frame in range(4):
        _, state = score_next(flow, variables["params"]["denoiser"], state, x, frame, text(model), frames=2)
        sizes.append(state.cache.k_LBPHD.shape)
        programs.append(score_next._cache_size())
    assert sizes == [(2, 1, 3 + 2 * 6, 2, 20)] * 4
    assert programs[1:] == [programs[1]] * 3
    assert state is not None and int(state.frame) == 4
