"""Where the solver starts, fitted by least squares: fewer Jacobi passes, the same result.

Either a guess of the first frame from its text: later frames start from the one before, the first has none, and from
zero the solver needs most of its passes to find its digit, face or horizon. Or a guess of every token from its own
noise and that of the token before it, for frames that do not wait for one another.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

RIDGE = 1e-3  # of the features' scale, against fitting noise


class FirstGuess(flax.struct.PyTreeNode):
    """u_0 ~ mean + (features - their mean) @ project @ basis, of rank R; features: the text's mean over its slots."""

    text_D: jax.Array
    mean_SK: jax.Array
    project_DR: jax.Array
    basis_RSK: jax.Array

    def __call__(self, text_BTD: jax.Array) -> jax.Array:
        """(B, S, K) tokens of u from text features (B, T, D)."""
        codes_BR = (text_BTD.mean(axis=1) - self.text_D) @ self.project_DR
        return self.mean_SK + jnp.einsum("br,rsk->bsk", codes_BR, self.basis_RSK)


class NoiseGuess(flax.struct.PyTreeNode):
    """u_s ~ mean + z_s @ weights + z_(s-1) @ before, the same for every token; the first has none before it."""

    mean_K: jax.Array
    weights_KK: jax.Array
    before_KK: jax.Array

    def __call__(self, z_BNSK: jax.Array, before_B1SK: jax.Array | None = None) -> jax.Array:
        """(B, N, S, K) tokens of u from those of z. before: z of the frame before them; None or 0: there is none."""
        before = _token_before(z_BNSK)
        if before_B1SK is not None:
            before = before.at[:, 0, 0].set(before_B1SK[:, 0, -1])
        return self.mean_K + z_BNSK @ self.weights_KK + before @ self.before_KK


def fit_noise(z_BNSK: np.ndarray, u_BNSK: np.ndarray) -> NoiseGuess:
    """Ridge regression of decoded tokens on the noise that they were decoded from."""
    channels = z_BNSK.shape[-1]
    seen = np.concatenate([z_BNSK, _token_before(z_BNSK)], axis=-1)
    z, u = (a.reshape(-1, a.shape[-1]).astype(np.float64) for a in (seen, u_BNSK))
    z_mean, u_mean = z.mean(axis=0), u.mean(axis=0)
    weights = _ridge(z - z_mean, u - u_mean)
    return NoiseGuess(*(jnp.asarray(a, jnp.float32) for a in (
        u_mean - z_mean @ weights, weights[:channels], weights[channels:])))


def _token_before(z_BNSK: jax.Array | np.ndarray) -> jax.Array:
    """The token before each one, also across frames; zero before the first."""
    tokens = z_BNSK.reshape(z_BNSK.shape[0], -1, z_BNSK.shape[-1])
    return jnp.pad(tokens[:, :-1], ((0, 0), (1, 0), (0, 0))).reshape(z_BNSK.shape)


def fit(text_MTD: np.ndarray, u_MSK: np.ndarray, rank: int = 64) -> FirstGuess:
    """Ridge regression of first frames on text features, cut to its `rank` strongest directions."""
    features = text_MTD.mean(axis=1).astype(np.float64)
    frames = u_MSK.reshape(len(u_MSK), -1).astype(np.float64)
    text, mean = features.mean(axis=0), frames.mean(axis=0)
    features, frames = features - text, frames - mean
    weights = _ridge(features, frames)
    # The strongest directions of what is predicted, not of the weights. With features = Q R they are those of
    # R @ weights, which has a row for each feature and not one for each clip.
    _, _, directions = np.linalg.svd(np.linalg.qr(features, mode="r") @ weights, full_matrices=False)
    basis = directions[:rank]
    shape = u_MSK.shape[1:]
    return FirstGuess(*(jnp.asarray(a, jnp.float32) for a in (
        text, mean.reshape(shape), weights @ basis.T, basis.reshape(-1, *shape))))


def _ridge(x_MD: np.ndarray, y_MK: np.ndarray) -> np.ndarray:
    """(D, K) weights from centred x to centred y."""
    gram = x_MD.T @ x_MD
    ridge = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    return np.linalg.solve(gram + ridge, x_MD.T @ y_MK)
