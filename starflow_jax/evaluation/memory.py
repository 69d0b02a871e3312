"""What an evaluation takes at least, as far as its settings say it, so that what is too large is said before it is
tried (sampling/memory.py)."""

from collections.abc import Sequence

from jax.sharding import Mesh

from starflow_jax.config import Config
from starflow_jax.evaluation.camera import LENGTHS
from starflow_jax.io.memory import check_fits, host_bytes
from starflow_jax.sampling.memory import (
    check_devices,
    check_making,
    flow_bytes,
    latent_bytes,
    pixel_bytes,
    videos_of,
)

SMALLER = "take smaller batches, more devices (mesh) or a larger machine"


def check_evaluation(config: Config, mesh: Mesh) -> None:
    """Raises UserError where what evaluate.task makes or measures at once does not fit into the memory of the devices
    or of the host. What depends on files is checked once they are read: `check_given`, `check_students`."""
    settings, frames, at_once = config.evaluate, config.model.frames, config.sample.batch_size
    if settings.task in ("test_set", "ti2v", "denoisers", "guidance"):
        check_making(config, mesh, at_once, frames, stream=False)
    if settings.task == "horizon":
        check_making(config, mesh, min(at_once, settings.prompts),
                     settings.latent_frames // frames * frames, stream=True)
    if settings.task == "camera":
        check_making(config, mesh, at_once, max(LENGTHS) * frames, stream=False)
        _check_kept(config, max(LENGTHS) * frames)
    if settings.task == "classify":
        _check_classified(config, mesh)
    if settings.task in ("test_set", "camera"):
        _check_measured(config, mesh)


def check_given(config: Config, mesh: Mesh, pixel_frames: int) -> None:
    """The same of evaluate.task=video, of so many frames: draws of noise on it, and what lies between it and another.
    """
    settings, frames = config.evaluate, 1 + (pixel_frames - 1) // config.codec.time_stride
    draws, flow, latents = min(settings.draws, settings.batch_size), flow_bytes(config), latent_bytes(config, frames)
    check_devices(f"{draws} draws of {videos_of(config, 1, frames)}", flow + draws * latents, mesh,
                  "take fewer at once (evaluate.batch_size), a shorter video, or a larger machine")
    if settings.other:
        what, mend = f"evaluate.steps={settings.steps}", "take fewer steps, shorter videos, or a larger machine"
        pixels = settings.steps * pixel_bytes(config, frames)
        # z and what it decodes to, and then the frames; these also side by side.
        check_devices(what, flow + 2 * settings.steps * latents + pixels, mesh, mend)
        check_fits(what, 2 * pixels, host_bytes(), "machine", mend)


def check_students(students: Sequence[Config], mesh: Mesh) -> None:
    """The same of evaluate.task=students: all of these models are there while each makes and measures videos. The
    teacher, whose size is its own workdir's, is not counted."""
    every = sum(map(flow_bytes, students))
    for config in students:
        others, frames = every - flow_bytes(config), config.model.frames
        if config.data.source == "digits":  # else no samples are read
            check_making(config, mesh, config.sample.batch_size, frames, stream=False, others=others)
            _check_kept(config, frames)
        _check_measured(config, mesh, others)


def _check_measured(config: Config, mesh: Mesh, others: int = 0) -> None:
    """A batch of test clips whose likelihood is measured. others: bytes of other models there."""
    size = config.evaluate.batch_size
    check_devices(f"evaluate.batch_size={size}",
                  others + flow_bytes(config) + size * latent_bytes(config, config.model.frames), mesh, SMALLER)


def _check_kept(config: Config, frames: int) -> None:
    """The samples of all prompts, of moving digits: those of each batch, and then joined."""
    prompts = min(config.evaluate.prompts, config.data.test_clips)
    check_fits(f"evaluate.prompts={config.evaluate.prompts}, {videos_of(config, prompts, frames)}",
               2 * prompts * pixel_bytes(config, frames), host_bytes(), "machine",
               "take fewer prompts, or a larger machine")


def _check_classified(config: Config, mesh: Mesh) -> None:
    """All clips are encoded together, and stay there beside what the deep block sees of them."""
    clips, frames = min(config.evaluate.clips, config.data.test_clips), config.model.frames
    what, mend = f"evaluate.clips={config.evaluate.clips}", "classify fewer clips, or take a larger machine"
    check_fits(what, clips * pixel_bytes(config, frames), host_bytes(), "machine", mend)
    check_devices(what, flow_bytes(config) + 2 * clips * latent_bytes(config, frames), mesh, mend)
