"""A Gradio app over the package's sessions: a video plays while it is made, and follows what you say meanwhile.

On Spaces as README.md says; elsewhere: pip install -e ".[demo]", then python launch/space/app.py. The parts of a video
are moving pictures of a latent frame each, put into one <img>: gr.Video(streaming=True) starts ffmpeg and ffprobe for
each part, and plays more than a second behind what is made.
"""

import base64
import contextlib
import html
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import numpy as np

import starflow_jax as sf
from starflow_jax.config import Serve
from starflow_jax.io.pictures import webp_bytes
from starflow_jax.model.codec import frame_size
from starflow_jax.sampling.files import file_rate, shown_scale
from starflow_jax.serving.asked import check_prompt
from starflow_jax.serving.describe import examples

SESSIONS = 2  # that play at once; others wait
WAITING = 8  # clients; more are sent away
MOST_SECONDS = 60  # of a video, so that those who wait get their turn
LIMITS = Serve()  # of what clients send


class Player:
    """Makes the videos of all clients, each in a session of its own. Errors are said in words, as gr.Error."""

    def __init__(self, model: sf.Model) -> None:
        self.model = model
        self.fps = file_rate(model.config)
        self._device = threading.Lock()  # sessions take turns, latent frame by latent frame
        self._playing: dict[str, sf.Session] = {}  # by gradio's name of a client's open page

    def play(self, prompt: str, seed: int | None, guidance: float, seconds: float,
             request: gr.Request) -> Iterator[tuple[str, str, str | None]]:
        """(a part of the video, what is said of it, None), each when the one before it has played; at last
        (no change, what is said, an MP4)."""
        stride, client = self.model.config.codec.time_stride, str(request.session_hash)
        with _in_words(), tempfile.TemporaryDirectory() as folder:
            frames = 1 + stride * max(1, round((seconds * self.fps - 1) / stride))
            # ahead=False: a change is seen a latent frame sooner.
            session = self.model.stream(check_prompt(prompt, LIMITS), seed=seed or 0, frames=frames, ahead=False)
            session.guidance = guidance
            self._playing[client] = session
            try:
                due = time.monotonic()
                while (part_THWC := self._next(session)) is not None:
                    time.sleep(max(0.0, due - time.monotonic()))
                    due = max(due, time.monotonic()) + len(part_THWC) / self.fps
                    yield self.picture(part_THWC), f"{session.shown} of {frames} frames", None
                if session.shown:
                    video = session.save(Path(folder) / "video.mp4")
                    yield gr.skip(), f"{session.shown} frames: the end", str(video)
            finally:  # also where the client has gone
                session.close()
                if self._playing.get(client) is session:
                    del self._playing[client]

    def change(self, prompt: str, guidance: float, request: gr.Request) -> str:
        """Another prompt and guidance for what plays; says from which frame on."""
        session = self._playing.get(str(request.session_hash))
        if session is None:
            return "Nothing plays; press Start."
        with _in_words():
            session.prompt, session.guidance = check_prompt(prompt, LIMITS), guidance
        return f"From frame {session.next_frame} on: {session.prompt}"

    def stop(self, request: gr.Request) -> None:
        """End what plays."""
        if session := self._playing.get(str(request.session_hash)):
            with self._device:
                session.close()

    def picture(self, part_THWC: np.ndarray) -> str:
        """As the address of a picture."""
        content = webp_bytes(part_THWC, self.fps, shown_scale(part_THWC.shape[1]))
        return f"data:image/webp;base64,{base64.b64encode(content).decode()}"

    def _next(self, session: sf.Session) -> np.ndarray | None:
        with self._device:
            return next(session, None)


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except sf.UserError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


def make_app(model: sf.Model) -> gr.Blocks:
    """The page, with its queue."""
    player = Player(model)
    config, known = model.config, examples(model.config)
    blank = player.picture(np.full((1, *frame_size(config), 3), 127, np.uint8))
    image = '<img src="${value}" alt="The video" style="width: 100%; image-rendering: pixelated">'
    with gr.Blocks(title="STARFlow-V, live", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown("# STARFlow-V, live\nA video plays while it is made. Change its prompt and press Enter.")
        with gr.Row():
            with gr.Column():
                screen = gr.HTML(blank, html_template=image)
                said, changed = gr.Markdown("Press Start."), gr.Markdown()
            with gr.Column():
                prompt = gr.Textbox(known[0] if known else "", label="Prompt", max_length=LIMITS.prompt_bytes)
                with gr.Row():
                    start = gr.Button("Start", variant="primary", min_width=80)
                    change, stop = gr.Button("Change", min_width=80), gr.Button("Stop", min_width=80)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
                guidance = gr.Slider(0, 6, config.sample.guidance, step=0.1, label="Guidance")
                seconds = gr.Slider(1, MOST_SECONDS, 20, step=1, label="Seconds")
                if known:
                    gr.Examples([[text] for text in known], prompt, label="Prompts that this model knows")
        whole = gr.Video(label="All of it, once it has ended", interactive=False, height=260)
        start.click(player.play, [prompt, seed, guidance, seconds], [screen, said, whole], api_name="play",
                    show_progress="hidden", concurrency_limit=SESSIONS)
        # Not in the queue, where they would wait behind the videos of others.
        gr.on([change.click, prompt.submit], player.change, [prompt, guidance], changed, queue=False,
              show_progress="hidden", api_name="change")
        stop.click(player.stop, queue=False, show_progress="hidden", api_name="stop")
        app.unload(player.stop)
    return app.queue(max_size=WAITING)


def main() -> None:
    """Load the model of the package, compile all that its sessions need, and serve the page."""
    warnings.filterwarnings("ignore", message=".*no training caption has", category=UserWarning)
    model = sf.load()
    model.warm_up(given=())
    make_app(model).launch(max_file_size=1, ssr_mode=False)  # bytes: nothing is uploaded


if __name__ == "__main__":
    main()
