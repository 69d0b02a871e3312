"""A model's operations against compiled programs, masks against their words, bounds by hand."""

import importlib.util
import types

import numpy as np
import pytest

from starflow_jax.config import Model, UserError
from starflow_jax.kernels.mask import Causal, FrameWindow, Full, Mask, seen
from starflow_jax.planning.program_cost import Cost, count
from starflow_jax.planning.roofline import CHIPS, GIB, Chip, bound, chip_of, forward_flops, model_flops, visible_pairs
from tests.helpers import tiny_model
from tests.planning.test_program_cost import lowered


def hidden_flops(model: Model, batch: int) -> float:
    """Operations of attention's two products over pairs that the masks hide: up to 128 keys a CPU multiplies all."""
    tokens, text = model.frames * model.tokens_per_frame, model.text_length
    ahead = FrameWindow(text, model.tokens_per_frame, model.denoiser_window, model.denoiser_lookahead)
    behind = FrameWindow(text, model.tokens_per_frame, model.denoiser_window, 0)
    later = ahead if model.denoiser == "every_layer" else behind
    in_frame, sequences = (model.tokens_per_frame, model.frames) if model.local_shallow else (tokens, 1)
    layers = [(model.shallow_width, in_frame, Causal(), sequences * sum(model.shallow_layers)),
              (model.deep_width, text + tokens, Causal(), model.deep_layers)]
    if model.denoiser != "none":
        layers += [(model.shallow_width, text + tokens, ahead, 1),
                   (model.shallow_width, text + tokens, later, model.denoiser_layers - 1)]
    return batch * sum(2 * 2 * width * times * (slots**2 - visible(mask, slots))
                       for width, slots, mask, times in layers)


def visible(mask: Mask, slots: int) -> int:
    return int(np.sum([[seen(mask, np.int64(q), np.int64(k), slots) for k in range(slots)] for q in range(slots)]))


SMALL = tiny_model(frames=3, height=2, width=4, shallow_width=60, deep_width=80, shallow_layers=(2, 1), deep_layers=3,
                   text_length=5, denoiser="first_layer", denoiser_layers=2, denoiser_window=2, unroll_layers=True)


@pytest.mark.parametrize("changes", [
    {}, dict(denoiser="every_layer", denoiser_lookahead=2), dict(denoiser="none", patch_size=2, local_shallow=False)])
def test_operations_of_the_forward_pass_are_those_that_are_compiled(changes: dict) -> None:
    model = Model(**{**vars(SMALL), **changes})
    compiled = count(lowered(model, training=False, batch=3).compile()).flops
    assert model_flops(model, clips=3) == pytest.approx(compiled - hidden_flops(model, batch=3), rel=1e-6)


def test_a_training_step_takes_three_forward_passes() -> None:
    model = tiny_model(frames=3, height=2, width=4, denoiser="first_layer", denoiser_layers=1, shallow_layers=(1,),
                       unroll_layers=True)
    compiled = count(lowered(model, training=True, batch=3).compile()).flops
    expected = model_flops(model, clips=3, training=True) + 3 * hidden_flops(model, batch=3)
    # Nothing asks for the gradient by the text, nor the denoiser's by the latents.
    assert expected * 0.97 < compiled < expected
    assert model_flops(model, clips=3, training=True) == 3 * model_flops(model, clips=3)


def test_operations_by_frames_clips_and_branches() -> None:
    image = Model(**{**vars(SMALL), "frames": 1})
    assert model_flops(SMALL, clips=4, frames=1) == model_flops(image, clips=4) == 4 * model_flops(image, clips=1)
    parts = forward_flops(SMALL)
    assert model_flops(SMALL, clips=1, branches=2) == sum(parts.values()) + parts["deep"]
    # Shallow blocks see a frame at a time: twice the frames, twice the operations; the deep block takes more.
    longer = forward_flops(SMALL, frames=6)
    assert longer["shallow"] == 2 * parts["shallow"] and longer["deep"] > 2 * parts["deep"] * (1 - 5 / 24)


@pytest.mark.parametrize("mask", [Causal(), Full(), FrameWindow(5, 7, 2, 1), FrameWindow(0, 6, 1, 0),
                                  FrameWindow(40, 3, 9, 2)])
def test_pairs(mask: Mask) -> None:
    assert visible_pairs(mask, 47) == visible(mask, 47)


CHIP = Chip("a", 1, hbm_bytes=1.0, peak_flops=100.0, hbm_bandwidth=10.0, ici_bandwidth=2.0)


@pytest.mark.parametrize("flops, hbm_bytes, sent, limited_by, seconds", [
    (1000.0, 50.0, {"all-gather": 6.0, "all-reduce": 8.0}, "compute", 10.0), (1000.0, 200.0, {}, "hbm", 20.0),
    (1000.0, 50.0, {"all-gather": 6.0, "all-reduce": 44.0}, "ici", 25.0)])
def test_the_slowest_part_bounds_the_step(flops, hbm_bytes, sent, limited_by, seconds) -> None:
    found = bound(Cost(flops=flops, hbm_bytes=hbm_bytes, collective_bytes=sent), CHIP, model_flops=600.0)
    assert (found.limited_by, found.seconds) == (limited_by, seconds)
    assert (found.compute_seconds, found.hbm_seconds) == (10.0, hbm_bytes / 10)
    assert found.ici_seconds == sum(sent.values()) / 2
    assert found.mfu == 600 / (100 * seconds)


def test_a_device_may_be_half_a_chip() -> None:
    half = chip_of(types.SimpleNamespace(device_kind="TPU7x", num_cores=1))
    assert half.hbm_bytes == 96 * GIB and half.peak_flops == CHIPS["TPU7x"].peak_flops / 2
    assert chip_of(types.SimpleNamespace(device_kind="TPU v5", num_cores=2)) == CHIPS["TPU v5"]
    with pytest.raises(UserError, match="'abacus'.*TPU v5 lite"):
        chip_of(types.SimpleNamespace(device_kind="abacus", num_cores=1))


@pytest.mark.parametrize("topology, chips, name", [
    ("v4:2x2x1", 4, "v4"), ("v5e:2x2", 4, "v5e"), ("v5p:2x2x1", 4, "v5p"), ("v6e:2x2", 4, "v6e"),
    ("tpu7x:2x2x1", 4, "tpu7x")])
def test_the_table_has_the_compilers_chips(topology: str, chips: int, name: str, monkeypatch) -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, TPUs' compiler, is not installed: pip install -e '.[tpu]'")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    whole = chip_of(devices[0])
    assert whole.name == name
    # Together they have what the chips have.
    assert sum(chip_of(device).hbm_bytes for device in devices) == chips * CHIPS[devices[0].device_kind].hbm_bytes
