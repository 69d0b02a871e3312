"""Draws the manual's diagrams from the code itself, and one from the record of a training, in a minute or two on a CPU:
python -m docs.figures"""

import json
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from configs.t2v import tiny
from starflow_jax.flow import decode, generation
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.kernels.mask import FrameWindow, seen
from starflow_jax.model.parameters import decoding_variables
from starflow_jax.model.store import load_model
from starflow_jax.sampling.conditions import make_conditions
from starflow_jax.sampling.solver import TOLERANCE

PICTURES = Path(__file__).parent / "pages" / "pictures"
PROMPTS = ["a blue three moves right", "a red seven moves left", "a green two moves up", "a white nine moves down",
           "a yellow five moves left", "a red zero moves up", "a blue eight moves down", "a green four moves right"]


def orders(frames: int = 2) -> plt.Figure:
    """Where each token of each block's sequence lies."""
    model = tiny().model
    flow, side = STARFlow(model), model.height
    index = np.arange(frames * side * side).reshape(1, frames, side * side, 1)
    shallow = range(len(model.shallow_layers))
    sequences = [np.asarray(flow.to_block_order(block, jnp.asarray(index))) for block in shallow]
    sequences.append(index.reshape(1, -1, 1))  # the deep block's
    names = [f"shallow block {block}, a frame at a time" for block in shallow]
    figure, rows = plt.subplots(len(sequences), frames, figsize=(5.2, 7.2), layout="constrained")
    for name, sequence, row in zip([*names, "deep block, all frames"], sequences, rows):
        slot = np.empty(index.size, int)
        slot[sequence.ravel()] = np.tile(np.arange(sequence.shape[1]), len(sequence))
        for frame, axes in enumerate(row):
            grid = slot.reshape(frames, side, side)[frame]
            axes.imshow(grid, cmap="viridis", vmin=0, vmax=slot.max())
            for (y, x), value in np.ndenumerate(grid):
                axes.text(x, y, value, ha="center", va="center", fontsize=7,
                          color="white" if value < slot.max() * 0.6 else "black")
            axes.set(xticks=[], yticks=[], title=f"{name}\nframe {frame}" if frame == 0 else f"\nframe {frame}")
            axes.title.set_fontsize(9)
    return figure


def denoiser_mask(text: int = 4, frames: int = 8, tokens: int = 4, window: int = 4) -> plt.Figure:
    """Who sees whom in the first layer of the denoiser and in the others."""
    slots = text + frames * tokens
    figure, columns = plt.subplots(1, 2, figsize=(7.6, 4.2), layout="constrained")
    edges = [0, *range(text, slots + 1, tokens)]
    names = ["T", *map(str, range(frames))]
    for title, lookahead, axes in zip(("first layer: one frame ahead", "the other layers"), (1, 0), columns):
        mask = FrameWindow(text, tokens, window, lookahead, frames)
        query, key = np.arange(slots)[:, None], np.arange(slots)[None]
        axes.imshow(seen(mask, query, key, slots), cmap="Blues", vmin=0, vmax=1.6, extent=(0, slots, slots, 0))
        axes.set(title=title, xlabel="key", ylabel="query", xticks=np.convolve(edges, [0.5, 0.5], "valid"),
                 xticklabels=names, yticks=np.convolve(edges, [0.5, 0.5], "valid"), yticklabels=names)
        axes.tick_params(length=0)
        for edge in edges:
            axes.axhline(edge, color="white", linewidth=0.8)
            axes.axvline(edge, color="white", linewidth=0.8)
    return figure


def residuals(updates: int) -> np.ndarray:
    """(frames, updates, prompts): residual of each update of each frame of the pretrained model, given the exact ones
    before it."""
    config = tiny()
    system, params, *_ = load_model(config, Path("no workdir"))
    given = make_conditions(system, params, PROMPTS, range(len(PROMPTS)), config.sample)
    variables, grid, frames = decoding_variables(params), system.token_grid, given.total
    exact = generation.generate(system.flow, variables, given.noise(0, frames), given.texts.first,
                                guidance=config.sample.guidance, token_grid=grid, guess_BSK=given.guess_BSK)
    u_BNSK = jnp.concatenate([frame for frame, _ in exact], axis=1)

    def last_residual(frame: int, count: int) -> np.ndarray:
        state = decode.start_window(system.flow, variables, u_BNSK[:, :frame], given.texts.first, window=frames,
                                    token_grid=grid, guess_BSK=given.guess_BSK)
        solver = decode.Solver(config.model.tokens_per_frame, tolerance=0.0, max_steps=count)
        _, _, report = decode.decode_frames(
            system.flow, variables, state, given.noise(frame, 1), jnp.float32(config.sample.guidance),
            solver=solver, window=frames, token_grid=grid, branches=2)
        return np.asarray(report.residual[0])

    return np.stack([[last_residual(frame, count) for count in range(1, updates + 1)] for frame in range(frames)])


def jacobi(updates: int = 16) -> plt.Figure:
    """How fast a frame's tokens come to a standstill."""
    found, steps = residuals(updates), np.arange(1, updates + 1)
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for frame, residual_UB in enumerate(found):
        line, = axes.semilogy(steps, np.median(residual_UB, axis=1), marker="o", markersize=3,
                              label=f"latent frame {frame}")
        axes.fill_between(steps, residual_UB.min(axis=1), residual_UB.max(axis=1), color=line.get_color(), alpha=0.12)
    axes.axhline(TOLERANCE, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="updates", ylabel="residual", xticks=steps[::2])
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def training() -> plt.Figure:
    """Validations while the model in the package was trained, against hours of two CPU cores."""
    stages = json.loads((Path(__file__).parent / "training_of_the_model.json").read_text())
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.4), layout="constrained")
    for stage in stages:
        hours = [row["hours"] for row in stage["validations"]]
        for one, name in zip(axes, ("digit", "validation_bits_per_dim")):
            one.plot(hours, [row[name] for row in stage["validations"]], marker="o", markersize=4, label=stage["stage"])
    for one, label in zip(axes, ("digit read as asked, 100 prompts", "validation bits per dimension")):
        one.set(xlabel="hours since the first stage", ylabel=label)
        one.grid(alpha=0.3)
    axes[0].axhline(0.97, color="black", linestyle=":", linewidth=1)
    axes[1].legend(fontsize=7)
    return figure


def save(name: str, figure: plt.Figure) -> None:
    figure.savefig(PICTURES / name, metadata={"Date": None})
    print(PICTURES / name)


if __name__ == "__main__":
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "starflow_jax", "font.family": "sans-serif"}
    save("orders.svg", orders())
    save("denoiser_mask.svg", denoiser_mask())
    save("jacobi.svg", jacobi())
    save("training.svg", training())
