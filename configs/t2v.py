"""Text and images to video: python -m starflow_jax.main --config=configs/t2v.py[:VARIANT]

tiny          moving digits, 13 frames of 24x24 pixels: trains on two CPU cores, nothing is downloaded
tiny_long     the same model, trained for hours on two CPU cores
tiny_gpu      with larger batches, on a GPU
tiny_control  what lets the model in the package follow a camera

The paper's curriculum, 81 frames in Wan2.2 latents, text by flan-t5-xl; each stage starts from the one before it, by
--config.train.init_from=WORKDIR. The paper's page gives the order and the last stage's batch; steps are ours.

(configs/t2i.py:3b)  images
3b_384p              video of 384p
3b                   video of 480p
7b                   a wider deep block (4096 instead of 3072)
"""

import dataclasses

from configs.released import video_7b
from starflow_jax.config import (
    Codec,
    Config,
    Data,
    Evaluate,
    Model,
    Sample,
    Solver,
    Text,
    Train,
    choose_variant,
    to_config_dict,
)
from starflow_jax.text.prompt import frame_size


def tiny(name: str = "tiny", **train) -> Config:
    return Config(
        name=name,
        model=Model(channels=48, frames=4, height=6, width=6, shallow_layers=(1, 1), shallow_width=128,
                    deep_layers=4, deep_width=192, text_length=28, text_dim=128, denoiser_layers=2,
                    noise_std=0.15, unroll_layers=True),
        text=Text(encoder="trained", vocab_size=256, fps=8),
        codec=Codec(kind="patch", stride=4, time_stride=4),
        data=Data(image_probability=0.5),
        train=Train(**{**TINY_TRAIN, **train}),
        sample=Sample(guidance=2.0, context_frames=1),
    )


def tiny_long(name: str, **train) -> Config:
    """More clips, and more of them without their first frame, as the window's later positions see them."""
    config = tiny(name, **train)
    return dataclasses.replace(config, data=dataclasses.replace(
        config.data, train_clips=100_000, image_probability=0.7, first_frame_drop=0.4))


def tiny_control() -> Config:
    config = tiny("tiny_control")
    return dataclasses.replace(
        config, train=Train(**TINY_CONTROL_TRAIN), data=dataclasses.replace(
            config.data, camera=True, train_clips=50_000, image_probability=0.0, first_frame_drop=0.4))


TINY_TRAIN = dict(
    steps=220, batch_size=16, image_batch_size=48, learning_rate=1.5e-3, final_learning_rate=5e-5,
    denoiser_learning_rate=1.5e-3, warmup_steps=50, ema=0.998, log_every=10, checkpoint_every=100,
    evaluate_every=220, validation_clips=128)

TINY_LONG_TRAIN = dict(
    steps=12_000, batch_size=32, image_batch_size=128, optimizer="muon", learning_rate=1e-3, final_learning_rate=1e-5,
    denoiser_learning_rate=1e-3, warmup_steps=100, log_every=50, checkpoint_every=250, evaluate_every=1_000,
    validation_clips=256, adherence_prompts=100)

TINY_GPU_TRAIN = dict(
    TINY_LONG_TRAIN, batch_size=64, image_batch_size=192, ema=0.999, checkpoint_every=1_000, evaluate_every=2_000)


TINY_CONTROL_TRAIN = dict(
    target="control", steps=6_000, batch_size=32, optimizer="muon", learning_rate=1e-2, final_learning_rate=1e-5,
    warmup_steps=20, ema=0.995, log_every=50, checkpoint_every=250, evaluate_every=500, validation_clips=256,
    sheet_clips=0)


def paper(name: str, deep_layers: int, deep_width: int) -> Config:
    """The release's numbers, and where our config differs (docs: released weights)."""
    base = video_7b(name)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, deep_layers=deep_layers, deep_width=deep_width, denoiser="first_layer"),
        train=dataclasses.replace(base.train, steps=25_000, evaluate_every=2_500, sheet_clips=4, ema=Train.ema,
                                  skip_over_clip=False),
        sample=dataclasses.replace(base.sample, solver=Solver(), context_frames=0, as_released=False),
        evaluate=Evaluate(clips=256, prompts=16))


def at_resolution(config: Config, resolution: int, steps: int = 0) -> Config:
    """A paper's size at another resolution; positions keep their extent, so that a model learns on from the other."""
    side, stride = round(resolution * 4 / 3), config.codec.stride
    height, width = frame_size(side, config.text.aspect_ratio, stride)
    folder = f"prepared/{resolution}p"
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, height=height // stride, width=width // stride),
        data=dataclasses.replace(config.data, directory=folder),
        train=dataclasses.replace(config.train, steps=steps or config.train.steps),
        sample=dataclasses.replace(config.sample, side=side),
        prepare=dataclasses.replace(config.prepare, resolution=resolution, output=folder))


def get_config(variant: str = "tiny"):
    variants = {
        "tiny": tiny,
        "tiny_long": lambda: tiny_long("tiny_long", **TINY_LONG_TRAIN),
        "tiny_gpu": lambda: tiny_long("tiny_gpu", **TINY_GPU_TRAIN),
        "tiny_control": tiny_control,
        "3b_384p": lambda: at_resolution(paper("3b_384p", deep_layers=24, deep_width=3072), 384, steps=50_000),
        "3b": lambda: paper("3b", deep_layers=24, deep_width=3072),
        "7b": lambda: paper("7b", deep_layers=24, deep_width=4096),
    }
    return to_config_dict(choose_variant("configs/t2v.py", variants, variant))
