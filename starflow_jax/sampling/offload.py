"""One part of a model after the other, for devices that do not hold all of them at once (sample.offload)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Config, Sample, changed
from starflow_jax.io.progress import ProgressBar
from starflow_jax.model.store import LoadedModel, load_encoder
from starflow_jax.model.text import encode_text, read_tokenizer, text_encoder
from starflow_jax.sampling.batches import in_batches
from starflow_jax.sampling.conditions import extended, full_prompts, latent_frames, prompt_changes
from starflow_jax.sharding import fetch, to_host

TILE = 16  # latents of a tile's side
PROMPTS = 32  # encoded at once


def with_tiles(config: Config) -> Config:
    """The config with the Wan VAE working on tiles, where it offloads, makes whole videos and names no tile. A stream
    would keep the caches of all tiles, and take more."""
    sample, codec = config.sample, config.codec
    tiles = sample.offload and not sample.stream and codec.kind == "wan" and not codec.tile
    return changed(config, "codec", {"tile": TILE}) if tiles else config


def takes_turns(sample: Sample) -> bool:
    """Whether parts of the model wait in the hosts' memory; not those of a stream that has a device for each half."""
    return sample.offload and not (sample.stream and sample.devices > 1)


def with_parts_aside(loaded: LoadedModel, sample: Sample) -> LoadedModel:
    """The model with denoiser and codec in the hosts' memory, and the deep block too for a stream, in which they take
    turns. Each is copied to the devices for as long as it works. A deep block that makes a whole video stays there."""
    params = {name: to_host(part) if name == "denoiser" else part for name, part in loaded.params.items()}
    if sample.stream:
        params["flow"] = {**params["flow"], "deep": to_host(params["flow"]["deep"])}
    codec = to_host(jax.tree.map(jnp.asarray, loaded.system.codec))
    return loaded._replace(params=params, system=dataclasses.replace(loaded.system, codec=codec))


def encode_ahead(config: Config, workdir: Path, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """{whole prompt: features (text_length, text_dim)} of all that videos of these prompts are made from, by a frozen
    text encoder that is on the devices only meanwhile; {} where it was trained along with the flow."""
    if config.text.encoder != "frozen" or not config.model.text_length:
        return {}
    settings = config.sample
    frames, changes = latent_frames(config, settings), prompt_changes(config, settings).values()
    whole = dict.fromkeys(full_prompts(config, prompts, settings, is_image=frames == 1))
    again = [*changes, *(prompts if frames > config.model.frames else [])]
    whole |= dict.fromkeys(full_prompts(config, extended(config, again, settings), settings, is_image=False))
    tokenizer, params = read_tokenizer(config, workdir / "system"), load_encoder(config)
    encoded: dict[str, np.ndarray] = {}
    with ProgressBar("text", len(whole), unit="prompt", compiles=True) as progress:
        for batch in in_batches(list(whole), PROMPTS):
            ids = tokenizer.encode(list(batch), config.model.text_length)
            encoded |= zip(batch, fetch(encode_text(text_encoder(config), params["text"], ids)))
            progress.update(len(batch))
    return encoded
