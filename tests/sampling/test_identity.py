"""Names of files: one for each video, the same for the same one; and whose files lie under a name that was given."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starflow_jax.config import Sample, UserError, changed
from starflow_jax.io.files import write_text
from starflow_jax.model.own_settings import PRETRAINED, settings_of
from starflow_jax.model.store import system_checksum, weights_of
from starflow_jax.sampling.files import files_of, made_by_others
from starflow_jax.sampling.identity import Recipe, checksum_of_given
from starflow_jax.sampling.requests import Request, read_requests
from tests.small_model import CONFIG

RECIPE = Recipe(CONFIG, weights="11", system="22", given="")
REQUEST = Request("a red seven, moves right", 0)


def with_sample(recipe: Recipe = RECIPE, **settings: Any) -> Recipe:
    return dataclasses.replace(recipe, config=changed(recipe.config, "sample", settings))


def test_prompts_that_slug_alike_have_names_of_their_own() -> None:
    prompts = (REQUEST.prompt, "a red seven moves right!", "a red seven moves right", "a" * 300, "a" * 301, "七" * 300,
               "!")
    names = [files_of(RECIPE, Path("x"), Request(prompt, 0)).video.name for prompt in prompts]
    assert len(set(names)) == len(names) and all(len(name.encode()) < 200 for name in names)
    assert names[0].startswith("a_red_seven_moves_right_seed0_") and names[-1].startswith("no_prompt_seed0_")


@pytest.mark.parametrize("other", [
    with_sample(guidance=1.0), with_sample(frames=9), with_sample(weights="int8"), with_sample(certify=True),
    with_sample(solver={"tolerance": 0.0}), with_sample(negative_prompt="x"), with_sample(stream=True),
    with_sample(count=2, keep=1), dataclasses.replace(RECIPE, weights="12"), dataclasses.replace(RECIPE, system="23"),
    dataclasses.replace(RECIPE, given=checksum_of_given(np.zeros((1, 8, 8, 3), np.uint8))),
    dataclasses.replace(RECIPE, config=changed(CONFIG, "model", {"dtype": "bfloat16"})),
    dataclasses.replace(RECIPE, config=changed(CONFIG, "text", {"fps": 9}))])
def test_what_makes_another_video_gives_another_name(other: Recipe) -> None:
    assert other.identity(REQUEST) != RECIPE.identity(REQUEST)


def test_what_makes_the_same_video_gives_the_same_name() -> None:
    same = with_sample(batch_size=1, output="elsewhere", count=4, overwrite=True, prompts_file="list", offload=True)
    same = dataclasses.replace(same, config=changed(same.config, "model", {"unroll_layers": True}))
    assert same.identity(REQUEST) == RECIPE.identity(REQUEST)
    rewritten = Request("a red seven in detail", 0, given=REQUEST.prompt)
    assert RECIPE.identity(rewritten) == RECIPE.identity(REQUEST) != RECIPE.identity(Request(REQUEST.prompt, 1))


def test_what_all_videos_share_is_put_into_words_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million names would otherwise take minutes, without a word."""
    recipe, put = dataclasses.replace(RECIPE), []
    monkeypatch.setattr("starflow_jax.sampling.identity.plain", lambda settings: put.append(settings) or {})
    assert len({recipe.identity(Request("a red seven", seed)) for seed in range(100)}) == 100 and len(put) == 1


def test_a_given_name_is_another_runs_until_its_json_says_otherwise(tmp_path: Path) -> None:
    """Of several seeds, of which the likeliest is kept, each may have the name."""
    recipe = with_sample(output=str(tmp_path / "a.b.mp4"), count=2, keep=1, prompt="a red seven")
    requests = read_requests(recipe.config)
    files = files_of(recipe, tmp_path, requests[0])
    assert (files.video.name, files.details.name, files.picture.name) == ("a.b.mp4", "a.b.json", "a.b.png")
    assert not made_by_others(recipe, tmp_path, requests)
    files.picture.touch()  # even a picture is somebody's
    assert len(made_by_others(recipe, tmp_path, requests)) == 2
    assert not made_by_others(with_sample(recipe, overwrite=True), tmp_path, requests)
    write_text(files.details, json.dumps({"identity": recipe.identity(requests[1])}))
    assert not made_by_others(recipe, tmp_path, requests)
    assert made_by_others(with_sample(recipe, guidance=1.0), tmp_path, requests)


def test_names_of_vbench_belong_to_one_seed_each(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([{"prompt_en": "a cat", "dimension": ["color"]}]))
    recipe = with_sample(vbench=str(tmp_path / "list.json"), count=2)
    folder, requests = tmp_path / "videos", read_requests(recipe.config)
    files = files_of(recipe, folder, requests[0])
    write_text(files.video, "")
    write_text(files.details, json.dumps({"identity": recipe.identity(requests[0])}))
    assert files.details.parent == tmp_path / "videos_details" and not made_by_others(recipe, folder, requests)
    later = with_sample(recipe, seed=1)  # whose second video has the seed of this first one
    assert list(made_by_others(later, folder, read_requests(later.config))) == read_requests(later.config)[:1]


def test_one_file_is_for_one_video(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the file of one video, and several are asked for"):
        read_requests(with_sample(output="a.mp4", prompt="a", count=2).config)
    with pytest.raises(UserError, match="sample.vbench names its files"):
        Sample(vbench="installed", output="a.mp4")


def test_another_calibration_is_another_system(tmp_path: Path) -> None:
    config, folder = settings_of(PRETRAINED), tmp_path / "system"
    (tmp_path / "checkpoints").mkdir()
    assert len(weights_of(config, tmp_path / "none")) == 8 + 8  # the control module's too
    before = system_checksum(config, tmp_path)
    write_text(folder / "decoding.json", "{}")
    first = system_checksum(config, tmp_path)
    write_text(folder / "decoding.json", "[]")
    assert len({before, first, system_checksum(config, tmp_path)}) == 3
    write_text(folder / "notes.txt", "not a part of it")
    write_text(folder / "decoding.json", "{}")
    assert system_checksum(config, tmp_path) == first
