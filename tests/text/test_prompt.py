"""The formatted prompt and frame sizes, against the release's own."""

import json
from pathlib import Path
from typing import Any

import pytest

from starflow_jax.config import UserError
from starflow_jax.text.prompt import EXTEND, format_prompt, frame_size

GOLDEN = Path(__file__).parents[1] / "golden"


def _cases(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


def test_format_prompt_golden() -> None:
    for case in _cases("prompt_format"):
        text = case.pop("text")
        assert format_prompt(**case) == text


def test_frame_size_golden() -> None:
    for case in _cases("aspect_ratio"):
        size = case.pop("size")
        assert list(frame_size(**case)) == size


def test_extend_is_part_of_the_caption() -> None:
    assert format_prompt(EXTEND + "a red seven", fps=8) == "A video with 8 fps:\n(extend) a red seven\n"


@pytest.mark.parametrize("ratio", ["", "16", "16:", ":9", "16:0", "-16:9", "16x9", "16:9:1", "1.5:1", " 16:9"])
def test_bad_aspect_ratio(ratio: str) -> None:
    with pytest.raises(UserError, match="W:H"):
        frame_size(256, ratio, 16)
    with pytest.raises(UserError, match="W:H"):
        format_prompt("a caption", aspect_ratio=ratio)


def test_bad_sizes() -> None:
    with pytest.raises(UserError, match="larger size"):
        frame_size(32, "100:1", 16)
    with pytest.raises(UserError, match="at least 1"):
        frame_size(256, "1:1", 0)
