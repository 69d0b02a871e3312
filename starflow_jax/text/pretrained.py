"""A published T5 v1.1 (flan-t5-xl) as the frozen text encoder: its folder of safetensors, settings and tokenizer.

    huggingface-cli download google/flan-t5-xl config.json spiece.model "*.safetensors*" --local-dir flan-t5-xl
"""

import functools
from pathlib import Path

from starflow_jax.config import UserError
from starflow_jax.io.checksums import check_file
from starflow_jax.io.files import read_json
from starflow_jax.io.tensor_files import StoredArray, open_safetensors
from starflow_jax.text.t5 import T5Config, stack_t5
from starflow_jax.text.tokenizer import Tokenizer

SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets",
         "relative_attention_max_distance", "layer_norm_epsilon")


FLAN_T5_XL = T5Config(vocab_size=32_128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32)


def encoder_config(folder: Path, text_dim: int) -> T5Config:
    """The encoder's sizes from its config.json.

    Raises UserError where it is missing, of another kind of model, or its features have not `text_dim` channels.
    """
    config = _encoder_config(folder)
    if config.d_model != text_dim:
        raise UserError(f"{folder / 'config.json'}: its features have {config.d_model} channels, model.text_dim="
                        f"{text_dim}; take the encoder that the model was trained with (flan-t5-xl: 2048)")
    return config


def encoder_channels(folder: Path) -> int:
    """Channels of the encoder's features. Raises UserError as `encoder_config`."""
    return _encoder_config(folder).d_model


@functools.lru_cache  # asked for with every module that is built
def _encoder_config(folder: Path) -> T5Config:
    path = _file_of(folder, "config.json")
    check_file(path)
    try:
        settings = read_json(path)
        kind = settings.get("feed_forward_proj"), settings.get("model_type", "t5")
        config = T5Config(**{name: settings[name] for name in SIZES if name in settings})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: can't be read as the settings of a T5 encoder ({error})") from error
    if kind != ("gated-gelu", "t5"):
        raise UserError(f"{path}: is no T5 v1.1 (its model_type is {kind[1]!r}, its feed_forward_proj {kind[0]!r}, "
                        "not 'gated-gelu'); take flan-t5-xl")
    return config


def load_tokenizer(folder: Path) -> Tokenizer:
    """Its sentencepiece model. Raises UserError where it is missing or none."""
    return Tokenizer.load(_file_of(folder, "spiece.model"))


def open_encoder(folder: Path, text_dim: int) -> dict[str, StoredArray]:
    """{"layers/attention/q/kernel": array} of the parameters of T5Encoder(encoder_config(folder)), float32, each read
    on first use; a decoder's are passed over.

    Raises UserError for a folder that holds no such encoder.
    """
    config = encoder_config(folder, text_dim)
    return stack_t5(open_safetensors(folder), config)


def _file_of(folder: Path, name: str) -> Path:
    path = _folder(folder) / name
    if not path.exists():
        raise UserError(f"text.weights={str(folder)!r}: holds no {name}; give a folder as google/flan-t5-xl is "
                        "published, with config.json, spiece.model and safetensors")
    return path


def _folder(folder: Path) -> Path:
    if folder == Path() or not folder.is_dir():
        raise UserError(f"text.weights={'' if folder == Path() else str(folder)!r}: must be a folder with the frozen "
                        "text encoder; download google/flan-t5-xl and name it with --config.text.weights=DIR")
    return folder
