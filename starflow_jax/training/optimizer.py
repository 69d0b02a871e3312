"""Learning-rate schedule and the two optimizers (DESIGN: training constants)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from starflow_jax.config import Train
from starflow_jax.model.parameters import Params
from starflow_jax.sharding import parameter_name

# Root mean square of a step of Muon at learning rate 1, about AdamW's, so that one learning rate serves both
# (Muon is Scalable for LLM Training, section 2.2).
MUON_RMS = 0.2


def schedule(settings: Train) -> optax.Schedule:
    """Linear warm-up, then cosine to the final learning rate."""
    warmup = min(settings.warmup_steps, settings.steps)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else settings.learning_rate, settings.learning_rate, warmup, max(settings.steps, warmup + 1),
        settings.final_learning_rate)


def flow_optimizer(settings: Train) -> optax.GradientTransformation:
    """AdamW (0.9, 0.95) or Muon behind a clip by global norm."""
    return _clipped(settings, schedule(settings), beta2=0.95)


def denoiser_optimizer(settings: Train) -> optax.GradientTransformation:
    """The denoiser's own, warmed up and decayed with the flow's."""
    shape, peak = schedule(settings), settings.learning_rate
    rate = lambda count: shape(count) * (settings.denoiser_learning_rate / peak)  # noqa: E731
    return _clipped(settings, rate, settings.denoiser_beta2)


def _clipped(settings: Train, rate: optax.Schedule, beta2: float) -> optax.GradientTransformation:
    if settings.optimizer == "muon":
        decay = settings.weight_decay
        optimizer = muon(rate, weight_decay=decay, adam_weight_decay=decay, adam_b1=0.9, adam_b2=beta2,
                         consistent_rms=MUON_RMS, muon_weight_dimension_numbers=layer_matrices)
    else:
        optimizer = optax.adamw(rate, b1=0.9, b2=beta2, weight_decay=settings.weight_decay)
    return optax.chain(optax.clip_by_global_norm(settings.clip), optimizer)


def layer_matrices(params: Params) -> Any:
    """The axes of what Muon orthogonalizes: each layer's matrices, queries, keys and values apart, of parameters
    stacked over layers (L, in, ..., out). None for the rest, which AdamW with Nesterov's momentum trains: embeddings,
    norms, biases, and what leads into and out of a stack."""
    def axes(path: Any, value: jax.Array) -> MuonDimensionNumbers | None:
        names = parameter_name(path).split("/")
        is_matrix = "layers" in names and names[-1] == "kernel"
        return MuonDimensionNumbers(reduction_axis=1, output_axis=value.ndim - 1) if is_matrix else None

    return jax.tree_util.tree_map_with_path(axes, params)


def averaged(ema: Params, params: Params, accepted: jax.Array, settings: Train) -> Params:
    """The moving average of the parameters after an update; accepted: updates before it, of which it remembers few at
    first."""
    decay = jnp.minimum(settings.ema, (1 + accepted) / (10 + accepted))
    return jax.tree.map(lambda old, now: old + (1 - decay) * (now - old), ema, params)


def split(params: Params) -> tuple[Params, Params]:
    """(what the flow's optimizer trains, what the denoiser's does)."""
    return ({name: value for name, value in params.items() if name != "denoiser"},
            {name: value for name, value in params.items() if name == "denoiser"})
