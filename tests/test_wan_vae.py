"""The Wan2.2 VAE: the released sizes, and streams that are the whole; its values are in test_golden.py."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from starflow_jax.codec import wan_weights
from starflow_jax.codec.wan_stream import WanCodec
from starflow_jax.codec.wan_vae import WanConfig
from starflow_jax.config import UserError
from tests.test_golden import golden_wan

GOLDEN = Path(__file__).parent / "golden" / "wan22_vae.json"


@pytest.fixture(scope="module")
def codec() -> WanCodec:
    return golden_wan(json.loads(GOLDEN.read_text()), load_file(GOLDEN.with_suffix(".safetensors")))


def test_the_released_model_has_704_688_668_parameters_in_196_tensors() -> None:
    shapes = wan_weights.released_shapes(WanConfig())
    assert len(shapes) == 196
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 704_688_668


def test_a_stream_of_latent_frames_decodes_to_the_whole(codec: WanCodec) -> None:
    """The first latent frame gives one frame, each later one four; the cache goes in and comes out."""
    latents = jax.random.normal(jax.random.key(0), (1, 3, 2, 3, codec.config.z_dim))
    whole = jax.jit(WanCodec.decode)(codec, latents)
    step, cache, parts = jax.jit(WanCodec.decode_next), None, []
    for index in range(3):
        part, cache = step(codec, latents[:, index:index + 1], cache)
        parts.append(part)
    assert [part.shape[1] for part in parts] == [1, 4, 4]
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5 * float(jnp.abs(whole).max()))


def test_weights_of_another_model_are_listed(codec: WanCodec) -> None:
    tensors = wan_weights.to_released(codec.params, codec.config)
    first, second, *_ = tensors
    tensors["extra"] = tensors.pop(first)
    tensors[second] = tensors[second][..., None]
    with pytest.raises(UserError) as caught:
        wan_weights.from_released(tensors.items(), codec.config, jnp.float32)
    for words in (f"missing: {first}", "unexpected: extra", f"misshapen: {second}"):
        assert words in str(caught.value)
