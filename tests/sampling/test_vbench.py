"""VBench's prompt list: a file, the installed package, and names that its own programs find."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path

import pytest

from starflow_jax.config import Sample, UserError
from starflow_jax.sampling import vbench
from starflow_jax.sampling.requests import read_requests
from tests.small_model import CONFIG

LIST = [{"prompt_en": "a red seven moves right", "dimension": ["color"]},
        {"prompt_en": "in a still frame, v. 2-5", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a red seven moves right", "dimension": ["object_class"], "auxiliary_info": {}}]


@pytest.fixture
def prompt_list(tmp_path: Path) -> str:
    (tmp_path / "list.json").write_text(json.dumps(LIST))
    return str(tmp_path / "list.json")


def test_prompts_in_order_with_all_their_dimensions(prompt_list: str) -> None:
    assert list(vbench.read_prompts(prompt_list).items()) == [
        ("a red seven moves right", {"color", "object_class"}), ("in a still frame, v. 2-5", {"temporal_flickering"})]


def test_lists_that_are_none(tmp_path: Path, monkeypatch) -> None:
    for text in ("{", '["a prompt"]', '[{"prompt_en": "a"}]', "[]", "3"):
        (tmp_path / "list.json").write_text(text)
        with pytest.raises(UserError, match="list.json: "):
            vbench.read_prompts(str(tmp_path / "list.json"))
    with pytest.raises(UserError, match="none.json"):
        vbench.read_prompts("none.json")

    def missing(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match="pip install --no-deps vbench"):
        vbench.read_prompts("installed")


def test_installed_list() -> None:
    try:
        importlib.metadata.distribution("vbench")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vbench is not installed")
    prompts = vbench.read_prompts("installed")
    assert len(prompts) == 944  # 946 entries, two of them twice
    assert sum("temporal_flickering" in dimensions for dimensions in prompts.values()) == 75
    assert len(frozenset().union(*prompts.values())) == 16


def test_requests_are_named_as_vbench_wants(prompt_list: str) -> None:
    config = dataclasses.replace(CONFIG, sample=Sample(vbench=prompt_list, count=2, seed=4))
    assert [(request.given_name, request.seed) for request in read_requests(config)] == [
        ("a red seven moves right-0", 4), ("a red seven moves right-1", 5),
        ("in a still frame, v. 2-5-0", 4), ("in a still frame, v. 2-5-1", 5)]
    with pytest.raises(UserError, match="sample.vbench"):
        read_requests(dataclasses.replace(CONFIG, sample=Sample(vbench=prompt_list, prompt="a")))
    for settings in (dict(stream=True), dict(count=2, keep=1)):
        with pytest.raises(UserError, match="vbench"):
            Sample(vbench=prompt_list, **settings)
