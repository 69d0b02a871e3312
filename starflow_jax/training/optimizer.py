"""Learning-rate schedule and the two optimizers (DESIGN: training constants)."""

import jax
import jax.numpy as jnp
import optax

from starflow_jax.config import Train
from starflow_jax.model.parameters import Params


def schedule(settings: Train) -> optax.Schedule:
    """Linear warm-up, then cosine to the final learning rate."""
    warmup = min(settings.warmup_steps, settings.steps)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else settings.learning_rate, settings.learning_rate, warmup, max(settings.steps, warmup + 1),
        settings.final_learning_rate)


def flow_optimizer(settings: Train) -> optax.GradientTransformation:
    """AdamW (0.9, 0.95) behind a clip by global norm."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(schedule(settings), b1=0.9, b2=0.95, weight_decay=settings.weight_decay))


def denoiser_optimizer(settings: Train) -> optax.GradientTransformation:
    """The denoiser's own AdamW, warmed up and decayed with the flow's."""
    shape, peak = schedule(settings), settings.learning_rate
    rate = lambda count: shape(count) * (settings.denoiser_learning_rate / peak)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(rate, b1=0.9, b2=settings.denoiser_beta2, weight_decay=settings.weight_decay))


def averaged(ema: Params, params: Params, accepted: jax.Array, settings: Train) -> Params:
    """The moving average of the parameters after an update; accepted: updates before it, of which it remembers few at
    first."""
    decay = jnp.minimum(settings.ema, (1 + accepted) / (10 + accepted))
    return jax.tree.map(lambda old, now: old + (1 - decay) * (now - old), ema, params)


def split(params: Params) -> tuple[Params, Params]:
    """(what the flow's optimizer trains, what the denoiser's does)."""
    return ({name: value for name, value in params.items() if name != "denoiser"},
            {name: value for name, value in params.items() if name == "denoiser"})
