"""Who may attend to whom, as small boolean arrays made from positions."""

import jax
import jax.numpy as jnp
import numpy as np


def causal(length: int) -> np.ndarray:
    """(S, S): slot i sees slots 0..i. A text prefix is simply the first slots of the sequence."""
    return np.tril(np.ones((length, length), bool))


def frame_window(
    query_frame_S: jax.Array, key_frame_K: jax.Array, window: int, lookahead: int | jax.Array
) -> jax.Array:
    """(S, K): frame n sees frames n-window+1 .. n+lookahead, wholly; text is frame -1.

    Text keys are seen by all; text queries see all text and frames 0 .. lookahead (as frame 0 would).
    """
    query = jnp.maximum(query_frame_S, 0)[:, None]
    key = key_frame_K[None, :]
    return (key < 0) | ((key > query - window) & (key <= query + lookahead))


def frame_indices(text_length: int, frames: int, tokens_per_frame: int) -> np.ndarray:
    """(text_length + frames*tokens_per_frame,) frame of each slot, -1 for text."""
    return np.concatenate([np.full(text_length, -1), np.repeat(np.arange(frames), tokens_per_frame)])
