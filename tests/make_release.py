"""The files of a release as a user has them, of random values: to convert and sample at full size without its weights.

    python -m tests.make_release FOLDER [--size=full|tiny]

FOLDER gets starflow-v.yaml, starflow-v.pth (flow and denoiser, bfloat16), Wan2.2_VAE.pth (float32) with vae.json (its
channel statistics), and flan-t5-xl/ (config.json, spiece.model, float32 safetensors in two shards, decoder included).
With --size=full names, shapes, dtypes and counts are the published ones: 28 GB, written tensor by tensor. Values keep
activations as large as a trained model's, and what the flow's blocks predict small, so that samples are finite noise.
The tokenizer is a small one, of 288 pieces: the published one is not made of numbers.
"""

import argparse
import dataclasses
import json
import re
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from configs.released import VIDEO_7B
from starflow_jax.checkpoints.released import flow_shapes, unstack_to_released
from starflow_jax.codec.wan_stream import wan_config
from starflow_jax.codec.wan_weights import released_shapes
from starflow_jax.config import Codec, Model
from starflow_jax.io.tensor_files import StoredArray, write_safetensors
from starflow_jax.model.release import released_config
from starflow_jax.text.pretrained import FLAN_T5_XL
from starflow_jax.text.t5 import T5Config
from tests.pth_files import write_state_dict

Shapes = Mapping[str, tuple[int, ...]]
TOKENIZER = Path(__file__).parent / "golden" / "pipeline" / "t2v" / "t5" / "spiece.model"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The release's arguments, and the sizes that they do not say."""

    arguments: dict[str, Any]
    text: T5Config
    vae: dict[str, int]  # settings of `codec`


SIZES = {
    "full": Sizes(VIDEO_7B, FLAN_T5_XL, {}),
    "tiny": Sizes(
        VIDEO_7B | dict(img_size=64, vid_size="17:16", channel_size=8, channels=64, top_block_channels=128,
                        layers_per_block="1 1 1 1 1 2", pt_seq_len=5, txt_size=28, denoiser_window=3),
        T5Config(vocab_size=288, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3),
        {"encoder_width": 2, "decoder_width": 3}),
}


def make_release(folder: Path, size: str = "full") -> dict[str, int]:
    """Write the files; returns {file: how many parameters it holds}."""
    sizes = SIZES[size]
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "starflow-v.yaml"
    settings.write_text(yaml.safe_dump({"arguments": [{name: value} for name, value in sizes.arguments.items()]}))
    config = released_config(settings)
    flow = shapes_of_flow(dataclasses.replace(config.model, text_dim=sizes.text.d_model))
    write_state_dict(folder / "starflow-v.pth", random_tensors(flow, jnp.bfloat16))
    vae = shapes_of_vae(dataclasses.replace(config.codec, **sizes.vae), config.model.channels)
    write_state_dict(folder / "Wan2.2_VAE.pth", random_tensors(vae, np.float32))
    write_statistics(folder / "vae.json", config.model.channels)
    text = write_text_encoder(folder / "flan-t5-xl", sizes.text)
    return {name: sum(int(np.prod(shape)) for shape in shapes.values())
            for name, shapes in (("starflow-v.pth", flow), ("Wan2.2_VAE.pth", vae), ("flan-t5-xl", text))}


def shapes_of_flow(model: Model) -> Shapes:
    ours = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in flow_shapes(model).items()}
    return {name: tensor.shape for name, tensor in unstack_to_released(ours, model).items()}


def shapes_of_vae(settings: Codec, channels: int) -> Shapes:
    return released_shapes(wan_config(settings, channels))


def write_statistics(path: Path, channels: int) -> None:
    random = np.random.default_rng(0)
    path.write_text(json.dumps({"mean": random.normal(scale=0.3, size=channels).tolist(),
                                "std": random.uniform(0.4, 1.2, size=channels).tolist()}, indent=1))


def write_text_encoder(folder: Path, sizes: T5Config) -> Shapes:
    """Returns the shapes of its tensors."""
    folder.mkdir(exist_ok=True)
    said = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": True, "tie_word_embeddings": False, "num_decoder_layers": sizes.num_layers,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    (folder / "config.json").write_text(json.dumps({**said, **dataclasses.asdict(sizes)}, indent=1))
    shutil.copy2(TOKENIZER, folder)
    shards = {"model-00001-of-00002.safetensors": shapes_of_encoder(sizes),
              "model-00002-of-00002.safetensors": shapes_of_decoder(sizes)}
    for name, shapes in shards.items():
        write_safetensors(folder / name, random_tensors(shapes, np.float32), {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, shapes in shards.items() for name in shapes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return {name: shape for shapes in shards.values() for name, shape in shapes.items()}


def shapes_of_encoder(sizes: T5Config) -> Shapes:
    return {"shared.weight": (sizes.vocab_size, sizes.d_model),
            **_stack("encoder", sizes, attentions=("SelfAttention",))}


def shapes_of_decoder(sizes: T5Config) -> Shapes:
    return {**_stack("decoder", sizes, attentions=("SelfAttention", "EncDecAttention")),
            "lm_head.weight": (sizes.vocab_size, sizes.d_model)}


def _stack(stack: str, sizes: T5Config, attentions: tuple[str, ...]) -> Shapes:
    c, inner = sizes, sizes.num_heads * sizes.d_kv
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(c.num_layers):
        layers = f"{stack}.block.{block}.layer"
        for layer, attention in enumerate(attentions):
            shapes |= {f"{layers}.{layer}.{attention}.{name}.weight": (inner, c.d_model) for name in "qkv"}
            shapes |= {f"{layers}.{layer}.{attention}.o.weight": (c.d_model, inner),
                       f"{layers}.{layer}.layer_norm.weight": (c.d_model,)}
        last = f"{layers}.{len(attentions)}"
        shapes |= {f"{last}.DenseReluDense.{name}.weight": (c.d_ff, c.d_model) for name in ("wi_0", "wi_1")}
        shapes |= {f"{last}.DenseReluDense.wo.weight": (c.d_model, c.d_ff), f"{last}.layer_norm.weight": (c.d_model,)}
    bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return {**shapes, bias: (c.relative_attention_num_buckets, c.num_heads),
            f"{stack}.final_layer_norm.weight": (c.d_model,)}


def random_tensors(shapes: Shapes, dtype: Any) -> dict[str, StoredArray]:
    """Each drawn when it is read, and always the same."""
    def of(name: str, shape: tuple[int, ...]) -> StoredArray:
        return StoredArray(shape, dtype, lambda: random_tensor(name, shape).astype(dtype, copy=False))

    return {name: of(name, shape) for name, shape in shapes.items()}


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32; shape: as PyTorch has it, outputs first."""
    if re.search(r"(norm\.weight|gamma)$", name):
        return np.ones(shape, np.float32)
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    values *= scale_of(name, shape)
    return values


def scale_of(name: str, shape: tuple[int, ...]) -> float:
    """A matrix keeps the size of what it is given, but for a block's prediction, which is small."""
    if name == "shared.weight" or name.endswith("sos_embed"):
        return 1.0
    by_inputs = float(np.prod(shape[1:])) ** -0.5
    if name.endswith("Attention.q.weight"):  # T5's attention does not scale its scores: each has d_kv, 64, terms
        return by_inputs / 8
    return 0.1 * by_inputs if "proj_out" in name else by_inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="full")
    arguments = parser.parse_args()
    began = time.perf_counter()
    for name, parameters in make_release(arguments.folder, arguments.size).items():
        print(f"{arguments.folder / name}: {parameters:,} parameters")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
