"""The flow and the denoiser in PyTorch on our parameters, written from `flow` and `nn`: what `benchmarks.flow` measures
ours against.

Plain layers on tensors, F.scaled_dot_product_attention, torch.optim.AdamW; keys and values lie in caches that are
written in place.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from starflow_jax.benchmarks.vae_torch import to_tensor
from starflow_jax.config import Model, Train
from starflow_jax.flow.block import SOFT_CLIP, UNIT_SCALE, block_rope
from starflow_jax.kernels.mask import FrameWindow, seen
from starflow_jax.model.parameters import Params

Tensor = Any


class Cache(NamedTuple):
    """Keys and values of a stack's layers, (L, B, H, slots, D) each."""

    keys: Tensor
    values: Tensor


@dataclasses.dataclass
class Decoding:
    """What an inversion knows of the slots before the next one."""

    cache: Cache
    length: int  # of the cache, filled
    last_B1C: Tensor  # the token before the next slot


class TorchFlow:
    """The maps of whole videos, float32, of a model without patches. Raises ImportError without torch."""

    def __init__(self, model: Model, params: Params) -> None:
        import torch

        self.torch, self.functional, self.model = torch, torch.nn.functional, model
        flat = traverse_util.flatten_dict(params, sep="/")
        self.weights = {name: self._laid_out(name, np.asarray(value)) for name, value in flat.items()}
        self._ropes: dict[Any, Tensor] = {}

    def _laid_out(self, name: str, value: np.ndarray) -> Tensor:
        """Matrices as nn.Linear keeps them, (out, in); those of layers behind the layers' axis."""
        if name.endswith("qkv/kernel") or name.endswith("qkv/bias"):  # (L, in, 3, D), (L, 3, D)
            value = value.reshape(*value.shape[:-2], -1)
        return to_tensor(np.swapaxes(value, -1, -2) if name.endswith("kernel") else value)

    # The maps

    def forward(self, x_BTHWC: Tensor, text_BTD: Tensor) -> tuple[Tensor, list[Tensor]]:
        """z (B, T, S, K) and the elementwise log-determinants of the blocks."""
        batch, frames = x_BTHWC.shape[:2]
        x, logdets = x_BTHWC.reshape(batch * frames, -1, self.model.channels), []
        for index in range(len(self.model.shallow_layers)):
            z, logdet = self._block(f"shallow_{index}", self._ordered(index, x), self._rope(1, 0))
            x = self._ordered(index, z)
            logdets.append(logdet)
        z, logdet = self._block("deep", x.reshape(batch, -1, x.shape[-1]), self._rope(frames, text_BTD.shape[1]),
                                text_BTD)
        return z.reshape(batch, frames, -1, z.shape[-1]), [*logdets, logdet]

    def score(self, x_BTHWC: Tensor, text_BTD: Tensor) -> Tensor:
        """The denoiser's output, the shape of the latents."""
        model, frames = self.model, x_BTHWC.shape[1]
        tokens = self._linear("denoiser/proj_in", x_BTHWC.reshape(x_BTHWC.shape[0], -1, model.channels))
        hidden = self.torch.cat([self._linear("denoiser/proj_text", text_BTD), tokens], dim=1)
        prefix, per_frame = text_BTD.shape[1], model.height * model.width
        ahead = FrameWindow(prefix, per_frame, model.denoiser_window, model.denoiser_lookahead, frames)
        later = dataclasses.replace(ahead, lookahead=0) if model.denoiser == "first_layer" else ahead
        masks = [self._seen(ahead, hidden.shape[1]), self._seen(later, hidden.shape[1])]
        rope = self._rope(frames, prefix)
        for layer in range(model.denoiser_layers):
            hidden = self.layer("denoiser", layer, hidden, rope, masks[min(layer, 1)])
        out = self._linear("denoiser/proj_out", self._final_norm("denoiser", hidden)[:, prefix:])
        return out.reshape(x_BTHWC.shape)

    def loss(self, x_BTHWC: Tensor, text_BTD: Tensor) -> Tensor:
        """Negative log-likelihood per dimension, constants left out."""
        z, logdets = self.forward(x_BTHWC, text_BTD)
        return 0.5 * (z**2).mean() - sum(logdet.mean() for logdet in logdets)

    def sample(self, z_BTSK: Tensor, texts_2BTD: Tensor, guidance: float, block: int, tolerance: float
               ) -> tuple[Tensor, int]:
        """(latents (B, T, h, w, C), passes of the deep block) of noise: both stacks inverted by block Jacobi, each
        frame's blocks started at the frame before, shallow blocks a frame at once; block=1: one token after another."""
        model = self.model
        batch, frames, tokens, channels = z_BTSK.shape
        with self.torch.inference_mode():
            text, rope = texts_2BTD.flatten(0, 1), self._rope(frames, texts_2BTD.shape[2])
            state = self._begin("deep", 2 * batch, batch, text.shape[1] + frames * tokens)
            self._predict("deep", self._linear("deep/proj_text", text), state, rope, commit=True)
            made, passes, start = [], 0, z_BTSK.new_zeros(batch, tokens, channels)
            for frame in range(frames):
                start, more = self._invert("deep", z_BTSK[:, frame], start, state, rope, block, tolerance, guidance)
                made.append(start)
                passes += more
            x = self.torch.stack(made, dim=1).reshape(batch * frames, tokens, channels)
            size, close = (1, 0.0) if block == 1 else (tokens, 0.1 * tolerance)
            for index in reversed(range(len(model.shallow_layers))):
                z = self._ordered(index, x)
                state = self._begin(f"shallow_{index}", batch * frames, batch * frames, tokens)
                x, _ = self._invert(f"shallow_{index}", z, z, state, self._rope(1, 0), size, close)
                x = self._ordered(index, x)
        return x.reshape(batch, frames, model.height, model.width, channels), passes

    # Parts of them

    def _block(self, name: str, x_BSC: Tensor, rope: Tensor, text_BTD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        sos = self.weights[f"{name}/sos"].expand(x_BSC.shape[0], -1, -1)
        hidden, prefix = self._linear(f"{name}/proj_in", self.torch.cat([sos, x_BSC[:, :-1]], dim=1)), 0
        if text_BTD is not None:
            prefix = text_BTD.shape[1]
            hidden = self.torch.cat([self._linear(f"{name}/proj_text", text_BTD), hidden], dim=1)
        for layer in range(self._layers(name)):
            hidden = self.layer(name, layer, hidden, rope)
        mu, sigma = self._affine(name, self._final_norm(name, hidden)[:, prefix:])
        return (x_BSC - mu) / sigma, -sigma.log()

    def layer(self, name: str, layer: int, x_BSD: Tensor, rope: Tensor, mask: Tensor | None = None,
              cached: tuple[Tensor, Tensor, int] | None = None) -> Tensor:
        """One layer of a stack; causal without a mask. cached: the layer's (keys, values), which are written from so
        many slots on, and the mask of all slots up to the last."""
        weight = f"{name}/transformer/layers/layer"
        heads = x_BSD.shape[-1] // self.model.head_dim
        qkv = self._linear(f"{weight}/qkv", self._norm(f"{weight}/attention_norm", layer, x_BSD), layer)
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self._rotated(q, rope), self._rotated(k, rope)
        if cached is not None:
            keys, values, begin = cached
            end = begin + x_BSD.shape[1]
            keys[:, :, begin:end], values[:, :, begin:end] = k, v
            k, v = keys[:, :, :end], values[:, :, :end]
        causal = mask is None and (cached is None or cached[2] == 0)
        out = self.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x_BSD = x_BSD + self._linear(f"{weight}/proj", out.transpose(1, 2).flatten(2), layer)
        hidden = self._linear(f"{weight}/mlp_in", self._norm(f"{weight}/mlp_norm", layer, x_BSD), layer)
        return x_BSD + self._linear(f"{weight}/mlp_out", self.functional.gelu(hidden), layer)

    def _linear(self, name: str, x: Tensor, layer: int | None = None) -> Tensor:
        weight, bias = self.weights[f"{name}/kernel"], self.weights[f"{name}/bias"]
        if layer is not None:
            weight, bias = weight[layer], bias[layer]
        return self.functional.linear(x, weight, bias)

    def _norm(self, name: str, layer: int, x: Tensor) -> Tensor:
        scale, bias = self.weights[f"{name}/scale"][layer], self.weights[f"{name}/bias"][layer]
        return self.functional.layer_norm(x, x.shape[-1:], scale, bias, 1e-5)

    def _final_norm(self, name: str, x: Tensor) -> Tensor:
        weight = 1 + self.weights[f"{name}/transformer/final_norm/weight"]
        return self.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)

    def _affine(self, name: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
        out = SOFT_CLIP * self.torch.tanh(self._linear(f"{name}/proj_out", hidden) / SOFT_CLIP)
        a, mu = out.chunk(2, dim=-1)
        return mu, self.functional.softplus(a + UNIT_SCALE)

    def _rotated(self, x_BHSD: Tensor, rope_2SE: Tensor) -> Tensor:
        cos, sin = rope_2SE
        first, second = x_BHSD.chunk(2, dim=-1)
        return self.torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)

    def _rope(self, frames: int, text: int) -> Tensor:
        if (frames, text) not in self._ropes:
            model = self.model
            table = block_rope((frames, model.height, model.width), model.extent, text, model.head_dim)
            self._ropes[frames, text] = to_tensor(table)
        return self._ropes[frames, text]

    def _seen(self, mask: FrameWindow, slots: int) -> Tensor:
        slot = np.arange(slots)
        return self.torch.from_numpy(np.broadcast_to(seen(mask, slot[:, None], slot, slots), (slots, slots)).copy())

    def _ordered(self, index: int, x: Tensor) -> Tensor:
        return x if index % 2 else x.flip(1)

    def _layers(self, name: str) -> int:
        if name == "deep":
            return self.model.deep_layers
        return self.model.shallow_layers[int(name.removeprefix("shallow_"))]

    # The inverse

    def _begin(self, name: str, lanes: int, batch: int, slots: int) -> Decoding:
        width = self.model.deep_width if name == "deep" else self.model.shallow_width
        shape = (self._layers(name), lanes, width // self.model.head_dim, slots, self.model.head_dim)
        cache = Cache(self.torch.zeros(shape), self.torch.zeros(shape))
        return Decoding(cache, 0, self.weights[f"{name}/sos"].detach().expand(batch, 1, -1))

    def _predict(self, name: str, hidden: Tensor, state: Decoding, rope: Tensor, commit: bool = False
                 ) -> tuple[Tensor, Tensor]:
        """(mean, scale) of the next slots; their keys and values lie in the cache behind what is known of it."""
        begin, count = state.length, hidden.shape[1]
        slot = self.torch.arange(begin + count)
        mask = slot[begin:, None] >= slot if begin and count > 1 else None
        for layer in range(self._layers(name)):
            cached = state.cache.keys[layer], state.cache.values[layer], begin
            hidden = self.layer(name, layer, hidden, rope[:, begin:begin + count], mask, cached)
        state.length += count if commit else 0
        return self._affine(name, self._final_norm(name, hidden))

    def _invert(self, name: str, z: Tensor, start: Tensor, state: Decoding, rope: Tensor, block: int, tolerance: float,
                guidance: float | None = None) -> tuple[Tensor, int]:
        """(tokens of the noise, passes)."""
        made, passes = [], 0
        for first in range(0, z.shape[1], block):
            goal, x = z[:, first:first + block], start[:, first:first + block]
            for _ in range(goal.shape[1]):
                inputs = self.torch.cat([state.last_B1C, x[:, :-1]], dim=1)
                hidden = self._linear(f"{name}/proj_in", inputs)
                mu, sigma = self._guided(name, hidden, state, rope, guidance)
                new = mu + sigma * goal
                change = ((new - x)**2).sum(dim=(1, 2)) / (new**2).sum(dim=(1, 2))
                x, passes = new, passes + 1
                if bool((change < tolerance).all()):
                    break
            state.length += goal.shape[1]
            state.last_B1C = x[:, -1:]
            made.append(x)
        return self.torch.cat(made, dim=1), passes

    def _guided(self, name: str, hidden: Tensor, state: Decoding, rope: Tensor, guidance: float | None
                ) -> tuple[Tensor, Tensor]:
        if guidance is None:
            return self._predict(name, hidden, state, rope)
        mu, sigma = self._predict(name, hidden.repeat(2, 1, 1), state, rope)
        (mu_c, mu_u), (sigma_c, sigma_u) = mu.chunk(2), sigma.chunk(2)
        s = (sigma_c / sigma_u).clamp(max=1) ** 2
        norm = 1 + guidance - guidance * s
        return ((1 + guidance) * mu_c - guidance * s * mu_u) / norm, sigma_c / norm.sqrt()


class TorchTraining:
    """A training step of both losses on one batch, with both optimizers, the clip by norm and the moving average."""

    def __init__(self, flow: TorchFlow, settings: Train) -> None:
        torch = flow.torch
        self.flow, self.settings, self.torch = flow, settings, torch
        self.ema = {name: weight.clone() for name, weight in flow.weights.items()}
        for weight in flow.weights.values():
            weight.requires_grad_()
        self.parts = [[weight for name, weight in flow.weights.items() if name.startswith("denoiser") == is_denoiser]
                      for is_denoiser in (False, True)]
        rates = ((settings.learning_rate, 0.95), (settings.denoiser_learning_rate, settings.denoiser_beta2))
        self.optimizers = [torch.optim.AdamW(part, lr=rate, betas=(0.9, beta2), weight_decay=settings.weight_decay,
                                             fused=True) for part, (rate, beta2) in zip(self.parts, rates)]

    def gradients(self, x_BTHWC: Tensor, text_BTD: Tensor) -> tuple[float, float]:
        """(the flow's loss, the denoiser's); every weight has its gradient then."""
        model = self.flow.model
        noisy = x_BTHWC.clone().requires_grad_()
        loss = self.flow.loss(noisy, text_BTD)
        (loss * (model.noise_std / model.denoising_step)).backward()
        target = model.noise_std * noisy.numel() * noisy.grad
        regression = ((self.flow.score(x_BTHWC, text_BTD) - target)**2).mean()
        regression.backward()
        return float(loss.detach()), float(regression.detach())

    def step(self, x_BTHWC: Tensor, text_BTD: Tensor) -> tuple[float, float]:
        """The losses before it."""
        losses = self.gradients(x_BTHWC, text_BTD)
        for part, optimizer in zip(self.parts, self.optimizers):
            self.torch.nn.utils.clip_grad_norm_(part, self.settings.clip)
            optimizer.step()
            optimizer.zero_grad()
        with self.torch.no_grad():
            self.torch._foreach_lerp_(list(self.ema.values()), list(self.flow.weights.values()), 1 - self.settings.ema)
        return losses
