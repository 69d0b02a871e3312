"""What is installed is what lies here."""

import configparser

from starflow_jax.io.command_line import CONFIGS
from tests.small_run import ROOT


def test_setup_cfg_names_every_package_and_the_configs() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "starflow_jax").rglob("__init__.py")]
    packages = setup["options"]["packages"].split()
    assert sorted(packages) == sorted(["starflow_jax.configs", *(".".join(folder.parts) for folder in folders)])
    assert setup["options"]["package_dir"].split() == ["starflow_jax.configs", "=", "configs"]
    assert setup["options.entry_points"]["console_scripts"].split("=")[1].strip() == "starflow_jax.main:starflow"


def test_configs_lie_beside_the_package_in_a_checkout() -> None:
    assert CONFIGS == ROOT / "configs"
    assert not (ROOT / "starflow_jax" / "configs").exists()  # there, in the wheel, they would be found first
