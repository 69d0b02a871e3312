"""What starting imports: nothing heavy before settings are checked, and for sampling only what sampling needs."""

import subprocess
import sys

import pytest

from tests.small_run import ROOT

HEAVY = ("jax", "flax", "numpy", "orbax", "tensorflow_datasets", "grain", "av", "PIL", "scipy", "sklearn", "matplotlib",
         "tensorboardX", "optax")
BEYOND_SAMPLING = ("tensorflow_datasets", "scipy", "sklearn", "matplotlib", "tensorboardX", "optax",
                   "jax.experimental.pallas")


def imported(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of the modules a fresh process has imported after the code."""
    asked = f"{code}\nimport sys\nprint([name for name in {names} if name in sys.modules])"
    return eval(subprocess.run([sys.executable, "-c", asked], cwd=ROOT, check=True, capture_output=True,
                               text=True).stdout.splitlines()[-1])


@pytest.mark.parametrize("code", [
    "import starflow_jax",
    "import starflow_jax.main",
    "import starflow_jax as sf\ntry:\n sf.run('sample', sf.load_config(), 'nowhere')\n"
    "except sf.UserError as error:\n assert 'there is no prompt' in str(error)\nelse:\n assert False",
    "from configs import t2i, t2v, ti2v\n[config.get_config() for config in (t2i, t2v, ti2v)]",
])
def test_settings_are_checked_before_anything_heavy_is_imported(code: str) -> None:
    assert imported(code, HEAVY) == []


def test_sampling_imports_what_it_needs() -> None:
    assert imported("import starflow_jax.modes.sample", (*BEYOND_SAMPLING, "jax")) == ["jax"]
