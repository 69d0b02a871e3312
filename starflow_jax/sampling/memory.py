"""What a model, its training and its videos take at least, so that what is too large is said before it is tried.

All are lower bounds, of arrays that are there at one time: nothing is refused that could run.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from starflow_jax.config import Config, Model
from starflow_jax.io.memory import check_fits, host_bytes
from starflow_jax.model.codec import frame_size
from starflow_jax.model.own_settings import backbone_config
from starflow_jax.model.quantize import BYTES
from starflow_jax.sampling.conditions import latent_frames
from starflow_jax.sampling.files import shown_scale

FEWER = ("ask for fewer frames (sample.frames) or fewer at once (sample.batch_size), or take more devices (mesh) or a "
         "larger machine")
SMALLER = "take smaller batches (train.batch_size), a smaller model, more devices (mesh) or a larger machine"


def layer_parameters(model: Model) -> int:
    """Parameters of the flow's layers' matrices: 12 times the width's square each."""
    return 12 * (model.deep_layers * model.deep_width**2 + sum(model.shallow_layers) * model.shallow_width**2)


def flow_bytes(config: Config) -> int:
    """Of these matrices, as sampling keeps them."""
    itemsize = BYTES.get(config.sample.weights, jnp.dtype(config.model.dtype).itemsize)
    return int(layer_parameters(config.model) * itemsize)


def latent_bytes(config: Config, frames: int) -> int:
    """Of a video's latents, float32."""
    model = config.model
    return 4 * frames * model.height * model.width * model.channels


def pixel_bytes(config: Config, frames: int) -> int:
    """Of the pixels of so many latent frames, uint8."""
    return (1 + (frames - 1) * config.codec.time_stride) * math.prod(frame_size(config)) * 3


def cache_bytes(config: Config) -> int:
    """Of the keys and values of a video that the deep block has room for."""
    model, settings = config.model, config.sample
    itemsize = 1 if settings.cache == "int8" else jnp.dtype(model.dtype).itemsize
    branches = 2 if settings.guided else 1
    slots = model.frames * model.tokens_per_frame + model.text_length
    return 2 * branches * model.deep_layers * slots * model.deep_width * itemsize


def check_videos(config: Config, mesh: Mesh, together: int, kept: int = 0) -> None:
    """Raises UserError where videos by config.sample do not fit into the memory of the devices or of the host.

    together: how many are made at once. kept: how many are held until the most likely are known.
    """
    frames, stream = latent_frames(config, config.sample), config.sample.stream
    check_making(config, mesh, together, frames, stream)
    if not stream:
        pixels, scale = pixel_bytes(config, frames), shown_scale(frame_size(config)[0])
        held = max(together * pixels, kept * (pixels + latent_bytes(config, frames)))
        check_fits(videos_of(config, together, frames) + (f", {kept} kept to compare" if kept else ""),
                   held + scale**2 * pixels, host_bytes(), "machine", FEWER)


def check_making(config: Config, mesh: Mesh, together: int, frames: int, stream: bool, others: int = 0) -> None:
    """The same of the devices alone. frames: latent frames of a video. others: bytes of other models there."""
    settings = config.sample
    held = min(frames, config.model.frames) if stream else frames  # a stream holds no more than a window
    flow, latents = flow_bytes(config), together * latent_bytes(config, held)
    if settings.offload and stream:  # its parts take turns
        flow = 0
    needed = flow + together * cache_bytes(config) + latents
    if not stream:  # u and the sample lie there beside the frames
        needed = max(needed, flow + 2 * latents + together * pixel_bytes(config, frames))
    stages = settings.devices if stream else 1  # a stream's parts lie on devices of their own
    check_devices(videos_of(config, together, frames), others + needed / stages, mesh, FEWER)


def check_sessions(config: Config, mesh: Mesh, sessions: int, as_batches: bool) -> None:
    """The same of so many streams that are live at once. as_batches: their steps are one program, which holds their
    caches twice."""
    each = cache_bytes(config) * (2 if as_batches else 1) + latent_bytes(config, config.model.frames)
    check_devices(f"serve.sessions={sessions}", flow_bytes(config) + sessions * each, mesh,
                  "serve fewer sessions, or take a larger machine")


def videos_of(config: Config, together: int, frames: int) -> str:
    """In words. frames: latent ones."""
    of = f"of {1 + (frames - 1) * config.codec.time_stride} frames"
    return f"a video {of}" if together == 1 else f"{together} videos {of} together"


def check_training(config: Config, mesh: Mesh) -> None:
    """The same of training: parameters with two moments and gradients, float32, or the frozen model that something is
    trained beside (a decoder is trained without the flow); and a batch on the host."""
    target, kept = config.train.target, jnp.dtype(config.model.dtype).itemsize
    itemsize = {"all": 4 * 4, "lora": BYTES.get(config.lora.weights, kept), "decoder": 0}.get(target, kept)
    check_devices("training this model", layer_parameters(backbone_config(config).model) * itemsize, mesh, SMALLER)
    if config.data.image_probability < 1:
        frames = config.model.frames
        clip = latent_bytes(config, frames) // 4 if config.data.latents else pixel_bytes(config, frames)
        check_fits(f"train.batch_size={config.train.batch_size}", config.train.batch_size * clip / jax.process_count(),
                   host_bytes(), "machine", SMALLER)


def check_devices(what: str, needed: float, mesh: Mesh, mend: str) -> None:
    """Raises UserError where so many bytes, spread evenly over the mesh, do not fit its devices of this process."""
    here = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if not here:
        return
    each = needed / mesh.size
    limit = (here[0].memory_stats() or {}).get("bytes_limit", 0)
    if here[0].platform == "cpu":
        check_fits(what, each * len(here), host_bytes(), "machine", mend)
    elif limit:
        check_fits(what, each, limit, "device", mend)
