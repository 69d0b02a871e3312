"""What only a flow can tell about a given video: its exact likelihood token by token, its way to noise and back, and
what lies between two videos in z (--mode=evaluate --config.evaluate.task=video).

The flow is a density of latents with the training noise (standard deviation noise_std): that noise is drawn
`draws` times, the same with and without the caption, and likelihoods are means over the draws.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Config, Solver, UserError
from starflow_jax.flow import generation
from starflow_jax.io.pictures import HeatMap
from starflow_jax.model.codec import pixel_frames
from starflow_jax.model.parameters import Params, decoding_variables
from starflow_jax.model.system import System
from starflow_jax.sampling.batches import noised_draws
from starflow_jax.sampling.conditions import caption_text, noised, steering
from starflow_jax.sampling.denoise import denoise
from starflow_jax.sampling.finite import finite_frames
from starflow_jax.sampling.generate import encode_z
from starflow_jax.sampling.likelihood import window_nll_per_token
from starflow_jax.sampling.shallow import invert_all, joined
from starflow_jax.sampling.solver import calibrated_solver, complete, deep_solver, shallow_solver
from starflow_jax.sampling.windows import Latents, windowed
from starflow_jax.sharding import fetch


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """-log p in nats of D noised copies of a video, constants included; N latent frames of S tokens."""

    nll_DNS: np.ndarray  # given the caption
    null_nll_DNS: np.ndarray  # given the empty caption
    dims: int  # dimensions of a token

    @property
    def caption_fit_NS(self) -> np.ndarray:
        """log p(x | caption) - log p(x | no caption) of each token, in nats: above 0 the caption explains the video."""
        return (self.null_nll_DNS - self.nll_DNS).mean(axis=0)

    @property
    def bits_NS(self) -> np.ndarray:
        """Bits per dimension of each token."""
        return self.nll_DNS.mean(axis=0) / self.dims / np.log(2)


@dataclasses.dataclass(frozen=True)
class RoundTrip:
    """Video -> latents -> z -> latents -> video, of the first window."""

    latents_error: float  # |x' - x| / |x| of the noised latents x
    z_mean_square: float  # 1 for a video that the model finds typical
    codec_THWC: np.ndarray  # uint8: encoded and decoded by the codec, without the flow
    frames_THWC: np.ndarray  # uint8: through z and denoised


def check_pair(config: Config, frames_THWC: np.ndarray, other_THWC: np.ndarray) -> None:
    """Raises UserError where two videos can't be interpolated: of different lengths, or longer than the window."""
    if len(frames_THWC) != len(other_THWC):
        raise UserError(f"evaluate.other={config.evaluate.other}: has {len(other_THWC)} frames at the model's rate, "
                        f"evaluate.video has {len(frames_THWC)}; cut them to the same length")
    if len(frames_THWC) > pixel_frames(config):
        raise UserError(f"evaluate.other: videos of {len(frames_THWC)} frames are longer than the window of "
                        f"{pixel_frames(config)} in which z is defined; cut them to that")


def likelihood(system: System, params: Params, frames_THWC: np.ndarray, caption: str, draws: int) -> Likelihood:
    """Exact likelihood with and without the caption, token by token, along sample.camera where there is one; later
    windows are given the frames before them.

    frames: uint8. draws: of the training noise, evaluate.batch_size of them at once.
    """
    def nll_BNS(noisy: jax.Array, caption: str) -> np.ndarray:
        text = caption_text(system, params, [caption] * len(noisy), noisy.shape[1], system.config.sample.camera)
        return fetch(windowed(system, noisy, lambda part, window: window_nll_per_token(
            system.flow, params, part, text.at(window.begin, window.start),
            steering(params, system.config.model, text, window.start, window.start, part.shape[1]))))

    parts = [(nll_BNS(noisy, caption), nll_BNS(noisy, "")) for noisy in noised_draws(system, frames_THWC, draws)]
    nll_DNS, null_nll_DNS = map(np.concatenate, zip(*parts))
    return Likelihood(nll_DNS, null_nll_DNS, system.config.model.token_channels)


def decode_z(system: System, params: Params, z_BNSK: jax.Array, text: jax.Array) -> jax.Array:
    """x~ = f^-1(z), exact: block Jacobi until nothing changes, without guidance."""
    solver = complete(Solver("jacobi", tolerance=0.0), calibrated_solver(system), system.config.model)
    variables = decoding_variables(params)
    made = generation.generate(system.flow, variables, z_BNSK, text[None], solver=deep_solver(solver),
                               token_grid=system.token_grid, window=system.config.model.frames,
                               cache=system.config.sample.cache)
    return invert_all(system.flow, variables, joined(*(frames for frames, _ in made)), solver=shallow_solver(solver),
                      token_grid=system.token_grid)[0]


def round_trip(system: System, params: Params, frames_THWC: np.ndarray, caption: str) -> RoundTrip:
    """The first window of a video to z and back."""
    frames_THWC = frames_THWC[:system.pixel_frames]
    noisy = noised(system, frames_THWC[None], [0])
    text = system.caption_features(params, [caption], is_image=noisy.shape[1] == 1)
    z = encode_z(system.flow, params, noisy, text)
    back = decode_z(system, params, z, text)
    clean = denoise(system, params, back, text, system.config.sample.denoise)
    return RoundTrip(float(jnp.linalg.norm(back - noisy) / jnp.linalg.norm(noisy)), float(jnp.mean(z**2)),
                     fetch(system.decode(system.encode(frames_THWC[None])))[0],
                     _shown(system, clean)[0])


def interpolate(
    system: System, params: Params, pair_THWC: tuple[np.ndarray, np.ndarray], captions: tuple[str, str], steps: int
) -> np.ndarray:
    """(steps, T, H, W, 3) uint8: from one video to the other along a great circle in z and a line in text features."""
    noisy = jnp.concatenate([noised(system, frames[None], [0]) for frames in pair_THWC])
    text = system.caption_features(params, captions, is_image=noisy.shape[1] == 1)
    z = encode_z(system.flow, params, noisy, text)
    between = slerp(z[0], z[1], np.linspace(0, 1, steps))
    shares = jnp.linspace(0, 1, steps)[:, None, None]
    texts = (1 - shares) * text[0] + shares * text[1]
    clean = denoise(system, params, decode_z(system, params, between, texts), texts, system.config.sample.denoise)
    return _shown(system, clean)


def _shown(system: System, clean: Latents) -> np.ndarray:
    names = [f"video {number} of {len(clean)}, decoded from z" for number in range(1, len(clean) + 1)]
    return finite_frames(system.decoded(clean, system.config.sample.denoise), names)


def slerp(start: jax.Array, end: jax.Array, shares: np.ndarray) -> jax.Array:
    """(len(shares), ...): points on the great circle, so that those between two typical z have a typical norm.

    The ends are exact. Between (anti)parallel ones, which no single circle joins, the points are on a line.
    """
    cosine = jnp.sum(start * end) / (jnp.linalg.norm(start) * jnp.linalg.norm(end))
    angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
    t = jnp.asarray(shares, start.dtype).reshape(-1, *(1,) * start.ndim)
    if jnp.sin(angle) < 1e-4:
        return (1 - t) * start + t * end
    return (jnp.sin((1 - t) * angle) * start + jnp.sin(t * angle) * end) / jnp.sin(angle)


def surprise_maps(found: Likelihood, token_grid: tuple[int, int]) -> list[HeatMap]:
    """Each token's bits per dimension, and what the caption adds to its likelihood."""
    bits, fit = (values_NS.reshape(-1, *token_grid) for values_NS in (found.bits_NS, found.caption_fit_NS))
    limit = max(float(np.abs(fit).max()), 1e-6)
    return [HeatMap(bits, "inferno", float(bits.min()), float(bits.max()), "surprise\n(bits/dim)"),
            HeatMap(fit, "RdBu", -limit, limit, "caption fit\n(nats)")]


def headline(found: Likelihood, caption: str) -> str:
    """The caption, the video's log-likelihood given it, and what it adds."""
    return (f'"{caption}": {-found.nll_DNS.sum(axis=(1, 2)).mean():.0f} nats, caption fit '
            f"{found.caption_fit_NS.sum():+.0f}")


def facts_of(found: Likelihood, config: Config) -> dict[str, Any]:
    """The likelihood as JSON."""
    total_D, mean_NS = -found.nll_DNS.sum(axis=(1, 2)), -found.nll_DNS.mean(axis=0)
    fit_D = (found.null_nll_DNS - found.nll_DNS).sum(axis=(1, 2))
    return {
        "log_likelihood_of": f"latents with noise {config.model.noise_std}, mean over {len(total_D)} draws of it",
        "log_likelihood_nats": float(total_D.mean()),
        "log_likelihood_standard_error": _standard_error(total_D),
        "bits_per_dim": float(found.bits_NS.mean()),
        "log_likelihood_nats_per_frame": mean_NS.sum(axis=1).tolist(),
        "log_likelihood_nats_per_token": mean_NS.tolist(),
        "caption_fit_nats": float(fit_D.mean()),
        "caption_fit_standard_error": _standard_error(fit_D),
        "caption_fit_nats_per_frame": found.caption_fit_NS.sum(axis=1).tolist(),
        "caption_fit_nats_per_token": found.caption_fit_NS.tolist(),
    }


def _standard_error(values_D: np.ndarray) -> float | None:
    return float(values_D.std(ddof=1) / np.sqrt(len(values_D))) if len(values_D) > 1 else None
