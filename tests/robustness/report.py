"""What a run of a hostile test found, as a JSON file that docs/pages/reliability.md quotes."""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from starflow_jax.io.files import write_text


def write_report(path: Path, found: dict[str, Any]) -> None:
    """Write what was found, with the date and the versions that it was found with."""
    about = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "jax": version("jax")}
    write_text(path, json.dumps({**about, **found}, indent=1) + "\n")
