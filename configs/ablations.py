"""The paper's ablations on small models: python -m starflow_jax.main --config=configs/ablations.py:VARIANT[-SEED]

The package's model, which runs/ablations/start holds (docs: experiments), trained on with one thing changed:
base                what the others are compared with
global_shallow      shallow blocks see all frames
noise_0 noise_0.05 noise_0.3   another standard deviation of the training noise (base: 0.15); 0 stands for what rounding
                    to 256 levels does to latents: without any noise the density of 8-bit pixels has no bound
no_images           clips alone
no_drop             every clip has its first frame

From random parameters, for as many multiply-adds in all as width_192 in STEPS steps; compared by likelihood alone:
width_128 width_192 width_256 width_384   width of the deep block, the others narrower or wider with it

decoder             beside the model in the package: a decoder for noised latents (train.target=decoder)

SEED is train.seed, 0 where none is given; the workdir is runs/ablations/VARIANT-SEED by default, which
--mode=evaluate --config.evaluate.task=ablations looks for (docs: experiments). On a GPU: more --config.train.steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from configs.t2v import tiny_long
from starflow_jax.config import Config, Evaluate, Model, UserError, choose_variant, to_config_dict, whole_number

START = "runs/ablations/start"
STEPS, DECODER_STEPS = 300, 6_000  # five minutes and a quarter of an hour on one CPU core
# Standard deviation of rounding pixels in [-1, 1] to 256 levels, 2 / 255 / sqrt(12), in units of the package's codec.
ROUNDING = 0.001
SHALLOW = {128: 64, 192: 128, 256: 192, 384: 256}  # width of the shallow blocks and the denoiser, by the deep block's


def trained_for(steps: int, learning_rate: float, ema: float, init_from: str = "", prompts: int = 100) -> Config:
    return dataclasses.replace(tiny_long(
        "base", init_from=init_from, steps=steps, learning_rate=learning_rate, denoiser_learning_rate=learning_rate,
        final_learning_rate=1e-5, ema=ema, evaluate_every=steps, checkpoint_every=200, keep_checkpoints=1,
        sheet_clips=4), evaluate=Evaluate(clips=500, prompts=prompts))


def base() -> Config:
    return trained_for(STEPS, 5e-4, 0.98, START)


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
    usual = trained_for(STEPS, 1.5e-3, 0.99, prompts=12)
    model = dataclasses.replace(usual.model, deep_width=deep_width, shallow_width=SHALLOW[deep_width])
    steps = round(STEPS * multiply_adds(usual.model) / multiply_adds(model))
    return dataclasses.replace(usual, model=model, train=dataclasses.replace(
        usual.train, steps=steps, evaluate_every=steps))


def multiply_adds(model: Model) -> int:
    """Of a token in the layers' matrices: 12 width^2 in each."""
    narrow = sum(model.shallow_layers) + model.denoiser_layers
    return 12 * (narrow * model.shallow_width**2 + model.deep_layers * model.deep_width**2)


def decoder() -> Config:
    config = trained_for(DECODER_STEPS, 1.5e-3, 0.99)
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
    "width_192": lambda: with_width(192),
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
