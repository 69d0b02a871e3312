"""A step of train.target=decoder: noised latents of real clips, decoded; L1, LPIPS and an adversarial term (DESIGN:
three denoisers). The flow has no part in it: samples are clean latents and its noise, and so are these."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

from starflow_jax.codec.interface import LatentCodec, decode_pixels, to_float
from starflow_jax.config import Config, Train
from starflow_jax.config import Decoder as Settings
from starflow_jax.model.decoder import initial_decoder
from starflow_jax.model.parameters import Params
from starflow_jax.training.discriminator import discriminator_loss, fresh_discriminator, generator_loss
from starflow_jax.training.optimizer import averaged, flow_optimizer

# (variables, first, second): distances (B,) of pictures (B, H, W, 3) in [-1, 1].
Perceptual = Callable[[Any, jax.Array, jax.Array], jax.Array]


class DecoderState(flax.struct.PyTreeNode):
    """All that a step changes. Checkpoints store the arrays under these names."""

    step: jax.Array  # int32
    params: Params  # {"decoder": ...}
    ema: Params  # the averaged parameters
    optimizer: Any
    discriminator: Params  # {} without an adversarial term
    discriminator_optimizer: Any
    skipped: jax.Array  # int32: steps whose update was left out
    key: jax.Array  # raw uint32 key data, the base of every step's noise


def create_state(config: Config, codec: LatentCodec) -> DecoderState:
    """The state at step 0: the decoder as the codec has it, and a random discriminator."""
    settings, key = config.decoder, jax.random.key(config.train.seed)
    params = initial_decoder(config, codec, key)
    width = settings.discriminator_width
    discriminator = fresh_discriminator(jax.random.fold_in(key, 1), width) if settings.adversarial else {}
    return DecoderState(
        step=jnp.int32(0), params=params, ema=jax.tree.map(jnp.copy, params),
        optimizer=flow_optimizer(config.train).init(params), discriminator=discriminator,
        discriminator_optimizer=discriminator_optimizer(settings).init(discriminator), skipped=jnp.int32(0),
        key=jax.random.key_data(key))


def discriminator_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Adam (0.5, 0.9) at a rate that does not decay."""
    return optax.adam(settings.discriminator_learning_rate, b1=0.5, b2=0.9)


def noised(config: Config, latents_BNhwC: jax.Array, key: jax.Array) -> jax.Array:
    """Latents with noise of model.noise_std; with decoder.noise=uniform each clip's is drawn between 0 and that."""
    noise_key, level_key = jax.random.split(key)
    levels = jnp.float32(config.model.noise_std)
    if config.decoder.noise == "uniform":
        levels *= jax.random.uniform(level_key, (len(latents_BNhwC), 1, 1, 1, 1))
    return latents_BNhwC + levels * jax.random.normal(noise_key, latents_BNhwC.shape)


@partial(jax.jit, static_argnames=("config", "perceptual"), donate_argnames="state")
def decoder_step(
    config: Config, state: DecoderState, codec: LatentCodec, latents_BNhwC: jax.Array, frames_BTHWC: jax.Array,
    perceptual: Perceptual | None, perceptual_variables: Any
) -> tuple[DecoderState, dict[str, jax.Array]]:
    """One update of the decoder, and one of the discriminator, from clean latents and the uint8 frames they are of."""
    real = to_float(frames_BTHWC)
    noise_key, frame_key = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step))
    noisy = noised(config, latents_BNhwC, noise_key)

    def loss(params: Params) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
        made = decode_pixels(codec.with_decoder(params["decoder"]), noisy, config.codec.later_frames_scale)
        terms = {"l1": jnp.mean(jnp.abs(made - real))}
        total = terms["l1"]
        if perceptual is not None:
            first, second = (_one_frame_each(pixels, frame_key) for pixels in (made, real))
            terms["lpips"] = jnp.mean(perceptual(perceptual_variables, first, second))
            total += config.decoder.lpips * terms["lpips"]
        if config.decoder.adversarial:
            terms["adversarial"] = generator_loss(state.discriminator, made)
            total += config.decoder.adversarial * terms["adversarial"]
        return total, (made, terms)

    (total, (made, terms)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    norm, judged = optax.tree.norm(grads), {}
    discriminator_grads = state.discriminator
    if config.decoder.adversarial:
        judged["discriminator_loss"], discriminator_grads = jax.value_and_grad(discriminator_loss)(
            state.discriminator, real, lax.stop_gradient(made))
    skip = ~jnp.isfinite(total + norm + optax.tree.norm(discriminator_grads))
    state = lax.cond(skip, lambda: state.replace(skipped=state.skipped + 1),
                     lambda: _update(config, state, grads, discriminator_grads))
    return state.replace(step=state.step + 1), {
        "loss": total, **terms, **judged, "grad_norm": norm, "skip": skip, "skipped": state.skipped}


def _update(config: Config, state: DecoderState, grads: Params, discriminator_grads: Params) -> DecoderState:
    settings: Train = config.train
    changes, optimizer = flow_optimizer(settings).update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, changes)
    judge_changes, judge_optimizer = discriminator_optimizer(config.decoder).update(
        discriminator_grads, state.discriminator_optimizer, state.discriminator)
    ema = averaged(state.ema, params, state.step - state.skipped, settings)
    return state.replace(
        params=params, ema=ema, optimizer=optimizer, discriminator_optimizer=judge_optimizer,
        discriminator=optax.apply_updates(state.discriminator, judge_changes))


def _one_frame_each(pixels_BTHWC: jax.Array, key: jax.Array) -> jax.Array:
    """(B, H, W, 3): a random frame of each clip, the same for the same key."""
    frames_B = jax.random.randint(key, (len(pixels_BTHWC),), 0, pixels_BTHWC.shape[1])
    return jnp.take_along_axis(pixels_BTHWC, frames_B[:, None, None, None, None], axis=1)[:, 0]
