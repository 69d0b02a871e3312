"""Golden cases of kind `pipeline`: a folder of the release's files, converted and sampled as a user does it, with the
random numbers given."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import starflow_jax as sf
from starflow_jax import modes
from starflow_jax.codec.interface import decode_pixels, to_float
from starflow_jax.config import Sample, Solver
from starflow_jax.flow import decode
from starflow_jax.io.command_line import load_config
from starflow_jax.model.codec import frame_size
from starflow_jax.model.system import System
from starflow_jax.sampling.conditions import Conditions, Draws, Noise, given_latents, guidance_texts, make_conditions
from starflow_jax.sampling.denoise import denoise, denoise_window
from starflow_jax.sampling.generate import deep_frames, generate_clips
from starflow_jax.sampling.solver import chosen_solver, shallow_solver

Compare = Callable[[str, Any], None]


def converted(folder: Path, workdir: Path) -> Any:
    """The model of a workdir that --mode=convert made of a case's files, with nothing said of them but their places."""
    flow, vae = (next(path for path in (folder / f"{name}.pth", folder / f"{name}.safetensors") if path.exists())
                 for name in ("model", "Wan2.2_VAE"))
    config = load_config(
        f"configs/released.py:{folder / 'starflow-v.yaml'}", model={"dtype": "float32"},
        convert={"source": str(flow), "codec": str(vae), "text": str(folder / "t5")})
    modes.run("convert", config, workdir)
    return sf.load(workdir)


def asked_for(case: dict) -> dict[str, Any]:
    """The settings of `sample` of a case's command line; all else is as the conversion left it."""
    solver = Solver(kind="jacobi", block_size=4 * case["jacobi_block_size"], first_block_size=case["jacobi_block_size"],
                    tolerance=case["jacobi_th"], max_steps=case["jacobi_max_iter"])
    return dict(guidance=case["cfg"], frames=case["target_length"], fps=case["out_fps"], solver=solver,
                aspect_ratio=case["aspect_ratio"])


def check_pipeline(folder: Path, case: dict, compare: Compare, workdir: Path) -> None:
    model = converted(folder, workdir)
    image = str(folder / case["input_image"]) if case["input_image"] else ""
    system, _, known = model._begin(case["caption"], asked_for(case), image=image)
    settings, params = system.config.sample, model.params
    tensors = load_file(folder / "tensors.safetensors")
    check_settings(case, system, settings)
    check_text(case, system, params, settings, compare)

    known_BTHWC = None if known is None else known[None]
    draws = Draws(Noise(given_BN=system.flow.tokens(_frames_last(tensors["in/noise"]))), *(
        None if known is None else _frames_last(tensors[f"in/{name}"][:, None])
        for name in ("image_noise", "image_posterior_noise")))
    given = make_conditions(system, params, [case["caption"]], [0], settings, known_BTHWC, draws)
    if known_BTHWC is not None:
        compare("image_pixels", _channels_first(to_float(known_BTHWC))[:, 0])
        compare("image_latent", _channels_first(given_latents(system, known_BTHWC, draws))[:, 0])
        compare("image_condition", _channels_first(given.known_BThwC)[:, 0])
    noisy = check_flow(system, params, given, settings, compare)
    check_denoiser(case, system, params, noisy, given, compare)

    clips = generate_clips(system, params, [case["caption"]], [0], settings, known_BTHWC, draws)
    compare("sample", _channels_first(clips.noisy_BNhwC))
    compare("frames_uint8", clips.frames_BTHWC[0])


def check_settings(case: dict, system: System, settings: Sample) -> None:
    config = system.config
    assert frame_size(config) == (case["height"], case["width"])
    assert config.model.frames == case["local_attn_window"]
    assert config.model.denoiser_window == case["denoiser_window"]
    if config.model.frames > case["context_length"]:
        assert settings.context_frames == case["context_length"]
    assert config.codec.later_frames_scale == case["temporal_latent_scale"]
    assert config.model.noise_std == case["noise_std"]


def check_text(case: dict, system: System, params: Any, settings: Sample, compare: Compare) -> None:
    metadata = dict(fps=settings.fps, aspect_ratio=settings.aspect_ratio)
    prompts = [system.prompt(caption, **metadata) for caption in (case["caption"], case["null_caption"])]
    assert prompts == [case["text_after_preprocess"], case["null_text_after_preprocess"]]
    ids_BS = system.text_ids(prompts)
    for prefix, row_S in zip(("", "null_"), ids_BS):
        compare(f"{prefix}input_ids", row_S[None])
        compare(f"{prefix}attention_mask", (row_S != 0)[None].astype(np.int32))
    guided = dataclasses.replace(settings, guidance=1.0)  # both branches, also of a case without guidance
    text, null = guidance_texts(system, params, [case["caption"]], guided, is_image=False)
    compare("text_features", text)
    compare("null_text_features", null)


def check_flow(system: System, params: Any, given: Conditions, settings: Sample, compare: Compare) -> Any:
    u = jnp.concatenate([made for made, _ in deep_frames(system, params, given, settings)], axis=1)
    whole = u if given.known_BTSK is None else jnp.concatenate([given.known_BTSK, u], axis=1)
    compare("after_deep_block", _channels_first(system.flow.latents(whole, system.token_grid[0])))
    noisy, _ = decode.invert_shallow(system.flow, {"params": params["flow"]}, u, token_grid=system.token_grid,
                                     solver=shallow_solver(chosen_solver(system, settings)))
    noisy = noisy if given.known_BThwC is None else jnp.concatenate([given.known_BThwC, noisy], axis=1)
    compare("sample", _channels_first(noisy))
    return noisy


def check_denoiser(case: dict, system: System, params: Any, noisy: Any, given: Conditions, compare: Compare) -> None:
    """The whole, and each window: of the overlap, its input has what the windows before made of it."""
    clean = denoise(system, params, noisy, given.text, "denoiser")
    compare("denoised", _channels_first(clean))
    scale = system.config.codec.later_frames_scale
    ready = np.asarray(clean).copy()
    ready[:, 1:] /= scale
    compare("latents_to_decode", _channels_first(ready))
    compare("frames", _channels_first(decode_pixels(system.codec, clean, scale)))
    for index, chunk in enumerate(case["denoiser_chunks"]["latent_frames"]):
        start, stop, begin = chunk["start"], chunk["stop"], chunk["written_from"]
        window = jnp.concatenate([clean[:, start:begin], noisy[:, begin:stop]], axis=1)
        compare(f"denoiser_chunk_{index}_input", _channels_first(window))
        out = denoise_window(system, params, window, begin, given.text, "denoiser")
        compare(f"denoiser_chunk_{index}_output", _channels_first(out))


def _frames_last(x_BTCHW: np.ndarray) -> np.ndarray:
    return np.moveaxis(x_BTCHW, 2, -1)


def _channels_first(x_BTHWC: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x_BTHWC), -1, 2)
