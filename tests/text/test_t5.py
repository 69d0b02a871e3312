"""The T5 encoder (its golden numbers are in test_golden.py): masking by zero gradients, buckets, sizes."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from starflow_jax.config import UserError
from starflow_jax.text.t5 import T5Config, T5Encoder, load_t5, mask_padding, relative_buckets

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=4, num_heads=4)


@functools.partial(jax.jit, static_argnames="dtype")
def encode(params: Any, ids_BS: jax.Array, dtype: jnp.dtype = jnp.float32) -> Any:
    return T5Encoder(SMALL, dtype).apply({"params": params}, ids_BS)


def golden_config(case: Mapping[str, Any]) -> T5Config:
    """The config of a golden case of kind t5_encoder."""
    names = {field.name for field in dataclasses.fields(T5Config)}
    return T5Config(**{name: value for name, value in case["config"].items() if name in names})


def golden_weights(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict of a golden case: its tensors under params/."""
    return {name.removeprefix("params/"): x for name, x in tensors.items() if name.startswith("params/")}


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return json.loads((GOLDEN / "t5_encoder.json").read_text()), load_file(GOLDEN / "t5_encoder.safetensors")


@pytest.fixture(scope="module")
def small_params() -> Any:
    return jax.jit(T5Encoder(SMALL).init)(jax.random.key(0), jnp.ones((1, 8), jnp.int32))["params"]


def test_load_names_what_is_wrong(golden: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    config, weights = golden_config(golden[0]), golden_weights(golden[1])
    with pytest.raises(UserError, match=r"shared\.weight has shape \(96, 48\)"):
        load_t5(weights, dataclasses.replace(config, vocab_size=97))
    del weights["encoder.block.2.layer.1.DenseReluDense.wo.weight"]
    with pytest.raises(UserError, match=r"no tensor encoder\.block\.2\.layer\.1\.DenseReluDense\.wo\.weight"):
        load_t5(weights, config)


def test_loaded_tree_is_the_module_s(golden: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    config = golden_config(golden[0])
    loaded = load_t5(golden_weights(golden[1]), config)
    made = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), loaded) == jax.tree.map(
        lambda x: (x.shape, x.dtype), made
    )


def test_padding_keys_are_unseen_and_all_others_seen(small_params: Any) -> None:
    # One id apiece, so that the gradient of an embedding row is that of a position.
    ids_BS = jnp.array([[5, 6, 7, 1, 0, 0]])

    def total(embedding: jax.Array) -> jax.Array:
        features_BSD = encode({**small_params, "embed": {"embedding": embedding}}, ids_BS)
        weights_BSD = jax.random.normal(jax.random.key(1), features_BSD.shape)
        return jnp.sum(mask_padding(features_BSD, ids_BS) * weights_BSD)

    gradient_ND = jax.jit(jax.grad(total))(small_params["embed"]["embedding"])
    assert not gradient_ND[0].any()
    assert np.abs(gradient_ND[jnp.array([5, 6, 7, 1])]).max(axis=-1).min() > 1e-3


def test_padding_does_not_change_the_text(small_params: Any) -> None:
    ids_BS = jnp.array([[5, 6, 7, 1]])
    padded_ids_BS = jnp.pad(ids_BS, ((0, 0), (0, 5)))
    alone = encode(small_params, ids_BS)
    padded = encode(small_params, padded_ids_BS)
    np.testing.assert_allclose(padded[:, :4], alone, atol=1e-5)
    assert padded[:, 4:].all() and not mask_padding(padded, padded_ids_BS)[:, 4:].any()


def test_a_text_without_tokens_is_finite(small_params: Any) -> None:
    features_BSD = encode(small_params, jnp.zeros((1, 4), jnp.int32))
    assert np.isfinite(features_BSD).all()


def test_initial_features_have_unit_rms_and_tell_words_apart(small_params: Any) -> None:
    ids_BS = jax.random.randint(jax.random.key(2), (4, 16), 2, 64)
    features_BSD = np.asarray(encode(small_params, ids_BS))
    np.testing.assert_allclose(np.mean(features_BSD**2, axis=-1), 1, atol=1e-4)
    changed_BSD = encode(small_params, ids_BS.at[:, 3].set(1))
    moved_BS = np.sqrt(np.mean((changed_BSD - features_BSD) ** 2, axis=-1))
    assert moved_BS[:, 3].min() > 0.5 and np.delete(moved_BS, 3, axis=1).min() > 0.01


def test_bfloat16_stays_near_float32(small_params: Any) -> None:
    ids_BS = jax.random.randint(jax.random.key(2), (2, 16), 2, 64)
    exact = encode(small_params, ids_BS)
    rough = encode(small_params, ids_BS, jnp.bfloat16)
    assert rough.dtype == jnp.bfloat16
    assert 0 < np.sqrt(np.mean((np.asarray(rough, np.float32) - exact) ** 2)) < 0.03


def test_relative_buckets() -> None:
    """Integers only: far bucket k begins where (distance / 8)^8 >= 16^k."""
    length = 200
    bucket_QK = relative_buckets(length, 32, 128)
    for distance in range(length):
        far = 8 + max((k for k in range(8) if distance**8 >= 8**8 * 16**k), default=0)
        expected = distance if distance < 8 else far
        assert bucket_QK[distance, 0] == expected
        assert bucket_QK[0, distance] == expected + 16 * (distance > 0)


def test_flan_t5_xl_size() -> None:
    config = T5Config(vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32)
    shapes = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), jnp.ones((1, 8), jnp.int32))
    layer = 4 * 2048 * 2048 + 3 * 2048 * 5120 + 2 * 2048
    by_hand = 32128 * 2048 + 24 * layer + 32 * 32 + 2048
    assert sum(x.size for x in jax.tree.leaves(shapes)) == by_hand == 1_223_527_424


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", 0),
        ("num_layers", -1),
        ("layer_norm_epsilon", 0.0),
        ("relative_attention_num_buckets", 30),
        ("relative_attention_max_distance", 8),
    ],
)
def test_bad_config(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{field} is {value}"):
        dataclasses.replace(SMALL, **{field: value})
