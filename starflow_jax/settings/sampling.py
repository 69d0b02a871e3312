"""Sampling, the solver, and evaluation."""

import dataclasses
from typing import ClassVar

from starflow_jax.settings.fields import (
    RATIO,
    SEED,
    WEIGHTS,
    Allowed,
    Settings,
    UserError,
    at_least,
    names,
    one_of,
    positive,
    setting,
)


@dataclasses.dataclass(frozen=True)
class Solver(Settings):
    """How the flow is inverted. What is left unset is as calibrated for the model, or one frame at a time, a large
    one in equal parts."""

    path: ClassVar[str] = "sample.solver"

    kind: str = setting("", "empty: as calibrated, or jacobi", one_of("", "jacobi", "wavefront", "sequential"))
    block_size: int = setting(0, "tokens solved for at once; 0: as calibrated, or a step's frames in equal parts of "
                              "at most 300",
                              at_least(0, "as calibrated", most=1_000_000))
    frames_per_step: int = setting(0, "frames solved for at once; 0: as calibrated, or one",
                                   at_least(0, "as calibrated", most=10_000))
    updates: int = setting(3, "updates of each token by the wavefront, whatever the tolerance", positive(10_000))
    start: str = setting("", "where the solver starts: the previous frame, or the noise; empty: as calibrated, or "
                         "previous", one_of("", "previous", "noise"))
    tolerance: float = setting(-1.0, "largest relative change at which a block is solved; 0: exact; -1: as calibrated, "
                               "or 1e-3", Allowed("-1 (as calibrated), 0 (exact) or more, at most 1000000",
                                                  lambda value: value == -1 or 0 <= value <= 1e6))
    max_steps: int = setting(0, "updates of a block; 0: the block size, which is exact",
                             at_least(0, "the block size", most=1_000_000))
    first_block_size: int = setting(0, "tokens solved for at once in a video's first frame; 0: block_size",
                                    at_least(0, "block_size", most=1_000_000))

    def check(self) -> None:
        self.require("kind", self.kind != "wavefront" or self.tolerance != 0,
                     "is not exact, which sample.solver.tolerance=0 asks for; use jacobi or sequential")


def _adapter(named: str) -> tuple[str, float]:
    """(name, scale) of NAME[:SCALE]."""
    name, _, scale = named.rpartition(":")
    try:
        return (name, float(scale)) if name else (named, 1.0)
    except ValueError:  # a colon in the name itself
        return named, 1.0


def _names_adapter(named: str) -> bool:
    name, scale = _adapter(named)
    return bool(name) and not name.endswith(":") and abs(scale) <= 1000


@dataclasses.dataclass(frozen=True)
class Sample(Settings):
    """Generation."""

    prompt: str = setting("", "what the video shows")
    prompts_file: str = setting("", "a text file with a prompt on each line")
    rewrite: str = setting("", 'lengthens prompts: a command (prompt in, longer prompt out), or "module:function"')
    session: str = setting("", "a JSON that Session.save wrote: its video is made again, by its own settings")
    vbench: str = setting("", 'VBench\'s prompt list, a file or "installed": its prompts, files named as it expects')
    negative_prompt: str = setting("", "what guidance steers away from; empty: the empty caption")
    changes: str = setting("", 'other prompts from later frames on: "25: a red seven moves left; 49: ..."')
    image: str = setting("", "a picture file: the video's first frame")
    video: str = setting("", "a video file to extend")
    camera: str = setting("", "from where each frame is seen: a file (RealEstate10K's text, JSON, or moves), or moves "
                          'such as "pan_right:12; zoom_in:13"')
    control: str = setting("", "a workdir of train.target=control, or a .safetensors file of one, whose module "
                         "follows sample.camera; empty: the one beside the package's model")
    count: int = setting(1, "videos per prompt", positive(1_000_000))
    keep: int = setting(0, "how many of these to keep, the most likely ones; 0: all",
                        at_least(0, "all", most=1_000_000))
    seed: int = setting(0, "seed of the first video; each further one takes the next", SEED)
    guidance: float = setting(2.5, "weight of classifier-free guidance", at_least(0, "none", most=100))
    later_guidance: float = setting(-1.0, "that weight once the window has moved on or the prompt has changed; -1: the "
                                    "same", Allowed("0 or more, at most 100, or -1 (that of guidance)",
                                                    lambda value: value == -1 or 0 <= value <= 100))
    frames: int = setting(0, "pixel frames, given ones included; 0: the training length, after a given video",
                          at_least(0, "the training length", most=1_000_000))
    fps: int = setting(0, "frame rate of the prompt and of the file; 0: as trained",
                       at_least(0, "as trained", most=1000))
    aspect_ratio: str = setting("", "aspect ratio of the frames, where `side` is given, and in the prompt; empty: as "
                                "trained", RATIO)
    side: int = setting(0, "pixels of a 1:1 frame's side; frames of another aspect ratio keep its area; 0: always the "
                        "training size", at_least(0, "the training size", most=16_384))
    offload: bool = setting(False, "one part of the model after the other: a frozen text encoder is read, used and "
                            "dropped before the flow is read; denoiser and codec lie in the host's memory until the "
                            "flow is done, and the Wan VAE works on tiles; in a stream they and the deep block take "
                            "turns on the device, frame by frame")
    batch_size: int = setting(32, "videos made together; fewer are filled up to the next power of two",
                              positive(10_000))
    stream: bool = setting(False, "write each video while it is being made")
    devices: int = setting(1, "of a stream; with 2 or more the deep block is on the first, the rest on the second",
                           positive(10_000))
    solver: Solver = setting(Solver(), "how the flow is inverted")
    certify: bool = setting(False, "encode the sample again and report the distance to the noise it was made from")
    context_frames: int = setting(0, "latent frames re-encoded when the window moves on; 0: three quarters of it",
                                  at_least(0, "three quarters", most=10_000))
    renoise: bool = setting(False, "frames that are encoded again are denoised and given the training noise anew")
    denoise: str = setting("denoiser", "what removes the noise that training added: the denoiser, a step along the "
                           "score, or a decoder that was trained for it (train.target=decoder)",
                           one_of("denoiser", "score", "decoder", "none"))
    as_released: bool = setting(False, "follow the release's own sampling program in details where ours differs")
    checkpoint: str = setting("newest", "the newest, or the best by validation; also for evaluation and packaging",
                              one_of("newest", "best"))
    weights: str = setting("", "what the layers' matrices are kept as; empty: model.dtype", one_of(*WEIGHTS))
    lora: str = setting("", "LoRA factors that are added to the model, FILE[:SCALE],...: workdirs of "
                        "train.target=lora, or PEFT's files",
                        Allowed("comma-separated names, each with or without a :SCALE of -1000 to 1000",
                                lambda value: not value or all(map(_names_adapter, names(value)))))
    merge_lora: bool = setting(True, "those of sample.lora, or of the workdir, are added to the matrices when these "
                               "are loaded, before they are rounded (weights); else their products are computed apart")
    decoder: str = setting("", "what sample.denoise=decoder decodes with: a workdir of train.target=decoder, or its "
                           "decoder as a file; empty: that of --workdir")
    draft: str = setting("", "a workdir of train.target=student, or its smaller deep block as a file: it drafts each "
                         "step's frames, and the solver starts there; the result is the model's own")
    draft_tolerance: float = setting(1e-2, "largest relative change at which a draft is solved",
                                     at_least(0, "exact", most=1_000_000))
    cache: str = setting("", "what the deep block's cache is kept as; empty: model.dtype", one_of("", "int8"))
    output: str = setting("", "folder of the videos, or of one video the file NAME.mp4; empty: WORKDIR/samples")
    overwrite: bool = setting(False, "files under such a name, or VBench's, that another run made are replaced; else "
                              "they are an error")

    def check(self) -> None:
        self.require("keep", self.keep <= self.count, f"must be at most count={self.count}")
        self.require("seed", SEED.holds(self.seed + self.count - 1),
                     f"with count={self.count} the last seed must be at most {2**32 - 1}")
        for field in ("keep", "certify", "vbench"):
            self.require(field, not (self.stream and getattr(self, field)),
                         "needs whole clips; leave it out, or set sample.stream=false")
        self.require("output", not (self.vbench and self.output_file), "sample.vbench names its files; name a folder")
        self.require("keep", not (self.vbench and self.keep), "sample.vbench needs every video; leave one of them out")
        self.require("decoder", not self.decoder or self.denoise == "decoder", "needs sample.denoise=decoder")
        self.require("draft", not self.draft or self.solver.kind != "sequential",
                     "is where an iteration starts; sample.solver.kind=sequential has none")
        self.require("renoise", not (self.renoise and (self.denoise in ("none", "decoder") or self.as_released)),
                     "needs sample.denoise=denoiser or score, and sample.as_released=false")

    @property
    def adapters(self) -> tuple[tuple[str, float], ...]:
        """Names of what sample.lora adds, and their scales."""
        return tuple(map(_adapter, names(self.lora))) if self.lora else ()

    @property
    def output_file(self) -> str:
        """The file that sample.output names; "" where it is a folder."""
        return self.output if self.output.endswith(".mp4") else ""

    @property
    def guidance_past_window(self) -> float:
        """The weight once the window has moved on or the prompt has changed."""
        return self.guidance if self.later_guidance < 0 else self.later_guidance

    def weight(self, later: bool) -> float:
        """Of guidance. later: the window has moved on or the prompt has changed."""
        return self.guidance_past_window if later else self.guidance

    @property
    def guided(self) -> bool:
        """Whether any window is."""
        return max(self.guidance, self.guidance_past_window) > 0

    def check_prompts(self) -> None:
        """Raises UserError unless prompts are given in one way. Not a part of `check`: the API takes them otherwise."""
        if self.session:
            self.require("session", not (self.prompt or self.prompts_file or self.vbench),
                         "has its own prompts; leave out sample.prompt, sample.prompts_file and sample.vbench")
            return
        if self.vbench and (self.prompt or self.prompts_file):
            raise UserError("sample.vbench is a list of prompts; leave out sample.prompt and sample.prompts_file")
        if self.prompt and self.prompts_file:
            raise UserError("sample.prompt and sample.prompts_file are both given; leave one out")
        if not (self.vbench or self.prompt.strip() or self.prompts_file):
            raise UserError('there is no prompt; give one with --config.sample.prompt="a blue three moves right" '
                            "or a file of them, one per line, with --config.sample.prompts_file=FILE")


EVALUATIONS = ("test_set", "horizon", "ti2v", "camera", "video", "classify", "quality", "denoisers", "guidance",
               "ablations", "students")


@dataclasses.dataclass(frozen=True)
class Evaluate(Settings):
    """What is measured: likelihood and adherence on the test split, or far beyond the training length; one video,
    captions chosen by likelihood, or folders of any system's videos."""

    task: str = setting("test_set", "what is measured", one_of(*EVALUATIONS))
    clips: int = setting(1_000, "test clips whose likelihood is measured, or whose caption is chosen by it (classify)",
                         positive(10_000_000))
    batch_size: int = setting(64, "clips at once, and draws of one video", positive(10_000))
    prompts: int = setting(500, "test prompts whose samples are measured (test_set, horizon, ti2v, camera, students)",
                           positive(1_000_000))
    latent_frames: int = setting(128, "latent frames of each of them (horizon)", positive(100_000))
    video: str = setting("", "a video file: its exact likelihood given `caption`, and its way to z and back (video)")
    caption: str = setting("", "caption of that video")
    other: str = setting("", "another video file: interpolation in z from `video` to it")
    other_caption: str = setting("", "caption of that other video; empty: the same one")
    steps: int = setting(7, "videos of an interpolation, both ends included",
                         Allowed("2 or more, at most 1000: both ends are included", lambda value: 2 <= value <= 1000))
    draws: int = setting(8, "draws of the training noise over which a video's likelihood is averaged", positive(10_000))
    every_caption: bool = setting(False, "score all captions, not only those that the search visits (classify)")
    guidance: tuple[float, ...] = setting(
        (0.0, 1.0, 2.0, 3.0, 5.0), "weights of guidance that are compared (guidance)",
        Allowed("a tuple of numbers, 0 or more, at most 100",
                lambda value: len(value) > 0 and 0 <= min(value) <= max(value) <= 100))
    folder: str = setting("", "comma-separated folders of videos of any system (quality)")
    reference: str = setting("", "a folder of real videos; without `folder`: how well the codec reconstructs them "
                             "(quality)")
    vbench: str = setting("", 'VBench\'s prompt list, a file or "installed", that names the videos (quality)')
    frames: int = setting(16, "first frames of each video that Frechet video distance compares",
                          Allowed("9 or more, at most 10000: fewer vanish in I3D's strides",
                                  lambda value: 9 <= value <= 10_000))
    fps: int = setting(0, "frame rate at which folders are compared; 0: their own",
                       at_least(0, "the videos' own", most=1000))

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

