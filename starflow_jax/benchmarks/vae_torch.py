"""The Wan VAE in PyTorch on our parameters, written from `codec.wan_vae`: what `benchmarks.vae` measures ours against.

Plain layers on tensors (B, C, T, H, W). A video goes through in the same parts as ours: the first frame alone, then
`time_stride` frames, or one latent frame, at a time, and each convolution in time keeps the last frames it saw.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from starflow_jax.codec.wan_stream import WanCodec

Tensor = Any


def can_be_timed(what: str) -> bool:
    """Whether something can be timed beside PyTorch, which works on the processor; where not, a line says so."""
    if jax.default_backend() == "cpu" and find_spec("torch") is not None:
        return True
    print(f"{what} beside PyTorch is not timed: it needs PyTorch (pip install 'starflow_jax[convert]') and "
          "JAX_PLATFORMS=cpu\n")
    return False


def to_tensor(array: Any) -> Tensor:
    """A copy in float32."""
    import torch

    return torch.from_numpy(np.array(array, np.float32, order="C"))


class TorchVAE:
    """Encodes and decodes whole videos, float32. Raises ImportError without torch."""

    def __init__(self, codec: WanCodec) -> None:
        import torch

        self.torch, self.functional, self.config = torch, torch.nn.functional, codec.config
        flat = traverse_util.flatten_dict(codec.params, sep="/")
        self.weights = {name: to_tensor(np.moveaxis(value, (-1, -2), (0, 1)) if name.endswith("kernel") else value)
                        for name, value in flat.items()}
        self.mean, self.std = (to_tensor(value).view(-1, 1, 1, 1) for value in (codec.mean_C, codec.std_C))
        self.past: dict[str, Tensor] = {}

    def encode(self, pixels_BCTHW: Tensor) -> Tensor:
        """Normalised means."""
        return (self._in_parts(self._encode, pixels_BCTHW, self.config.time_stride) - self.mean) / self.std

    def decode(self, latents_BCNhw: Tensor) -> Tensor:
        """Pixels, not clamped."""
        return self._in_parts(self._decode, latents_BCNhw * self.std + self.mean, 1)

    def _in_parts(self, step: Callable[[Tensor], Tensor], x: Tensor, length: int) -> Tensor:
        self.past = {}
        parts = [x[:, :, :1], *(x[:, :, start:start + length] for start in range(1, x.shape[2], length))]
        with self.torch.inference_mode():
            return self.torch.cat([step(part) for part in parts], dim=2)

    def _encode(self, x: Tensor) -> Tensor:
        c, size = self.config, self.config.patch_size
        x = x.unflatten(4, (-1, size)).unflatten(3, (-1, size)).permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)
        x = self._causal("encoder/stem/conv", x)
        for stage, time in enumerate((*c.temporal_downsample, False)):
            name, last, before = f"encoder/stages_{stage}", stage == len(c.dim_mult) - 1, x
            for index in range(c.num_res_blocks):
                x = self._residual(f"{name}/residuals_{index}", x)
            x = x if last else self._down(f"{name}/resample", x, time)
            x = x + self._averaged(before, x.shape[1], 2 if time else 1, 1 if last else 2)
        x = self._head("encoder/head", self._middle("encoder/middle", x))
        return self._conv("quant", x)[:, :c.z_dim]

    def _decode(self, x: Tensor) -> Tensor:
        c, size = self.config, self.config.patch_size
        begins = not self.past
        x = self._middle("decoder/middle", self._causal("decoder/stem/conv", self._conv("post_quant", x)))
        for stage, time in enumerate((*reversed(c.temporal_downsample), False)):
            name, before = f"decoder/stages_{stage}", x
            for index in range(c.num_res_blocks + 1):
                x = self._residual(f"{name}/residuals_{index}", x)
            if stage < len(c.dim_mult) - 1:
                x = self._up(f"{name}/resample", x, time)
                x = x + self._repeated(before, x.shape[1], 2 if time else 1, begins)
        x = self._head("decoder/head", x).unflatten(1, (-1, size, size))
        return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)

    def _conv(self, name: str, x: Tensor, **options: Any) -> Tensor:
        """In 3-D, or frame by frame where the kernel is of rows and columns."""
        weight, bias = self.weights[f"{name}/kernel"], self.weights[f"{name}/bias"]
        if weight.ndim == 5:
            return self.functional.conv3d(x, weight, bias, **options)
        frames = self.functional.conv2d(x.transpose(1, 2).flatten(0, 1), weight, bias, **options)
        return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    def _remember(self, name: str, x: Tensor) -> Tensor:
        """x with two more frames in front, the past ones or zeros."""
        past = self.past.get(name, x.new_zeros(1).expand(*x.shape[:2], 2, *x.shape[3:]))
        x = self.torch.cat([past, x], dim=2)
        self.past[name] = x[:, :, -2:]
        return x

    def _causal(self, name: str, x: Tensor) -> Tensor:
        return self._conv(name, self._remember(name, x), padding=(0, 1, 1))

    def _activated(self, name: str, x: Tensor) -> Tensor:
        return self.functional.silu(self._norm(name, x))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        gamma = math.sqrt(x.shape[1]) * self.weights[f"{name}/gamma"].view(-1, 1, 1, 1)
        return self.functional.normalize(x, dim=1) * gamma

    def _residual(self, name: str, x: Tensor) -> Tensor:
        hidden = self._causal(f"{name}/conv_1/conv", self._activated(f"{name}/norm_1", x))
        hidden = self._causal(f"{name}/conv_2/conv", self._activated(f"{name}/norm_2", hidden))
        if f"{name}/shortcut/kernel" in self.weights:
            x = self._conv(f"{name}/shortcut", x)
        return x + hidden

    def _middle(self, name: str, x: Tensor) -> Tensor:
        x = self._residual(f"{name}/first", x)
        return self._residual(f"{name}/last", x + self._attended(f"{name}/attention", x))

    def _attended(self, name: str, x: Tensor) -> Tensor:
        qkv = self._conv(f"{name}/to_qkv", self._norm(f"{name}/norm", x)).transpose(1, 2).flatten(3)  # (B, T, 3C, hw)
        q, k, v = qkv.transpose(2, 3).chunk(3, dim=-1)
        out = self.functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).unflatten(3, x.shape[3:])
        return self._conv(f"{name}/proj", out.transpose(1, 2))

    def _head(self, name: str, x: Tensor) -> Tensor:
        return self._causal(f"{name}/conv/conv", self._activated(f"{name}/norm", x))

    def _down(self, name: str, x: Tensor, time: bool) -> Tensor:
        x = self._conv(f"{name}/space", self.functional.pad(x, (0, 1, 0, 1)), stride=2)
        if not time:
            return x
        past, self.past[name] = self.past.get(name), x[:, :, -1:]
        if past is None:
            return x
        return self._conv(f"{name}/time", self.torch.cat([past, x], dim=2), stride=(2, 1, 1))

    def _up(self, name: str, x: Tensor, time: bool) -> Tensor:
        if time:
            begins = name not in self.past
            seen = self._remember(name, x[:, :, 1:] if begins else x)  # the first frame is not seen by the others
            if not begins:
                pairs = self._conv(f"{name}/time", seen).unflatten(1, (2, -1))
                x = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return self._conv(f"{name}/space", x.repeat_interleave(2, 3).repeat_interleave(2, 4), padding=1)

    def _averaged(self, x: Tensor, features: int, time: int, space: int) -> Tensor:
        x = self.functional.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0))
        x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
        return x.unflatten(1, (features, -1)).mean(dim=2)

    def _repeated(self, x: Tensor, features: int, time: int, begins: bool) -> Tensor:
        x = x.repeat_interleave(features * time * 4 // x.shape[1], dim=1).unflatten(1, (features, time, 2, 2))
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, time - 1:] if begins else x
