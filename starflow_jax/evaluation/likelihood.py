"""What only a flow can say of a given video: its exact likelihood token by token, the way to noise and back, and
what lies between two videos in z (--mode=evaluate --config.evaluate.video=FILE).

The flow is a density of latents with the training noise (standard deviation noise_std): that noise is drawn
`draws` times, the same with and without the caption, and likelihoods are means over the draws.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Config, UserError
from starflow_jax.evaluation.measures import psnr
from starflow_jax.flow import decode
from starflow_jax.flow.starflow import FlowOutput, STARFlow, apply_flow
from starflow_jax.io.files import atomic_path
from starflow_jax.io.pictures import contact_sheet, resize_crop
from starflow_jax.io.progress import ProgressBar, table
from starflow_jax.io.video import at_rate, read_video, write_mp4
from starflow_jax.model.parameters import Params, decoding_variables, flow_variables
from starflow_jax.model.shapes import pixel_frames
from starflow_jax.model.store import load_model
from starflow_jax.model.system import System
from starflow_jax.sampling.conditions import noise_for, token_grid
from starflow_jax.sampling.denoise import denoise
from starflow_jax.sampling.solver import deep_solver, shallow_solver
from starflow_jax.sampling.windows import output_windows

SHOWN_PIXELS = 96  # small models' frames are enlarged to about this height
SHOWN_FRAMES = 12  # latent frames at most in the surprise map


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """-log p in nats of D noised copies of a video, constants included; N latent frames of S tokens."""

    nats_DNS: np.ndarray  # given the caption
    null_DNS: np.ndarray  # given the empty caption
    dims: int  # numbers in a token

    @property
    def caption_fit_NS(self) -> np.ndarray:
        """log p(x | caption) - log p(x | no caption) in nats: above 0 the caption explains the video."""
        return (self.null_DNS - self.nats_DNS).mean(axis=0)

    @property
    def bits_NS(self) -> np.ndarray:
        """Bits per dimension of each token."""
        return self.nats_DNS.mean(axis=0) / self.dims / np.log(2)


@dataclasses.dataclass(frozen=True)
class RoundTrip:
    """Video -> latents -> z -> latents -> video, of the first window."""

    latents_error: float  # |x' - x| / |x| of the noised latents x
    z_mean_square: float  # 1 for a video that the model finds typical
    codec_THWC: np.ndarray  # the codec there and back, without the flow
    frames_THWC: np.ndarray  # through z and denoised


def inspect_video(config: Config, workdir: Path) -> None:
    """Measure evaluate.video and, with evaluate.other, go from one to the other; files in WORKDIR/inspected."""
    began, settings = time.perf_counter(), config.evaluate
    frames_THWC, left_out = read_clip(config, settings.video)
    other_THWC = read_clip(config, settings.other)[0] if settings.other else None
    if other_THWC is not None:
        check_pair(config, frames_THWC, other_THWC)
    system, params, source = load_model(config, workdir)
    print(f"model: {source}")
    with ProgressBar("inspect", 3 if settings.other else 2, unit="part") as progress:
        found = likelihood(system, params, frames_THWC, settings.caption, settings.draws)
        progress.update()
        there_and_back = round_trip(system, params, frames_THWC, settings.caption)
        progress.update()
        if other_THWC is not None:
            other_caption = settings.other_caption or settings.caption
            between = interpolate(system, params, (frames_THWC, other_THWC), (settings.caption, other_caption),
                                  settings.steps)
            progress.update()
    path = workdir / "inspected" / Path(settings.video).stem
    draw_surprise(path.with_name(f"{path.name}_surprise.png"), system, frames_THWC, found, settings.caption)
    scale = max(1, SHOWN_PIXELS // frames_THWC.shape[1])
    shown = frames_THWC[:len(there_and_back.frames_THWC)]
    contact_sheet(path.with_name(f"{path.name}_round_trip.png"),
                  np.stack([shown, there_and_back.codec_THWC, there_and_back.frames_THWC]),
                  ["given", "codec there and back", "through z and back, denoised"], scale=scale)
    facts = {"model": source, "video": settings.video, "caption": settings.caption, "frames": len(frames_THWC),
             "frames_left_out": left_out, **_facts(found, config),
             "round_trip": {"latents_relative_error": there_and_back.latents_error,
                            "z_mean_square": there_and_back.z_mean_square,
                            "psnr": psnr(shown, there_and_back.frames_THWC),
                            "psnr_of_codec_alone": psnr(shown, there_and_back.codec_THWC)}}
    if other_THWC is not None:
        facts["interpolation"] = {"other": settings.other, "other_caption": other_caption, "steps": settings.steps}
        _write_interpolation(path.with_name(f"{path.name}_to_{Path(settings.other).stem}.mp4"), config, between)
    facts["seconds"] = round(time.perf_counter() - began, 1)
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(facts, indent=1))
    _print(facts, path)


def read_clip(config: Config, path: str) -> tuple[np.ndarray, int]:
    """A video file at the model's size and frame rate, (T, H, W, 3) uint8, and how many frames were left out.

    T is 1 + a multiple of the codec's time stride, from the start. Raises UserError for a file that can't be
    read, or of more than one frame and fewer than a second latent frame takes.
    """
    stride, codec = config.codec.time_stride, config.codec.stride
    frames_THWC, fps = read_video(path)
    wanted = config.text.fps or fps
    frames_THWC = at_rate(frames_THWC, fps, wanted)
    count = len(frames_THWC)
    if 1 < count <= stride:
        raise UserError(f"{path}: {count} frames at {wanted:g} frames per second; the model needs {1 + stride} or more")
    kept = 1 + (count - 1) // stride * stride
    size = config.model.height * codec, config.model.width * codec
    return resize_crop(frames_THWC[:kept], *size), count - kept


def check_pair(config: Config, frames_THWC: np.ndarray, other_THWC: np.ndarray) -> None:
    """Raises UserError where there is nothing between two videos: of two lengths, or beyond the window."""
    if len(frames_THWC) != len(other_THWC):
        raise UserError(f"evaluate.other={config.evaluate.other}: has {len(other_THWC)} frames at the model's rate, "
                        f"evaluate.video {len(frames_THWC)}; cut them to one length")
    if len(frames_THWC) > pixel_frames(config):
        raise UserError(f"evaluate.other: videos of {len(frames_THWC)} frames are longer than the window of "
                        f"{pixel_frames(config)} in which z is defined; cut them to that")


def noised(system: System, frames_THWC: np.ndarray, draws: int) -> jax.Array:
    """(D, N, h, w, C): latents with the training noise of seeds 0, 1, ..."""
    latents = system.encode(jnp.asarray(frames_THWC[None]))
    shape = latents.shape[1:]
    noise = noise_for(range(draws), (shape[0], shape[1] * shape[2], shape[3]))
    return latents + system.config.model.noise_std * noise.reshape(draws, *shape)


def text_of(system: System, params: Params, caption: str, is_image: bool) -> jax.Array:
    """(1, text_length, text_dim) features of a caption with the metadata of training."""
    return jax.jit(system.features)(params, jnp.asarray(system.text_ids([system.prompt(caption, is_image)])))


def token_nats(flow: STARFlow, out: FlowOutput) -> jax.Array:
    """(B, T, S) exact -log p of each token in raster order, constants included; its sum over S is `nats`.

    A token's share is that of its noise and of every block's scale at its place.
    """
    shape = out.z_BTSK.shape
    total = 0.5 * (out.z_BTSK**2 + np.log(2 * np.pi))
    for index, logdet in enumerate(out.logdets[:-1]):
        ordered = logdet.reshape(-1, *shape[2:]) if flow.config.local_shallow else logdet
        total -= flow.from_block_order(index, ordered, shape)
    return jnp.sum(total - out.logdets[-1].reshape(shape), axis=-1)


def _tokennats_of_window(system: System, params: Params, noisy: jax.Array, text: jax.Array) -> jax.Array:
    return token_nats(system.flow, _forward(system, params, noisy, text))


def _forward(system: System, params: Params, noisy: jax.Array, text: jax.Array) -> FlowOutput:
    return apply_flow(system.flow, flow_variables(params), STARFlow.forward, noisy, text)


def likelihood(system: System, params: Params, frames_THWC: np.ndarray, caption: str, draws: int) -> Likelihood:
    """Exact likelihood with and without the caption, token by token; beyond the window, given the frames before."""
    noisy, run = noised(system, frames_THWC, draws), jax.jit(_tokennats_of_window, static_argnums=0)

    def nats_DNS(caption: str) -> np.ndarray:
        text = text_of(system, params, caption, is_image=noisy.shape[1] == 1)
        text = jnp.broadcast_to(text, (draws, *text.shape[1:]))
        spans = output_windows(system.config, noisy.shape[1], ahead=0)
        return np.concatenate([run(system, params, noisy[:, start:stop], text)[:, begin - start:end - start]
                               for start, stop, begin, end in spans], axis=1)

    return Likelihood(nats_DNS(caption), nats_DNS(""), system.config.model.token_channels)


def encode_z(system: System, params: Params, noisy: jax.Array, text: jax.Array) -> jax.Array:
    """z = f(x~), (B, N, S, K), of at most a window."""
    return jax.jit(_forward, static_argnums=0)(system, params, noisy, text).z_BTSK


def decode_z(system: System, params: Params, z_BNSK: jax.Array, text: jax.Array) -> jax.Array:
    """x~ = f^-1(z), exact: block Jacobi until nothing changes, without guidance."""
    settings = dataclasses.replace(system.config.sample, solver="jacobi", tolerance=0.0, max_steps=0, stream=False)
    variables, grid = decoding_variables(system.config, params), token_grid(system)
    made = decode.generate(system.flow, variables, z_BNSK, text[None], solver=deep_solver(system, settings),
                           token_grid=grid, window=system.config.model.frames)
    u_BNSK = jnp.concatenate([frames for frames, _ in made], axis=1)
    return decode.invert_shallow(system.flow, variables, u_BNSK, solver=shallow_solver(settings), token_grid=grid)[0]


def round_trip(system: System, params: Params, frames_THWC: np.ndarray, caption: str) -> RoundTrip:
    """The first window of a video to z and back."""
    frames_THWC = frames_THWC[:system.pixel_frames]
    noisy = noised(system, frames_THWC, draws=1)
    text = text_of(system, params, caption, is_image=noisy.shape[1] == 1)
    z = encode_z(system, params, noisy, text)
    back = decode_z(system, params, z, text)
    clean = denoise(system, params, back, text, system.config.sample.denoise)
    return RoundTrip(float(jnp.linalg.norm(back - noisy) / jnp.linalg.norm(noisy)), float(jnp.mean(z**2)),
                     np.asarray(system.decode(system.encode(jnp.asarray(frames_THWC[None]))))[0],
                     np.asarray(system.decode(clean))[0])


def interpolate(
    system: System, params: Params, pair_THWC: tuple[np.ndarray, np.ndarray], captions: tuple[str, str], steps: int
) -> np.ndarray:
    """(steps, T, H, W, 3): from one video to the other by a great circle in z and a line in the text features."""
    noisy = jnp.concatenate([noised(system, frames, draws=1) for frames in pair_THWC])
    text = jnp.concatenate([text_of(system, params, caption, noisy.shape[1] == 1) for caption in captions])
    z = encode_z(system, params, noisy, text)
    between = slerp(z[0], z[1], np.linspace(0, 1, steps))
    shares = jnp.linspace(0, 1, steps)[:, None, None]
    texts = (1 - shares) * text[0] + shares * text[1]
    clean = denoise(system, params, decode_z(system, params, between, texts), texts, system.config.sample.denoise)
    return np.asarray(system.decode(clean))


def slerp(start: jax.Array, end: jax.Array, shares: np.ndarray) -> jax.Array:
    """(len(shares), ...): points on the great circle, so that what lies between two typical z has a typical norm.

    The ends come out exactly; of (anti)parallel ones, where there is no one circle, a line.
    """
    cosine = jnp.sum(start * end) / (jnp.linalg.norm(start) * jnp.linalg.norm(end))
    angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
    t = jnp.asarray(shares, start.dtype).reshape(-1, *(1,) * start.ndim)
    if jnp.sin(angle) < 1e-4:
        return (1 - t) * start + t * end
    return (jnp.sin((1 - t) * angle) * start + jnp.sin(t * angle) * end) / jnp.sin(angle)


def draw_surprise(path: Path, system: System, frames_THWC: np.ndarray, found: Likelihood, caption: str) -> None:
    """A PNG of three rows: the frames, each token's bits per dimension over them, and what the caption adds."""
    count, grid = found.bits_NS.shape[0], token_grid(system)
    chosen = np.unique(np.linspace(0, count - 1, min(count, SHOWN_FRAMES)).round().astype(int))
    from matplotlib.figure import Figure  # takes a third of a second to import

    figure = Figure(figsize=(1.3 * len(chosen) + 1.8, 4.6), layout="constrained")
    axes = figure.subplots(3, len(chosen), squeeze=False)
    fit = found.caption_fit_NS
    limit = max(float(np.abs(fit).max()), 1e-6)
    maps = ((found.bits_NS, "inferno", float(found.bits_NS.min()), float(found.bits_NS.max()), "surprise\n(bits/dim)"),
            (fit, "RdBu", -limit, limit, "caption fit\n(nats)"))
    for column, frame in enumerate(chosen):
        pixel = int(frame) * system.config.codec.time_stride
        picture, extent = frames_THWC[pixel], (0, frames_THWC.shape[2], frames_THWC.shape[1], 0)
        axes[0, column].imshow(picture, extent=extent)
        axes[0, column].set_title(f"frame {pixel}", fontsize=8)
        for row, (values, colours, low, high, _) in enumerate(maps, start=1):
            axes[row, column].imshow(picture.mean(axis=-1), cmap="gray", extent=extent)
            axes[row, column].imshow(values[frame].reshape(grid), cmap=colours, vmin=low, vmax=high, extent=extent,
                                     alpha=0.75)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for row, (*_, label) in enumerate(maps, start=1):
        figure.colorbar(axes[row, 0].images[1], ax=list(axes[row]), shrink=0.8, label=label)
    figure.suptitle(f'"{caption}": {-found.nats_DNS.sum(axis=(1, 2)).mean():.0f} nats, caption fit {fit.sum():+.0f}',
                    fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _write_interpolation(path: Path, config: Config, videos_KTHWC: np.ndarray) -> None:
    scale = max(1, SHOWN_PIXELS // videos_KTHWC.shape[2])
    labels = [f"{share:.2f}" for share in np.linspace(0, 1, len(videos_KTHWC))]
    write_mp4(path, np.concatenate(list(videos_KTHWC), axis=2), config.text.fps or 1, scale)
    contact_sheet(path.with_suffix(".png"), videos_KTHWC, labels, scale=max(1, scale // 2))


def _facts(found: Likelihood, config: Config) -> dict[str, Any]:
    """The likelihood as JSON has it."""
    total_D, mean_NS = -found.nats_DNS.sum(axis=(1, 2)), -found.nats_DNS.mean(axis=0)
    fit_D = (found.null_DNS - found.nats_DNS).sum(axis=(1, 2))
    return {
        "log_likelihood_of": f"latents with noise {config.model.noise_std}, mean over {len(total_D)} draws of it",
        "log_likelihood_nats": float(total_D.mean()),
        "log_likelihood_standard_error": _standard_error(total_D),
        "bits_per_dim": float(found.bits_NS.mean()),
        "log_likelihood_nats_per_frame": mean_NS.sum(axis=1).tolist(),
        "log_likelihood_nats_per_token": mean_NS.tolist(),
        "caption_fit_nats": float(fit_D.mean()),
        "caption_fit_standard_error": _standard_error(fit_D),
        "caption_fit_nats_per_frame": found.caption_fit_NS.sum(axis=1).tolist(),
        "caption_fit_nats_per_token": found.caption_fit_NS.tolist(),
    }


def _standard_error(values_D: np.ndarray) -> float | None:
    return float(values_D.std(ddof=1) / np.sqrt(len(values_D))) if len(values_D) > 1 else None


def _print(facts: dict[str, Any], path: Path) -> None:
    trip, per_frame = facts["round_trip"], facts["log_likelihood_nats_per_frame"]
    rows = [("log-likelihood, nats", f"{facts['log_likelihood_nats']:.1f}"),
            ("bits per dimension", f"{facts['bits_per_dim']:.4f}"),
            ("log-likelihood of each latent frame", " ".join(f"{nats:.0f}" for nats in per_frame)),
            ("with less without the caption, nats", f"{facts['caption_fit_nats']:+.1f}"),
            ("to z and back: relative error of latents", f"{trip['latents_relative_error']:.1e}"),
            ("to z and back, denoised: PSNR of frames", f"{trip['psnr']:.1f} dB"),
            ("the codec alone", f"{trip['psnr_of_codec_alone']:.1f} dB")]
    print(table(rows, (f"{facts['frames']} frames", facts["caption"])))
    print(f"\nwritten to {path.parent}: {', '.join(sorted(p.name for p in path.parent.glob(path.name + '*')))}")
