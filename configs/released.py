"""The release's own YAML as settings: python -m starflow_jax.main --config=configs/released.py:FILE.yaml --mode=convert

FILE.yaml  a configuration file of the release; what each of its keys becomes: starflow_jax/model/release.py
7b         the published video model's numbers, without a file
t2i        the published image model's, as far as they are known

A converted workdir keeps these settings: --mode=sample --workdir=WORKDIR needs no --config.
"""

from pathlib import Path

from starflow_jax.config import Config, UserError, to_config_dict
from starflow_jax.model.release import config_of, released_config

VIDEO_7B = dict(
    img_size=640, vid_size="81:16", channel_size=48, patch_size=1, channels=3072, top_block_channels=4096, blocks=6,
    layers_per_block="2 2 2 2 2 24", pt_seq_len=32, txt_size=256, text="google/flan-t5-xl",
    vae="Wan-AI/Wan2.2-TI2V-5B-Diffusers:0.6", noise_std=0.5, cond_noise_level=1, fps_cond=1, mix_aspect=1,
    learnable_self_denoiser=1, conditional_denoiser=1, denoiser_window=10, temporal_causal=2, shallow_block_local=1,
    batch_size=192, secondary_batch_size=1536, secondary_ratio=0.2, secondary_img_size=512, lr=5e-5, min_lr=1e-6,
    drop_label=0.1, drop_image=0.25, grad_clip=1, grad_skip=1)

IMAGE = dict(
    img_size=256, channel_size=4, patch_size=1, channels=3072, blocks=6, layers_per_block="2 2 2 2 2 24", txt_size=128,
    text="google/flan-t5-xl", vae="stabilityai/sd-vae-ft-ema", noise_std=0.3)


def video_7b(name: str = "released_7b") -> Config:
    return config_of(VIDEO_7B, name, "configs/released.py:7b")


def image(name: str = "released_t2i") -> Config:
    return config_of(IMAGE, name, "configs/released.py:t2i")


def get_config(variant: str = "7b"):
    if variant.endswith((".yaml", ".yml")):
        return to_config_dict(released_config(Path(variant)))
    variants = {"7b": video_7b, "t2i": image}
    if variant not in variants:
        raise UserError(f"configs/released.py:{variant}: must be a .yaml file of the release, or {', '.join(variants)}")
    return to_config_dict(variants[variant]())
