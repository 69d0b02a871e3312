"""STARFlow-V: the invertible map f = f_D o f_S from latents to noise (DESIGN: the method).

A shallow stack f_S of flow blocks that see one frame at a time, then one deep causal block f_D over all
frames, conditioned on text. Tokens are kept as (B, T, S, K): frame, raster position in it, channels.
"""

from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from starflow_jax.config import Model
from starflow_jax.flow.block import FlowBlock, block_rope
from starflow_jax.flow.denoiser import Denoiser
from starflow_jax.nn.patch import patchify, unpatchify
from starflow_jax.nn.transformer import Control


class FlowOutput(flax.struct.PyTreeNode):
    """The forward pass: noise, and what every block did, from the data on."""

    z_BTSK: jax.Array
    block_outputs: tuple[jax.Array, ...]  # tokens after 0, 1, ... blocks, raster order; the last is z
    logdets: tuple[jax.Array, ...]  # elementwise, in each block's own token order


class STARFlow(nn.Module):
    """The flow and, beside it, the denoiser; all its methods are pure functions of the parameters."""

    config: Model

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        common: dict[str, Any] = dict(channels=c.token_channels, head_dim=c.head_dim, dtype=dtype, remat=c.remat,
                                      sequence_parallel=c.sequence_parallel, unroll=c.unroll_layers)
        self.shallow = [FlowBlock(width=c.shallow_width, layers=layers, **common) for layers in c.shallow_layers]
        self.deep = FlowBlock(width=c.deep_width, layers=c.deep_layers, text=c.text_length > 0, **common)
        if c.denoiser != "none":
            self.denoiser = Denoiser(
                width=c.shallow_width, layers=c.denoiser_layers, window=c.denoiser_window,
                lookahead=c.denoiser_lookahead, first_layer_only=c.denoiser == "first_layer",
                text=c.text_length > 0, **common)

    def __call__(self, x_BTHWC: jax.Array, text_BTD: jax.Array | None = None) -> tuple[FlowOutput, jax.Array | None]:
        """Both parts, as `init` needs them: (flow output, denoiser output or None)."""
        denoised = None if self.config.denoiser == "none" else self.score(x_BTHWC, text_BTD)
        return self.forward(x_BTHWC, text_BTD), denoised

    def forward(self, x_BTHWC: jax.Array, text_BTD: jax.Array | None = None, control: Control | None = None
                ) -> FlowOutput:
        """Latents -> noise. text: (B, text_length, text_dim) features, a prefix of the deep block; control: of its
        tokens."""
        if text_BTD is not None:
            chex.assert_shape(text_BTD, (x_BTHWC.shape[0], None, None))
        outputs, logdets = self.shallow_forward(x_BTHWC)
        z_BTSK, logdet = self.deep_forward(outputs[-1], self.grid(x_BTHWC.shape)[1:], text_BTD, control)
        return FlowOutput(z_BTSK, (*outputs, z_BTSK), (*logdets, logdet))

    def deep_forward(self, u_BTSK: jax.Array, token_grid: tuple[int, int], text_BTD: jax.Array | None = None,
                     control: Control | None = None) -> tuple[jax.Array, jax.Array]:
        """f_D: noise (B, T, S, K), and the deep block's log-determinant (B, T*S, K). token_grid: a frame's rows and
        columns of tokens."""
        rope = self.rope((u_BTSK.shape[1], *token_grid), text_BTD)
        z_BSK, logdet = self.deep.forward(_join_frames(u_BTSK), rope, text_BTD, control)
        return z_BSK.reshape(u_BTSK.shape), logdet

    def shallow_forward(self, x_BTHWC: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """f_S: tokens after 0, 1, ... shallow blocks in raster order, and the blocks' log-determinants."""
        x_BTSK = self.tokens(x_BTHWC)
        outputs, logdets = [x_BTSK], []
        for index in range(len(self.shallow)):
            ordered = self.to_block_order(index, outputs[-1])
            z, logdet = self.shallow[index].forward(ordered, self.shallow_rope(self.grid(x_BTHWC.shape)))
            outputs.append(self.from_block_order(index, z, x_BTSK.shape))
            logdets.append(logdet.reshape(x_BTSK.shape) if self.config.local_shallow else logdet)
        return tuple(outputs), tuple(logdets)

    def score(self, x_BTHWC: jax.Array, text_BTD: jax.Array | None = None, count: jax.Array | None = None
              ) -> jax.Array:
        """s_phi of noisy latents, the shape of the latents. x - 0.3 s(x) is the denoised video. count: as the denoiser
        takes it."""
        frames, height, width = self.grid(x_BTHWC.shape)
        tokens_BSK = _join_frames(self.tokens(x_BTHWC))
        out_BSK = self.denoiser(tokens_BSK, frames, self.rope((frames, height, width), text_BTD), text_BTD, count)
        return self.latents(out_BSK.reshape(x_BTHWC.shape[0], frames, height * width, -1), height)

    def tokens(self, x_BTHWC: jax.Array) -> jax.Array:
        """Latents -> (B, T, S, K) tokens in raster order. Raises AssertionError for another number of channels."""
        chex.assert_shape(x_BTHWC, (None, None, None, None, self.config.channels))
        patches = patchify(x_BTHWC, self.config.patch_size)
        return patches.reshape(*patches.shape[:2], -1, patches.shape[-1])

    def latents(self, tokens_BTSK: jax.Array, token_height: int) -> jax.Array:
        """The inverse of `tokens`."""
        batch, frames, tokens, channels = tokens_BTSK.shape
        grid = tokens_BTSK.reshape(batch, frames, token_height, tokens // token_height, channels)
        return unpatchify(grid, self.config.patch_size)

    def grid(self, shape_BTHWC: tuple[int, ...]) -> tuple[int, int, int]:
        """Frames, token rows and token columns of latents of this shape."""
        _, frames, height, width, _ = shape_BTHWC
        return frames, height // self.config.patch_size, width // self.config.patch_size

    def rope(self, grid: tuple[int, int, int], text_BTD: jax.Array | None) -> jax.Array:
        """RoPE of a text prefix and all frames: the deep block's and the denoiser's."""
        text_length = 0 if text_BTD is None else text_BTD.shape[1]
        return block_rope(grid, self.config.extent, text_length, self.config.head_dim)

    def shallow_rope(self, grid: tuple[int, int, int]) -> jax.Array:
        """RoPE of a shallow block's sequence: one frame, or all of them with global shallow blocks."""
        frames = 1 if self.config.local_shallow else grid[0]
        return block_rope((frames, *grid[1:]), self.config.extent, 0, self.config.head_dim)

    def to_block_order(self, index: int, tokens_BTSK: jax.Array) -> jax.Array:
        """Raster tokens -> (B', S', K) sequences of shallow block `index`: frames or clips, even blocks reversed."""
        local = self.config.local_shallow
        sequences = tokens_BTSK.reshape(-1, *tokens_BTSK.shape[2:]) if local else _join_frames(tokens_BTSK)
        return sequences[:, ::-1] if index % 2 == 0 else sequences

    def from_block_order(self, index: int, sequences: jax.Array, shape_BTSK: tuple[int, ...]) -> jax.Array:
        """The inverse of `to_block_order`."""
        return (sequences[:, ::-1] if index % 2 == 0 else sequences).reshape(shape_BTSK)


def _join_frames(tokens_BTSK: jax.Array) -> jax.Array:
    return tokens_BTSK.reshape(tokens_BTSK.shape[0], -1, tokens_BTSK.shape[-1])


def apply_flow(flow: STARFlow, variables: Any, method: Callable, *args: Any) -> Any:
    """`flow.apply` of one method, typed by what that method returns rather than by Linen's union."""
    return flow.apply(variables, *args, method=method)
