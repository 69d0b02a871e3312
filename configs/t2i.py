"""Text to image: python -m starflow_jax.main --config=configs/t2i.py[:3b]

3b  the released image model: 256x256 pixels in 32x32 latents of 4 channels, text 128 x 2048, no denoiser
"""

from starflow_jax.config import Codec, Config, Model, Sample, Text, Train, UserError, to_config_dict


def released_3b() -> Config:
    return Config(
        name="t2i_3b",
        model=Model(channels=4, frames=1, height=32, width=32, shallow_layers=(2, 2, 2, 2, 2), shallow_width=3072,
                    deep_layers=24, deep_width=3072, text_length=128, text_dim=2048, denoiser="none",
                    local_shallow=False, noise_std=0.3, dtype="bfloat16", remat="layer"),
        text=Text(encoder="frozen", fps=0),
        codec=Codec(kind="wan", stride=8, time_stride=1),
        train=Train(batch_size=512),
        sample=Sample(guidance=3.5, block_size=64),
    )


def get_config(variant: str = "3b"):
    variants = {"3b": released_3b}
    if variant not in variants:
        raise UserError(f"configs/t2i.py:{variant}: no such variant; there are {', '.join(variants)}")
    return to_config_dict(variants[variant]())
