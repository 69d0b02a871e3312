"""The release's own YAML -> our settings: what each of its keys becomes, or why it has no effect on us (`KEYS`).

A configuration file of the release is `arguments:`, a list of one-key maps, and what it leaves out is as its trainer's
parser has it. Its sampling program overrides some of it; those values are SAMPLING.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from starflow_jax.config import (
    Codec,
    Config,
    Data,
    Model,
    Prepare,
    Sample,
    Solver,
    Text,
    Train,
    UserError,
    whole_number,
)
from starflow_jax.text.prompt import frame_size

# Context beyond the window, guidance and Jacobi as the release's sampling program and script have them; the YAML's
# `cfg` never applies there.
SAMPLING = dict(context_frames=16, guidance=3.5)
BLOCK, LATER_BLOCKS, TOLERANCE, MAX_STEPS = 32, 4, 1e-3, 32
TEXT_CHANNELS = {"small": 512, "base": 768, "large": 1024, "xl": 2048, "xxl": 4096}  # of flan-t5-...
ASPECT_RATIOS = "1:1,2:3,3:2,16:9,9:16,4:5,5:4,21:9,9:21"


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the YAML: the settings that it becomes, or why it has no effect; only: the values that can be
    honoured, where not all can."""

    becomes: str = ""
    without_effect: str = ""
    default: Any = None  # where the YAML does not have it; None: it must be there
    only: tuple[Any, ...] = ()


def _fixed(value: Any, why: str) -> Key:
    return Key(without_effect=why, default=value, only=(value,))


def _ignored(why: str) -> Key:
    return Key(without_effect=why, default="")


_ALWAYS, _NEVER = "the flow is always so", "the flow is never so"
_WHERE, _LONG = "names places on the authors' machines", "how long and how often the release trains and saves"
_MACHINE = "how the release lays a model out over its machines; ours: mesh, model.remat, model.dtype"
_SAMPLED = "the release's sampling program goes by its command line's; ours: sample"
_LOOK = "what the release's trainer draws of its samples; ours: train.sheet_clips"

KEYS: dict[str, Key] = {
    # model
    "channel_size": Key("model.channels"),
    "patch_size": Key("model.patch_size", default=1),
    "channels": Key("model.shallow_width, of the shallow blocks and the denoiser"),
    "top_block_channels": Key("model.deep_width", default=0),
    "blocks": Key("checked: the number of layers_per_block", default=0),
    "layers_per_block": Key("model.shallow_layers, model.deep_layers"),
    "head_dim": Key("model.head_dim", default=64),
    "pt_seq_len": Key("model.rope_extent", default=0),
    "shallow_block_local": Key("model.local_shallow", default=0, only=(0, 1)),
    "temporal_causal": Key("model.denoiser_lookahead: this less 1", default=0),
    "learnable_self_denoiser": Key("model.denoiser: every_layer, or none", default=0, only=(0, 1)),
    "conditional_denoiser": Key("checked: 1 with a denoiser, which always sees the text", default=0, only=(0, 1)),
    "denoiser_window": Key("model.denoiser_window", default=10),
    "noise_std": Key("model.noise_std"),
    "cond_noise_level": Key("text.metadata: noise_level; model.reference_noise: with it the loss is weighted",
                            default=0, only=(0, 1)),
    "rope": _fixed(1, _ALWAYS),
    "sos": _fixed(1, _ALWAYS),
    "nvp": _fixed(1, _ALWAYS),
    "use_softplus": _fixed(1, _ALWAYS),
    "use_final_norm": _fixed(1, _ALWAYS),
    "use_bias": _fixed(1, _ALWAYS),
    "soft_clip": _fixed(4, _ALWAYS),
    "cond_top_only": _fixed(1, "the deep block alone is always the one that sees text"),
    "seq_order": _fixed("L2R", "the deep block always reads left to right"),
    "norm_type": _fixed("layer_norm", _ALWAYS),
    "adaln": _fixed(0, _NEVER),
    "use_swiglu": _fixed(0, _NEVER),
    "use_qk_norm": _fixed(0, _NEVER),
    "use_post_norm": _fixed(0, _NEVER),
    "use_mm_attn": _fixed(0, _NEVER),
    "noise_embed_denoiser": _fixed(0, "the denoiser is not conditioned on the noise level"),
    "num_heads": _fixed(None, "heads are the width / head_dim"),
    "num_kv_heads": _fixed(None, "as many as there are heads"),
    "use_pretrained_lm": _fixed(None, _NEVER),
    # text and frames
    "text": Key("text.encoder=frozen; its channels are model.text_dim, which a conversion reads from the encoder"),
    "txt_size": Key("model.text_length"),
    "fps_cond": Key("text.metadata: fps", default=0, only=(0, 1)),
    "mix_aspect": Key("text.metadata: aspect_ratio; prepare.aspect_ratios; without it all frames are square", default=0,
                      only=(0, 1)),
    "img_size": Key("sample.side, model.height, model.width; prepare.resolution"),
    "vid_size": Key("frames:fps; model.frames, text.fps; an image model has none", default=""),
    "vae": Key("codec.kind; what stands behind a colon is codec.later_frames_scale"),
    "finetuned_vae": _fixed("none", "a VAE of other weights is named by convert.codec"),
    "vae_adapter": _fixed(None, "the VAE is used as it is"),
    "vae_decoder_factor": _fixed(1, "the VAE is used as it is"),
    # training
    "batch_size": Key("train.batch_size", default=192),
    "secondary_batch_size": Key("train.image_batch_size", default=0),
    "secondary_ratio": Key("data.image_probability", default=0),
    "secondary_img_size": _ignored("pictures have the size that --mode=prepare gave them; prepare.resolution is three "
                                   "quarters of this"),
    "secondary_vid_size": _fixed(None, "pictures are one frame"),
    "secondary_dataset": _ignored("ours: data.directory, several folders"),
    "lr": Key("train.learning_rate", default=0),
    "min_lr": Key("train.final_learning_rate", default=1e-6),
    "warmup_steps": Key("train.warmup_steps, where it is given", default=None),
    "drop_label": Key("data.caption_drop", default=0.1),
    "drop_image": Key("data.first_frame_drop", default=0),
    "grad_clip": Key("train.clip", default=1),
    "grad_skip": Key("train.skip_over_clip", default=0, only=(0, 1)),
    "acc": Key("train.accumulate", default=1),
    "noise_type": _fixed("gaussian", "the noise is always Gaussian"),
    "latent_norm_regularization": _fixed(0, "the loss is the likelihood alone"),
    "last_frame_cond": _fixed(0, "given frames are the first ones"),
    "video_to_video": _fixed(0, "given frames are the first ones"),
    "no_flip": _fixed(1, "nothing is mirrored"),
    "loss_scaling": _ignored("float32 gradients need none"),
    "use_8bit_adam": _fixed(0, "the optimizer is float32"),
    "fp8": _fixed(0, "ours: model.dtype"),
    "train_seed": _ignored("ours: train.seed"),
    "seed": _ignored("seeds give other numbers in JAX than in PyTorch"),
    **{name: _ignored(_MACHINE) for name in (
        "fsdp", "fsdp_text_encoder", "gradient_checkpoint", "gradient_checkpoint_mlp", "compile")},
    **{name: _ignored(_WHERE) for name in (
        "wds", "data", "dataset", "caption_column", "logdir", "resume_path", "wandb_name", "model_config_path",
        "checkpoint_path")},
    **{name: _ignored(_LONG) for name in (
        "epochs", "epoch_length", "resume_epoch", "save_every", "sample_freq", "dry_run")},
    **{name: _ignored(_LOOK) for name in ("num_samples", "sample_batch_size", "save_folder")},
    # sampling: its program's own command line overrides these, given or not
    "cfg": _ignored("the release's sampling program goes by its command line's; ours: sample.guidance=3.5, as its "
                    "script gives it"),
    "local_attn_window": _ignored("the window is the training length, as where the script gives a target length"),
    **{name: _ignored(_SAMPLED) for name in (
        "aspect_ratio", "attn_temp", "caption", "context_length", "denoising_batch_size", "disable_learnable_denoiser",
        "guide_top", "input_image", "jacobi", "jacobi_block_size", "jacobi_max_iter", "jacobi_th", "out_fps",
        "return_sequence", "self_denoising_lr", "target_length", "target_noise_std")},
}


def released_config(path: Path) -> Config:
    """The settings of a YAML file of the release. Raises UserError for what can't be read or honoured."""
    return config_of(read_arguments(path), name=path.stem.replace("-", "_"), source=str(path))


def read_arguments(path: Path) -> dict[str, Any]:
    """{key: value} of `arguments:`, a list of one-key maps or one map. Raises UserError where it is none."""
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
        listed = held["arguments"]
        maps = [listed] if isinstance(listed, dict) else listed
        return {key: value for one in maps for key, value in one.items()}
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: can't be read as a YAML of the release, `arguments:` and a list of keys "
                        f"({' '.join(str(error).split()) or type(error).__name__})") from error


def config_of(arguments: Mapping[str, Any], name: str, source: str) -> Config:
    """The settings of the release's keys. Raises UserError for unknown keys and values that can't be honoured."""
    given = _checked(arguments, source)
    image = not given["vid_size"]
    codec, stride = _codec(given["vae"], source), 8 if image else 16
    side = given["img_size"] // stride * stride
    ratio, (height, width) = _shape(side, stride, given["patch_size"], bool(given["mix_aspect"]))
    frames, fps = (1, 0) if image else _length(given["vid_size"], source)
    layers = given["layers_per_block"]
    denoiser = bool(given["learnable_self_denoiser"])
    stated = {"noise_level": given["cond_noise_level"], "fps": given["fps_cond"], "aspect_ratio": given["mix_aspect"]}
    model = Model(
        channels=given["channel_size"], frames=frames, height=height // stride, width=width // stride,
        patch_size=given["patch_size"], shallow_layers=layers[:-1], shallow_width=given["channels"],
        deep_layers=layers[-1], deep_width=given["top_block_channels"] or given["channels"],
        head_dim=given["head_dim"], rope_extent=float(given["pt_seq_len"] or side // stride // given["patch_size"]),
        local_shallow=bool(given["shallow_block_local"]), text_length=given["txt_size"],
        text_dim=_text_channels(given["text"], source), denoiser="every_layer" if denoiser else "none",
        denoiser_window=given["denoiser_window"], denoiser_lookahead=max(given["temporal_causal"] - 1, 0),
        noise_std=float(given["noise_std"]),
        # The release multiplies the denoiser's output by 0.3 whatever its loss was weighted by.
        reference_noise=0.3 if given["cond_noise_level"] or denoiser else 0.0, dtype="bfloat16", remat="layer")
    train = {} if given["warmup_steps"] is None else {"warmup_steps": given["warmup_steps"]}
    return Config(
        name=name, model=model, codec=codec,
        text=Text(encoder="frozen", metadata=",".join(key for key, states in stated.items() if states), fps=fps,
                  aspect_ratio=ratio),
        data=Data(source="prepared", directory=f"prepared/{side * 3 // 4}p", latents=True,
                  image_probability=1.0 if image else float(given["secondary_ratio"]),
                  caption_drop=float(given["drop_label"]), first_frame_drop=float(given["drop_image"])),
        train=Train(
            batch_size=given["batch_size"], image_batch_size=given["secondary_batch_size"], accumulate=given["acc"],
            learning_rate=float(given["lr"] or Train.learning_rate), final_learning_rate=float(given["min_lr"]),
            clip=float(given["grad_clip"]), skip_over_clip=bool(given["grad_skip"]), denoiser_beta2=0.999, ema=0.0,
            **train),
        sample=_sampling(frames, side),
        prepare=_preparation(side, bool(given["mix_aspect"])))


def _shape(side: int, stride: int, patch_size: int, mixed: bool) -> tuple[str, tuple[int, int]]:
    """The aspect ratio that is sampled where none is asked for, and its rows and columns of pixels."""
    ratios = ("16:9", *ASPECT_RATIOS.split(",")) if mixed else ("1:1",)
    sizes = {ratio: frame_size(side, ratio, stride) for ratio in ratios}
    whole = [ratio for ratio, size in sizes.items() if all(one // stride % patch_size == 0 for one in size)]
    ratio = (whole or ratios)[0]
    return ratio, sizes[ratio]


def _sampling(frames: int, side: int) -> Sample:
    """As the release's sampling program and script have it; our context where the window has no room for theirs."""
    context = SAMPLING["context_frames"] if frames > SAMPLING["context_frames"] else 0
    solver = Solver(kind="jacobi", block_size=LATER_BLOCKS * BLOCK, first_block_size=BLOCK, tolerance=TOLERANCE,
                    max_steps=MAX_STEPS)
    return Sample(guidance=SAMPLING["guidance"], context_frames=int(context), side=side, solver=solver, batch_size=1,
                  as_released=True)


def _preparation(side: int, mixed: bool) -> Prepare:
    return Prepare(resolution=side * 3 // 4, output=f"prepared/{side * 3 // 4}p", latents=True, text_features=True,
                   aspect_ratios=ASPECT_RATIOS if mixed else "1:1")


def _checked(arguments: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Every key's value, of the type of its default, or of the layers a tuple."""
    unknown = [name for name in arguments if name not in KEYS]
    if unknown:
        raise UserError(f"{source}: unknown key {', '.join(map(str, unknown))}; see KEYS in "
                        "starflow_jax/model/release.py")
    missing = [name for name, key in KEYS.items()
               if name not in arguments and key.default is None and not key.without_effect and name != "warmup_steps"]
    if missing:
        raise UserError(f"{source}: has no {', '.join(missing)}")
    given = {name: arguments.get(name, key.default) for name, key in KEYS.items()}
    for name, key in KEYS.items():
        value = None if given[name] == "None" else given[name]
        if key.only and value not in key.only:
            words = " or ".join(map(str, key.only))
            why = key.without_effect or key.becomes
            raise UserError(f"{source}: {name}={value}: only {words} can be honoured; {why}")
    given["layers_per_block"] = _layers(given["layers_per_block"], source)
    for name in NUMBERS:
        given[name] = _number(name, given[name], source)
    for name in ("patch_size", "img_size"):  # of which the others' values are made
        if type(given[name]) is not int or given[name] < 1:
            raise UserError(f"{source}: {name}={given[name]}: must be a whole number from 1 on")
    if given["blocks"] and given["blocks"] != len(given["layers_per_block"]):
        raise UserError(f"{source}: blocks={given['blocks']}: layers_per_block names {len(given['layers_per_block'])}")
    if given["learnable_self_denoiser"] and not given["conditional_denoiser"]:
        raise UserError(f"{source}: conditional_denoiser=0: only 1 can be honoured; our denoiser always sees the text")
    return given


LARGEST = 1_000_000_000
NUMBERS = ("channel_size", "patch_size", "channels", "top_block_channels", "blocks", "head_dim", "pt_seq_len",
           "temporal_causal", "denoiser_window", "txt_size", "img_size", "batch_size", "secondary_batch_size", "acc",
           "noise_std", "lr", "min_lr", "secondary_ratio", "drop_label", "drop_image", "grad_clip")


def _number(name: str, value: Any, source: str) -> Any:
    """YAML reads 5e-5 as text."""
    try:
        number = float(value or 0)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{source}: {name}={value!r:.100}: must be a number") from error
    if not 0 <= number <= LARGEST:
        raise UserError(f"{source}: {name}={value!r:.100}: must be 0 to {LARGEST}")
    return int(number) if number.is_integer() else number


def _layers(value: Any, source: str) -> tuple[int, ...]:
    words = str(value).split()
    layers = [whole_number(word) for word in words]
    if len(words) < 2 or not all(layers):
        raise UserError(f"{source}: layers_per_block={value!r}: must be numbers of layers, of one shallow block or "
                        "more and of the deep block, such as 2 2 2 2 2 24")
    return tuple(filter(None, layers))


def _length(vid_size: str, source: str) -> tuple[int, int]:
    """(latent frames, frames per second) of "81:16"."""
    frames, fps = map(whole_number, str(vid_size).partition(":")[::2])
    if frames is None or fps is None or frames % 4 != 1:
        raise UserError(f"{source}: vid_size={vid_size!r}: must be frames:fps, frames 1 + a multiple of 4, such as "
                        "81:16")
    return 1 + (frames - 1) // 4, fps


def _text_channels(text: str, source: str) -> int:
    size = str(text).rpartition("flan-t5-")[2]
    if size not in TEXT_CHANNELS:
        raise UserError(f"{source}: text={text!r}: only flan-t5-{', -'.join(TEXT_CHANNELS)} can be honoured")
    return TEXT_CHANNELS[size]


def _codec(vae: str, source: str) -> Codec:
    """Of "Wan-AI/Wan2.2-TI2V-5B-Diffusers:0.6", or of the image model's "stabilityai/sd-vae-ft-ema"."""
    name, _, scale = str(vae).partition(":")
    if "wan2.2" in name.lower():
        return Codec(kind="wan", stride=16, time_stride=4, later_frames_scale=float(_number("vae", scale or 1, source)))
    if "sd-vae" in name.lower():
        return Codec(kind="kl", stride=8, time_stride=1)
    raise UserError(f"{source}: vae={vae!r}: only the Wan2.2 VAE and sd-vae-ft-ema (or -mse) can be honoured")
