"""Text to image: python -m starflow_jax.main --config=configs/t2i.py[:tiny|3b|released]

tiny      single pictures of moving digits: the first stage of configs/t2v.py:tiny, on a laptop
3b        the first stage of the paper's curriculum: images of 384p in Wan2.2 latents, text by flan-t5-xl
released  the released image model's numbers: 32x32 latents of 4 channels (codec.kind=kl), bare captions
"""

import dataclasses

from configs.released import image as released_image
from configs.t2v import at_resolution, paper
from configs.t2v import tiny as tiny_video
from starflow_jax.config import Config, choose_variant, to_config_dict


def tiny() -> Config:
    video = tiny_video("t2i_tiny")
    return dataclasses.replace(
        video,
        model=dataclasses.replace(video.model, frames=1, denoiser="none", local_shallow=True),
        data=dataclasses.replace(video.data, image_probability=1.0),
        train=dataclasses.replace(video.train, image_batch_size=0, batch_size=48))


def images_3b() -> Config:
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


def get_config(variant: str = "tiny"):
    variants = {"tiny": tiny, "3b": images_3b, "released": lambda: released_image("t2i_released")}
    return to_config_dict(choose_variant("configs/t2i.py", variants, variant))
