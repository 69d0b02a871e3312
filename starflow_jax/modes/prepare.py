"""--mode=prepare: raw videos and pictures -> clips and, where asked for, their latents and text features."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax import sharding
from starflow_jax.codec.colours import rgb_of_planes
from starflow_jax.codec.interface import LatentCodec, encode_frames
from starflow_jax.config import Config, Mesh, UserError
from starflow_jax.data import examples
from starflow_jax.data.raw import latents
from starflow_jax.data.raw.building import PREPARED, REJECTED, prepare_clips
from starflow_jax.data.raw.clips import SLOWEST
from starflow_jax.data.raw.encoder import Encoder, served
from starflow_jax.data.raw.job import Bucket, Job
from starflow_jax.data.raw.planes import Pixels
from starflow_jax.data.raw.shards import SPLITS
from starflow_jax.io.files import check_reachable, check_writable
from starflow_jax.io.memory import check_fits, host_bytes
from starflow_jax.io.progress import table
from starflow_jax.model.codec import FITTED_CODEC, codec_fingerprint, digest, make_codec, pixel_frames, read_codec
from starflow_jax.model.store import load_model
from starflow_jax.model.text import (
    encode_text,
    frozen_encoder_params,
    make_tokenizer,
    prompt_text,
    text_encoder,
    text_fingerprint,
)
from starflow_jax.modes.alone import alone_in
from starflow_jax.sampling.memory import check_devices
from starflow_jax.text.prompt import frame_size
from starflow_jax.text.tokenizer import Tokenizer


def prepare(config: Config, workdir: Path) -> None:
    """Prepare config.prepare.input, resuming where an earlier run was killed; print a summary.

    Several processes share the latents and features; clips that are kept as media are made by the first one.
    """
    settings = config.prepare
    folder = settings.output or str(workdir / "prepared")
    named = "prepare.output" if settings.output else "--workdir"
    check_reachable(folder, named)
    check_writable(folder, named)
    job = job_of(config, folder)
    check_memory(config, job)
    with alone_in(folder, named):
        done = _prepare(config, workdir, job)
    if jax.process_index() == 0:
        _print(done, folder, settings.latents or settings.text_features)


def _prepare(config: Config, workdir: Path, job: Job) -> dict[str, Any]:
    """What prepared.json holds in the end."""
    settings, folder = config.prepare, job.folder
    beam = None if settings.beam == "none" else settings.beam
    if jax.process_index() == 0 and (job.path / PREPARED).exists():
        print(f"{folder}: its clips are complete and are kept; files added to the input since then need another "
              "prepare.output")
    if settings.media:
        done = sharding.on_every_process(partial(prepare_clips, processes=settings.processes, beam=beam), job)
        if settings.latents:
            write_latents(config, workdir, folder)
    else:
        with encoder_of(config, workdir) as encoder:
            done = prepare_clips(dataclasses.replace(job, encoder=encoder), processes=settings.processes,
                                 share=_share(), meet=partial(sharding.meet, "prepare"))
    if settings.text_features:
        write_text_features(config, workdir, folder)
    return done


def check_memory(config: Config, job: Job) -> None:
    """Raises UserError where a clip does not fit into the memory of this machine, in the process that cuts it, or what
    is encoded at once into that of the devices."""
    settings = job.settings
    pixels, size = min((bucket.height * bucket.width, bucket.name) for bucket in job.buckets)
    clip = f"a clip of {job.frames} frames of {size} pixels"
    mend = "take a lower prepare.resolution or fewer prepare.frames (1 where there are pictures alone)"
    if settings.beam == "none":  # its workers are elsewhere
        # With 4:2:0 colours. Of a video that is slower than prepare.fps, some frames are taken twice and held once.
        check_fits(clip, SLOWEST * job.frames * pixels * 3 / 2, host_bytes(), "machine", mend)
    mesh, batch_size = _over_devices(settings.batch_size)
    if settings.latents:  # batches are filled up to their size, as RGB
        what, batch = f"prepare.batch_size={settings.batch_size}, each {clip}", batch_size * job.frames * pixels * 3
        check_devices(what, batch, mesh, f"encode fewer at once, or {mend}")
        if settings.media:  # else those that cut clips send planes, piece by piece
            check_fits(what, batch, host_bytes(), "machine", f"encode fewer at once, or {mend}")
    if settings.text_features:
        check_devices(f"prepare.batch_size={settings.batch_size} prompts",
                      2 * batch_size * config.model.text_length * config.model.text_dim, mesh, "encode fewer at once")


def job_of(config: Config, folder: str) -> Job:
    """The settings with what follows from the model. Raises UserError for impossible sizes."""
    later = config.codec.time_stride if config.model.frames > 1 else 0
    frames = config.prepare.frames or pixel_frames(config) + later
    return Job(config.prepare, folder, buckets=buckets_of(config), frames=frames)


def buckets_of(config: Config) -> tuple[Bucket, ...]:
    """One size per aspect ratio, of whole tokens: 480p is 640 x 640, or 480 x 848."""
    side = round(config.prepare.resolution * 4 / 3)  # of a square of as many pixels as 16:9 at this height
    multiple = math.lcm(config.codec.stride * config.model.patch_size, 2)  # video files have even sides
    buckets: list[Bucket] = []
    for aspect_ratio in config.prepare.ratios:
        height, width = frame_size(side, aspect_ratio, multiple)
        if all((bucket.height, bucket.width) != (height, width) for bucket in buckets):
            buckets.append(Bucket(height, width, aspect_ratio))
    return tuple(buckets)


def write_latents(config: Config, workdir: Path, folder: str) -> None:
    """Encode all clips with the workdir's codec, each batch over all devices of this process."""
    codec, scale = _codec(config, workdir), config.codec.later_frames_scale
    mesh, batch_size = _over_devices(config.prepare.batch_size)

    def shape(shape_THWC: tuple[int, ...]) -> tuple[int, ...]:
        frames = jax.ShapeDtypeStruct((1, *shape_THWC), jnp.uint8)
        return jax.eval_shape(encode_frames, codec, frames, scale).shape[1:]

    latents.write_latents(folder, lambda frames: np.asarray(encode_frames(codec, _put(frames, mesh), scale)), shape,
                          batch_size=batch_size, made_by=codec_fingerprint(config, codec), share=_share())


@contextlib.contextmanager
def encoder_of(config: Config, workdir: Path) -> Iterator[Encoder]:
    """The workdir's codec, for the processes that cut clips; each batch over all devices of this process."""
    codec, scale = _codec(config, workdir), config.codec.later_frames_scale
    mesh, batch_size = _over_devices(config.prepare.batch_size)

    def encode(clips: list[Pixels]) -> np.ndarray:
        frames = [rgb_of_planes(*clip) if len(clip.planes) > 1 else clip.planes[0] for clip in clips]
        batch = _put(jnp.stack(frames + [frames[-1]] * (batch_size - len(frames))), mesh)
        return latents.to_half(np.asarray(encode_frames(codec, batch, scale))[:len(frames)], "latents")

    with served(encode) as called:
        yield Encoder(called, batch_size, codec_fingerprint(config, codec))


def write_text_features(config: Config, workdir: Path, folder: str) -> None:
    """Encode every prompt that the clips may be trained with, by the frozen text encoder or the workdir's own."""
    tokenizer, params = _text_encoder(config, workdir)
    mesh, batch_size = _over_devices(config.prepare.batch_size)
    made_by = text_fingerprint(config)
    if config.text.encoder == "trained":  # it changes during training
        made_by["arrays"] = digest(params)
    encoder, params = text_encoder(config), jax.device_put(params, sharding.replicated(mesh))

    def encode(prompts: list[str]) -> np.ndarray:
        ids_BS = tokenizer.encode(prompts, config.model.text_length)
        return np.asarray(encode_text(encoder, params, _put(ids_BS, mesh)))

    def prompts_of(bucket: dict[str, Any], clip: dict[str, Any]) -> list[str]:
        record = {**clip, "fps": int(clip["fps"]), "aspect_ratio": bucket["aspect_ratio"]}
        return examples.prompts_of(record, partial(prompt_text, config), bucket["frames"] == 1)

    latents.write_text_features(folder, encode, config.model.text_dim, prompts_of, batch_size=batch_size,
                                made_by=made_by, share=_share())


def _codec(config: Config, workdir: Path) -> LatentCodec:
    """A VAE; or the workdir's own codec, whose model may not be trained yet, or the package's."""
    if config.codec.kind != "patch":
        return make_codec(config)
    if (workdir / "system" / FITTED_CODEC).exists():
        return read_codec(config, workdir / "system")
    try:
        return load_model(config, workdir)[0].codec
    except UserError as error:
        raise UserError(f"{workdir} holds no codec to make latents with: it is fitted at the start of --mode=train "
                        "--config.data.source=prepared; without prepare.latents the clips alone are made") from error


def _text_encoder(config: Config, workdir: Path) -> tuple[Tokenizer, Any]:
    """(tokenizer, the encoder's parameters)."""
    if config.text.encoder == "frozen":
        return make_tokenizer(config), frozen_encoder_params(config)["text"]
    system, params, source, _ = load_model(config, workdir)
    print(f"text encoder: that of {source}")
    return system.tokenizer, params["text"]


def _over_devices(batch_size: int) -> tuple[jax.sharding.Mesh, int]:
    """(this process's devices as one data-parallel mesh, the batch size rounded up to a multiple of them)."""
    devices = jax.local_devices()
    return sharding.make_mesh(Mesh(), devices), -(-batch_size // len(devices)) * len(devices)


def _put(batch: np.ndarray | jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    return jax.device_put(batch, sharding.batch_sharding(mesh))


def _share() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()


def _print(done: dict[str, Any], folder: str, derived_too: bool) -> None:
    rows = [(name, bucket["aspect_ratio"], *(bucket["clips"].get(split, 0) for split in SPLITS))
            for name, bucket in done["buckets"].items()]
    print(table(rows, ("bucket", "aspect ratio", *SPLITS)))
    if done["rejected"]:
        print()
        print(table(list(done["rejected"].items()), ("left out because", "times")))
    print(f"\n{done['items']} files, {done['clips']} clips: {folder}/{PREPARED}\n"
          f"what was left out and why: {folder}/{REJECTED}")
    print(f"next: --mode=train --config.data.source=prepared --config.data.directory={folder}"
          + (" --config.data.latents=true" if derived_too else ""))
