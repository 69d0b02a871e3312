"""Text to image: python -m starflow_jax.main --config=configs/t2i.py[:tiny|3b|released]

tiny      single pictures of moving digits: the first stage of configs/t2v.py:tiny, on a laptop
3b        the first stage of the paper's curriculum: images of 384p in Wan2.2 latents, text by flan-t5-xl
released  the released image model's sizes, 32x32 latents of 4 channels and text 128 x 2048, to convert and score: its
          4-channel codec is not among ours
"""

import dataclasses

from configs.t2v import at_resolution, paper
from configs.t2v import tiny as tiny_video
from starflow_jax.config import Codec, Config, Model, Text, choose_variant, to_config_dict


def tiny() -> Config:
    video = tiny_video("t2i_tiny")
    return dataclasses.replace(
        video,
        model=dataclasses.replace(video.model, frames=1, denoiser="none", local_shallow=True),
        data=dataclasses.replace(video.data, image_probability=1.0),
        train=dataclasses.replace(video.train, image_batch_size=0, batch_size=48))


def recipe_3b() -> Config:
    """Images alone: no denoiser, no frame rate; the video model takes it over by train.init_from."""
    video = at_resolution(paper("t2i_3b", deep_layers=24, deep_width=3072), 384)
    return dataclasses.replace(
        video,
        model=dataclasses.replace(video.model, frames=1, denoiser="none", noise_std=0.3),
        text=dataclasses.replace(video.text, fps=0),
        data=dataclasses.replace(video.data, directory="prepared/images_384p", image_probability=1.0),
        train=dataclasses.replace(video.train, steps=200_000, batch_size=1_024, image_batch_size=1_024,
                                  learning_rate=1e-4),
        prepare=dataclasses.replace(video.prepare, output="prepared/images_384p", batch_size=64))


def released() -> Config:
    return Config(
        name="t2i_released",
        model=Model(channels=4, frames=1, height=32, width=32, shallow_layers=(2, 2, 2, 2, 2), shallow_width=3072,
                    deep_layers=24, deep_width=3072, text_length=128, text_dim=2048, denoiser="none",
                    noise_std=0.3, local_shallow=False, dtype="bfloat16", remat="layer"),
        text=Text(encoder="frozen", fps=0),
        codec=Codec(kind="wan", stride=8, time_stride=1),
    )


def get_config(variant: str = "tiny"):
    variants = {"tiny": tiny, "3b": recipe_3b, "released": released}
    return to_config_dict(choose_variant("configs/t2i.py", variants, variant))
