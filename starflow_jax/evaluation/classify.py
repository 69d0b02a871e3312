"""The caption of a clip chosen by exact likelihood: a generative model as classifier
(--mode=evaluate --config.evaluate.task=classify).

The captions are every digit, colour and direction in one wording. log p(x | caption) differs between captions in the
deep block alone, so the shallow blocks run once for a clip.
"""

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from starflow_jax.data.digits.captions import ATTRIBUTES, COLOUR_NAMES, DIGIT_WORDS, DIRECTION_NAMES, caption
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.io.progress import ProgressBar
from starflow_jax.model.parameters import Params, flow_variables
from starflow_jax.model.system import System
from starflow_jax.sampling.conditions import noised, shallow_tokens

CHOICES = (len(DIGIT_WORDS), len(COLOUR_NAMES), len(DIRECTION_NAMES))
SEARCH_ORDER = (1, 2, 0)  # colour, direction, digit: the surest first
WORDING = 0  # seed of the wording, the same for all captions

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]  # clips (P,), labels (P, 3) -> log-likelihoods (P,)


def score_captions(system: System, params: Params, frames_BTHWC: np.ndarray, every: bool) -> np.ndarray:
    """(B, digits, colours, directions) log p(x~ | caption) in nats, up to a constant for each clip; -inf: not scored.

    frames: uint8. every: score all captions, else only those that `search` visits.
    """
    noisy = noised(system, frames_BTHWC, range(len(frames_BTHWC)))
    u_BTSK = shallow_tokens(system.flow, params, noisy)
    features = system.caption_features(params, all_captions(), is_image=noisy.shape[1] == 1)
    size = system.config.sample.batch_size
    pairs = len(noisy) * (np.prod(CHOICES) if every else 2 * sum(CHOICES))
    with ProgressBar("captions", int(pairs), unit="caption", compiles=True) as progress:

        def score(clips_P: np.ndarray, labels_P3: np.ndarray) -> np.ndarray:
            texts_P, found = np.ravel_multi_index(labels_P3.T, CHOICES), []
            for begin in range(0, len(clips_P), size):
                part = np.minimum(np.arange(begin, begin + size), len(clips_P) - 1)  # one shape, one compilation
                found.append(_deep_log_likelihood(system.flow, system.token_grid, params, u_BTSK[clips_P[part]],
                                                  features[texts_P[part]]))
                progress.update(min(size, len(clips_P) - begin))
            return np.concatenate(found)[:len(clips_P)]

        return score_all(score, len(noisy)) if every else search(score, len(noisy))


def all_captions() -> list[str]:
    """One caption for every digit, colour and direction, the last varying fastest."""
    return [caption(digit, colour, direction, np.random.default_rng(WORDING), long=True)
            for digit, colour, direction in itertools.product(*map(range, CHOICES))]


@partial(jax.jit, static_argnums=(0, 1))
def _deep_log_likelihood(
    flow: STARFlow, token_grid: tuple[int, int], params: Params, u_BTSK: jax.Array, text_BLD: jax.Array
) -> jax.Array:
    """(B,) log p_D(u | text) in nats, without constants."""
    batch, frames, _, channels = u_BTSK.shape

    def deep(flow: STARFlow) -> tuple[jax.Array, jax.Array]:
        rope = flow.rope((frames, *token_grid), text_BLD)
        return flow.deep.forward(u_BTSK.reshape(batch, -1, channels), rope, text_BLD)

    z_BSK, logdet_BSK = apply_flow(flow, flow_variables(params), deep)
    return jnp.sum(logdet_BSK - 0.5 * z_BSK**2, axis=(1, 2))


def score_all(score: Score, clips: int) -> np.ndarray:
    """Every caption of every clip, (B, digits, colours, directions)."""
    labels_C3 = np.array(list(itertools.product(*map(range, CHOICES))))
    found = [score(np.full(len(labels_C3), clip), labels_C3) for clip in range(clips)]
    return np.stack(found).reshape(clips, *CHOICES)


def search(score: Score, clips: int) -> np.ndarray:
    """The same for the captions that a search over one attribute at a time visits, -inf elsewhere.

    It ends, for each clip, at a caption that no change of a single attribute makes more likely.
    """
    scores = np.full((clips, *CHOICES), -np.inf)
    best_B3 = np.zeros((clips, 3), int)
    settled_B = np.zeros(clips, int)  # attributes in a row that did not change
    order = itertools.cycle(SEARCH_ORDER)
    while len(active := np.flatnonzero(settled_B < len(ATTRIBUTES))):
        attribute = next(order)
        labels_PC3 = np.repeat(best_B3[active, None], CHOICES[attribute], axis=1)
        labels_PC3[..., attribute] = np.arange(CHOICES[attribute])
        clips_P, labels_P3 = np.repeat(active, CHOICES[attribute]), labels_PC3.reshape(-1, 3)
        missing = np.isneginf(scores[clips_P, *labels_P3.T])
        scores[clips_P[missing], *labels_P3[missing].T] = score(clips_P[missing], labels_P3[missing])
        chosen = scores[clips_P, *labels_P3.T].reshape(len(active), -1).argmax(axis=1)
        changed = chosen != best_B3[active, attribute]
        best_B3[active, attribute] = chosen
        settled_B[active] = np.where(changed, 1, settled_B[active] + 1)
    return scores


def choose(scores: np.ndarray) -> np.ndarray:
    """(B, 3): each attribute's most likely value, the others summed out over the scored captions."""
    return np.stack([logsumexp(scores, axis=others).argmax(axis=1) for others in ((2, 3), (1, 3), (1, 2))], axis=1)
