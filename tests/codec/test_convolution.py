"""The convolutions' forms on CPUs: equal to the plain ones in values and gradients, and used there alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from starflow_jax.codec import convolution as forms
from starflow_jax.codec.convolution import convolution, doubled

LAYOUT_3D: dict[str, Any] = {"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")}
LAYOUT_2D: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
SAME = ((1, 1), (1, 1))


def drawn(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def plain(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, padding, **LAYOUT_3D)


def plain_doubled(x: jax.Array, kernel: jax.Array) -> jax.Array:
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return lax.conv_general_dilated(x, kernel, (1, 1), SAME, **LAYOUT_2D)


@partial(jax.jit, static_argnums=0)
def with_gradients(function: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
    out, pull_back = jax.vjp(function, x, kernel)
    return out, *pull_back(jnp.cos(jnp.arange(out.size)).reshape(out.shape))


def convolutions_of(function: Callable[..., jax.Array], platform: str, *arrays: jax.Array) -> list[str]:
    """The results' types of every convolution in the program that is lowered for a platform."""
    text = export.export(jax.jit(function), platforms=[platform])(*arrays).mlir_module()
    return [line.rsplit("-> ", 1)[1].split(" loc")[0] for line in text.splitlines() if "stablehlo.convolution(" in line]


@pytest.mark.parametrize("frames,time,front,stride", [
    (3, 3, 0, 1), (1, 3, 2, 1), (2, 3, 2, 1), (5, 3, 2, 1), (5, 3, 0, 2), (2, 1, 0, 1), (4, 3, 0, 1), (6, 3, 0, 1)])
def test_a_sum_of_taps_is_the_3d_convolution(
    frames: int, time: int, front: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "MANY", 0)
    space = 1 if front == 0 and stride == 2 else 3
    x, kernel = drawn(2, frames, 4, 5, 3), drawn(time, space, space, 3, 2, seed=1) / 9
    pad = (space // 2,) * 2
    padding: Any = ((front, 0), pad, pad) if space == 3 else "VALID"
    args = (stride, 1, 1), padding
    ours = with_gradients(lambda x, kernel: convolution(x, kernel, *args, **LAYOUT_3D), x, kernel)
    for found, expected in zip(ours, with_gradients(lambda x, kernel: plain(x, kernel, *args), x, kernel)):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_doubled_picture_is_convolved_as_if_it_were_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "MANY", 0)
    x, kernel = drawn(2, 3, 5, 4), drawn(3, 3, 4, 2, seed=1) / 6
    ours = with_gradients(partial(doubled, strides=(1, 1), padding=SAME, **LAYOUT_2D), x, kernel)
    for found, expected in zip(ours, with_gradients(plain_doubled, x, kernel)):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("front", [0, 2])
def test_bfloat16_is_summed_in_float32(front: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that results are rounded once."""
    monkeypatch.setattr(forms, "MANY", 0)
    x, kernel = (value.astype(jnp.bfloat16) for value in (drawn(1, 4, 4, 4, 64), drawn(3, 3, 3, 64, 8, seed=1) / 40))
    padding = ((front, 0), *SAME)
    exact = plain(x.astype(jnp.float32), kernel.astype(jnp.float32), (1, 1, 1), padding)
    ours = convolution(x, kernel, (1, 1, 1), padding, **LAYOUT_3D)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2**-8, atol=1e-5)


def test_the_platform_of_the_program_decides() -> None:
    """Many pixels on a CPU: by taps, by pairs of frames, in four phases. Few, or another platform: as it is written."""
    causal = partial(convolution, strides=(1, 1, 1), padding=((2, 0), *SAME), **LAYOUT_3D)
    going_on = partial(convolution, strides=(1, 1, 1), padding=((0, 0), *SAME), **LAYOUT_3D)
    twice = partial(doubled, strides=(1, 1), padding=SAME, **LAYOUT_2D)
    kernel, many, few = drawn(3, 3, 3, 3, 2), drawn(1, 2, 32, 16, 3), drawn(1, 2, 8, 8, 3)
    whole = ["tensor<1x2x32x16x2xf32>"]
    assert convolutions_of(causal, "cpu", many, kernel) == ["tensor<1x32x16x2xf32>", "tensor<2x32x16x2xf32>"]
    assert convolutions_of(going_on, "cpu", drawn(1, 6, 32, 16, 3), kernel) == ["tensor<2x32x16x2xf32>"] * 4
    assert convolutions_of(causal, "cpu", few, kernel) == ["tensor<1x2x8x8x2xf32>"]
    assert convolutions_of(causal, "tpu", many, kernel) == convolutions_of(causal, "cuda", many, kernel) == whole
    picture, kernel, small = drawn(1, 32, 32, 3), drawn(3, 3, 3, 2), drawn(1, 8, 8, 3)
    assert convolutions_of(twice, "cpu", picture, kernel) == ["tensor<1x32x32x2xf32>"] * 4
    assert convolutions_of(twice, "cpu", small, kernel) == ["tensor<1x16x16x2xf32>"]
    assert convolutions_of(twice, "tpu", picture, kernel) == ["tensor<1x64x64x2xf32>"]
