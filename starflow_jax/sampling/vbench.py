"""VBench's prompt list and file names, so that its own programs find the videos: "PROMPT-INDEX.mp4".

The list is `VBench_full_info.json`, which the package vbench carries. It is read as a file: neither the package nor its
heavy dependencies are imported (pip install --no-deps vbench).
"""

import importlib.metadata
from pathlib import Path

from starflow_jax.config import UserError
from starflow_jax.io.files import read_json

INSTALLED = "installed"
PROMPT_LIST = "vbench/VBench_full_info.json"
SAMPLES = 5  # videos of each prompt that VBench looks for, indices from 0


def read_prompts(source: str) -> dict[str, frozenset[str]]:
    """{prompt: dimensions that are measured on it}, in the list's order; source: the list's file, or "installed".

    Raises UserError where it is not installed, or is no such list.
    """
    path = Path(source)
    if source == INSTALLED:
        try:
            path = Path(str(importlib.metadata.distribution("vbench").locate_file(PROMPT_LIST)))
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError("VBench's prompt list is not installed; pip install --no-deps vbench, or give its file "
                            "VBench_full_info.json") from error
    try:
        entries = read_json(path)
        prompts: dict[str, frozenset[str]] = {}
        for entry in entries:
            prompt = entry["prompt_en"]
            prompts[prompt] = prompts.get(prompt, frozenset()) | frozenset(entry["dimension"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: can't be read as VBench's prompt list ({type(error).__name__}: {error}); it is a "
                        'JSON list of {"prompt_en": ..., "dimension": [...]}') from error
    if not prompts:
        raise UserError(f"{path}: holds no prompt")
    return prompts


def stem(prompt: str, index: int) -> str:
    """VBench's file name for video number `index` of a prompt, without the extension."""
    return f"{prompt}-{index}"
