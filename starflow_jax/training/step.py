"""One training step: both losses from one backward pass of the flow, both optimizers (DESIGN: losses)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from starflow_jax.config import Config
from starflow_jax.flow.likelihood import nll_mean
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.model.parameters import Params, flow_variables
from starflow_jax.model.system import System
from starflow_jax.sharding import parameter_shardings, replicated
from starflow_jax.training.losses import weighted_loss
from starflow_jax.training.optimizer import TrainState, apply_gradients

# frames_BTHWC uint8, text_ids_BS int32, drop_first_B bool; or, computed before, latents_BNhwC and features_BSD.
Batch = dict[str, Any]


def clean_latents(system: System, batch: Batch) -> jax.Array:
    """(B, N, h, w, C) training latents of a batch.

    Video clips are recorded one latent frame longer than the model's: the last one is left out, or, where
    drop_first_B says so, the first (the model then learns to go on from the middle of a video). Latents that come
    with the batch are taken as they are.
    """
    latents = system.latents_of(batch)
    if "latents_BNhwC" in batch or latents.shape[1] == 1:
        return latents
    drop_first = batch["drop_first_B"][:, None, None, None, None]
    return jnp.where(drop_first, latents[:, 1:], latents[:, :-1])


def encoded(system: System, batch: Batch, frozen: Params) -> Batch:
    """The batch as the step takes it: what comes of weights that are not trained, a VAE's or a text encoder's, is
    computed before, and they are no part of the step's program. frozen: the text encoder's, or {}."""
    if system.config.codec.kind == "wan":
        rest = {name: value for name, value in batch.items() if name not in ("frames_BTHWC", "drop_first_B")}
        batch = {**rest, "latents_BNhwC": clean_latents(system, batch)}
    if frozen and "text_ids_BS" in batch:
        features = _features(system, frozen, batch["text_ids_BS"])
        batch = {**{name: value for name, value in batch.items() if name != "text_ids_BS"}, "features_BSD": features}
    return batch


@partial(jax.jit, static_argnums=0)
def _features(system: System, params: Params, ids_BS: jax.Array) -> jax.Array:
    return system.features(params, ids_BS)


def gradients(system: System, params: Params, noisy: jax.Array, text: jax.Array) -> tuple[Params, dict]:
    """Gradients of every parameter, and the losses, from noised latents.

    text: ids (B, S), and the text encoder is trained along; or a frozen one's features (B, S, D).
    """
    def features(trained: Params) -> jax.Array:
        return text if text.ndim == 3 else system.features(trained, text)

    return gradients_from_features(system.flow, params, noisy, features)


def gradients_from_features(
    flow: STARFlow, params: Params, noisy: jax.Array, features: Callable[[Params], jax.Array]
) -> tuple[Params, dict]:
    """The same for any source of text features: a function of the parameters.

    Flow-score matching: the backward pass of the flow also gives dL/dx~, whose sigma * numel multiple is
    the denoiser's regression target.
    """
    config = flow.config

    def flow_loss(trained: Params, x: jax.Array):
        text = features(trained)
        out = apply_flow(flow, flow_variables(trained), STARFlow.forward, x, text)
        nll = nll_mean(out)
        return weighted_loss(nll.loss, config.noise_std), (nll.loss, text)

    trained = {name: value for name, value in params.items() if name != "denoiser"}
    (_, (loss, text)), (grads, grad_x) = jax.value_and_grad(flow_loss, argnums=(0, 1), has_aux=True)(trained, noisy)
    if config.denoiser == "none":
        return grads, {"loss": loss}
    target = lax.stop_gradient(config.noise_std * noisy.size * grad_x)
    text = lax.stop_gradient(text)

    def denoiser_loss(denoiser: Params) -> jax.Array:
        score = apply_flow(flow, {"params": {"denoiser": denoiser}}, STARFlow.score, noisy, text)
        return jnp.mean((score - target) ** 2)

    regression, denoiser_grads = jax.value_and_grad(denoiser_loss)(params["denoiser"])
    return {**grads, "denoiser": denoiser_grads}, {"loss": loss, "denoiser_loss": regression}


def make_train_step(system: System, mesh: Mesh | None = None):
    """(state, batch) -> (state, scalars on the device); jitted, the state donated.

    On a mesh the state keeps its layout over it (sharding.parameter_shardings); the noise is the same on any.
    """
    settings, noise_std = system.config.train, system.config.model.noise_std

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        clean = clean_latents(system, batch)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        noisy = clean + noise_std * jax.random.normal(key, clean.shape)
        text = batch["features_BSD"] if "features_BSD" in batch else batch["text_ids_BS"]
        grads, losses = _accumulate(system, state.params, noisy, text, settings.accumulate)
        state, norm, skip = apply_gradients(state, grads, settings)
        return state, {**losses, "bits_per_dim": to_bits(losses["loss"]), "grad_norm": norm,
                       "skip": skip, "skipped": state.skipped}

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    def placed(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        state, scalars = step(state, batch)
        return jax.lax.with_sharding_constraint(state, parameter_shardings(state, mesh)), scalars

    return jax.jit(placed, donate_argnums=0, out_shardings=(None, replicated(mesh)))


def _accumulate(system: System, params: Params, noisy: jax.Array, text: jax.Array, parts: int):
    """Mean gradients and losses over `parts` microbatches, one after the other."""
    if parts == 1:
        return gradients(system, params, noisy, text)
    # Every parts-th clip: each microbatch has some of the clips that a device holds already.
    micro = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), (noisy, text))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                        jax.eval_shape(lambda: gradients(system, params, noisy[:1], text[:1])))

    def add(total: Any, part: tuple[jax.Array, jax.Array]):
        return jax.tree.map(lambda t, g: t + g / parts, total, gradients(system, params, *part)), None

    return lax.scan(add, zero, micro)[0]


def to_bits(loss: jax.Array | float) -> jax.Array | float:
    """Bits per dimension of the noised latents, constants included, from the mean loss in nats."""
    return (loss + 0.5 * math.log(2 * math.pi)) / math.log(2)


def tokens_of(batch: Batch, config: Config) -> int:
    """Latent tokens that a step on this batch trains on."""
    clips, frames = batch["latents_BNhwC" if "latents_BNhwC" in batch else "frames_BTHWC"].shape[:2]
    return clips * (1 if frames == 1 else config.model.frames) * config.model.tokens_per_frame
