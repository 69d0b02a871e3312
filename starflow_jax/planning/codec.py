"""The Wan VAE's programs, compiled from shapes alone (--mode=plan --config.plan.step=codec)."""

from typing import Any

import jax
import jax.numpy as jnp

from starflow_jax.codec.interface import decode_latents, decode_next, encode_frames
from starflow_jax.codec.wan_stream import Tiles, WanCodec, wan_config
from starflow_jax.codec.wan_weights import abstract_params
from starflow_jax.config import Config, UserError
from starflow_jax.planning.array_kinds import contents_of
from starflow_jax.planning.program import Program

# At the compiler's usual effort the search for each convolution's best loops takes hours on two cores; memory is
# decided before it.
LEAST_EFFORT = {"exec_time_optimization_effort": -1.0}


def abstract_codec(config: Config) -> WanCodec:
    """The VAE of config.codec in shapes. Raises UserError for other codecs."""
    settings, channels = config.codec, config.model.channels
    if settings.kind != "wan":
        raise UserError(f"codec.kind={settings.kind!r}: plan.step=codec plans the Wan VAE (--config.codec.kind=wan)")
    sizes = wan_config(settings, channels)
    statistics_C: Any = jax.ShapeDtypeStruct((channels,), jnp.float32)
    return WanCodec(abstract_params(sizes, jnp.dtype(settings.dtype)), statistics_C, statistics_C, config=sizes,
                    dtype=settings.dtype, tiles=Tiles(settings.tile, settings.tile_overlap))


def compile_codec(config: Config, placed: jax.sharding.Sharding) -> list[Program]:
    """For plan.videos videos of the training length: a step encodes and decodes them. A stream's next frame is listed
    for its memory alone: its work is a part of decoding's."""
    codec, model, videos = abstract_codec(config), config.model, config.plan.videos
    stride = codec.config.stride
    frames = jax.ShapeDtypeStruct((videos, 1 + (model.frames - 1) * codec.config.time_stride, model.height * stride,
                                   model.width * stride, 3), jnp.uint8)
    latents = jax.ShapeDtypeStruct((videos, model.frames, model.height, model.width, model.channels), jnp.float32)
    one = jax.ShapeDtypeStruct((videos, 1, *latents.shape[2:]), jnp.float32)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    _, cache = jax.eval_shape(decode_next, codec, one, None, scale)

    def program(name: str, run: Any, *arguments: Any, times: float = 1) -> Program:
        on_chip = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), arguments)
        lowered = run.lower(*on_chip)
        return Program(name, lowered.compile(compiler_options=LEAST_EFFORT), times, lowered=lowered,
                       contents=contents_of(run, on_chip, {}, lowered.out_info, on_chip[0]))

    return [program("encode, a video", encode_frames, codec, frames, scale),
            program("decode, a video", decode_latents, codec, latents, scale),
            program("decode, a stream's next frame", decode_next, codec, one, cache, scale, times=0)]
