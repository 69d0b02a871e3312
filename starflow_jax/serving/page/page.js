// The page: one session at a time over a WebSocket; its pieces of MP4 are played through Media Source Extensions.

const $ = (id) => document.getElementById(id);
const video = $("video");
const KEEP_SECONDS = 30; // of what was played, in the player; all pieces are kept besides, for saving
const MOST_BYTES = 500e6; // of these; a longer session can no longer be saved
const KEYS = { ArrowLeft: "pan_left", ArrowRight: "pan_right", ArrowUp: "tilt_up", ArrowDown: "tilt_down",
               "+": "zoom_in", "-": "zoom_out", " ": "still" };
const CURVE = 60; // latent frames of the curve
let model = null;
let session = null;

function say(text) { $("state").textContent = text; }
function complain(text) { $("error").textContent = text; }
function seconds(value) { return value < 10 ? `${value.toFixed(2)} s` : `${value.toFixed(0)} s`; }

class Session {
  constructor(asked) {
    this.asked = asked;
    this.pieces = [];
    this.bytes = 0;
    this.waiting = []; // pieces that the player does not have yet
    this.shown = 0;
    this.told = 0; // frames that the server was told to have played
    this.over = false;
    this.record = null;
    this.surprises = [];
    this.begun = performance.now();
    this.since = null;
    this.socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/v1/session`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.socket.send(JSON.stringify(asked));
    this.socket.onmessage = (event) => this.take(event.data);
    this.socket.onclose = () => this.end("The connection to the server has ended.");
  }

  send(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  take(data) {
    if (session !== this) return;
    if (data instanceof ArrayBuffer) {
      if (this.bytes < MOST_BYTES) this.pieces.push(data);
      this.bytes += data.byteLength;
      this.waiting.push(data);
      this.feed();
      return;
    }
    const message = JSON.parse(data);
    const act = {
      queued: () => say(`All places are taken; you are number ${message.place} in the queue.`),
      begun: () => say("Begun: the first frame is being made."),
      video: () => this.play(`video/mp4; codecs="${message.codec}"`),
      frames: () => this.count(message),
      changed: () => say(`Changed: holds from frame ${message.frame} on.`),
      shown: () => { $("change").textContent = seconds(message.seconds); },
      refused: () => complain(message.why),
      record: () => this.saveRecord(message.record),
      ended: () => {
        this.record = message.record || null;
        if (message.failed) complain(message.why);
        const why = { end: "The end.", idle: "Ended: nothing was heard of you for a while.", closed: "Stopped.",
                      slow: "Ended: your connection is too slow.", stopped: "Ended: the server stops." };
        this.end(why[message.why] || "Ended.");
      },
    }[message.type];
    if (act) act();
  }

  play(kind) {
    const Source = window.ManagedMediaSource || window.MediaSource;
    if (!Source || !Source.isTypeSupported(kind)) {
      complain("This browser can't play the video while it is made; save the MP4 when it has ended.");
      return;
    }
    this.source = new Source();
    video.disableRemotePlayback = true;
    video.src = URL.createObjectURL(this.source);
    this.source.addEventListener("sourceopen", () => {
      URL.revokeObjectURL(video.src);
      this.buffer = this.source.addSourceBuffer(kind);
      this.buffer.addEventListener("updateend", () => this.feed());
      this.feed();
    }, { once: true });
    $("screen").classList.add("plays");
    video.play().catch(() => say("Press the picture to play."));
  }

  feed() {
    if (!this.buffer || this.buffer.updating || this.source.readyState !== "open") return;
    if (this.waiting.length) {
      try {
        this.buffer.appendBuffer(this.waiting[0]);
        this.waiting.shift();
      } catch (error) {
        if (error.name === "QuotaExceededError") this.forget(5);
        else complain("The video can't be played any further here.");
      }
    } else if (this.over) {
      this.source.endOfStream();
    } else {
      this.forget(KEEP_SECONDS);
    }
  }

  forget(keep) {
    const held = this.buffer.buffered;
    const end = video.currentTime - keep;
    if (held.length && end > held.start(0) + 5) this.buffer.remove(held.start(0), end);
  }

  count(message) {
    this.shown = message.shown;
    $("made").textContent = message.shown;
    if (message.shown === 1) $("first").textContent = seconds((performance.now() - this.begun) / 1000);
    if (message.seconds > 0) $("rate_made").textContent = (message.shown / message.seconds).toFixed(1);
    if (typeof message.surprise === "number") this.draw(message.surprise);
    if (message.shown > 1 && !this.paused) say(`Playing: ${this.asked.prompt}`);
    this.report();
  }

  draw(surprise) {
    this.surprises = [...this.surprises, surprise].slice(-CURVE);
    $("surprise").textContent = `${surprise.toFixed(3)} bits per dimension`;
    const low = Math.min(...this.surprises);
    const range = Math.max(...this.surprises) - low || 1;
    $("line").setAttribute("points", this.surprises.map((value, index) =>
      `${(300 * (index + CURVE - this.surprises.length)) / (CURVE - 1)},${75 - (70 * (value - low)) / range}`).join(" "));
  }

  // Frames that have begun to play. The server makes one latent frame beyond them, and no more.
  report() {
    const frame = Math.min(this.shown, Math.floor(video.currentTime * model.fps + 1e-3) + (video.currentTime > 0 ? 1 : 0));
    $("played").textContent = frame;
    if (frame > this.told) {
      this.since ??= { frame: frame - 1, time: performance.now() - 1000 / model.fps }; // of the start, or of a pause's end
      const passed = performance.now() - this.since.time;
      $("rate_played").textContent = (1000 * (frame - this.since.frame) / passed).toFixed(1);
      this.told = frame;
      this.send({ played: frame });
    }
  }

  pause(paused) {
    this.paused = paused;
    this.since = null;
    this.send({ pause: paused });
    if (paused) video.pause();
    else video.play().catch(() => {});
    $("pause").setAttribute("aria-pressed", String(paused));
    say(paused ? "Paused. Your place is kept for a while." : "Goes on.");
  }

  end(words) {
    if (this.over) return;
    this.over = true;
    this.feed();
    this.socket.close();
    if (session === this) {
      say(words);
      buttons();
    }
  }

  saveVideo() {
    if (this.bytes >= MOST_BYTES) complain("Only the beginning of so long a session is kept.");
    save(new Blob(this.pieces, { type: "video/mp4" }), "session.mp4");
  }

  saveRecord(record) {
    save(new Blob([JSON.stringify(record, null, 1)], { type: "application/json" }), "session.json");
  }
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function buttons() {
  const live = Boolean(session && !session.over);
  for (const id of ["pause", "stop", "send"]) $(id).disabled = !live;
  for (const id of ["restart", "save_video"]) $(id).disabled = !session;
  $("save_record").disabled = !session || (session.over && !session.record);
  for (const button of document.querySelectorAll("[data-move]")) button.disabled = !live;
}

function start(asked) {
  if (session) {
    session.over = true;
    session.socket.close();
  }
  complain("");
  $("line").setAttribute("points", "");
  $("surprise").textContent = "–";
  for (const id of ["made", "played"]) $(id).textContent = "0";
  for (const id of ["rate_made", "rate_played", "first", "change"]) $(id).textContent = "–";
  $("pause").setAttribute("aria-pressed", "false");
  say("Connecting.");
  session = new Session(asked);
  buttons();
}

async function base64(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = "";
  for (let at = 0; at < bytes.length; at += 32768) text += String.fromCharCode(...bytes.subarray(at, at + 32768));
  return btoa(text);
}

async function submit(event) {
  event.preventDefault();
  const asked = { prompt: $("prompt").value, seed: Number($("seed").value), guidance: Number($("guidance").value),
                  surprise: $("surprising").checked };
  $("curve_figure").hidden = !asked.surprise;
  if (!$("endless").checked) asked.frames = Number($("frames").value);
  const file = $("picture").files[0];
  if (file) {
    if (file.size * 1.4 > model.upload_bytes) {
      complain(`The picture is larger than ${Math.floor(model.upload_bytes / 1.4e6)} MB.`);
      return;
    }
    asked.image = await base64(file);
  }
  start(asked);
}

function move(name) {
  if (session && !session.over && model.steerable) session.send({ camera: name });
}

function listen() {
  $("form").addEventListener("submit", submit);
  $("send").addEventListener("click", () => {
    complain("");
    session.asked.prompt = $("prompt").value;
    session.send({ prompt: $("prompt").value, guidance: Number($("guidance").value) });
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    if ($("send").disabled) $("form").requestSubmit();
    else $("send").click();
  });
  $("pause").addEventListener("click", () => session.pause(!session.paused));
  $("restart").addEventListener("click", () => start({ ...session.asked }));
  $("stop").addEventListener("click", () => session.end("Stopped."));
  $("save_video").addEventListener("click", () => session.saveVideo());
  $("save_record").addEventListener("click", () => {
    if (session.over) session.saveRecord(session.record);
    else session.send({ record: true });
  });
  $("endless").addEventListener("change", () => { $("frames").disabled = $("endless").checked; });
  video.addEventListener("timeupdate", () => session && session.report());
  (function tick() {
    if (session && !session.over) session.report();
    requestAnimationFrame(tick);
  })();
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
  steering();
}

function steering() {
  const screen = $("screen");
  for (const button of document.querySelectorAll("[data-move]")) {
    button.addEventListener("click", () => move(button.dataset.move));
  }
  let pressed = null;
  screen.addEventListener("keydown", (event) => {
    if (!model.steerable || !(event.key in KEYS)) return;
    event.preventDefault();
    if (pressed !== event.key) move(KEYS[event.key]);
    pressed = event.key;
  });
  screen.addEventListener("keyup", (event) => {
    if (event.key !== pressed) return;
    pressed = null;
    move("still");
  });
  let from = null;
  screen.addEventListener("pointerdown", (event) => {
    if (video.paused && session && !session.paused) video.play().catch(() => {});
    if (!model.steerable) return;
    from = [event.clientX, event.clientY];
    screen.setPointerCapture(event.pointerId);
  });
  let last = "still";
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

async function begin() {
  const answer = await fetch("v1/model");
  if (!answer.ok) throw new Error((await answer.json()).error);
  model = await answer.json();
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
  listen();
  buttons();
  const health = await fetch("healthz");
  if (!health.ok) say("The server is still compiling; a session begins when it is done.");
}

begin().catch((error) => complain(`The server can't be reached: ${error.message}`));
