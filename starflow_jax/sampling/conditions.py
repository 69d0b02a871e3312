"""What a batch of videos depends on: text features, noise, given frames."""

from collections.abc import Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Config, Sample, UserError
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.model.parameters import Params, flow_variables
from starflow_jax.model.shapes import pixel_frames, prompt_text
from starflow_jax.model.system import System
from starflow_jax.sampling.solver import deep_start


def latent_frames(config: Config, settings: Sample) -> int:
    """Latent frames of a video of settings.frames pixel frames. Raises UserError for a length that can't be."""
    stride = config.codec.time_stride
    frames = settings.frames or pixel_frames(config)
    if (frames - 1) % stride:
        near = (frames - 1) // stride * stride + 1
        raise UserError(
            f"sample.frames={frames}: must be 1 + a multiple of {stride}, such as {near} or {near + stride}")
    total = 1 + (frames - 1) // stride
    if total > config.model.frames < 3:
        raise UserError(f"sample.frames={frames}: a window of {config.model.frames} latent frames is too short to move "
                        f"on; up to {pixel_frames(config)} frames are possible")
    return total


def noise_for(seeds: Sequence[int], shape_NSK: tuple[int, int, int]) -> jax.Array:
    """(B, N, S, K): each clip's noise comes of its own seed, frame by frame, so that a seed gives the same
    video alone, in a batch, and at any length."""

    def of_clip(seed: jax.Array) -> jax.Array:
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(shape_NSK[0]))
        return jax.vmap(lambda key: jax.random.normal(key, shape_NSK[1:]))(keys)

    return jax.vmap(of_clip)(jnp.asarray(seeds, jnp.uint32))


class Conditions(flax.struct.PyTreeNode):
    """All that a batch of videos depends on, on the device; frames are latent ones."""

    texts: dict[int, jax.Array]  # (branches, B, text_length, text_dim) by the frame from which on it holds
    noise_BNSK: jax.Array  # of the frames to make
    known_BTSK: jax.Array | None  # u of the given frames
    known_BThwC: jax.Array | None  # and their noised latents
    guess_BSK: jax.Array | None  # of the first frame
    start_BNSK: jax.Array | None  # where the solver starts; None: each frame from the one before

    @property
    def text(self) -> dict[int, jax.Array]:
        """The conditional features, by the frame of the whole video."""
        given = 0 if self.known_BTSK is None else self.known_BTSK.shape[1]
        return {at + given if at else 0: texts[0] for at, texts in self.texts.items()}


def prepare(
    system: System,
    params: Params,
    captions: Sequence[str],
    seeds: Sequence[int],
    settings: Sample,
    known_BTHWC: np.ndarray | None = None,
) -> Conditions:
    """Captions, seeds and given frames as the flow takes them. Raises UserError for what can't be."""
    model, total = system.config.model, latent_frames(system.config, settings)
    features, is_image = jax.jit(system.features), total == 1

    def encode(prompts: Sequence[str]) -> jax.Array:
        told = partial(prompt_text, system.config, is_image=is_image, fps=settings.fps,
                       aspect_ratio=settings.aspect_ratio)
        return features(params, jnp.asarray(system.text_ids([told(prompt) for prompt in prompts])))

    def branches(prompts: Sequence[str]) -> jax.Array:
        text = encode(prompts)
        if not settings.guidance:
            return text[None]
        return jnp.stack([text, jnp.broadcast_to(encode([settings.negative_prompt]), text.shape)])

    noise = noise_for(seeds, (total, model.tokens_per_frame, model.token_channels))
    known, known_latents, given = None, None, 0
    if known_BTHWC is not None:
        known_latents = _noised(system, known_BTHWC, seeds)
        given = known_latents.shape[1]
        if given >= total:
            raise UserError(f"sample.frames={settings.frames}: the {known_BTHWC.shape[1]} given frames fill it; "
                            f"ask for {known_BTHWC.shape[1] + system.config.codec.time_stride} or more")
        known = jax.jit(shallow_tokens, static_argnums=0)(system, params, known_latents)
    texts = {0: branches(captions)}
    for frame, prompt in prompt_changes(system.config, settings).items():
        texts[frame - given] = branches([prompt] * len(captions))
    if min(texts) < 0:
        raise UserError(f"sample.changes={settings.changes!r}: the prompt of given frames can't be changed")
    guess = None if system.guess is None or given else system.guess(texts[0][0])
    noise, start = noise[:, given:], None
    if deep_start(system, settings) == "noise":
        start = noise if system.noise_guess is None else system.noise_guess(noise)
    return Conditions(texts, noise, known, known_latents, guess, start)


def prompt_changes(config: Config, settings: Sample) -> dict[int, str]:
    """{latent frame: prompt} of sample.changes. Raises UserError where it can't be read."""
    changes = {}
    for part in filter(str.strip, settings.changes.split(";")):
        frame, colon, prompt = part.partition(":")
        if not colon or not frame.strip().isdigit() or int(frame) < 1:
            raise UserError(f'sample.changes={settings.changes!r}: write "25: a prompt; 49: another one", '
                            "frames from 1")
        changes[-(-int(frame) // config.codec.time_stride)] = prompt.strip()
    return changes


def token_grid(system: System) -> tuple[int, int]:
    """Rows and columns of a frame's tokens."""
    model = system.config.model
    return model.height // model.patch_size, model.width // model.patch_size


def shallow_tokens(system: System, params: Params, x: jax.Array) -> jax.Array:
    """Noised latents -> u, the tokens that the deep block sees, (B, T, S, K)."""
    return apply_flow(system.flow, flow_variables(params), STARFlow.shallow_forward, x)[0][-1]


def _noised(system: System, frames_BTHWC: np.ndarray, seeds: Sequence[int]) -> jax.Array:
    """Given frames as the flow knows them: encoded, with the training noise added."""
    latents = system.encode(jnp.asarray(frames_BTHWC))
    shape = latents.shape[1:]
    noise = noise_for([seed ^ 0x5EED for seed in seeds], (shape[0], shape[1] * shape[2], shape[3]))
    return latents + system.config.model.noise_std * noise.reshape(latents.shape)


Text = jax.Array | dict[int, jax.Array]  # features, or those that hold from a frame on


def text_at(text: Text, frame: int) -> jax.Array:
    return text[max(at for at in text if at <= frame)] if isinstance(text, dict) else text
