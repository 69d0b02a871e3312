"""Settings: frozen dataclasses, checked when they are made; an error names field, value and what is allowed.

`Config` holds all of them. A recipe in configs/ builds one and hands it to `to_config_dict`, whose result
ml_collections makes overridable from the command line; `from_config_dict` checks it again. Nothing else in
the package sees a ConfigDict. Each field carries its description and its allowed values (settings/fields.py).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ml_collections import ConfigDict

from starflow_jax.settings import listing
from starflow_jax.settings.fields import (
    NAMES,
    POSITIVE,
    PROBABILITY,
    Allowed,
    Settings,
    UserError,
    at_least,
    names,
    one_of,
    required,
    setting,
    type_hints,
)

# What is kept of a layer for its backward pass: all that it needs; the layer's input, from which the rest is computed
# again; that and the output of attention; or the same, kept in the host's memory.
REMAT = ("none", "layer", "attention", "offload")
# What moves in attention where mesh.sequence shards the tokens (nn/sequence_parallel.py).
SEQUENCE_PARALLEL = ("ulysses", "all_gather", "ring")
DTYPES = one_of("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Model(Settings):
    """The flow f_D o f_S and its denoiser."""

    channels: int = required("C of the latents", POSITIVE)
    frames: int = required("latent frames of a training clip; 1 for an image model", POSITIVE)
    height: int = required("latent rows", POSITIVE)
    width: int = required("latent columns", POSITIVE)
    shallow_layers: tuple[int, ...] = required(
        "Transformer layers of each shallow block, counted from the data",
        Allowed("a tuple of layer counts greater than 0, one per shallow block",
                lambda value: len(value) > 0 and min(value) > 0))
    shallow_width: int = required("channels inside the shallow blocks and the denoiser", POSITIVE)
    deep_layers: int = required("Transformer layers of the deep block", POSITIVE)
    deep_width: int = required("channels inside the deep block", POSITIVE)
    head_dim: int = setting(64, "channels of an attention head",
                            Allowed("a multiple of 4, >= 20", lambda value: value % 4 == 0 and value >= 20))
    patch_size: int = setting(1, "rows and columns of latents that make one token", POSITIVE)
    rope_extent: float = setting(0.0, "side of the grid of rotary positions; 0: sqrt(height * width) / patch_size",
                                 at_least(0, "from the latent size"))
    local_shallow: bool = setting(True, "shallow blocks see one frame at a time")
    text_length: int = setting(256, "tokens of text; 0: no text", at_least(0, "no text"))
    text_dim: int = setting(2048, "channels of the text features", POSITIVE)
    denoiser: str = setting("first_layer", "which of the denoiser's layers look ahead; none: no denoiser",
                            one_of("none", "first_layer", "every_layer"))
    denoiser_layers: int = setting(8, "Transformer layers of the denoiser", POSITIVE)
    denoiser_window: int = setting(10, "latent frames that a frame attends to, its own included", POSITIVE)
    denoiser_lookahead: int = setting(1, "latent frames that it attends to after its own", at_least(0))
    noise_std: float = setting(0.5, "standard deviation of the noise that training adds to the latents", POSITIVE)
    reference_noise: float = setting(0.3, "the loss is weighted noise_std / this, and the denoiser's output is taken "
                                     "times this; 0: noise_std, which is no weight", at_least(0, "noise_std"))
    dtype: str = setting("float32", "dtype in which the layers compute", DTYPES)
    remat: str = setting("none", "what is kept for the backward pass: everything, a layer's input, that and the output "
                         "of its attention, or the same in the host's memory", one_of(*REMAT))
    sequence_parallel: str = setting("ulysses", "what moves in attention where mesh.sequence shards the tokens",
                                     one_of(*SEQUENCE_PARALLEL))
    unroll_layers: bool = setting(False, "faster steps for small models on a CPU, but longer compilation")

    def check(self) -> None:
        for field in ("shallow_width", "deep_width"):
            self.require(field, getattr(self, field) % self.head_dim == 0,
                         f"must be a multiple of head_dim={self.head_dim}")
        for field in ("height", "width"):
            self.require(field, getattr(self, field) % self.patch_size == 0,
                         f"must be a multiple of patch_size={self.patch_size}")

    @property
    def denoising_step(self) -> float:
        """What the denoiser's output is multiplied by; the loss whose gradient it learns is weighted noise_std / it."""
        return self.reference_noise or self.noise_std

    @property
    def token_channels(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def extent(self) -> float:
        return self.rope_extent or math.sqrt(self.height * self.width) / self.patch_size

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width // self.patch_size**2


METADATA = ("noise_level", "fps", "aspect_ratio")  # what a prompt may state beside its caption


@dataclasses.dataclass(frozen=True)
class Text(Settings):
    """The text encoder: a small T5 trained along with the flow, or frozen flan-t5 features."""

    encoder: str = setting("trained", "trained along with the flow, or frozen", one_of("trained", "frozen"))
    vocab_size: int = setting(320, "most pieces that the trained tokenizer may have", POSITIVE)
    layers: int = setting(2, "Transformer layers", POSITIVE)
    d_model: int = setting(128, "channels", POSITIVE)
    d_kv: int = setting(32, "channels of an attention head", POSITIVE)
    d_ff: int = setting(256, "channels of the feed-forward layers", POSITIVE)
    heads: int = setting(4, "attention heads", POSITIVE)
    metadata: str = setting("fps,aspect_ratio", "what the prompt states beside the caption, comma-separated; empty: "
                            "nothing", Allowed(f"of {', '.join(METADATA)}, comma-separated",
                                               lambda value: not value or set(names(value)) <= set(METADATA)))
    fps: int = setting(8, "frame rate of training, which the prompt states", at_least(0, "an image model"))
    aspect_ratio: str = setting("1:1", "aspect ratio of training, which the prompt states")
    weights: str = setting("", "of the frozen encoder: a folder as flan-t5-xl is published, which also sets the sizes")

    def states(self, name: str) -> bool:
        """Whether prompts state one of METADATA."""
        return name in names(self.metadata)


@dataclasses.dataclass(frozen=True)
class Codec(Settings):
    """Pixels <-> latents: the small models' linear patch codec, or the Wan2.2 VAE."""

    kind: str = setting("patch", "the linear codec, the Wan2.2 VAE, or the image models' AutoencoderKL",
                        one_of("patch", "wan", "kl"))
    stride: int = setting(4, "pixels per latent, in rows and columns", POSITIVE)
    time_stride: int = setting(4, "frames per latent frame after the first", POSITIVE)
    later_frames_scale: float = setting(1.0, "latents of frames n >= 1 are multiplied by this", POSITIVE)
    weights: str = setting("", "a safetensors file under the VAE's published names; kl: or a folder with one")
    latent_mean: tuple[float, ...] = setting((), "mean of each channel; (): the file's tensor `mean`; kl: 0")
    latent_std: tuple[float, ...] = setting(
        (), "standard deviation of each channel; (): the file's tensor `std`; kl: 1 / its scaling factor",
        Allowed("a tuple of numbers greater than 0", lambda value: all(one > 0 for one in value)))
    encoder_width: int = setting(160, "Wan: channels of the encoder's first stage", POSITIVE)
    decoder_width: int = setting(256, "Wan: channels of the decoder's last stage", POSITIVE)
    norm_groups: int = setting(32, "kl: groups of channels in its norms, where no config.json beside it says so",
                               POSITIVE)
    dtype: str = setting("float32", "dtype in which a VAE computes", DTYPES)
    # Saves memory for whole videos; a stream must keep the cache of each tile, overlaps too.
    tile: int = setting(0, "Wan: latent rows and columns encoded and decoded at once; 0: whole frames")
    tile_overlap: int = setting(8, "Wan: latents that neighbouring tiles share", POSITIVE)

    def check(self) -> None:
        self.require("tile", self.tile == 0 or self.tile > self.tile_overlap,
                     f"must be 0 (whole frames) or greater than tile_overlap={self.tile_overlap}")


@dataclasses.dataclass(frozen=True)
class Data(Settings):
    """The built-in moving digits or prepared data, and how clips, images and captions are mixed."""

    source: str = setting("digits", "moving digits, or data prepared by --mode=prepare", one_of("digits", "prepared"))
    directory: str = setting("", "digits: the data set's folder; empty: in the user's cache; prepared: one folder, or "
                             "several, comma-separated")
    latents: bool = setting(False, "train on prepared latents (and a frozen text encoder's features), not on pixels")
    size: int = setting(24, "digits: pixels of a frame's side", POSITIVE)
    digit_size: int = setting(15, "digits: pixels of a digit's side", POSITIVE)
    train_clips: int = setting(40_000, "digits: clips of the training split", POSITIVE)
    validation_clips: int = setting(500, "digits: clips of the validation split", POSITIVE)
    test_clips: int = setting(1_000, "digits: clips of the test split", POSITIVE)
    image_probability: float = setting(0.2, "share of steps that train on images", PROBABILITY)
    first_frame_drop: float = setting(0.25, "share of clips that are shown without their first frame", PROBABILITY)
    caption_drop: float = setting(0.1, "share of clips that are shown without their caption", PROBABILITY)
    short_caption: float = setting(0.1, "share of captions that are the short ones", PROBABILITY)
    workers: int = setting(0, "processes that decode clips; 0: threads of the training process",
                           at_least(0, "threads"))

    def check(self) -> None:
        self.require("directory", bool(self.directory) or self.source == "digits",
                     "must name the folder that --mode=prepare wrote")
        self.require("latents", self.source == "prepared" or not self.latents, "needs data.source=prepared")


@dataclasses.dataclass(frozen=True)
class Train(Settings):
    """The training loop."""

    steps: int = setting(100_000, "optimizer steps", POSITIVE)
    batch_size: int = setting(192, "clips per step", POSITIVE)
    image_batch_size: int = setting(0, "images per step; 0: as many as a batch of clips has frames",
                                    at_least(0, "as many as frames"))
    accumulate: int = setting(1, "microbatches per step", POSITIVE)
    learning_rate: float = setting(5e-5, "after warm-up", POSITIVE)
    final_learning_rate: float = setting(1e-6, "at the end of the cosine decay", POSITIVE)
    warmup_steps: int = setting(1_000, "steps of linear warm-up; a run of fewer steps is all warm-up",
                                at_least(0, "none"))
    weight_decay: float = setting(1e-4, "of AdamW", at_least(0))
    clip: float = setting(1.0, "largest gradient norm; a larger one is scaled down", POSITIVE)
    outlier_factor: float = setting(8.0, "a step whose gradient norm is this many times its running mean is skipped",
                                    Allowed("greater than 1", lambda value: value > 1))
    skip_over_clip: bool = setting(False, "a step whose gradient norm is over `clip` is skipped, too")
    denoiser_learning_rate: float = setting(1e-4, "of the denoiser's own optimizer", POSITIVE)
    denoiser_beta2: float = setting(0.95, "decay of the squared gradients in it",
                                    Allowed("at least 0 and below 1", lambda value: 0 <= value < 1))
    ema: float = setting(0.9999, "decay of the averaged parameters",
                         Allowed("at least 0 and below 1", lambda value: 0 <= value < 1))
    seed: int = setting(0, "of parameters, data order and noise")
    init_from: str = setting("", "a workdir, or one of its checkpoints, whose model training starts from; empty: "
                             "random parameters")
    log_every: int = setting(20, "steps between lines of metrics", POSITIVE)
    checkpoint_every: int = setting(500, "steps between checkpoints", POSITIVE)
    evaluate_every: int = setting(1_000, "steps between validations", POSITIVE)
    keep_checkpoints: int = setting(3, "newest checkpoints to keep, besides the best", POSITIVE)
    validation_clips: int = setting(128, "clips whose likelihood each validation measures", POSITIVE)
    adherence_prompts: int = setting(0, "validation captions whose samples are read at each validation; 0: none",
                                     at_least(0, "none"))
    sheet_clips: int = setting(8, "samples drawn at each validation; 0: none", at_least(0, "none"))

    def check(self) -> None:
        for field in ("batch_size", "image_batch_size"):
            self.require(field, getattr(self, field) % self.accumulate == 0,
                         f"must be a multiple of accumulate={self.accumulate}")


@dataclasses.dataclass(frozen=True)
class Solver(Settings):
    """How the flow is inverted. What is left unset is as calibrated for the model, or one frame at a time."""

    path: ClassVar[str] = "sample.solver"

    kind: str = setting("", "empty: as calibrated, or jacobi", one_of("", "jacobi", "wavefront", "sequential"))
    block_size: int = setting(0, "tokens solved for at once; 0: as calibrated, or those of a step's frames",
                              at_least(0, "as calibrated"))
    frames_per_step: int = setting(0, "frames solved for at once; 0: as calibrated, or one",
                                   at_least(0, "as calibrated"))
    updates: int = setting(3, "updates of each token by the wavefront, whatever the tolerance", POSITIVE)
    start: str = setting("", "where the solver starts: the previous frame, or the noise; empty: as calibrated, or "
                         "previous", one_of("", "previous", "noise"))
    tolerance: float = setting(1e-3, "largest relative change at which a block is solved; 0: exact",
                               at_least(0, "exact"))
    max_steps: int = setting(0, "updates of a block; 0: the block size, which is exact",
                             at_least(0, "the block size"))
    first_block_size: int = setting(0, "tokens solved for at once in a video's first frame; 0: block_size",
                                    at_least(0, "block_size"))

    def check(self) -> None:
        self.require("kind", self.kind != "wavefront" or self.tolerance > 0,
                     "is not exact, which sample.solver.tolerance=0 asks for; use jacobi or sequential")


@dataclasses.dataclass(frozen=True)
class Sample(Settings):
    """Generation."""

    prompt: str = setting("", "what the video shows")
    prompts_file: str = setting("", "a text file with a prompt on each line")
    rewrite: str = setting("", 'lengthens prompts: a command (prompt in, longer prompt out), or "module:function"')
    vbench: str = setting("", 'VBench\'s prompt list, a file or "installed": its prompts, files named as it expects')
    negative_prompt: str = setting("", "what guidance steers away from; empty: the empty caption")
    changes: str = setting("", 'other prompts from later frames on: "25: a red seven moves left; 49: ..."')
    image: str = setting("", "a picture file: the video's first frame")
    video: str = setting("", "a video file to extend")
    count: int = setting(1, "videos per prompt", POSITIVE)
    keep: int = setting(0, "how many of these to keep, the most likely ones; 0: all", at_least(0, "all"))
    seed: int = setting(0, "seed of the first video; each further one takes the next")
    guidance: float = setting(2.5, "weight of classifier-free guidance", at_least(0, "none"))
    frames: int = setting(0, "pixel frames, given ones included; 0: the training length, after a given video",
                          at_least(0, "the training length"))
    fps: int = setting(0, "frame rate of the prompt and of the file; 0: as trained", at_least(0, "as trained"))
    aspect_ratio: str = setting("", "aspect ratio of the frames, where `side` is given, and in the prompt; empty: as "
                                "trained")
    side: int = setting(0, "pixels of a 1:1 frame's side; frames of another aspect ratio keep its area; 0: always the "
                        "training size", at_least(0, "the training size"))
    batch_size: int = setting(32, "videos made together", POSITIVE)
    stream: bool = setting(False, "write each video while it is being made")
    devices: int = setting(1, "of a stream; with 2 or more the deep block is on the first, the rest on the second",
                           POSITIVE)
    solver: Solver = setting(Solver(), "how the flow is inverted")
    certify: bool = setting(False, "encode the sample again and report the distance to the noise it was made from")
    context_frames: int = setting(0, "latent frames re-encoded when the window moves on; 0: three quarters of it",
                                  at_least(0, "three quarters"))
    denoise: str = setting("denoiser", "what removes the noise that training added",
                           one_of("denoiser", "score", "none"))
    as_released: bool = setting(False, "follow the release's own sampling program in details where ours differs")
    checkpoint: str = setting("newest", "the newest, or the best by validation; also for evaluation and packaging",
                              one_of("newest", "best"))
    output: str = setting("", "folder of the videos; empty: WORKDIR/samples")

    def check(self) -> None:
        self.require("keep", self.keep <= self.count, f"must be at most count={self.count}")
        for field in ("keep", "certify", "vbench"):
            self.require(field, not (self.stream and getattr(self, field)),
                         "needs whole clips; leave it out, or set sample.stream=false")
        self.require("keep", not (self.vbench and self.keep), "sample.vbench needs every video; leave one of them out")


_AXIS = at_least(0, "what the others leave")


@dataclasses.dataclass(frozen=True)
class Mesh(Settings):
    """How devices are arranged: the product of the axes is their number; one axis may be 0, what the others leave."""

    data: int = setting(0, "copies of the model", _AXIS)
    fsdp: int = setting(1, "shards of parameters and optimizer state; clips are sharded over data and fsdp", _AXIS)
    tensor: int = setting(1, "shards of every layer", _AXIS)
    sequence: int = setting(1, "shards of every clip's tokens", _AXIS)

    def check(self) -> None:
        zeros = [self.data, self.fsdp, self.tensor, self.sequence].count(0)
        self.require("data", zeros <= 1, "only one axis of the mesh can be 0 (what the others leave)")


@dataclasses.dataclass(frozen=True)
class Plan(Settings):
    """What --mode=plan compiles, and for which pod."""

    topology: str = setting("v5p:4x4x4", "kind and shape of the pod; kinds are v4, v5e, v5p, v6e and tpu7x")
    step: str = setting("train", "a training step; all programs that make videos of the training length; or the Wan "
                        "VAE's on one chip", one_of("train", "sample", "codec"))
    videos: int = setting(1, "videos sampled, or coded, together", POSITIVE)
    updates: int = setting(8, "updates of the solver per block of tokens, assumed in the bound on sampling",
                           POSITIVE)
    search: bool = setting(False, "try meshes and rematerialisations, and rank what fits")


BENCHMARKS = ("start", "data", "attention", "decoding", "training")


@dataclasses.dataclass(frozen=True)
class Benchmark(Settings):
    """What --mode=benchmark times."""

    parts: str = setting(",".join(BENCHMARKS), "what to time",
                         Allowed(f"comma-separated parts of {', '.join(BENCHMARKS)}",
                                 lambda value: set(names(value)) <= set(BENCHMARKS)))

    @property
    def named(self) -> tuple[str, ...]:
        return names(self.parts)


EVALUATIONS = ("test_set", "video", "classify", "quality")


@dataclasses.dataclass(frozen=True)
class Evaluate(Settings):
    """What is measured: likelihood and adherence on the test split, one video, captions chosen by likelihood, or
    folders of any system's videos."""

    task: str = setting("test_set", "what is measured", one_of(*EVALUATIONS))
    clips: int = setting(1_000, "test clips whose likelihood is measured, or whose caption is chosen by it (classify)",
                         POSITIVE)
    batch_size: int = setting(64, "clips at once", POSITIVE)
    prompts: int = setting(500, "test prompts whose samples are read (test_set)", POSITIVE)
    video: str = setting("", "a video file: its exact likelihood given `caption`, and its way to z and back (video)")
    caption: str = setting("", "caption of that video")
    other: str = setting("", "another video file: interpolation in z from `video` to it")
    other_caption: str = setting("", "caption of that other video; empty: the same one")
    steps: int = setting(7, "videos of an interpolation, both ends included",
                         Allowed("2 or more: both ends are included", lambda value: value >= 2))
    draws: int = setting(8, "draws of the training noise over which a video's likelihood is averaged", POSITIVE)
    every_caption: bool = setting(False, "score all captions, not only those that the search visits (classify)")
    folder: str = setting("", "comma-separated folders of videos of any system (quality)")
    reference: str = setting("", "a folder of real videos; without `folder`: how well the codec reconstructs them "
                             "(quality)")
    vbench: str = setting("", 'VBench\'s prompt list, a file or "installed", that names the videos (quality)')
    frames: int = setting(16, "first frames of each video that Frechet video distance compares",
                          Allowed("9 or more: fewer vanish in I3D's strides", lambda value: value >= 9))
    fps: int = setting(0, "frame rate at which folders are compared; 0: their own", at_least(0, "the videos' own"))

    def check(self) -> None:
        for task, fields in {"video": ("video", "caption", "other", "other_caption"), "classify": ("every_caption",),
                             "quality": ("folder", "reference", "vbench")}.items():
            for field in fields:
                self.require(field, self.task == task or not getattr(self, field),
                             f"belongs to evaluate.task={task}; set that too")
        if self.task == "video":
            self.require("video", bool(self.video), "must name the video file that evaluate.task=video measures")
            self.require("caption", bool(self.caption.strip()),
                         "evaluate.video needs a caption, such as 'a red seven moves left'")
        self.require("other_caption", bool(self.other) or not self.other_caption,
                     "belongs to evaluate.other; give that too")
        if self.task == "quality":
            self.require("folder", bool(self.folder or self.reference),
                         "must name folders of videos, or evaluate.reference a folder for the codec to reconstruct")
        self.require("vbench", bool(self.folder) or not self.vbench, "belongs to evaluate.folder; give that too")


@dataclasses.dataclass(frozen=True)
class Convert(Settings):
    """Released weights and workdirs -> checkpoints, and back."""

    source: str = setting("", "a .pth, a folder of torch's shards, safetensors, a name on a hub (hub:OWNER/NAME), or a "
                          "workdir whose model is to grow")
    text: str = setting("", "the text encoder's folder; empty: text.weights")
    target: str = setting("", "a .safetensors file under the release's names, from the workdir's newest checkpoint")
    prefix: str = setting("", 'prefix of the names of the flow\'s tensors in the source, such as "model."')
    dtype: str = setting("stored", "dtype of what is written; stored: the source's",
                         one_of("stored", "float32", "bfloat16"))
    codec: str = setting("", "the VAE's .pth or safetensors, to be written to codec.weights; empty: that is there")
    statistics: str = setting("", "a JSON file with its latents' channel means and deviations; empty: one beside it, "
                              "or codec.latent_mean and codec.latent_std")
    copy: bool = setting(False, "copy the text encoder's folder into the workdir; else its place is kept")


_SHARE = Allowed("0 or more and below 1", lambda value: 0 <= value < 1)


@dataclasses.dataclass(frozen=True)
class Prepare(Settings):
    """Raw videos and pictures with captions -> clips, latents and text features to train on."""

    input: str = setting("", 'a folder, a .csv, .jsonl or .parquet list, or tars ("data/*.tar")')
    output: str = setting("", "folder of the prepared data; empty: WORKDIR/prepared")
    long_captions: str = setting("caption_long,long_caption,synthetic_caption,recaption",
                                 "fields, of which the first one found is used", NAMES)
    short_captions: str = setting("caption_short,short_caption,raw_caption,txt,caption,text,title",
                                  "the same; txt is the file KEY.txt", NAMES)
    frames: int = setting(0, "frames of a clip; 0: the model's and one latent frame's more, so that the first can go",
                          at_least(0, "the model's"))
    fps: int = setting(16, "frame rate of a clip, stated in the prompt; 0: the source's", at_least(0, "the source's"))
    resolution: int = setting(480, "as in 384p, 480p: the height of a 16:9 frame; those of other aspect ratios have as "
                              "many pixels", POSITIVE)
    aspect_ratios: str = setting("21:9,16:9,3:2,4:3,1:1,3:4,2:3,9:16", "buckets; a video goes into the nearest", NAMES)
    clips_per_video: int = setting(0, "most clips taken from one video; 0: all", at_least(0, "all"))
    max_upscale: float = setting(1.25, "largest enlargement; smaller sources are left out", POSITIVE)
    min_brightness: float = setting(12.0, "mean of a clip, 0 to 255; darker ones are left out", at_least(0))
    min_motion: float = setting(0.4, "mean change from frame to frame, 0 to 255; stiller ones are left out",
                                at_least(0))
    cut_threshold: float = setting(25.0, "the same: a cut is above it, and far above the frames before; 0: no cuts",
                                   at_least(0, "none"))
    crf: int = setting(10, "H.264's quality", Allowed("0 (lossless) to 51", lambda value: 0 <= value <= 51))
    validation_share: float = setting(0.01, "of the videos, by a hash of their names", _SHARE)
    test_share: float = setting(0.01, "of the videos, by a hash of their names", _SHARE)
    items_per_part: int = setting(16, "videos of a folder or list that one process takes at a time", POSITIVE)
    clips_per_shard: int = setting(256, "clips per file", POSITIVE)
    processes: int = setting(0, "processes that cut clips; 0: one per core", at_least(0, "one per core"))
    beam: str = setting("none", 'flags of an Apache Beam pipeline, such as "--runner=FlinkRunner ..."')
    latents: bool = setting(False, "encode the clips with the workdir's codec")
    text_features: bool = setting(False, "encode their prompts with the workdir's text encoder")
    batch_size: int = setting(8, "clips that are encoded at once", POSITIVE)

    def check(self) -> None:
        self.require("test_share", self.validation_share + self.test_share < 1,
                     f"leaves nothing to train on beside validation_share={self.validation_share}")

    @property
    def long_names(self) -> tuple[str, ...]:
        return names(self.long_captions)

    @property
    def short_names(self) -> tuple[str, ...]:
        return names(self.short_captions)

    @property
    def ratios(self) -> tuple[str, ...]:
        return names(self.aspect_ratios)


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """All settings."""

    path: ClassVar[str] = "config"

    name: str = required("what the recipe is called; its workdir is runs/NAME by default")
    model: Model = required("")
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

    def check(self) -> None:
        self.train.require(
            "adherence_prompts", self.data.source == "digits" or not self.train.adherence_prompts,
            "must be 0 with prepared data: only moving digits can be read")


# Settings that were renamed, and what to write instead.
RENAMED = {
    "model.parted_attention": "model.sequence_parallel=ulysses|all_gather|ring (was heads|gather|ring)",
    "evaluate.recognise": "evaluate.task=classify, of evaluate.clips test clips",
    "sample.solver": "sample.solver.kind",
    **{f"sample.{name}": f"sample.solver.{name}"
       for name in ("block_size", "updates", "frames_per_step", "start", "tolerance", "max_steps")},
}
RENAMED_VARIANTS = {"box": "tiny_gpu"}


def unknown_setting(name: str) -> UserError:
    """The error for a dotted name that is no setting, such as "sample.guidence"."""
    return listing.unknown_setting(Config, name, RENAMED)


def choose_variant(file: str, variants: Mapping[str, Callable[[], Config]], variant: str) -> Config:
    """A variant of a recipe, by its name. Raises UserError, listing those there are, for another name."""
    if variant in variants:
        return variants[variant]()
    if RENAMED_VARIANTS.get(variant) in variants:
        raise UserError(f"{file}:{variant}: this variant is called :{RENAMED_VARIANTS[variant]} now")
    raise UserError(f"{file}:{variant}: no such variant; there are {', '.join(variants)}")


def to_config_dict(config: Config) -> ConfigDict:
    """The settings as a locked ConfigDict, for ml_collections' command-line overrides."""
    return ConfigDict(dataclasses.asdict(config)).lock()


def from_config_dict(settings: ConfigDict) -> Config:
    """The checked settings. Raises UserError for unknown or missing fields and bad values."""
    return _build(Config, settings.to_dict(), "")


def from_dict(values: Mapping[str, Any]) -> Config:
    """The settings from `dataclasses.asdict`, or from JSON of that. Raises UserError as `from_config_dict` does."""
    return _build(Config, dict(values), "")


def changed(config: Config, section: str, changes: Mapping[str, Any]) -> Config:
    """The settings with some of one section changed; a nested section's are given as a dict, or as a whole instance.

    Raises UserError for unknown fields and bad values.
    """
    values = dataclasses.asdict(config)
    for name, value in changes.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        held = values[section].get(name)
        values[section][name] = held | value if isinstance(held, dict) and isinstance(value, dict) else value
    return from_dict(values)


def _build(section: Any, values: dict[str, Any], prefix: str) -> Any:
    fields, hints = {field.name: field for field in dataclasses.fields(section)}, type_hints(section)
    built = {}
    for name, value in values.items():
        if name not in fields:
            raise unknown_setting(prefix + name)
        if not dataclasses.is_dataclass(hints[name]):
            built[name] = tuple(value) if isinstance(value, list) else value
        elif isinstance(value, dict):
            built[name] = _build(hints[name], value, f"{prefix}{name}.")
        else:
            raise unknown_setting(prefix + name)
    for name, field in fields.items():
        if name not in built and field.default is dataclasses.MISSING:
            raise UserError(f"{prefix}{name}: this setting has no default and must be given")
    return section(**built)

