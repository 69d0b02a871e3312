"""LoRA factors and the model that they are added to: fresh, merged, apart, several, in int8, of another model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from starflow_jax.config import Config, Lora, UserError, changed
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.model.beside import fingerprint_of
from starflow_jax.model.lora import adapted_kernels, fresh_factors, with_factors
from starflow_jax.model.parameters import flow_variables
from starflow_jax.model.quantize import quantize_params
from tests.helpers import latents, random_params, text
from tests.small_model import CONFIG

MODEL = CONFIG.model


def with_lora(**settings: Any) -> Config:
    return dataclasses.replace(CONFIG, lora=Lora(**{"rank": 3, "alpha": 6.0, **settings}))


def random_factors(config: Config, seed: int = 0) -> Any:
    """In which B is not zero."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * random.normal(size=leaf.shape), jnp.float32),
                        jax.eval_shape(lambda: fresh_factors(config, jax.random.key(0))))


def noise_of(config: Config, params: Any) -> np.ndarray:
    """z of fixed latents."""
    flow, x, features = STARFlow(config.model), latents(MODEL, 2), text(MODEL, 2)
    return np.asarray(jax.jit(lambda params: apply_flow(
        flow, flow_variables(params), STARFlow.forward, x, features).z_BTSK)(params))


def test_fresh_factors_leave_the_model_as_it_is() -> None:
    config, params = with_lora(blocks="deep,shallow,denoiser"), random_params(CONFIG)
    factors = jax.jit(lambda: fresh_factors(config, jax.random.key(0)))()
    np.testing.assert_array_equal(noise_of(config, with_factors(config, params, factors)), noise_of(config, params))
    a = factors["flow"]["deep"]["transformer"]["layers"]["layer"]["qkv"]["lora_a"]
    bound = 1 / np.sqrt(MODEL.deep_width)
    assert a.shape == (1, MODEL.deep_width, 3) and 0.8 * bound < np.abs(a).max() <= bound
    assert np.abs(noise_of(config, with_factors(config, params, random_factors(config))) - noise_of(config, params)
                  ).max() > 0.01


def test_factors_are_scaled_and_belong_to_the_named_matrices() -> None:
    config, params = with_lora(targets="proj", blocks="deep"), random_params(CONFIG)
    name, = adapted_kernels(config)
    assert name == "flow/deep/transformer/layers/layer/proj/kernel"
    factors = random_factors(config)
    by_hand = traverse_util.flatten_dict(params, sep="/")
    a, b = (traverse_util.flatten_dict(factors, sep="/")[name.replace("kernel", leaf)] for leaf in ("lora_a", "lora_b"))
    by_hand[name] = by_hand[name] + 6.0 / 3 * jnp.einsum("lir,lro->lio", a, b)
    np.testing.assert_allclose(noise_of(config, with_factors(config, params, factors)),
                               noise_of(config, traverse_util.unflatten_dict(by_hand, sep="/")), atol=1e-5)
    every = adapted_kernels(with_lora(blocks="shallow,denoiser"))
    assert {key.split("/transformer")[0] for key in every} == {"flow/shallow_0", "flow/shallow_1", "denoiser"}


def test_an_int8_base_stays_in_int8() -> None:
    config, params = with_lora(), random_params(CONFIG)
    quantized, factors = quantize_params(params), random_factors(config)
    model = with_factors(config, quantized, factors)
    kernel = model["flow"]["deep"]["transformer"]["layers"]["layer"]["mlp_in"]["kernel"]
    assert kernel.base.q.dtype == jnp.int8
    whole = noise_of(config, with_factors(config, params, factors))
    assert 0 < np.abs(noise_of(config, model) - whole).max() < 0.2


def test_a_fingerprint_is_of_values_whatever_they_are_kept_in() -> None:
    flat = traverse_util.flatten_dict(random_params(CONFIG), sep="/")
    in_bfloat16 = {name: np.asarray(value).astype(jnp.bfloat16) for name, value in flat.items()}
    other = traverse_util.flatten_dict(random_params(CONFIG, seed=2), sep="/")
    assert fingerprint_of(flat) == fingerprint_of(in_bfloat16) != fingerprint_of(other)


def test_settings_are_checked() -> None:
    adapters = changed(CONFIG, "sample", {"lora": "a:0.5, runs/b,c:d"}).sample.adapters
    assert adapters == (("a", 0.5), ("runs/b", 1.0), ("c:d", 1.0))
    for named in ("a,", "a:", "a:nan"):
        with pytest.raises(UserError, match="sample.lora="):
            changed(CONFIG, "sample", {"lora": named})
    with pytest.raises(UserError, match="lora.targets='q': must be comma-separated parts of qkv"):
        Lora(targets="q")
    with pytest.raises(UserError, match="lora.blocks='denoiser': this model has no denoiser"):
        changed(changed(CONFIG, "model", {"denoiser": "none"}), "lora", {"blocks": "denoiser"})
