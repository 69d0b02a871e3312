"""Run by tests/codec/test_wan_stream.py with eight simulated devices: a narrow Wan VAE on a mesh.

python -m tests.sharded_vae FILE: writes differences from one device, and each device's share of the work, as JSON.
"""

import json
import math
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax import config as settings_of
from starflow_jax import sharding
from starflow_jax.benchmarks.vae import random_codec
from starflow_jax.codec import convolution
from starflow_jax.codec.interface import decode_next
from starflow_jax.codec.wan_stream import WanCodec
from starflow_jax.codec.wan_vae import WanConfig

CONFIG = WanConfig(dim=4, dec_dim=8, z_dim=4)
LATENTS = (1, 3, 6, 5, CONFIG.z_dim)  # 6 rows, then 12, 24 and 48, of which the first two don't divide over eight


def operations(codec: WanCodec, latents: np.ndarray) -> float:
    """Of decoding, with every convolution as it is written: as on an accelerator, whatever a CPU makes of it."""
    with mock.patch.object(convolution, "MANY", math.inf):
        found = jax.jit(lambda codec, latents: codec.decode(latents)).lower(codec, latents).compile().cost_analysis()
    return float((found[0] if isinstance(found, list) else found)["flops"])


def main(path: Path) -> None:
    codec, latents = random_codec(CONFIG), np.random.default_rng(0).normal(size=LATENTS).astype(np.float32)
    video = np.random.default_rng(1).uniform(-1, 1, (1, 5, 96, 80, 3)).astype(np.float32)
    decode, encode = jax.jit(WanCodec.decode), jax.jit(WanCodec.encode)
    pixels, encoded = np.asarray(decode(codec, latents)), np.asarray(encode(codec, video))
    alone = operations(codec, latents)
    mesh = sharding.make_mesh(settings_of.Mesh(data=1, fsdp=1, tensor=4, sequence=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(codec, sharding.replicated(mesh))
        whole = np.asarray(decode(placed, latents))
        parts, cache, before = [], None, decode_next._cache_size()
        for frame in range(LATENTS[1]):
            decoded, cache = decode_next(placed, jnp.asarray(latents[:, frame:frame + 1]), cache, 1.0)
            parts.append(np.asarray(decoded.frames_BTHWC))
        shades = np.round((np.clip(pixels, -1, 1) + 1) * 127.5)
        results = {
            "decoded": float(np.abs(whole - pixels).max()),
            "encoded": float(np.abs(np.asarray(encode(placed, video)) - encoded).max()),
            "streamed_shades": float(np.abs(np.concatenate(parts, axis=1) - shades).max()),
            "stream_programs": decode_next._cache_size() - before,
            "share_of_the_work": operations(placed, latents) / alone,
            "rows_of_the_last_cache": jax.tree.leaves(cache.high)[-1].addressable_shards[0].data.shape[2]}
    path.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
