"""The formatted prompt and frame sizes: what they refuse (test_golden.py compares them with the release's)."""

import pytest

from starflow_jax.config import UserError
from starflow_jax.text.prompt import EXTEND, format_prompt, frame_size


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
