import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from starflow_jax.nn.dense import Dense
from starflow_jax.nn.lora import Adapted
from starflow_jax.nn.products import product

ROWS, FEATURES = (4, 33), 72


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape)


@pytest.mark.parametrize("features", [(5,), (3, 5)])
@pytest.mark.parametrize("leading", [(), (6,), (2, 3)])
def test_it_is_the_sum_over_the_inputs(leading: tuple[int, ...], features: tuple[int, ...]) -> None:
    x, kernel = np.asarray(normal(*leading, 8)), np.asarray(normal(8, *features))
    expected = np.tensordot(x.astype(np.float64), kernel.astype(np.float64), 1)
    np.testing.assert_allclose(product(jnp.asarray(x), jnp.asarray(kernel)), expected, atol=1e-5)


def test_bfloat16_stays_bfloat16() -> None:
    x, kernel = normal(2, 3, 8), normal(8, 3, 5)
    found = product(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), product(x, kernel), atol=0.1)


def test_over_a_mesh_clips_and_tokens_stay_axes_of_their_own() -> None:
    x, kernel = normal(*ROWS, 16), normal(16, FEATURES)

    def shapes() -> str:
        return str(jax.make_jaxpr(product)(x, kernel))

    assert f"f32[{ROWS[0] * ROWS[1]},16]" in shapes()
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "sequence"), (AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        assert "reshape" not in shapes()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_gradient_turns_no_gradients_of_outputs(adapted: bool) -> None:
    """By name of the array's type: (features, rows) in what is compiled."""
    layer, x = Dense(FEATURES, dtype=jnp.float32), normal(*ROWS, 16)
    variables = layer.init(jax.random.key(0), x)["params"]
    factors = normal(16, 4), normal(4, FEATURES)

    def loss(factors: tuple[jax.Array, jax.Array], kernel: jax.Array, x: jax.Array) -> jax.Array:
        own = Adapted(kernel, *factors) if adapted else kernel + factors[0] @ factors[1]
        return jnp.sum(jax.nn.gelu(layer.apply({"params": {**variables, "kernel": own}}, x), approximate=False) ** 2)

    text = jax.jit(jax.grad(loss)).lower(factors, variables["kernel"], x).compile().as_text()
    assert f"f32[{ROWS[0] * ROWS[1]},{FEATURES}]" in text
    assert f"f32[{FEATURES},{ROWS[0] * ROWS[1]}]" not in text
