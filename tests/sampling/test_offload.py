"""sample.offload: the same frames, and each part on the device only while it works."""

from typing import Any

import jax
import numpy as np
import pytest

from starflow_jax.flow import decode
from starflow_jax.model.store import LoadedModel
from starflow_jax.model.system import System
from starflow_jax.sampling import denoise, stream
from starflow_jax.sampling.offload import takes_turns, with_parts_aside
from starflow_jax.sharding import is_on_host
from tests.helpers import changed
from tests.small_model import CAPTIONS, SETTINGS

SEEDS = [5, 6, 7]


def streamed(system: System, params: Any, settings: Any) -> np.ndarray:
    return np.concatenate(list(stream.stream_clips(system, params, CAPTIONS, SEEDS, settings)), axis=1)


@pytest.mark.parametrize("renoise", [False, True])
def test_a_stream_whose_parts_take_turns_has_the_same_frames(system: System, params, renoise: bool) -> None:
    """Bit for bit, past the window."""
    settings = changed(SETTINGS, frames=21, frames_per_step=1, renoise=renoise)
    offloaded = changed(settings, offload=True, stream=True)
    aside = with_parts_aside(LoadedModel(system, params, "", ""), offloaded)
    assert {is_on_host(leaf) for leaf in jax.tree.leaves((aside.params["flow"]["deep"], aside.params["denoiser"],
                                                          aside.system.codec))} == {True}
    assert not any(map(is_on_host, jax.tree.leaves(aside.params["flow"]["shallow_0"])))
    np.testing.assert_array_equal(
        streamed(aside.system, aside.params, offloaded), streamed(system, params, settings))


def test_deep_block_denoiser_and_codec_are_on_the_device_only_in_their_turns(
        system: System, params, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the largest matrix of each, among the arrays that a stream adds to those that were there."""
    settings = changed(SETTINGS, frames=21, frames_per_step=1, offload=True, stream=True)
    aside = with_parts_aside(LoadedModel(system, params, "", ""), settings)
    parts = {"deep": params["flow"]["deep"], "denoiser": params["denoiser"]}
    marks = {name: np.asarray(max(jax.tree.leaves(part), key=lambda leaf: leaf.size)) for name, part in parts.items()}
    before = set(map(id, jax.live_arrays()))
    held: dict[str, list[set[str]]] = {}

    def watch(module: Any, name: str) -> None:
        function = getattr(module, name)

        def watched(*args: Any, **keywords: Any) -> Any:
            there = [np.asarray(array) for array in jax.live_arrays()
                     if id(array) not in before and not is_on_host(array)
                     and array.shape in {mark.shape for mark in marks.values()}]
            held.setdefault(name, []).append(
                {part for part, mark in marks.items() if any(np.array_equal(array, mark) for array in there)})
            return function(*args, **keywords)

        monkeypatch.setattr(module, name, watched)

    watch(decode, "decode_frames")
    watch(stream, "score_next")
    watch(denoise, "denoiser_step")
    watch(stream, "decode_next")
    streamed(aside.system, aside.params, settings)
    assert len(held["decode_next"]) == 6
    assert {name: set(map(frozenset, of)) for name, of in held.items()} == {
        "decode_frames": {frozenset({"deep"})}, "score_next": {frozenset({"denoiser"})},
        "denoiser_step": {frozenset({"denoiser"})}, "decode_next": {frozenset()}}


def test_a_stream_over_two_devices_leaves_all_where_it_is() -> None:
    offloaded = changed(SETTINGS, offload=True)
    assert takes_turns(offloaded) and takes_turns(changed(offloaded, stream=True))
    assert not takes_turns(changed(offloaded, stream=True, devices=2)) and not takes_turns(SETTINGS)
