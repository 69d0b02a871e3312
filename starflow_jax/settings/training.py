"""Training, plans of it, and benchmarks."""

import dataclasses

from starflow_jax.settings.fields import (
    WEIGHTS,
    Allowed,
    Settings,
    at_least,
    names,
    one_of,
    positive,
    setting,
    whole_number,
)

TARGETS = ("all", "lora", "control", "student", "decoder")
OPTIMIZERS = ("adamw", "muon")
PROJECTIONS = ("qkv", "proj", "mlp_in", "mlp_out")  # of a Transformer layer
BLOCKS = ("shallow", "deep", "denoiser")


@dataclasses.dataclass(frozen=True)
class Train(Settings):
    """The training loop."""

    steps: int = setting(100_000, "optimizer steps", positive(1_000_000_000))
    batch_size: int = setting(192, "clips per step", positive(1_000_000))
    image_batch_size: int = setting(0, "images per step; 0: as many as a batch of clips has frames",
                                    at_least(0, "as many as frames", most=10_000_000))
    accumulate: int = setting(1, "microbatches per step", positive(1_000_000))
    optimizer: str = setting("adamw", "of flow and denoiser; muon: each step of a layer's matrix is orthogonalized "
                             "(fewer steps to the same loss), AdamW for the rest", one_of(*OPTIMIZERS))
    learning_rate: float = setting(5e-5, "after warm-up", positive(1000))
    final_learning_rate: float = setting(1e-6, "at the end of the cosine decay", positive(1000))
    warmup_steps: int = setting(1_000, "steps of linear warm-up; a run of fewer steps is all warm-up",
                                at_least(0, "none", most=1_000_000_000))
    weight_decay: float = setting(1e-4, "of the optimizers", at_least(0, most=1000))
    clip: float = setting(1.0, "largest gradient norm; a larger one is scaled down", positive(1_000_000_000))
    outlier_factor: float = setting(8.0, "a step whose gradient norm is this many times its running mean is skipped",
                                    Allowed("greater than 1, at most 1000000", lambda value: 1 < value <= 1e6))
    skip_over_clip: bool = setting(False, "also skip a step whose gradient norm is over `clip`")
    denoiser_learning_rate: float = setting(1e-4, "of the denoiser's own optimizer", positive(1000))
    denoiser_beta2: float = setting(0.95, "decay of the squared gradients in that optimizer",
                                    Allowed("at least 0 and below 1", lambda value: 0 <= value < 1))
    ema: float = setting(0.9999, "decay of the averaged parameters",
                         Allowed("at least 0 and below 1", lambda value: 0 <= value < 1))
    seed: int = setting(0, "of parameters, data order and noise",
                        Allowed("0 to 2147483647 (2^31 - 1)", lambda value: 0 <= value < 2**31))
    target: str = setting("all", "what is trained: the flow with its denoiser and text encoder; or, beside the model "
                          "of init_from, which stays as it is, low-rank factors of its matrices, a module that "
                          "makes it follow a camera, a smaller deep block, or the codec's decoder on noised latents",
                          one_of(*TARGETS))
    init_from: str = setting("", "a workdir, or one of its checkpoints, whose model training starts from; empty: "
                             "random parameters, and for the other targets the model in the package")
    log_every: int = setting(20, "steps between lines of metrics", positive(1_000_000_000))
    checkpoint_every: int = setting(500, "steps between checkpoints", positive(1_000_000_000))
    evaluate_every: int = setting(1_000, "steps between validations", positive(1_000_000_000))
    keep_checkpoints: int = setting(3, "newest checkpoints to keep, besides the best", positive(1_000_000))
    validation_clips: int = setting(128, "clips whose likelihood each validation measures", positive(10_000_000))
    adherence_prompts: int = setting(0, "validation captions whose samples are read at each validation; 0: none",
                                     at_least(0, "none", most=1_000_000))
    sheet_clips: int = setting(8, "samples drawn at each validation; 0: none", at_least(0, "none", most=1000))

    def check(self) -> None:
        for field in ("batch_size", "image_batch_size"):
            self.require(field, getattr(self, field) % self.accumulate == 0,
                         f"must be a multiple of accumulate={self.accumulate}")
        self.require("accumulate", self.target != "decoder" or self.accumulate == 1,
                     "must be 1 with train.target=decoder")


@dataclasses.dataclass(frozen=True)
class Lora(Settings):
    """The low-rank factors that train.target=lora trains: alpha / rank times A B is added to each frozen matrix."""

    rank: int = setting(16, "columns of A, rows of B", positive(65_536))
    alpha: float = setting(16.0, "their product is multiplied by this / rank", positive(1_000_000))
    targets: str = setting(",".join(PROJECTIONS), "the projections of a layer that have factors",
                           Allowed(f"comma-separated parts of {', '.join(PROJECTIONS)}",
                                   lambda value: set(names(value)) <= set(PROJECTIONS)))
    blocks: str = setting("deep", "the blocks whose layers have them",
                          Allowed(f"comma-separated parts of {', '.join(BLOCKS)}",
                                  lambda value: set(names(value)) <= set(BLOCKS)))
    weights: str = setting("", "what the layers' frozen matrices are kept as; empty: model.dtype", one_of(*WEIGHTS))

    @property
    def named_targets(self) -> tuple[str, ...]:
        return names(self.targets)

    @property
    def named_blocks(self) -> tuple[str, ...]:
        return names(self.blocks)


@dataclasses.dataclass(frozen=True)
class Control(Settings):
    """The module that train.target=control trains: rays of a camera to features, and these into each layer."""

    width: int = setting(128, "features of a token", positive(65_536))


def _ascending(listed: str) -> bool:
    """Whether they are whole numbers, each greater than the one before."""
    numbers = [whole_number(name) for name in names(listed)]
    found = [number for number in numbers if number is not None]
    return len(found) == len(numbers) and found == sorted(set(found))


@dataclasses.dataclass(frozen=True)
class Student(Settings):
    """The smaller deep block that train.target=student trains, of model.deep_layers and model.deep_width, beside its
    teacher: the model of train.init_from. Its loss is the sum of what has a weight, in nats per dimension."""

    start: str = setting("teacher", "what its training begins with: layers of the teacher, narrowed by activations "
                         "where deep_width is smaller; or random parameters", one_of("teacher", "random"))
    layers: str = setting("", "the teacher's layers that it begins with, counted from 0, as many as deep_layers; "
                          "empty: evenly spaced ones, the first and the last among them",
                          Allowed("comma-separated whole numbers, each greater than the one before",
                                  lambda value: not value or _ascending(value)))
    clips: int = setting(64, "training clips by whose activations a narrower one's channels, heads and hidden units "
                         "are chosen", positive(1_000_000))
    likelihood: float = setting(1.0, "weight of the negative log-likelihood", at_least(0, "none", most=1_000_000))
    mean: float = setting(1.0, "weight of half the squared difference of the teacher's mean of each token, in units of "
                          "the teacher's scale", at_least(0, "none", most=1_000_000))
    scale: float = setting(1.0, "weight of the squared difference of the teacher's log-scale of each token",
                           at_least(0, "none", most=1_000_000))
    teacher_layers: int = setting(0, "the teacher's deep_layers, for plans without it; 0: as it has them",
                                  at_least(0, "as the teacher has them", most=10_000))
    teacher_width: int = setting(0, "the teacher's deep_width, for plans without it; 0: as it has it",
                                 at_least(0, "as the teacher has it", most=1_000_000))

    def check(self) -> None:
        self.require("likelihood", self.likelihood + self.mean + self.scale > 0,
                     "of likelihood, mean and scale one needs a weight")

    @property
    def chosen_layers(self) -> tuple[int, ...]:
        """`layers` as numbers."""
        return tuple(map(int, names(self.layers))) if self.layers else ()


@dataclasses.dataclass(frozen=True)
class Decoder(Settings):
    """The decoder for noised latents that train.target=decoder fine-tunes, and its loss: L1 plus what has a weight."""

    noise: str = setting("fixed", "of the latents: model.noise_std, as samples have it, or for each clip uniform from "
                         "0 to that", one_of("fixed", "uniform"))
    width: int = setting(64, "patch codec: channels of its convolutional decoder; a VAE's has its own",
                         positive(65_536))
    layers: int = setting(2, "patch codec: residuals of that decoder", positive(10_000))
    lpips: float = setting(0.1, "weight of LPIPS, of one frame of each clip; left out where the extra `quality` is not "
                           "installed", at_least(0, "none", most=1_000_000))
    adversarial: float = setting(0.01, "weight of the hinge loss against a discriminator of patches",
                                 at_least(0, "none", most=1_000_000))
    discriminator_width: int = setting(32, "channels of the discriminator's first layer", positive(65_536))
    discriminator_learning_rate: float = setting(2e-4, "of the discriminator's own optimizer", positive(1000))


@dataclasses.dataclass(frozen=True)
class Plan(Settings):
    """What --mode=plan compiles, and for which pod."""

    topology: str = setting("v5p:4x4x4", "kind and shape of the pod; kinds are v4, v5e, v5p, v6e and tpu7x; or a "
                        "GPU's memory, such as gpu:80GB (a Hopper) or gpu:24GB (of compute capability 8.6)")
    step: str = setting("train", "a training step; all programs that make videos of the training length; "
                        "those that measure a given one (evaluate.task=video); or the Wan VAE's on one chip",
                        one_of("train", "sample", "likelihood", "codec"))
    videos: int = setting(1, "videos sampled, or coded, together", positive(1_000_000_000))
    updates: int = setting(0, "updates of the solver per block of tokens, assumed in the bound on sampling; 0: 8 of "
                           "up to 128 tokens, of larger blocks more, as calibration found on the package's model",
                           at_least(0, "8, and more of large blocks", most=1_000_000))
    search: bool = setting(False, "try meshes and rematerialisations, and rank what fits")


BENCHMARKS = ("start", "data", "attention", "decoding", "camera", "vae", "flow", "training")


@dataclasses.dataclass(frozen=True)
class Benchmark(Settings):
    """What --mode=benchmark times."""

    parts: str = setting(",".join(BENCHMARKS), "what to time",
                         Allowed(f"comma-separated parts of {', '.join(BENCHMARKS)}",
                                 lambda value: set(names(value)) <= set(BENCHMARKS)))

    @property
    def named(self) -> tuple[str, ...]:
        return names(self.parts)

