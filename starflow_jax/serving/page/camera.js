// The camera of a model that follows one: keys, buttons, and dragging on the picture.

import { $, page } from "./common.js";

const KEYS = { ArrowLeft: "pan_left", ArrowRight: "pan_right", ArrowUp: "tilt_up", ArrowDown: "tilt_down",
               "+": "zoom_in", "-": "zoom_out", " ": "still" };

function move(name) {
  if (page.session && !page.session.over && page.model.steerable) page.session.send({ camera: name });
}

export function followCamera() {
  for (const button of document.querySelectorAll("[data-move]")) {
    button.addEventListener("click", () => move(button.dataset.move));
  }
  keys($("screen"));
  dragging($("screen"));
}

function keys(screen) {
  let pressed = null;
  screen.addEventListener("keydown", (event) => {
    if (!page.model.steerable || !(event.key in KEYS)) return;
    event.preventDefault();
    if (pressed !== event.key) move(KEYS[event.key]);
    pressed = event.key;
  });
  screen.addEventListener("keyup", (event) => {
    if (event.key !== pressed) return;
    pressed = null;
    move("still");
  });
}

function dragging(screen) {
  let from = null;
  let last = "still";
  screen.addEventListener("pointerdown", (event) => {
    if ($("video").paused && page.session && !page.session.paused) $("video").play().catch(() => {});
    if (!page.model.steerable) return;
    from = [event.clientX, event.clientY];
    screen.setPointerCapture(event.pointerId);
  });
  screen.addEventListener("pointermove", (event) => {
    if (!from) return;
    const [x, y] = [event.clientX - from[0], event.clientY - from[1]];
    if (Math.hypot(x, y) < 15) return;
    // As one drags a picture: what is pulled to the right is seen from farther left.
    const name = Math.abs(x) > Math.abs(y) ? (x > 0 ? "pan_left" : "pan_right") : (y > 0 ? "tilt_up" : "tilt_down");
    if (name !== last) move(name);
    last = name;
  });
  for (const kind of ["pointerup", "pointercancel"]) screen.addEventListener(kind, () => {
    if (from && last !== "still") move("still");
    from = null;
    last = "still";
  });
}
