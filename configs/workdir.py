"""The settings of a workdir's model: --config=configs/workdir.py:WORKDIR (or --workdir=WORKDIR alone)."""

from pathlib import Path

from starflow_jax.config import UserError, to_config_dict
from starflow_jax.model.own_settings import settings_of


def get_config(workdir: str = ""):
    if not workdir:
        raise UserError("configs/workdir.py: name the workdir after a colon, configs/workdir.py:DIR")
    return to_config_dict(settings_of(Path(workdir)))
