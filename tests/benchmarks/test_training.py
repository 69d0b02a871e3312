"""What the benchmark estimates: weights, cache, and that its plot is drawn."""

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.benchmarks import decoding as benchmark_decode
from starflow_jax.benchmarks.random_flow import random_weights
from starflow_jax.flow.decode import start_window
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.io.pictures import read_image
from starflow_jax.model.parameters import flow_variables
from starflow_jax.model.system import System
from tests.small_model import CONFIG


def test_cache_is_as_large_as_estimated_and_does_not_depend_on_the_length(system: System, params) -> None:
    model = CONFIG.model
    texts = jnp.zeros((2, 1, model.text_length, model.text_dim))
    state = start_window(system.flow, flow_variables(params), jnp.zeros((1, 0, 4, 4)), texts, window=model.frames,
                         token_grid=(2, 2))
    cache = state.known.cache
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.k_LBPHD, cache.v_LBPHD)))
    assert held == benchmark_decode.cache_bytes(system, guided=True)


def test_random_weights_have_the_stated_scales(system: System) -> None:
    model = CONFIG.model
    flow = STARFlow(model)
    x = jnp.zeros((1, 2, model.height, model.width, model.channels))
    plain = flow.init(jax.random.key(0), x, jnp.zeros((1, model.text_length, model.text_dim)))["params"]
    drawn = random_weights(plain, jax.random.key(1))
    deep = drawn["deep"]
    kernel = np.asarray(deep["transformer"]["layers"]["layer"]["mlp_out"]["kernel"])
    assert np.isclose(kernel.std(), 0.9 / kernel.shape[-2] ** 0.5, rtol=0.05)
    out = np.asarray(deep["proj_out"]["kernel"])
    assert np.isclose(out.std(), 0.35 / out.shape[-2] ** 0.5, rtol=0.15)
    np.testing.assert_array_equal(deep["proj_out"]["bias"], plain["deep"]["proj_out"]["bias"])


def test_plot_is_drawn(tmp_path) -> None:
    rows = [{"scheme": "sequential", "block": 1, "passes": 144.0, "seconds_one_video": 0.2},
            {"scheme": "base line", "block": 12, "passes": 40.0, "seconds_one_video": 0.1}]
    benchmark_decode.plot(tmp_path / "plot.png", rows)
    picture = read_image(tmp_path / "plot.png").astype(int)
    assert picture.shape == (384, 960, 3)  # 8 x 3.2 inches
    # One colour for each scheme, in the plot of passes and in that of seconds.
    halves = picture[:, :480], picture[:, 480:]
    for colour in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):
        rows, columns = zip(*(np.nonzero((half == colour).all(-1)) for half in halves))
        assert all(len(of) > 20 for of in rows)
    marks = [np.argwhere((halves[0] == colour).all(-1)).mean(axis=0) for colour in ((0x1F, 0x77, 0xB4),
                                                                                   (0xFF, 0x7F, 0x0E))]
    assert marks[0][0] < marks[1][0] and marks[0][1] < marks[1][1]  # more passes lie higher, larger blocks to the right
