"""The paper's ablations on small models: python -m starflow_jax.main --config=configs/ablations.py:VARIANT[-SEED]

base                what the others are compared with: configs/t2v.py:tiny, trained for STEPS steps
global_shallow      shallow blocks see all frames
noise_0 noise_0.05 noise_0.3   another standard deviation of the training noise (base: 0.15); 0 stands for what rounding
                    to 256 levels does to latents: without any noise the density of 8-bit pixels has no bound
no_images           clips alone
no_drop             every clip has its first frame
width_128 width_256 width_384   another width of the deep block (base: 192), the others narrower or wider with it, for
                    as many multiply-adds in all as the base
decoder             beside the model in the package: a decoder for noised latents (train.target=decoder)

SEED is train.seed, 0 where none is given; the workdir is runs/ablations/VARIANT-SEED by default, which
--mode=evaluate --config.evaluate.task=ablations looks for (docs: experiments). On a GPU: more --config.train.steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from configs.t2v import tiny
from starflow_jax.config import Config, Evaluate, Model, UserError, choose_variant, to_config_dict, whole_number

STEPS = 500  # five minutes on one CPU core
# Standard deviation of rounding pixels in [-1, 1] to 256 levels, 2 / 255 / sqrt(12), in units of the package's codec.
ROUNDING = 0.001
SHALLOW = {128: 64, 256: 192, 384: 256}  # width of the shallow blocks and the denoiser, by that of the deep block


def base() -> Config:
    config = tiny("base")
    steps = dict(steps=STEPS, evaluate_every=STEPS, checkpoint_every=200, keep_checkpoints=1, sheet_clips=4)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **steps),
                               evaluate=Evaluate(clips=500, prompts=100))


def with_model(**changes: Any) -> Config:
    config = base()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def with_data(**changes: Any) -> Config:
    config = base()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def with_noise(noise_std: float) -> Config:
    """The loss without the weight noise_std / 0.3, which would vanish with the noise."""
    return with_model(noise_std=noise_std, reference_noise=0.0)


def with_width(deep_width: int) -> Config:
    config = base()
    model = dataclasses.replace(config.model, deep_width=deep_width, shallow_width=SHALLOW[deep_width])
    steps = round(STEPS * multiply_adds(config.model) / multiply_adds(model))
    return dataclasses.replace(config, model=model, train=dataclasses.replace(
        config.train, steps=steps, evaluate_every=steps))


def multiply_adds(model: Model) -> int:
    """Of a token in the layers' matrices: 12 width^2 in each."""
    narrow = sum(model.shallow_layers) + model.denoiser_layers
    return 12 * (narrow * model.shallow_width**2 + model.deep_layers * model.deep_width**2)


def decoder() -> Config:
    config = base()
    return dataclasses.replace(config, train=dataclasses.replace(config.train, target="decoder"))


VARIANTS: dict[str, Callable[[], Config]] = {
    "base": base,
    "global_shallow": lambda: with_model(local_shallow=False),
    "noise_0": lambda: with_noise(ROUNDING),
    "noise_0.05": lambda: with_noise(0.05),
    "noise_0.3": lambda: with_noise(0.3),
    "no_images": lambda: with_data(image_probability=0.0),
    "no_drop": lambda: with_data(first_frame_drop=0.0),
    "width_128": lambda: with_width(128),
    "width_256": lambda: with_width(256),
    "width_384": lambda: with_width(384),
    "decoder": decoder,
}


def get_config(variant: str = "base"):
    name, _, seed = variant.partition("-")
    config = choose_variant("configs/ablations.py", VARIANTS, name)
    number = whole_number(seed or "0")
    if number is None:
        raise UserError(f"configs/ablations.py:{variant}: the seed behind the variant must be a whole number")
    return to_config_dict(dataclasses.replace(
        config, name=f"ablations/{name}-{number}", train=dataclasses.replace(
            config.train, seed=number)))
