// The page: what is asked for, and the buttons.

import { followCamera } from "./camera.js";
import { $, base64, complain, page, say } from "./common.js";
import { makeFour } from "./seeds.js";
import { Session } from "./session.js";

function buttons() {
  const { session } = page;
  const live = Boolean(session && !session.over);
  for (const id of ["pause", "stop", "send"]) $(id).disabled = !live;
  for (const id of ["restart", "save_video"]) $(id).disabled = !session;
  $("save_record").disabled = !session || (session.over && !session.record);
  for (const button of document.querySelectorAll("[data-move]")) button.disabled = !live;
}

function start(asked) {
  if (page.session) page.session.leave();
  complain("");
  for (const id of ["made", "played"]) $(id).textContent = "0";
  for (const id of ["rate_made", "rate_played", "first", "change"]) $(id).textContent = "–";
  $("pause").setAttribute("aria-pressed", "false");
  say("Connecting.");
  $("curve_figure").hidden = !asked.surprise;
  page.session = new Session(asked, buttons);
  buttons();
}

// What the form asks for; null, and words, where that can't be.
async function asked() {
  const wanted = { prompt: $("prompt").value, seed: Number($("seed").value), guidance: Number($("guidance").value) };
  const file = $("picture").files[0];
  if (!file) return wanted;
  if (file.size * 1.4 > page.model.upload_bytes) {
    complain(`The file is larger than ${Math.floor(page.model.upload_bytes / 1.4e6)} MB.`);
    return null;
  }
  return { ...wanted, [file.type.startsWith("video/") ? "video" : "image"]: await base64(file) };
}

async function submit(event) {
  event.preventDefault();
  const wanted = await asked();
  if (!wanted) return;
  if (!$("endless").checked) wanted.frames = Number($("frames").value);
  start({ ...wanted, surprise: $("surprising").checked ? "map" : false });
}

async function four() {
  if (!$("form").reportValidity()) return;
  const wanted = await asked();
  if (!wanted) return;
  $("four_state").textContent = "Asked for.";
  makeFour(wanted);
}

function listen() {
  $("form").addEventListener("submit", submit);
  $("send").addEventListener("click", () => {
    complain("");
    page.session.change($("prompt").value, Number($("guidance").value));
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    if ($("send").disabled) $("form").requestSubmit();
    else $("send").click();
  });
  $("pause").addEventListener("click", () => page.session.pause(!page.session.paused));
  $("restart").addEventListener("click", () => start({ ...page.session.asked }));
  $("stop").addEventListener("click", () => page.session.stop());
  $("save_video").addEventListener("click", () => page.session.saveVideo());
  $("save_record").addEventListener("click", () => {
    if (page.session.over) page.session.saveRecord(page.session.record);
    else page.session.send({ record: true });
  });
  $("endless").addEventListener("change", () => { $("frames").disabled = $("endless").checked; });
  $("compare_form").addEventListener("submit", (event) => {
    event.preventDefault();
    complain("");
    if (page.session && !page.session.over) page.session.compare();
  });
  $("four").addEventListener("click", four);
  $("video").addEventListener("timeupdate", () => page.session && page.session.report());
  (function tick() {
    if (page.session) page.session.report();
    requestAnimationFrame(tick);
  })();
  dropping();
  followCamera();
}

function dropping() {
  for (const kind of ["dragenter", "dragover"]) $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
  $("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
  $("drop").addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    if (event.dataTransfer.files.length) $("picture").files = event.dataTransfer.files;
  });
}

function fill(model) {
  $("model").textContent = `${model.name}: ${model.width}×${model.height}, ${model.fps} frames per second`;
  $("guidance").value = model.guidance;
  $("frames").value = model.frames;
  $("frames").max = model.most_frames;
  $("frames").step = model.time_stride;
  $("frames").disabled = true;
  $("screen").style.aspectRatio = `${model.width} / ${model.height}`;
  $("camera").hidden = !model.steerable;
  $("screen").classList.toggle("plain", !model.steerable);
  $("prompt").value = model.examples[0] || "";
  for (const text of model.examples) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => { $("prompt").value = text; $("prompt").focus(); });
    $("examples").append(button);
  }
}

async function begin() {
  const answer = await fetch("v1/model");
  if (!answer.ok) throw new Error((await answer.json()).error);
  page.model = await answer.json();
  fill(page.model);
  listen();
  buttons();
  const health = await fetch("healthz");
  if (!health.ok) say("The server is still compiling; a session begins when it is done.");
}

begin().catch((error) => complain(`The server can't be reached: ${error.message}`));
