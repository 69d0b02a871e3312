"""Readers of formats that others define, with whole files for each: FOREIGN."""

import dataclasses
import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from starflow_jax.config import UserError
from tests.robustness.trial import Reader, without_checksums

FPS = 8


def frames(count: int = 5) -> np.ndarray:
    rows, columns = np.mgrid[:32, :48]
    return np.stack([np.stack([rows * 8, columns * 5, (rows + columns + 9 * index) % 256], axis=-1)
                     for index in range(count)]).astype(np.uint8)


def _first(folder: Path, pattern: str) -> Path:
    return next(iter(sorted(folder.glob(pattern))))


# Pictures and video.

VIDEO_KINDS = {"a.mp4": "libx264", "b.mkv": "mpeg4", "c.avi": "mjpeg", "d.mov": "png", "e.mkv": "ffv1",
               "f.webm": "libvpx", "g.ts": "mpeg2video", "h.gif": "gif"}


def _make_videos(folder: Path) -> None:
    import av

    from starflow_jax.io.video import mp4_bytes

    (folder / "z.mp4").write_bytes(mp4_bytes(frames(), FPS))
    for name, codec in VIDEO_KINDS.items():
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=25 if codec == "mpeg2video" else FPS)
            stream.height, stream.width = 32, 48
            stream.pix_fmt = stream.codec_context.codec.video_formats[0].name
            for frame in frames():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))


def _read_video(_: Path, path: Path) -> Any:
    from starflow_jax.io.video import read_video

    return read_video(path)


def _job() -> Any:
    from starflow_jax.config import Prepare
    from starflow_jax.data.raw.job import Bucket, Job

    return Job(Prepare(fps=0, max_upscale=4.0, min_brightness=0.0, min_motion=0.0, cut_threshold=0.0), folder="",
               buckets=(Bucket(16, 24, "3:2"), Bucket(24, 16, "2:3")), frames=3)


def _cut(media: str | bytes, is_image: bool) -> None:
    from starflow_jax.data.raw.clips import cut
    from starflow_jax.data.raw.sources import Item

    for _ in cut(Item("key", media, is_image, "long", "short"), _job()):
        pass


def _cut_video(_: Path, path: Path) -> None:
    _cut(str(path), is_image=False)
    _cut(path.read_bytes(), is_image=False)


def _cut_picture(_: Path, path: Path) -> None:
    _cut(path.read_bytes(), is_image=True)


def _make_pictures(folder: Path) -> None:
    picture, later = (Image.fromarray(frame) for frame in frames(2))
    turned = Image.Exif()
    turned[274] = 6
    picture.save(folder / "a.jpg", exif=turned)
    picture.save(folder / "b.jpeg", progressive=True, subsampling=0)
    for suffix in ("webp", "bmp", "tiff", "ppm"):
        picture.save(folder / f"c.{suffix}")
    picture.save(folder / "d.png")
    picture.convert("P").save(folder / "e.png", save_all=True, append_images=[later.convert("P")])
    picture.convert("P").save(folder / "f.gif", save_all=True, append_images=[later])
    picture.save(folder / "g.tiff", compression="tiff_lzw")


def _read_picture(_: Path, path: Path) -> Any:
    from starflow_jax.io.pictures import read_image

    return read_image(path)


# Tensors.


def _make_safetensors(folder: Path) -> None:
    import jax.numpy as jnp

    from starflow_jax.io.tensor_files import write_safetensors

    tensors = {"a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "a/c": np.ones(3, jnp.bfloat16),
               "d": np.zeros((), np.int64), "e": np.zeros((0, 2), np.float16)}
    write_safetensors(folder / "one.safetensors", tensors, {"format": "pt"})
    (folder / "shards").mkdir()
    for index, name in enumerate(sorted(tensors)):
        write_safetensors(folder / "shards" / f"{index}.safetensors", {name: tensors[name]})
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps({
        "weight_map": {name: f"{index}.safetensors" for index, name in enumerate(sorted(tensors))}}))


def _read_safetensors(folder: Path, _: Path) -> None:
    from starflow_jax.io.arrays import import_arrays
    from starflow_jax.io.tensor_files import open_safetensors

    refused = None
    for read in (lambda: open_safetensors(folder / "shards"), lambda: open_safetensors(folder / "one.safetensors"),
                 lambda: import_arrays(folder / "one.safetensors")):
        try:
            all_of(read())
        except UserError as error:
            refused = error
    if refused:
        raise refused


def all_of(arrays: Any) -> None:
    for array in arrays.values():
        all_of(array) if isinstance(array, dict) else np.asarray(array)


def _make_pth(folder: Path) -> None:
    from tests.pth_files import view, write

    storages = {"0": np.arange(6, dtype=np.float32), "1": np.arange(4)}
    write(folder / "a.pth", {"state": {"x": view("0", 0, (2, 3), (3, 1)), "y": view("0", 1, (2, 2), (1, 3))},
                             "list": [view("1", 0, (4,), (1,), "LongStorage", 4)], "step": 3}, storages)


def _read_pth(_: Path, path: Path) -> None:
    from starflow_jax.checkpoints.torch_files import open_weights

    all_of(open_weights(path))


def _pickle_of(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read("a/data.pkl")


def _pth_of(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/data/0", np.arange(6, dtype=np.float32).tobytes())
        archive.writestr("a/data/1", np.arange(4).tobytes())
    return file.getvalue()


def _make_array_pickles(folder: Path) -> None:
    tree = {"layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(3)}}
    (folder / "weights.ckpt").write_bytes(pickle.dumps(tree, protocol=4))


def _read_array_pickle(_: Path, path: Path) -> Any:
    from starflow_jax.evaluation.networks import read_arrays

    return read_arrays(path)


def _model() -> Any:
    from tests.helpers import tiny_model

    return tiny_model()


def _make_peft(folder: Path) -> None:
    from starflow_jax.checkpoints.peft import WEIGHTS, write_peft
    from starflow_jax.model.lora import kernel_shapes

    shapes = {name: shape for name, shape in kernel_shapes(_model()).items() if "/deep/" in name}
    factors = {name: (np.ones((layers, inputs, 2), np.float32), np.ones((layers, 2, *features), np.float32))
               for name, (layers, inputs, *features) in shapes.items()}
    write_peft(folder / WEIGHTS, factors, _model(), rank=2, alpha=3.0, backbone="1234", base="b")


def _read_peft(folder: Path, _: Path) -> Any:
    from starflow_jax.checkpoints.peft import read_peft

    return read_peft(folder, _model())


def _make_vae(folder: Path) -> None:
    from starflow_jax.codec.wan_stream import wan_config
    from starflow_jax.codec.wan_weights import released_shapes
    from starflow_jax.io.tensor_files import write_safetensors

    shapes = released_shapes(wan_config(_vae_config().codec, 4))
    write_safetensors(folder / "vae.safetensors", {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    (folder / "vae.json").write_text(json.dumps({"mean": [0.5] * 4, "std": [1.5] * 4}))
    (folder / "kl").mkdir()
    (folder / "kl" / "config.json").write_text(json.dumps({
        "_class_name": "AutoencoderKL", "norm_num_groups": 32, "scaling_factor": 0.18215, "latent_channels": 4}))


def _vae_config() -> Any:
    from starflow_jax.config import Codec, Config
    from tests.helpers import tiny_model

    return Config(name="vae", model=tiny_model(channels=4),
                  codec=Codec(kind="wan", stride=16, encoder_width=2, decoder_width=3))


def _read_vae(folder: Path, path: Path) -> None:
    from starflow_jax.checkpoints.torch_files import open_weights
    from starflow_jax.codec.kl_vae import read_settings
    from starflow_jax.model.codec import released_codec, sizes_of_codec

    if path.parent.name == "kl":
        read_settings(path.parent / "vae.safetensors")
        return
    source = folder / "vae.safetensors"
    tensors = open_weights(source)
    sizes_of_codec(_vae_config(), tensors, source)
    released_codec(_vae_config(), tensors, source, "")


# Text.


def _make_tokenizer(folder: Path) -> None:
    from starflow_jax.text.tokenizer import train_tokenizer

    (folder / "spiece.model").write_bytes(train_tokenizer(["a red seven moves", "a blue cat sleeps"], 140))


def _read_tokenizer(_: Path, path: Path) -> None:
    from starflow_jax.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    tokenizer.decode(tokenizer.encode(["a red seven sleeps", "Ünseen\n words \0", ""], 16))
    tokenizer.pieces("a blue seven")


def _make_encoder(folder: Path) -> None:
    from tests.make_release import SIZES, write_text_encoder

    write_text_encoder(folder, SIZES["tiny"].text)


def _read_encoder(folder: Path, _: Path) -> None:
    from starflow_jax.text import pretrained

    pretrained._encoder_config.cache_clear()
    all_of(pretrained.open_encoder(folder, 24))


def _make_prompts(folder: Path) -> None:
    (folder / "vbench.json").write_text(json.dumps([
        {"prompt_en": "a cat", "dimension": ["colour"]}, {"prompt_en": "ein Hund – läuft", "dimension": ["motion"]}]))
    (folder / "prompts.txt").write_text("a red seven moves right\n\nein Hund – läuft\n", encoding="utf-8")


def package_config() -> Any:
    from tests.small_model import CONFIG

    return CONFIG


def _read_prompts(_: Path, path: Path) -> None:
    from starflow_jax.sampling.requests import read_requests

    config = package_config()
    setting = "vbench" if path.suffix == ".json" else "prompts_file"
    sample: Any = dataclasses.replace(config.sample, **{setting: str(path)})
    read_requests(dataclasses.replace(config, sample=sample))


# Captions and lists.


def _read_units(source: str) -> None:
    from starflow_jax.config import Prepare
    from starflow_jax.data.raw.sources import list_units, read_unit

    for unit in list_units(source, 2):
        for _ in read_unit(unit, Prepare()):
            pass


def _make_captions(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.png").touch()
    (folder / "a.txt").write_text("a caption – of two\nlines", encoding="utf-8")
    (folder / "b.json").write_text(json.dumps({"caption": ["a first", "a second"], "caption_long": "a long one",
                                               "size": [32, 48], "score": 0.5}))


def _read_captions(folder: Path, _: Path) -> None:
    _read_units(str(folder))


def _rows() -> list[dict[str, Any]]:
    return [{"path": "a.mp4", "caption": "a first – one", "start": 0.5, "end": 2.0},
            {"path": "b.mp4", "caption": 'a "second"', "start": None, "end": None}]


def _make_lists(folder: Path) -> None:
    import csv

    import pyarrow
    import pyarrow.parquet

    for name in ("a.mp4", "b.mp4"):
        (folder / name).touch()
    with open(folder / "list.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(_rows()[0]))
        writer.writeheader()
        writer.writerows(_rows())
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows()))
    table = pyarrow.Table.from_pylist(_rows())
    pyarrow.parquet.write_table(table, folder / "list.parquet")
    pyarrow.parquet.write_table(table, folder / "plain.parquet", compression="none", use_dictionary=False)


def _read_list(_: Path, path: Path) -> None:
    _read_units(str(path))


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in (("a.mp4", b"frames"), ("a.txt", b"a caption"), ("a.json", b'{"caption": "another"}'),
                              ("b/c.png", b"a picture"), ("b/c.txt", "ein Bild – hier".encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _make_tar(folder: Path) -> None:
    (folder / "a.tar").write_bytes(_tar())
    (folder / "b.tar.gz").write_bytes(gzip.compress(_tar(), mtime=0))


def _make_packed_tar(folder: Path) -> None:
    (folder / "b.tgz").write_bytes(gzip.compress(_tar(), mtime=0))


def _packed(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


FOREIGN: dict[str, Reader] = {
    "video": Reader(_make_videos, _read_video, crashes=True),
    "video to prepare": Reader(_make_videos, _cut_video, crashes=True),
    "picture": Reader(_make_pictures, _read_picture, crashes=True),
    "picture to prepare": Reader(_make_pictures, _cut_picture, crashes=True),
    "safetensors": Reader(_make_safetensors, _read_safetensors),
    "pth": Reader(_make_pth, _read_pth),
    "pickle in a pth": Reader(_make_pth, _read_pth, inner=_pickle_of, pack=_pth_of),
    "pickled arrays": Reader(_make_array_pickles, _read_array_pickle),
    "peft": Reader(_make_peft, _read_peft, seal=without_checksums),
    "vae": Reader(_make_vae, _read_vae),
    "tokenizer": Reader(_make_tokenizer, _read_tokenizer, crashes=True),
    "text encoder": Reader(_make_encoder, _read_encoder, ("*.json", "*.safetensors")),
    "prompts": Reader(_make_prompts, _read_prompts),
    "captions": Reader(_make_captions, _read_captions, ("*.txt", "*.json")),
    "lists": Reader(_make_lists, _read_list, ("list.*", "plain.*"), crashes=True),
    "tar": Reader(_make_tar, _read_list),
    "tar in a tgz": Reader(_make_packed_tar, _read_list, inner=gzip.decompress, pack=_packed),
}
