"""Settings: frozen dataclasses, checked when they are made; an error names field, value and what is allowed.

`Config` is the whole of it. A file in configs/ builds one and hands it to `to_config_dict`, whose result
ml_collections makes overridable from the command line; `from_config_dict` checks it again. Nothing else in
the package sees a ConfigDict.
"""

import dataclasses
import math
import typing
from typing import Any

from ml_collections import ConfigDict


class UserError(Exception):
    """Bad input that its user can mend: shown as one line, exit code 2, no traceback."""

def _check(settings: Any, field: str, ok: bool, allowed: str) -> None:
    if not ok:
        value = getattr(settings, field)
        raise UserError(f"{type(settings).__name__.lower()}.{field}={value!r}: {allowed}")


def _check_positive(settings: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(settings, field)
        _check(settings, field, value > 0 and math.isfinite(value), "must be greater than 0")


def _check_choice(settings: Any, field: str, choices: tuple[str, ...]) -> None:
    _check(settings, field, getattr(settings, field) in choices,
           f"must be one of {', '.join(choice or '(empty)' for choice in choices)}")


# What the backward pass of a layer finds: all that it needs; the layer's input, the rest computed again; that and what
# attention gave; or the same kept in the host's memory.
REMAT = ("none", "layer", "attention", "offload")
# What moves in attention where mesh.sequence shards the tokens (nn/sequence_parallel.py).
SEQUENCE_PARALLEL = ("ulysses", "all_gather", "ring")


@dataclasses.dataclass(frozen=True)
class Model:
    """The flow f_D o f_S and its denoiser."""

    channels: int  # C of the latents
    frames: int  # latent frames of a training clip; 1 for an image model
    height: int  # latent rows
    width: int  # latent columns
    shallow_layers: tuple[int, ...]  # Transformer layers of each shallow block, from the data on
    shallow_width: int
    deep_layers: int
    deep_width: int
    head_dim: int = 64
    patch_size: int = 1
    rope_extent: float = 0.0  # the released pt_seq_len; 0: sqrt(height * width) / patch_size
    local_shallow: bool = True  # shallow blocks see one frame at a time
    text_length: int = 256
    text_dim: int = 2048
    denoiser: str = "first_layer"  # which layers look ahead, or none
    denoiser_layers: int = 8
    denoiser_window: int = 10
    denoiser_lookahead: int = 1
    noise_std: float = 0.5
    dtype: str = "float32"
    remat: str = "none"  # of REMAT
    sequence_parallel: str = "ulysses"  # of SEQUENCE_PARALLEL
    unroll_layers: bool = False  # faster steps for small models on CPU, for longer compilation

    def __post_init__(self) -> None:
        _check_positive(self, "channels", "frames", "height", "width", "shallow_width", "deep_layers", "deep_width",
                        "patch_size", "denoiser_layers", "denoiser_window", "noise_std", "text_dim")
        _check(self, "shallow_layers", len(self.shallow_layers) > 0 and min(self.shallow_layers) > 0,
               "must be a tuple of layer counts greater than 0, one per shallow block")
        _check(self, "head_dim", self.head_dim % 4 == 0 and self.head_dim >= 20, "must be a multiple of 4, >= 20")
        for field in ("shallow_width", "deep_width"):
            _check(self, field, getattr(self, field) % self.head_dim == 0,
                   f"must be a multiple of head_dim={self.head_dim}")
        for field in ("height", "width"):
            _check(self, field, getattr(self, field) % self.patch_size == 0,
                   f"must be a multiple of patch_size={self.patch_size}")
        _check(self, "text_length", self.text_length >= 0, "must be 0 (no text) or more")
        _check(self, "rope_extent", self.rope_extent >= 0, "must be 0 (from the latent size) or more")
        _check(self, "denoiser_lookahead", self.denoiser_lookahead >= 0, "must be 0 or more")
        _check_choice(self, "denoiser", ("none", "first_layer", "every_layer"))
        _check_choice(self, "dtype", ("float32", "bfloat16"))
        _check_choice(self, "remat", REMAT)
        _check_choice(self, "sequence_parallel", SEQUENCE_PARALLEL)

    @property
    def token_channels(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def extent(self) -> float:
        return self.rope_extent or math.sqrt(self.height * self.width) / self.patch_size

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width // self.patch_size**2


@dataclasses.dataclass(frozen=True)
class Text:
    """The text encoder: a small T5 trained along with the flow, or frozen flan-t5 features."""

    encoder: str = "trained"
    vocab_size: int = 320
    layers: int = 2
    d_model: int = 128
    d_kv: int = 32
    d_ff: int = 256
    heads: int = 4
    fps: int = 8  # told to the model in the prompt
    aspect_ratio: str = "1:1"
    weights: str = ""  # of the frozen encoder: a folder as flan-t5-xl is published, which sets the sizes

    def __post_init__(self) -> None:
        _check_choice(self, "encoder", ("trained", "frozen"))
        _check_positive(self, "vocab_size", "layers", "d_model", "d_kv", "d_ff", "heads")
        _check(self, "fps", self.fps >= 0, "must be 0 (an image model) or more")


@dataclasses.dataclass(frozen=True)
class Codec:
    """Pixels <-> latents: the small models' linear patch codec, or the Wan2.2 VAE."""

    kind: str = "patch"
    stride: int = 4  # pixels per latent, in rows and columns
    time_stride: int = 4  # frames per latent frame after the first
    later_frames_scale: float = 1.0  # latents of frames n >= 1 are multiplied by this
    # Of the Wan VAE alone:
    weights: str = ""  # a safetensors file under the release's names
    latent_mean: tuple[float, ...] = ()  # of each channel; (): the file's tensors `mean` and `std`
    latent_std: tuple[float, ...] = ()
    encoder_width: int = 160
    decoder_width: int = 256
    dtype: str = "float32"
    # Latent rows and columns that are encoded and decoded at once; 0: whole frames. Saves memory with whole videos; a
    # stream has to keep what each tile remembers, overlaps too.
    tile: int = 0
    tile_overlap: int = 8  # latents that neighbouring tiles share

    def __post_init__(self) -> None:
        _check_choice(self, "kind", ("patch", "wan"))
        _check_choice(self, "dtype", ("float32", "bfloat16"))
        _check_positive(self, "stride", "time_stride", "later_frames_scale", "encoder_width", "decoder_width")
        _check(self, "tile_overlap", self.tile_overlap > 0, "must be greater than 0")
        _check(self, "tile", self.tile == 0 or self.tile > self.tile_overlap,
               f"must be 0 (whole frames) or greater than tile_overlap={self.tile_overlap}")
        _check(self, "latent_std", all(value > 0 for value in self.latent_std), "each must be greater than 0")


@dataclasses.dataclass(frozen=True)
class Data:
    """The built-in moving digits or prepared data, and how clips, images and captions are mixed (DESIGN: tasks)."""

    source: str = "digits"  # or "prepared": by --mode=prepare
    directory: str = ""  # "": a cache folder of the user's; of prepared data one folder, or several with commas
    latents: bool = False  # train on prepared latents (and a frozen text encoder's features), not on pixels
    size: int = 24  # pixels of a frame's side
    digit_size: int = 15
    train_clips: int = 40_000
    validation_clips: int = 500
    test_clips: int = 1_000
    image_probability: float = 0.2
    first_frame_drop: float = 0.25
    caption_drop: float = 0.1
    short_caption: float = 0.1
    workers: int = 0  # processes that decode clips; 0: threads of the training process

    def __post_init__(self) -> None:
        _check_positive(self, "size", "digit_size", "train_clips", "validation_clips", "test_clips")
        _check(self, "workers", self.workers >= 0, "must be 0 (threads) or more")
        _check_choice(self, "source", ("digits", "prepared"))
        _check(self, "directory", bool(self.directory) or self.source == "digits",
               "has to name the folder that --mode=prepare wrote")
        _check(self, "latents", self.source == "prepared" or not self.latents, "needs data.source=prepared")
        for field in ("image_probability", "first_frame_drop", "caption_drop", "short_caption"):
            _check(self, field, 0 <= getattr(self, field) <= 1, "must be a probability, 0 to 1")


@dataclasses.dataclass(frozen=True)
class Train:
    """The training loop (DESIGN: training constants)."""

    steps: int = 100_000
    batch_size: int = 192
    image_batch_size: int = 0  # 0: as many images as a video batch has frames
    accumulate: int = 1  # microbatches per step
    learning_rate: float = 5e-5
    final_learning_rate: float = 1e-6
    warmup_steps: int = 1_000
    weight_decay: float = 1e-4
    clip: float = 1.0
    outlier_factor: float = 8.0  # a step whose gradient norm is this many times its running mean is skipped
    denoiser_learning_rate: float = 1e-4
    ema: float = 0.9999
    seed: int = 0
    init_from: str = ""  # a workdir or one of its checkpoints, whose model training begins with; "": at random
    log_every: int = 20
    checkpoint_every: int = 500
    evaluate_every: int = 1_000
    keep_checkpoints: int = 3
    validation_clips: int = 128
    adherence_prompts: int = 0  # validation captions whose samples are read at each evaluation; 0: none
    sheet_clips: int = 8  # samples drawn at each evaluation; 0: none

    def __post_init__(self) -> None:
        _check_positive(self, "steps", "batch_size", "accumulate", "learning_rate", "final_learning_rate",
                        "denoiser_learning_rate", "clip", "log_every", "checkpoint_every", "evaluate_every",
                        "keep_checkpoints", "validation_clips")
        _check(self, "warmup_steps", 0 <= self.warmup_steps <= self.steps, f"must be 0 to steps={self.steps}")
        for field in ("adherence_prompts", "sheet_clips"):
            _check(self, field, getattr(self, field) >= 0, "must be 0 (none) or more")
        _check(self, "outlier_factor", self.outlier_factor > 1, "must be greater than 1")
        _check(self, "ema", 0 <= self.ema < 1, "must be at least 0 and below 1")
        _check(self, "weight_decay", self.weight_decay >= 0, "must be 0 or more")
        _check(self, "image_batch_size", self.image_batch_size >= 0, "must be 0 (as many as frames) or more")
        for field in ("batch_size", "image_batch_size"):
            _check(self, field, getattr(self, field) % self.accumulate == 0,
                   f"must be a multiple of accumulate={self.accumulate}")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Generation."""

    prompt: str = ""
    prompts_file: str = ""
    rewrite: str = ""  # lengthens prompts: a command (prompt in, longer prompt out), or "module:function"
    vbench: str = ""  # VBench's prompt list, a file or "installed": its prompts, and files named as it wants
    negative_prompt: str = ""  # what guidance leads away from; "": the empty caption
    changes: str = ""  # "25: a red seven moves left; 49: ...": another prompt from that frame on
    image: str = ""  # a picture file: the video's first frame (TI2V)
    video: str = ""  # a video file that is gone on from
    count: int = 1  # videos per prompt
    keep: int = 0  # of these, the most likely ones are kept; 0: all
    seed: int = 0
    guidance: float = 2.5
    frames: int = 0  # pixel frames, given ones included; 0: the training length, beyond a given video
    fps: int = 0  # told to the model, and of the file; 0: as trained
    aspect_ratio: str = ""  # told to the model; "": as trained
    batch_size: int = 32
    stream: bool = False  # write each video while it is made
    devices: int = 1  # of a stream: 1, or 2 and more: the deep block on the first, the rest on the second
    solver: str = ""  # "jacobi", "wavefront" or "sequential"; "": as calibrated, or jacobi
    block_size: int = 0  # tokens solved for at once; 0: as calibrated, or a frame's
    updates: int = 3  # of each token by the wavefront, whatever the tolerance
    frames_per_step: int = 0  # frames solved for at once; 0: as calibrated, or one
    start: str = ""  # where the solver starts: the "previous" frame, or the "noise"; "": as calibrated, or previous
    tolerance: float = 1e-3  # 0: exact
    max_steps: int = 0  # 0: the block size, which is exact
    certify: bool = False  # encode the sample again and report the distance to its noise
    context_frames: int = 0  # latents re-encoded when the window moves on; 0: three quarters of it
    denoise: str = "denoiser"
    checkpoint: str = "newest"  # or "best" by validation; also what is evaluated and packaged
    output: str = ""  # "": WORKDIR/samples

    def __post_init__(self) -> None:
        _check_positive(self, "count", "batch_size", "devices", "updates")
        for field in ("keep", "fps", "block_size", "frames_per_step", "tolerance"):
            _check(self, field, getattr(self, field) >= 0, "must be 0 or more")
        _check(self, "keep", self.keep <= self.count, f"must be at most count={self.count}")
        _check(self, "guidance", self.guidance >= 0, "must be 0 (none) or more")
        _check(self, "frames", self.frames >= 0, "must be 0 (the training length) or more")
        _check(self, "max_steps", self.max_steps >= 0, "must be 0 (the block size) or more")
        _check(self, "context_frames", self.context_frames >= 0, "must be 0 (three quarters) or more")
        _check_choice(self, "solver", ("", "jacobi", "wavefront", "sequential"))
        _check(self, "solver", self.solver != "wavefront" or self.tolerance > 0,
               "is not exact, as sample.tolerance=0 asks; take jacobi or sequential")
        _check_choice(self, "denoise", ("denoiser", "score", "none"))
        _check_choice(self, "checkpoint", ("newest", "best"))
        _check_choice(self, "start", ("", "previous", "noise"))
        for field in ("keep", "certify", "vbench"):
            _check(self, field, not (self.stream and getattr(self, field)),
                   "needs whole clips; leave it out, or set sample.stream=false")
        _check(self, "keep", not (self.vbench and self.keep), "sample.vbench wants every video; leave one out")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How devices are arranged (sharding.py); their product is the number of devices. 0: what the others leave."""

    data: int = 0  # copies of the model
    fsdp: int = 1  # parts of parameters and optimizer state; clips are sharded over data and fsdp
    tensor: int = 1  # parts of every layer
    sequence: int = 1  # parts of every clip's tokens

    def __post_init__(self) -> None:
        for field in ("data", "fsdp", "tensor", "sequence"):
            _check(self, field, getattr(self, field) >= 0, "must be 0 (what the others leave) or more")
        zeros = [self.data, self.fsdp, self.tensor, self.sequence].count(0)
        _check(self, "data", zeros <= 1, "only one axis of the mesh can be 0 (what the others leave)")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What --mode=plan compiles, and for which pod."""

    topology: str = "v5p:4x4x4"  # kind and shape: v4, v5e, v5p, v6e or tpu7x
    # or "sample": all programs that make videos of the training length; or "codec": the Wan VAE's on one chip
    step: str = "train"
    videos: int = 1  # sampled, or coded, together
    updates: int = 8  # of the solver per block of tokens that the bound of sampling is estimated with
    search: bool = False  # try meshes and rematerialisations, and rank what fits

    def __post_init__(self) -> None:
        _check_choice(self, "step", ("train", "sample", "codec"))
        _check_positive(self, "videos", "updates")


BENCHMARKS = ("data", "attention", "decoding", "training")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What --mode=benchmark times."""

    parts: str = ",".join(BENCHMARKS)

    def __post_init__(self) -> None:
        _check(self, "parts", set(self.named) <= set(BENCHMARKS), f"must be of {', '.join(BENCHMARKS)}, separated by "
                                                                  "commas")

    @property
    def named(self) -> tuple[str, ...]:
        return tuple(map(str.strip, self.parts.split(",")))


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Likelihood and adherence on the test split; or, where one of the others is asked for, that alone."""

    clips: int = 1_000  # test clips whose likelihood is taken
    batch_size: int = 64  # of these at once
    prompts: int = 500  # fixed test prompts whose samples are read
    video: str = ""  # a video file: its exact likelihood under `caption`, and the way to noise and back
    caption: str = ""
    other: str = ""  # another video file: interpolation in z from `video` to it
    other_caption: str = ""  # "": the same caption
    steps: int = 7  # videos of an interpolation, both ends included
    draws: int = 8  # of the training noise, over which the likelihood of a video is averaged
    recognise: int = 0  # test clips whose caption is chosen by likelihood; 0: none
    every_caption: bool = False  # score all of them; else only those that the search comes by
    folder: str = ""  # comma-separated folders of videos of any system: their quality side by side
    reference: str = ""  # a folder of real ones; without `folder`: how well the codec gives them back
    vbench: str = ""  # VBench's prompt list, a file or "installed", after which the videos are named
    frames: int = 16  # first frames of each video that Frechet video distance compares
    fps: int = 0  # at which videos of folders are taken; 0: their own

    def __post_init__(self) -> None:
        _check_positive(self, "clips", "batch_size", "prompts", "draws")
        _check(self, "steps", self.steps >= 2, "must be 2 or more: both ends are included")
        _check(self, "recognise", self.recognise >= 0, "must be 0 (none) or more")
        _check(self, "caption", bool(self.caption.strip()) or not self.video,
               "evaluate.video needs a caption, such as 'a red seven moves left'")
        for field in ("caption", "other"):
            _check(self, field, bool(self.video) or not getattr(self, field),
                   "belongs to evaluate.video; give that too")
        _check(self, "other_caption", bool(self.other) or not self.other_caption,
               "belongs to evaluate.other; give that too")
        jobs = [field for field in ("video", "recognise", "folder", "reference") if getattr(self, field)]
        _check(self, jobs[-1] if jobs else "video", len(jobs) < 2 or jobs == ["folder", "reference"],
               f"is asked for beside {', '.join(f'evaluate.{job}' for job in jobs[:-1])}; ask for one thing at a time")
        _check(self, "vbench", bool(self.folder) or not self.vbench, "belongs to evaluate.folder; give that too")
        _check(self, "frames", self.frames >= 9, "must be 9 or more: fewer vanish in I3D's strides")
        _check(self, "fps", self.fps >= 0, "must be 0 (the videos' own) or more")


@dataclasses.dataclass(frozen=True)
class Convert:
    """Released weights and workdirs -> checkpoints, and back."""

    source: str = ""  # a .pth, a folder of torch's shards, safetensors, or a workdir whose model is to grow
    target: str = ""  # a .safetensors file under the release's names, from the workdir's newest checkpoint
    prefix: str = ""  # of the names of the flow's tensors in the source, such as "model."
    dtype: str = "stored"  # what is written: as it is in the source, or another
    codec: str = ""  # the Wan VAE's .pth or safetensors, to be written to codec.weights
    statistics: str = ""  # a JSON file with its latents' channel means and deviations; "": those of codec.latent_*

    def __post_init__(self) -> None:
        _check_choice(self, "dtype", ("stored", "float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Raw videos and pictures with captions -> clips, latents and text features to train on."""

    input: str = ""  # a folder, a .csv, .jsonl or .parquet list, or tars ("data/*.tar")
    output: str = ""  # "": WORKDIR/prepared
    long_captions: str = "caption_long,long_caption,synthetic_caption,recaption"  # fields, the first found is taken
    short_captions: str = "caption_short,short_caption,raw_caption,txt,caption,text,title"  # txt: of KEY.txt
    frames: int = 0  # of a clip; 0: the model's, and those of one more latent, for clips without their first
    fps: int = 16  # 0: the source's, which the model is told
    resolution: int = 480  # 384p, 480p: frames have the pixels of a picture of this height and 16/9 of it in width
    aspect_ratios: str = "21:9,16:9,3:2,4:3,1:1,3:4,2:3,9:16"  # buckets; a video goes into the nearest
    clips_per_video: int = 0  # 0: all
    max_upscale: float = 1.25  # smaller sources are left out
    min_brightness: float = 12.0  # mean of a clip, 0 to 255; darker ones are left out
    min_motion: float = 0.4  # mean change from frame to frame, 0 to 255; stiller ones are left out
    cut_threshold: float = 25.0  # the same; beyond it, and much beyond the frames before, is a cut; 0: none
    crf: int = 10  # H.264's quality, 0 (lossless) to 51
    validation_share: float = 0.01  # of the videos, by a hash of their names
    test_share: float = 0.01
    items_per_part: int = 16  # videos of a folder or list that one process takes at a time
    clips_per_shard: int = 256
    processes: int = 0  # 0: one per core
    beam: str = "none"  # flags of an Apache Beam pipeline, such as "--runner=FlinkRunner ..."
    latents: bool = False  # encode the clips with the workdir's codec
    text_features: bool = False  # and their prompts with its text encoder
    batch_size: int = 8  # clips that are encoded at once

    def __post_init__(self) -> None:
        _check_positive(self, "resolution", "max_upscale", "items_per_part", "clips_per_shard", "batch_size")
        for field in ("frames", "fps", "clips_per_video", "min_brightness", "min_motion", "cut_threshold", "processes"):
            _check(self, field, getattr(self, field) >= 0, "must be 0 or more")
        _check(self, "crf", 0 <= self.crf <= 51, "must be 0 (lossless) to 51")
        for field in ("validation_share", "test_share"):
            _check(self, field, 0 <= getattr(self, field) < 1, "must be 0 or more and below 1")
        _check(self, "test_share", self.validation_share + self.test_share < 1,
               f"leaves nothing to train on beside validation_share={self.validation_share}")
        for field in ("aspect_ratios", "long_captions", "short_captions"):
            named = all(map(str.strip, getattr(self, field).split(",")))
            _check(self, field, named, "must be comma-separated names")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything."""

    name: str
    model: Model
    text: Text = Text()
    codec: Codec = Codec()
    data: Data = Data()
    train: Train = Train()
    sample: Sample = Sample()
    mesh: Mesh = Mesh()
    plan: Plan = Plan()
    benchmark: Benchmark = Benchmark()
    evaluate: Evaluate = Evaluate()
    convert: Convert = Convert()
    prepare: Prepare = Prepare()

    def __post_init__(self) -> None:
        _check(self.train, "adherence_prompts", self.data.source == "digits" or not self.train.adherence_prompts,
               "must be 0 with prepared data: only moving digits can be read")


def to_config_dict(config: Config) -> ConfigDict:
    """The settings as a locked ConfigDict, for ml_collections' command-line overrides."""
    return ConfigDict(dataclasses.asdict(config)).lock()


def from_config_dict(settings: ConfigDict) -> Config:
    """The checked settings. Raises UserError for unknown or missing fields and bad values."""
    return _build(Config, settings.to_dict(), "config")


def _build(kind: Any, values: dict[str, Any], path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in fields:
            raise UserError(f"{path}.{name}: no such setting; there are {', '.join(fields)}")
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            built[name] = _build(hints[name], value, f"{path}.{name}")
        else:
            built[name] = tuple(value) if isinstance(value, list) else value
    missing = [name for name, field in fields.items()
               if name not in built and field.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{path}.{missing[0]}: this setting has no default and must be given")
    return kind(**built)
