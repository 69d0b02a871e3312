"""Both losses of a training step from one backward pass of the flow (DESIGN: losses)."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.config import Config, Student
from starflow_jax.flow.control import control_of
from starflow_jax.flow.likelihood import REFERENCE_NOISE, nll_mean
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.model.parameters import Params, flow_variables
from starflow_jax.model.text import encode_text, text_encoder
from starflow_jax.training.distillation import differences


def weighted_loss(loss: jax.Array, noise_std: float, reference: float = REFERENCE_NOISE) -> jax.Array:
    """sigma / 0.3 times the loss, the weight where the prompt states the noise level."""
    return loss * (noise_std / reference)


def to_bits(loss: jax.Array) -> jax.Array:
    """Bits per dimension of the noised latents, constants included, from the mean loss in nats."""
    return (loss + 0.5 * math.log(2 * math.pi)) / math.log(2)


Whole = Callable[[Params], Params]


def all_trained(params: Params) -> Params:
    """What a model's parameters are of those that are trained, where none are frozen."""
    return params


def gradients(config: Config, params: Params, noisy: jax.Array, text: jax.Array, whole: Whole = all_trained,
              rays_BNSK: jax.Array | None = None) -> tuple[Params, dict[str, jax.Array]]:
    """Gradients of every trained parameter, and the losses (scalars, per dimension), from noised latents
    (B, N, h, w, C).

    text: ids (B, S), with which the text encoder is trained too; or a frozen encoder's features (B, S, D). whole: the
    trained parameters -> the model's. rays: of the cameras that a control module among these follows.
    """

    def features(model: Params) -> jax.Array:
        return text if text.ndim == 3 else encode_text(text_encoder(config), model["text"], text)

    student = config.student if config.train.target == "student" else None
    return gradients_from_features(STARFlow(config.model), params, noisy, features, whole, rays_BNSK, student)


def gradients_from_features(
    flow: STARFlow, params: Params, noisy: jax.Array, features: Callable[[Params], jax.Array],
    whole: Whole = all_trained, rays_BNSK: jax.Array | None = None, student: Student | None = None
) -> tuple[Params, dict[str, jax.Array]]:
    """The same for any source of text features, a function of the model's parameters.

    Flow-score matching: the backward pass of the flow also gives dL/dx~, whose sigma * numel multiple is
    the denoiser's regression target; where nothing of a denoiser is trained, it ends at what is trained. student:
    weights of the loss of a smaller deep block, whose "teacher" is then among the model's parameters.
    """
    config = flow.config

    def flow_loss(trained: Params, x: jax.Array):
        model = whole(trained)
        text = features(model)
        steered = None if rays_BNSK is None else control_of((model["control"], rays_BNSK))
        out = apply_flow(flow, flow_variables(model), STARFlow.forward, x, text, steered)
        losses = {"loss": nll_mean(out).loss}
        total = losses["loss"] if student is None else student.likelihood * losses["loss"]
        if student is not None and student.mean + student.scale:
            losses |= differences(flow, model["teacher"], out, flow.grid(x.shape)[1:], text)
            total += student.mean * losses["mean_error"] + student.scale * losses["scale_error"]
        return weighted_loss(total, config.noise_std, config.denoising_step), (losses, text)

    trained = {name: value for name, value in params.items() if name != "denoiser"}
    denoises = "denoiser" in params
    (_, (losses, text)), (grads, *grad_x) = jax.value_and_grad(
        flow_loss, argnums=(0, 1) if denoises else (0,), has_aux=True)(trained, noisy)
    if not denoises:
        return grads, losses
    target = lax.stop_gradient(config.noise_std * noisy.size * grad_x[0])
    text = lax.stop_gradient(text)

    def denoiser_loss(denoiser: Params) -> jax.Array:
        model = whole({"denoiser": denoiser})
        score = apply_flow(flow, {"params": {"denoiser": model["denoiser"]}}, STARFlow.score, noisy, text)
        return jnp.mean((score - target) ** 2)

    regression, denoiser_grads = jax.value_and_grad(denoiser_loss)(params["denoiser"])
    return {**grads, "denoiser": denoiser_grads}, {**losses, "denoiser_loss": regression}


def accumulated_gradients(config: Config, params: Params, noisy: jax.Array, text: jax.Array,
                          whole: Whole = all_trained, rays_BNSK: jax.Array | None = None
                          ) -> tuple[Params, dict[str, jax.Array]]:
    """Mean gradients and losses over train.accumulate microbatches, one after the other."""
    parts = config.train.accumulate
    if parts == 1:
        return gradients(config, params, noisy, text, whole, rays_BNSK)
    # Every parts-th clip, so that each microbatch has some of the clips that a device already holds.
    micro = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), (noisy, text, rays_BNSK))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                        jax.eval_shape(lambda noisy, text, rays: gradients(config, params, noisy, text, whole, rays),
                                       *jax.tree.map(lambda a: a[0], micro)))

    def add(total: Any, part: tuple[jax.Array, jax.Array, jax.Array | None]):
        noisy, text, rays = part
        return jax.tree.map(lambda t, g: t + g / parts, total,
                            gradients(config, params, noisy, text, whole, rays)), None

    return lax.scan(add, zero, micro)[0]
