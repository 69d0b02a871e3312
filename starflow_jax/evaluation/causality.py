"""Which frames does a frame's z depend on? Shallow blocks that see one frame at a time keep the flow causal."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.flow.starflow import STARFlow
from starflow_jax.model.parameters import Params
from starflow_jax.model.system import System
from starflow_jax.sampling.generate import encode_z


def dependence(system: System, params: Params, noisy_BNhwC: jax.Array, text: jax.Array) -> np.ndarray:
    """(N, N): how much z of frame i moves with the latents of frame j, root mean square over a random direction in all
    latents of j, in units of that direction's. Exactly 0 where i does not see j."""
    frames = noisy_BNhwC.shape[1]
    columns = [_column(system.flow, params, noisy_BNhwC, text, frame) for frame in range(frames)]
    return np.stack([np.asarray(column) for column in columns], axis=1)


@partial(jax.jit, static_argnums=0)
def _column(flow: STARFlow, params: Params, noisy: jax.Array, text: jax.Array, frame: jax.Array) -> jax.Array:
    direction = jax.random.normal(jax.random.fold_in(jax.random.key(0), frame), noisy.shape)
    direction *= (jnp.arange(noisy.shape[1]) == frame)[:, None, None, None]
    _, moved_BNSK = jax.jvp(lambda x: encode_z(flow, params, x, text), (noisy,), (direction,))
    size = jnp.sqrt(jnp.mean(direction**2) * noisy.shape[1])
    return jnp.sqrt(jnp.mean(moved_BNSK**2, axis=(0, 2, 3))) / size
