"""What a batch of videos depends on: text features, noise, given frames."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.codec.interface import encode_drawn
from starflow_jax.config import Config, Model, Sample, UserError, whole_number
from starflow_jax.flow.control import LatentCameras, Steering, cameras_of_latents, ray_tokens
from starflow_jax.flow.first_guess import FirstGuess, NoiseGuess
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.io.cameras import read_cameras
from starflow_jax.model.codec import frame_size, pixel_frames
from starflow_jax.model.parameters import Params, shallow_variables
from starflow_jax.model.system import System
from starflow_jax.model.text import prompt_text
from starflow_jax.sampling.given import latents_of
from starflow_jax.sampling.solver import chosen_solver
from starflow_jax.sharding import to_devices
from starflow_jax.text.prompt import EXTEND

GIVEN_NOISE = 0x5EED  # turns a video's seed into that of the noise on its given frames
POSTERIOR_NOISE = 0xC0DEC  # and into that of the codec's own
RENOISE = 0xF4E5  # and into that of the noise on frames that are encoded again


ENDLESS = sys.maxsize  # latent frames of a video that goes on until nobody wants more


class VideoText(flax.struct.PyTreeNode):
    """Text features (..., B, S, D) of videos of any length."""

    first: jax.Array  # of windows that begin with the video's first frame
    later: dict[int, jax.Array]  # of all others, and of a changed prompt, by the latent frame from which on they hold
    cameras: LatentCameras | None = None  # of all latent frames; None: the model is not steered

    def at(self, frame: int, start: int) -> jax.Array:
        """What holds at a frame, in a window that begins with frame `start`."""
        return self.first if self.begins(frame, start) else self.later[self._since(frame)]

    def begins(self, frame: int, start: int) -> bool:
        """Whether that is the text with which the video begins, in its first window."""
        return not start and not self._since(frame)

    def _since(self, frame: int) -> int:
        return max(at for at in self.later if at <= frame)

    def change(self, frame: int, features: jax.Array, needed: int) -> None:
        """Let others hold from a frame on that nothing was made of yet; forgets what only held before frame `needed`.
        """
        holds = max(at for at in self.later if at <= max(needed, 0))
        for at in [at for at in self.later if 0 < at < holds]:
            del self.later[at]
        self.later[frame] = features


Text = jax.Array | VideoText  # features (B, S, D) of every window, or of each


class Noise(flax.struct.PyTreeNode):
    """Standard normal numbers of videos, (B, N, *shape): drawn from the videos' seeds for whichever frames are asked
    for, or given."""

    seeds_B: Any = None  # uint32
    given_BN: jax.Array | None = None
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())  # of a frame's, of those that are drawn

    def frames(self, first: int, count: int) -> jax.Array:
        """Those of so many frames from `first` on."""
        if self.given_BN is not None:
            return self.given_BN[:, first:first + count]
        return draw_noise(self.seeds_B, (count, *self.shape), first)


class Conditions(flax.struct.PyTreeNode):
    """All that a batch of videos depends on, on the device; frames are latent frames."""

    texts: VideoText  # (branches, B, text_length, text_dim); frames are counted from the first to make
    noise_BNSK: Noise  # of all frames; that of given ones is not used
    known_BTSK: jax.Array | None  # u of the given frames
    known_BThwC: jax.Array | None  # and their noised latents
    guess_BSK: jax.Array | None  # of the first frame
    noise_guess: NoiseGuess | None  # where the solver starts, if it does so from the noise; None: at the noise itself
    fresh_BNhwC: Noise | None = None  # what all frames, given ones too, are noised with when they are encoded again
    cameras: LatentCameras | None = None  # of all frames, given ones too
    total: int = flax.struct.field(pytree_node=False, default=ENDLESS)  # frames, given ones included
    starts_at_noise: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def given(self) -> int:
        """Latent frames that are given."""
        return 0 if self.known_BTSK is None else self.known_BTSK.shape[1]

    @property
    def text(self) -> VideoText:
        """The conditional features, by the frame of the whole video."""
        later = {at + self.given if at else 0: texts[0] for at, texts in self.texts.later.items()}
        return VideoText(self.texts.first[0], later, self.cameras)

    def text_at(self, frame: int, start: int) -> jax.Array:
        """The conditional features that hold at a frame of the whole video, in a window that begins with `start`."""
        return self.texts.at(max(frame - self.given, 0), start)[0]

    def begins(self, frame: int, start: int) -> bool:
        """Whether those are of the text with which the video begins, in its first window."""
        return self.texts.begins(max(frame - self.given, 0), start)

    def noise(self, first: int, count: int) -> jax.Array:
        """(B, count, S, K): of frames to make, counted from the first of these."""
        return self.noise_BNSK.frames(self.given + first, count)

    def start(self, first: int, count: int) -> jax.Array:
        """(B, count, S, K): where the solver starts at these frames, from their noise."""
        noise = self.noise(first, count)
        if self.noise_guess is None:
            return noise
        before = self.noise(first - 1, 1) if first else jnp.zeros_like(noise[:, :1])
        return _from_noise(self.noise_guess, noise, before)


class Draws(flax.struct.PyTreeNode):
    """The random numbers of a batch of videos, standard normal."""

    noise_BNSK: Noise  # of all frames' tokens; that of given ones is not used
    given_BThwC: jax.Array | None = None  # what given frames are noised with
    posterior_BThwC: jax.Array | None = None  # and what their latents are drawn with, as released
    fresh_BNhwC: Noise | None = None  # what frames are noised with when they are encoded again


def draw(system: System, seeds: Sequence[int], given: int = 0, renoise: bool = False) -> Draws:
    """The random numbers of videos of any length, `given` of whose latent frames are given, all from their seeds.
    renoise: whether frames will be encoded again with noise of their own."""
    model = system.config.model
    latent = (model.height, model.width, model.channels)

    def of_given(kind: int) -> jax.Array:
        noise = noise_for([seed ^ kind for seed in seeds], (given, model.height * model.width, model.channels))
        return noise.reshape(len(seeds), given, *latent)

    return Draws(Noise(np.asarray(seeds, np.uint32), shape=(model.tokens_per_frame, model.token_channels)),
                 of_given(GIVEN_NOISE) if given else None,
                 of_given(POSTERIOR_NOISE) if given and system.as_released else None,
                 Noise(np.asarray([seed ^ RENOISE for seed in seeds], np.uint32), shape=latent) if renoise else None)


def make_conditions(
    system: System,
    params: Params,
    captions: Sequence[str],
    seeds: Sequence[int],
    settings: Sample,
    known_BTHWC: np.ndarray | None = None,
    draws: Draws | None = None,
    changes: Mapping[int, Sequence[str]] | None = None,
    cameras: LatentCameras | None = None,
    total: int = 0,
) -> Conditions:
    """Captions, seeds and given frames, (B, T, H, W, 3) uint8, as the flow takes them. draws: in place of the seeds'.
    changes: each video's other captions by the latent frame from which on they hold, in place of sample.changes.
    cameras: each video's own, in place of sample.camera. total: latent frames, perhaps ENDLESS, in place of
    sample.frames.

    Raises UserError for a length that can't be, where the given frames fill it or their prompt is changed, and for a
    way of denoising that the model lacks.
    """
    system.codec_behind(settings.denoise)  # raises now, not once the latents are made
    total = total or latent_frames(system.config, settings)
    known, known_latents = None, None
    given = check_given(system.config, settings, None if known_BTHWC is None else known_BTHWC[0], total)
    if changes is None:
        changes = {at: [prompt] * len(captions) for at, prompt in prompt_changes(system.config, settings).items()}
    encodes_again = total > system.config.model.frames or bool(changes)
    draws = draws or draw(system, seeds, given, renoise=settings.renoise and encodes_again)
    if known_BTHWC is not None:
        known_latents = noised_given(system, known_BTHWC, draws)
        known = shallow_tokens(system.flow, params, known_latents)
    if min(changes, default=given) < given:
        raise UserError(f"sample.changes={settings.changes!r}: the prompt of given frames can't be changed")
    texts = _video_texts(system, params, {0: captions} | {at - given: other for at, other in changes.items()}, settings,
                         total)
    fitted = system.calibration
    guess = None if fitted.first_guess is None or given else _first_frame(fitted.first_guess, texts.first)
    return Conditions(texts, draws.noise_BNSK, known, known_latents, guess, fitted.noise_guess, draws.fresh_BNhwC,
                      cameras or _cameras(system, params, settings, len(captions)), total,
                      starts_at_noise=chosen_solver(system, settings).start == "noise")


def check_given(config: Config, settings: Sample, known_THWC: np.ndarray | None, total: int) -> int:
    """How many latent frames the given ones are. Raises UserError where they fill the `total` that there will be."""
    if known_THWC is None:
        return 0
    frames, stride = len(known_THWC), config.codec.time_stride
    given = latents_of(known_THWC, stride)
    if given >= total:
        raise UserError(f"sample.frames={settings.frames}: the {frames} given frames fill it; "
                        f"ask for {frames + stride} or more")
    return given


def _cameras(system: System, params: Params, settings: Sample, videos: int) -> LatentCameras | None:
    """sample.camera, the same of each video. Raises UserError where it can't be read, and for a model that can't follow
    one."""
    if not settings.camera:
        return None
    if "control" not in params:
        raise UserError(f"sample.camera={settings.camera!r}: this model follows no camera; train a control module with "
                        "--config.train.target=control and name its workdir with --config.sample.control=WORKDIR")
    height, width = frame_size(system.config)
    path = read_cameras(settings.camera, settings.frames or pixel_frames(system.config), height, width)
    of_latents = cameras_of_latents(path.intrinsics_T4[None], path.world_to_camera_T34[None],
                                    system.config.codec.time_stride)
    return jax.tree.map(lambda one: np.repeat(one, videos, axis=0), of_latents)


def steering(params: Params, model: Model, text: "Text", start: int, first: int, frames: int) -> Steering | None:
    """What steers so many frames from frame `first` on, in a window that begins with frame `start`; None: nothing."""
    if not isinstance(text, VideoText) or text.cameras is None:
        return None
    reference_B44 = text.cameras.world_to_camera_BNR44[:, start, -1]
    before_BN44 = text.cameras.before(first, first + frames, start)
    return params["control"], ray_tokens(text.cameras.cut(first, first + frames), reference_B44, before_BN44, model)


def _video_texts(
    system: System, params: Params, captions: Mapping[int, Sequence[str]], settings: Sample, total: int
) -> VideoText:
    """`guidance_texts` of captions by the frame from which on they hold, 0 among them, for `total` latent frames."""
    first = guidance_texts(system, params, captions[0], settings, is_image=total == 1)
    moves = total > system.config.model.frames
    later = {at: guidance_texts(system, params, extended(system.config, of, settings), settings, is_image=False)
             for at, of in captions.items() if at or moves}
    return VideoText(first, {0: first, **later})


def extended(config: Config, captions: Sequence[str], settings: Sample) -> list[str]:
    """The captions of windows that are encoded again, as training words those of clips without their first frame. As
    released, and for a model that was never shown one, they are as they are; and so is the empty caption."""
    if settings.as_released or not config.data.first_frame_drop:
        return list(captions)
    return [EXTEND + caption if caption else "" for caption in captions]


def caption_text(system: System, params: Params, captions: Sequence[str], frames: int, camera: str = "") -> VideoText:
    """Features of captions, with the metadata of training, for given videos of so many latent frames. camera: that all
    of them are seen by, as sample.camera. Raises UserError as `_cameras` does."""
    first = later = system.caption_features(params, captions, is_image=frames == 1)
    if frames > system.config.model.frames:
        later = system.caption_features(params, extended(system.config, captions, system.config.sample))
    pixel_frames = 1 + (frames - 1) * system.config.codec.time_stride
    seen = dataclasses.replace(system.config.sample, camera=camera, frames=pixel_frames)
    return VideoText(first, {0: later}, _cameras(system, params, seen, len(captions)))


def guidance_texts(
    system: System, params: Params, prompts: Sequence[str], settings: Sample, is_image: bool
) -> jax.Array:
    """(branches, B, text_length, text_dim): features of the prompts and, with guidance, of the negative prompt."""
    full = full_prompts(system.config, prompts, settings, is_image)
    return stack_branches(system.prompt_features(params, full), len(prompts))


def full_prompts(config: Config, prompts: Sequence[str], settings: Sample, is_image: bool) -> list[str]:
    """What the text encoder is given: the prompts and, with guidance, the negative one, each with its metadata."""
    away = [settings.negative_prompt] if settings.guided else []
    return [prompt_text(config, prompt, is_image, settings.fps, settings.aspect_ratio) for prompt in (*prompts, *away)]


@partial(jax.jit, static_argnums=1)
def stack_branches(features: jax.Array, prompts: int) -> jax.Array:
    """(branches, B, S, D): the features of a batch's prompts, and those of what guidance steers away from, if any."""
    text = features[:prompts]
    return jnp.stack([text, *(jnp.broadcast_to(away, text.shape) for away in features[prompts:])])


@jax.jit
def _first_frame(guess: FirstGuess, texts: jax.Array) -> jax.Array:
    return guess(texts[0])


@jax.jit
def _from_noise(guess: NoiseGuess, noise: jax.Array, before: jax.Array) -> jax.Array:
    return guess(noise, before)


def latent_frames(config: Config, settings: Sample) -> int:
    """Latent frames of a video of settings.frames pixel frames. Raises UserError for an impossible length."""
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


def prompt_changes(config: Config, settings: Sample) -> dict[int, str]:
    """{latent frame: prompt} of sample.changes. Raises UserError where it can't be read."""
    changes = {}
    for part in filter(str.strip, settings.changes.split(";")):
        frame, colon, prompt = part.partition(":")
        number = whole_number(frame.strip())
        if not colon or not number:
            raise UserError(f'sample.changes={settings.changes!r}: must be such as "25: a prompt; 49: another one", '
                            "with frames from 1 on")
        changes[-(-number // config.codec.time_stride)] = prompt.strip()
    return changes


def noise_for(seeds: Sequence[int], shape_NSK: tuple[int, int, int]) -> jax.Array:
    """(B, N, S, K): each clip's noise comes from its own seed, frame by frame, so that a seed gives the same
    video alone, in a batch, and at any length."""
    return draw_noise(np.asarray(seeds, np.uint32), shape_NSK, 0)


@partial(jax.jit, static_argnums=1)
def draw_noise(seeds_B: jax.Array, shape_N: tuple[int, ...], first: int | jax.Array) -> jax.Array:
    """`noise_for` as a program, of the frames from `first` on."""
    def of_clip(seed: jax.Array) -> jax.Array:
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(first + jnp.arange(shape_N[0]))
        return jax.vmap(lambda key: jax.random.normal(key, shape_N[1:]))(keys)

    return jax.vmap(of_clip)(seeds_B)


def given_latents(system: System, frames_BTHWC: np.ndarray, draws: Draws) -> jax.Array:
    """(B, N, h, w, C): latents of given frames, uint8; as released, drawn from the codec's posterior."""
    if draws.posterior_BThwC is None:
        return system.encode(frames_BTHWC)
    codec, scale = to_devices(system.codec), system.config.codec.later_frames_scale
    return encode_drawn(codec, frames_BTHWC, draws.posterior_BThwC, scale)


def noised_given(system: System, frames_BTHWC: np.ndarray, draws: Draws) -> jax.Array:
    """(B, N, h, w, C): given frames as the flow sees them: encoded, with the training noise added."""
    assert draws.given_BThwC is not None
    return with_noise(given_latents(system, frames_BTHWC, draws), draws.given_BThwC, system.config.model.noise_std)


def noised(system: System, frames_BTHWC: np.ndarray, seeds: Sequence[int]) -> jax.Array:
    """(B, N, h, w, C): uint8 frames as the flow sees them: encoded, with the training noise of each seed added. One
    video may have any number of seeds."""
    return noised_by_seeds(system, system.encode(frames_BTHWC), seeds)


def noised_by_seeds(system: System, latents: jax.Array, seeds: Sequence[int]) -> jax.Array:
    """Latents with the training noise of each seed added; one video may have any number of seeds."""
    _, frames, height, width, channels = latents.shape
    noise = noise_for(seeds, (frames, height * width, channels))
    return with_noise(latents, noise, system.config.model.noise_std)


@jax.jit
def with_noise(latents: jax.Array, noise: jax.Array, noise_std: float) -> jax.Array:
    """Latents (B, N, h, w, C) with standard normal noise, in tokens or latents, times noise_std added."""
    return latents + noise_std * noise.reshape(noise.shape[0], *latents.shape[1:])


def shallow_tokens(flow: STARFlow, params: Params, x: jax.Array) -> jax.Array:
    """Noised latents -> u, the tokens that the deep block sees, (B, T, S, K)."""
    return _shallow_tokens(flow, shallow_variables(params), x)


@partial(jax.jit, static_argnums=0)
def _shallow_tokens(flow: STARFlow, shallow: dict[str, Any], x: jax.Array) -> jax.Array:
    return apply_flow(flow, shallow, STARFlow.shallow_forward, x)[0][-1]


def text_at(text: Text, frame: int, start: int) -> jax.Array:
    """The features that hold at a frame, in a window that begins with frame `start`."""
    return text.at(frame, start) if isinstance(text, VideoText) else text
