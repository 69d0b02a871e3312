"""Data: what is trained on, how it is prepared, and what is converted."""

import dataclasses

from starflow_jax.settings.fields import (
    NAMES,
    PROBABILITY,
    RATIOS,
    Allowed,
    Settings,
    at_least,
    names,
    one_of,
    positive,
    setting,
)


@dataclasses.dataclass(frozen=True)
class Data(Settings):
    """The built-in moving digits or prepared data, and how clips, images and captions are mixed."""

    source: str = setting("digits", "moving digits, or data prepared by --mode=prepare", one_of("digits", "prepared"))
    directory: str = setting("", "digits: the data set's folder; empty: in the user's cache; prepared: one folder, or "
                             "several, comma-separated")
    latents: bool = setting(False, "train on prepared latents (and a frozen text encoder's features), not on pixels")
    size: int = setting(24, "digits: pixels of a frame's side", positive(1024))
    digit_size: int = setting(15, "digits: pixels of a digit's side", positive(1024))
    wraps: bool = setting(True, "digits: what leaves a frame on one side comes back on the other; with longer clips, "
                          "some of which change")
    camera: bool = setting(False, "digits: the same world, seen by a camera that moves; its poses are with the clips")
    train_clips: int = setting(40_000, "digits: clips of the training split", positive(100_000_000))
    validation_clips: int = setting(500, "digits: clips of the validation split", positive(100_000_000))
    test_clips: int = setting(1_000, "digits: clips of the test split", positive(100_000_000))
    image_probability: float = setting(0.2, "share of steps that train on images", PROBABILITY)
    first_frame_drop: float = setting(0.25, "share of clips that are shown without their first frame", PROBABILITY)
    caption_drop: float = setting(0.1, "share of clips that are shown without their caption", PROBABILITY)
    short_caption: float = setting(0.1, "share of captions that are the short ones", PROBABILITY)
    workers: int = setting(0, "processes that decode clips, at most 8 for each core; 0: threads of the training "
                           "process", at_least(0, "threads", most=1000))

    def check(self) -> None:
        self.require("directory", bool(self.directory) or self.source == "digits",
                     "must name the folder that --mode=prepare wrote")
        self.require("camera", self.source == "digits" or not self.camera,
                     "is of the moving digits; data prepared with prepare.camera=true have their own")
        self.require("latents", self.source == "prepared" or not self.latents, "needs data.source=prepared")


@dataclasses.dataclass(frozen=True)
class Convert(Settings):
    """Released weights and workdirs -> checkpoints, and back."""

    source: str = setting("", "a .pth, a folder of torch's shards, safetensors, a name on a hub (hub:OWNER/NAME), a "
                          "workdir whose model is to grow, or `pretrained`: the model in the package")
    text: str = setting("", "the text encoder's folder; empty: text.weights")
    target: str = setting("", "a .safetensors file under the release's names, from the workdir's newest checkpoint; "
                          "of LoRA factors under PEFT's, FOLDER/adapter_model.safetensors; of a control module or a "
                          "decoder it alone")
    alone: bool = setting(False, "of a student's workdir: its smaller deep block alone, as sample.draft takes it; else "
                          "the whole model that it is with the rest of its teacher")
    prefix: str = setting("", 'prefix of the names of the flow\'s tensors in the source, such as "model."')
    dtype: str = setting("stored", "dtype of what is written; stored: the source's",
                         one_of("stored", "float32", "bfloat16"))
    codec: str = setting("", "the VAE's .pth or safetensors, to be written to codec.weights; empty: that file as it is")
    statistics: str = setting("", "a JSON file with its latents' channel means and deviations; empty: one beside it, "
                              "or codec.latent_mean and codec.latent_std")
    copy: bool = setting(False, "copy the text encoder's folder into the workdir; else its path is stored")


MOST_MEGAPIXELS = 178  # what Pillow opens
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
                          at_least(0, "the model's", most=100_000))
    fps: int = setting(16, "frame rate of a clip, stated in the prompt; 0: the source's",
                       at_least(0, "the source's", most=1000))
    resolution: int = setting(480, "as in 384p, 480p: the height of a 16:9 frame; those of other aspect ratios have as "
                              "many pixels", positive(16_384))
    aspect_ratios: str = setting("21:9,16:9,3:2,4:3,1:1,3:4,2:3,9:16", "buckets; a video goes into the nearest", RATIOS)
    clips_per_video: int = setting(0, "most clips taken from one video; 0: all", at_least(0, "all", most=1_000_000))
    max_upscale: float = setting(1.25, "largest enlargement; smaller sources are left out", positive(1000))
    min_brightness: float = setting(12.0, "mean of a clip, 0 to 255; darker ones are left out", at_least(0, most=255))
    min_motion: float = setting(0.4, "mean change from frame to frame, 0 to 255; stiller ones are left out",
                                at_least(0, most=255))
    cut_threshold: float = setting(25.0, "the same: a cut is above it, and far above the frames before; 0: no cuts",
                                   at_least(0, "none", most=255))
    media: bool = setting(True, "keep the clips, to train on their pixels too; false: of them the latents alone, which "
                          "takes a fraction of the time and of the disk")
    crf: int = setting(13, "H.264's quality", Allowed("0 (lossless) to 51", lambda value: 0 <= value <= 51))
    max_text_mb: int = setting(16, "megabytes of a caption, or of the .json beside a video; larger ones are left out",
                               positive(1_000))
    max_file_mb: int = setting(4_000, "megabytes of a video or picture in a tar, which is held in memory; larger "
                               "ones are left out", positive(100_000))
    max_unpacking: int = setting(100, "a compressed tar that unpacks to more than so many times its size is left off "
                                 "there", positive(1_000_000))
    max_megapixels: int = setting(100, "millions of pixels of a picture or frame; larger ones are left out",
                                  positive(MOST_MEGAPIXELS))
    validation_share: float = setting(0.01, "of the videos, by a hash of their names", _SHARE)
    test_share: float = setting(0.01, "of the videos, by a hash of their names", _SHARE)
    items_per_part: int = setting(16, "videos of a folder or list that one process takes at a time",
                                  positive(1_000_000))
    clips_per_shard: int = setting(256, "clips per file", positive(1_000_000))
    processes: int = setting(0, "processes that cut clips, at most 8 for each core; 0: one per core",
                             at_least(0, "one per core", most=10_000))
    beam: str = setting("none", 'flags of an Apache Beam pipeline, such as "--runner=FlinkRunner ..."')
    camera: bool = setting(False, "with each video its camera, poses or moves in KEY.camera.txt or poses in "
                           "KEY.camera.json beside it; videos without are left out")
    latents: bool = setting(False, "encode the clips with the workdir's codec")
    text_features: bool = setting(False, "encode their prompts with the workdir's text encoder")
    batch_size: int = setting(8, "clips that are encoded at once", positive(10_000))

    def check(self) -> None:
        self.require("test_share", self.validation_share + self.test_share < 1,
                     f"leaves nothing to train on beside validation_share={self.validation_share}")
        self.require("media", self.media or self.latents, "leaves nothing to train on without prepare.latents=true")
        self.require("media", self.media or self.beam == "none", "goes without prepare.beam: its workers have no codec")

    @property
    def long_names(self) -> tuple[str, ...]:
        return names(self.long_captions)

    @property
    def short_names(self) -> tuple[str, ...]:
        return names(self.short_captions)

    @property
    def ratios(self) -> tuple[str, ...]:
        return names(self.aspect_ratios)

