"""How fast the flow is beside PyTorch, in turns within one run, on the same random weights: a layer, a forward pass, a
training step, and a guided video; and first a bare product of matrices, which says how the two do on this processor.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.benchmarks.flow_torch import TorchFlow, TorchTraining
from starflow_jax.benchmarks.random_flow import BENCHMARK_MODEL, RandomFlow, RandomVideo, random_weights
from starflow_jax.benchmarks.vae_torch import can_be_timed, to_tensor
from starflow_jax.config import Model, Solver, Train
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.io.timing import timed
from starflow_jax.kernels.mask import Causal
from starflow_jax.nn.rope import rope_table, text_positions
from starflow_jax.nn.transformer import Layer
from starflow_jax.sampling.calibration import loosest
from starflow_jax.sampling.solver import TOLERANCE

ROUNDS = 3
SIDE = 2_048
ROWS_OF_TOKENS = (1_024, 4_096, 16_384)
GUIDANCE = 2.0
Run = Callable[[], Any]


def beside_torch(model: Model = BENCHMARK_MODEL, tokens: tuple[int, ...] = ROWS_OF_TOKENS, rounds: int = ROUNDS
                 ) -> list[dict[str, Any]]:
    """A row each: median seconds, how many times as fast as PyTorch, and how far the two results are apart.

    Both work on the processor: elsewhere, and without PyTorch, there is a line that says so, and no row.
    """
    if not can_be_timed("the flow"):
        return []
    cases = {**_product(), **_layers(model, tokens), **_whole(model), **Videos(model).cases()}
    rows = []
    for what, (theirs, ours) in cases.items():
        found = timed(what, {"PyTorch": theirs, "ours": ours}, rounds)
        (expected, torch_seconds), (result, seconds) = found["PyTorch"], found["ours"]
        rows.append({"what": what, "PyTorch, s": torch_seconds, "ours, s": seconds,
                     "times as fast": torch_seconds / seconds, "squared difference": _apart(result, expected)})
    return rows


def _apart(ours: Any, theirs: Any) -> float:
    """The largest ||a - b||^2 / ||b||^2 of two results' arrays."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.sum((np.asarray(a) - np.asarray(b))**2) / np.sum(np.asarray(b)**2)) for a, b in pairs)


def _product(side: int = SIDE) -> dict[str, tuple[Run, Run]]:
    matrix = jax.random.normal(jax.random.key(0), (side, side))
    tensor = to_tensor(matrix)
    return {f"a product of matrices, {side:,} x {side:,}": (
        lambda: (tensor @ tensor).numpy(), partial(_on_host, jax.jit(lambda a: a @ a), matrix))}


def _layers(model: Model, lengths: tuple[int, ...]) -> dict[str, tuple[Run, Run]]:
    """One causal layer of the deep block's width over rows of tokens, forward."""
    layer = Layer(model.head_dim, jnp.float32, Causal(), None, "ulysses", parent=None)
    x_1SD = jax.random.normal(jax.random.key(0), (1, max(lengths), model.deep_width))
    rope_2SE = rope_table(text_positions(max(lengths), model.extent), model.head_dim)
    params = random_weights(jax.jit(partial(layer.init, past=None, is_first=False))(
        jax.random.key(1), x_1SD[:, :8], rope_2SE=rope_2SE[:, :8])["params"], jax.random.key(2))
    stack = {"deep": {"transformer": {"layers": {"layer": jax.tree.map(lambda leaf: leaf[None], params)}}}}
    torch_flow = TorchFlow(model, stack)

    def theirs(x: Any, rope: Any) -> np.ndarray:
        with torch_flow.torch.inference_mode():
            return torch_flow.layer("deep", 0, x, rope).numpy()

    @jax.jit
    def ours(x: jax.Array, rope: jax.Array) -> jax.Array:
        return layer.apply({"params": params}, x, None, False, rope)[0]

    cases: dict[str, tuple[Run, Run]] = {}
    for length in lengths:
        x, rope = x_1SD[:, :length], rope_2SE[:, :length]
        cases[f"a layer, {length:,} tokens"] = (partial(theirs, to_tensor(x), to_tensor(rope)),
                                                partial(_on_host, ours, x, rope))
    return cases


def _on_host(function: Callable, *args: Any) -> Any:
    return jax.tree.map(np.asarray, function(*args))


def _whole(model: Model) -> dict[str, tuple[Run, Run]]:
    """The flow's forward pass, and training steps on one batch; their results are z, and a step's losses."""
    of = RandomFlow(model)
    settings = Train(steps=1_000, warmup_steps=0, skip_over_clip=False)
    torch_x, torch_text = to_tensor(of.x), to_tensor(of.text)
    torch_flow, trained = TorchFlow(model, of.params), TorchTraining(TorchFlow(model, of.params), settings)
    next_step = of.next_step(settings)

    def forward() -> np.ndarray:
        with torch_flow.torch.inference_mode():
            return torch_flow.forward(torch_x, torch_text)[0].numpy()

    @jax.jit
    def own_forward(params: Any) -> jax.Array:
        return apply_flow(of.flow, {"params": params}, STARFlow.forward, of.x, of.text).z_BTSK

    def own_step() -> tuple[float, float]:
        losses = next_step()
        return float(losses["loss"]), float(losses["denoiser_loss"])

    return {"forward pass": (forward, partial(_on_host, own_forward, of.params)),
            "training step": (partial(trained.step, torch_x, torch_text), own_step)}


class Videos:
    """One guided video from the same noise."""

    def __init__(self, model: Model) -> None:
        of = RandomFlow(model)
        self.torch_flow, self.video = TorchFlow(model, of.params), RandomVideo(of, GUIDANCE)
        self.start = self.video.fitted()(self.video.z_BTSK)

    def cases(self) -> dict[str, tuple[Run, Run]]:
        """Like for like: the same blocks, starts and tolerance. At equal error: frame by frame from what linear guesses
        from the noise, beside PyTorch's from the frame before, each with the loosest tolerance within it."""
        tokens = self.video.tokens
        found: dict[str, tuple[Run, Run]] = {
            "a video, one token after another": (partial(self.theirs, 1, 0.0),
                                                 partial(self.ours, Solver("sequential", 1, 1)))}
        for block in (tokens // 4, tokens):
            solver = Solver("jacobi", block, 1, tolerance=TOLERANCE)
            found[f"a video, blocks of {block} tokens"] = (partial(self.theirs, block, TOLERANCE),
                                                           partial(self.ours, solver))
        exact = self.ours(Solver("sequential", 1, 1))
        plain, guessed = (loosest(partial(self._decoder, start), Solver("jacobi", tokens, 1), exact)
                          for start in (None, self.start))
        found["a video, at equal error"] = (partial(self.theirs, tokens, plain.tolerance),
                                            partial(self.ours, guessed, self.start))
        return found

    def theirs(self, block: int, tolerance: float) -> np.ndarray:
        z, texts = to_tensor(self.video.z_BTSK), to_tensor(self.video.texts_GBTD)
        latents, _ = self.torch_flow.sample(z, texts, GUIDANCE, block, tolerance)
        return latents.numpy()

    def ours(self, solver: Solver, start: jax.Array | None = None) -> np.ndarray:
        return self.video.decoded(solver, start)[0]

    def _decoder(self, start: jax.Array | None, solver: Solver) -> Callable[[], tuple[np.ndarray, float]]:
        return partial(self.video.decoded, solver, start)
