"""A picture and a text to video: python -m starflow_jax.main --config=configs/ti2v.py[:VARIANT]

The flow fills its cache with a given first frame by its own forward pass, so any text-to-video model can do this as it
is: --mode=sample --workdir=WORKDIR_OF_T2V --config.sample.image=FILE. These variants of configs/t2v.py train a model
further (--config.train.init_from=WORKDIR_OF_T2V) for this task alone: clips with their first frame, no single images.
"""

import dataclasses

from configs import t2v
from starflow_jax.config import from_config_dict, to_config_dict


def get_config(variant: str = "tiny"):
    video = from_config_dict(t2v.get_config(variant))
    return to_config_dict(dataclasses.replace(
        video,
        name=f"ti2v_{variant}",
        data=dataclasses.replace(video.data, image_probability=0.0, first_frame_drop=0.0),
        train=dataclasses.replace(video.train, learning_rate=video.train.learning_rate / 5)))
