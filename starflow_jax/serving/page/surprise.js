// What only a flow can tell: each latent frame's surprise as a curve, that under another prompt as a second one, and
// where in the frame it lies as heat over the video.

import { $, bits, page } from "./common.js";

const CURVE = 60; // latent frames of the curves, and of the maps that are kept
const CELL = 48; // pixels of the canvas for each of a map's cells

export class Surprise {
  constructor() {
    this.frames = []; // {latent, own, other, map} of the last latent frames
    this.drawn = null; // what the canvas shows
    for (const id of ["line", "other_line"]) $(id).setAttribute("points", "");
    for (const id of ["surprise", "region"]) $(id).textContent = "–";
    $("other_surprise").textContent = "";
    this.clear();
  }

  add(message) {
    const latent = (message.shown - 1) / page.model.time_stride;
    this.frames = [...this.frames, { latent, own: message.surprise, other: message.other_surprise,
                                     map: message.surprise_map }].slice(-CURVE);
    $("surprise").textContent = bits(message.surprise);
    const compared = typeof message.other_surprise === "number";
    $("other_surprise").textContent = compared ? `; under the other prompt ${bits(message.other_surprise)}` : "";
    const values = this.frames.flatMap((frame) => [frame.own, frame.other]).filter((value) => value !== undefined);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    this.curve("line", "own", low, high);
    this.curve("other_line", "other", low, high);
  }

  curve(id, name, low, high) {
    const first = CURVE - this.frames.length;
    const points = this.frames.map((frame, index) => [(300 * (first + index)) / (CURVE - 1), frame[name]]);
    const known = points.filter(([, value]) => value !== undefined);
    $(id).setAttribute("points", known.map(([x, value]) =>
      `${x.toFixed(1)},${(75 - (70 * (value - low)) / (high - low || 1)).toFixed(1)}`).join(" "));
  }

  // The heat of the latent frame that plays: from the mean of the maps that are kept, where it is clear, to their most.
  show(playing) {
    const latent = playing ? 1 + Math.floor((playing - 1) / page.model.time_stride) : 0;
    const map = this.frames.find((frame) => frame.latent === latent)?.map;
    if (!$("overlay").checked || !map) return this.clear();
    if (this.drawn === map) return undefined;
    this.drawn = map;
    const cells = this.frames.flatMap((frame) => frame.map ? frame.map.flat() : []);
    const low = cells.reduce((sum, value) => sum + value, 0) / cells.length;
    const high = Math.max(...cells);
    const canvas = $("heat");
    [canvas.height, canvas.width] = [CELL * map.length, CELL * map[0].length];
    const most = Math.max(...map.flat());
    const context = canvas.getContext("2d");
    let outlined = null;
    map.forEach((row, y) => row.forEach((value, x) => {
      const heat = Math.max(0, value - low) / (high - low || 1);
      context.fillStyle = `rgb(255 ${Math.round(220 - 190 * heat)} 0 / ${(0.75 * heat).toFixed(3)})`;
      context.fillRect(CELL * x, CELL * y, CELL, CELL);
      if (value === most) outlined = [x, y];
    }));
    context.strokeStyle = "white";
    context.strokeRect(CELL * outlined[0] + 0.5, CELL * outlined[1] + 0.5, CELL - 1, CELL - 1);
    $("region").textContent = place(outlined, map);
    canvas.hidden = false;
    return undefined;
  }

  clear() {
    if (!$("heat").hidden) $("region").textContent = "–";
    $("heat").hidden = true;
    this.drawn = null;
  }
}

function place([x, y], map) {
  const third = (at, count) => Math.min(2, Math.floor((3 * (at + 0.5)) / count));
  const words = `${["upper", "middle", "lower"][third(y, map.length)]} ${
    ["left", "centre", "right"][third(x, map[0].length)]}`;
  return words === "middle centre" ? "centre" : words;
}
