"""Which mesh suits which step, and what a search tries."""

import dataclasses

import pytest

from configs.t2v import get_config
from starflow_jax import config as settings_of
from starflow_jax.config import Config, from_config_dict
from starflow_jax.planning.meshes import candidates, chosen, suited
from starflow_jax.sampling import mesh
from tests.helpers import tiny_model


def paper() -> Config:
    return from_config_dict(get_config("7b"))


def with_plan(config: Config, **changes) -> Config:
    return dataclasses.replace(config, plan=settings_of.Plan(**changes))


@pytest.mark.parametrize(("chips", "sizes"), [(64, (1, 64, 1, 1)), (256, (1, 64, 1, 4)), (3, (1, 3, 1, 1))])
def test_training_shards_the_batch_first_then_the_tokens(chips: int, sizes: tuple[int, ...]) -> None:
    """192 clips: 64 or 3 shards of them, and what is left over goes to the tokens."""
    assert dataclasses.astuple(suited(paper(), chips)) == sizes


def test_sampling_is_planned_on_the_mesh_that_it_chooses() -> None:
    asked = with_plan(paper(), step="sample", videos=4)
    assert suited(asked, 64) == mesh.suited(asked, 64, 4) == settings_of.Mesh(data=4, tensor=16)


def test_a_mesh_that_is_set_is_kept() -> None:
    asked = dataclasses.replace(paper(), mesh=settings_of.Mesh(data=1, fsdp=16, tensor=4))
    assert chosen(asked, 64).mesh == asked.mesh
    assert chosen(paper(), 64).mesh == settings_of.Mesh(1, 64, 1, 1)


def test_a_search_tries_only_what_divides() -> None:
    tried = list(candidates(paper(), 256))
    assert len(tried) == len({(one.mesh, one.model.remat) for one in tried}) > 10
    for one in tried:
        data, fsdp, tensor, sequence = dataclasses.astuple(one.mesh)
        assert data * fsdp * tensor * sequence == 256
        assert 192 % (data * fsdp) == 0 and 64 % (tensor * sequence) == 0 and 48 % (tensor * sequence) == 0


def test_a_search_over_the_codec_tries_dtypes_and_tiles() -> None:
    model = tiny_model(channels=3, frames=4, height=6, width=8)
    config = with_plan(Config("small", model, codec=settings_of.Codec(kind="wan", tile_overlap=4)), step="codec")
    tried = list(candidates(config, 1))
    assert [(one.codec.dtype, one.codec.tile) for one in tried] == [
        ("bfloat16", 0), ("bfloat16", 8), ("float32", 0), ("float32", 8)]
    assert all(one.mesh == settings_of.Mesh(1, 1, 1, 1) for one in tried)
