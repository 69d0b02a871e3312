// One session over a WebSocket; its pieces of MP4 are played through Media Source Extensions.

import { $, complain, page, save, say, seconds } from "./common.js";
import { Surprise } from "./surprise.js";

const video = $("video");
const KEEP_SECONDS = 30; // of what was played, in the player; all pieces are kept besides, for saving
const STOP_MILLISECONDS = 3000; // in which the server has to send the JSON
const MOST_BYTES = 500e6; // of these; a longer session can no longer be saved

export class Session {
  constructor(asked, ended) {
    this.asked = asked;
    this.ended = ended; // called when it has
    this.pieces = [];
    this.bytes = 0;
    this.waiting = []; // pieces that the player does not have yet
    this.shown = 0;
    this.told = 0; // frames that the server was told to have played
    this.over = false;
    this.record = null;
    this.surprise = new Surprise();
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
    if (page.session !== this) return;
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
      begun: () => {
        say("Begun: the first frame is being made.");
        if (this.asked.surprise && $("other").value.trim()) this.compare();
      },
      video: () => this.play(`video/mp4; codecs="${message.codec}"`),
      frames: () => this.count(message),
      changed: () => say(`Changed: holds from frame ${message.frame} on.`),
      shown: () => { $("change").textContent = seconds(message.seconds); },
      refused: () => complain(message.why),
      record: () => {
        this.record = message.record;
        if (this.stopping) this.end("Stopped.");
        else this.saveRecord(message.record);
      },
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
    if (typeof message.surprise === "number") this.surprise.add(message);
    if (message.shown > 1 && !this.paused) say(`Playing: ${this.asked.prompt}`);
    this.report();
  }

  // Frames that have begun to play. The server makes one latent frame beyond them, and no more.
  report() {
    const playing = Math.floor(video.currentTime * page.model.fps + 1e-3);
    this.surprise.show(Math.max(0, Math.min(this.shown - 1, playing)));
    const frame = Math.min(this.shown, playing + (video.currentTime > 0 ? 1 : 0));
    $("played").textContent = frame;
    if (frame > this.told) {
      // Since the start, or a pause's end.
      this.since ??= { frame: frame - 1, time: performance.now() - 1000 / page.model.fps };
      const passed = performance.now() - this.since.time;
      $("rate_played").textContent = (1000 * (frame - this.since.frame) / passed).toFixed(1);
      this.told = frame;
      this.send({ played: frame });
    }
  }

  change(prompt, guidance) {
    this.asked = { ...this.asked, prompt, guidance };
    this.send({ prompt, guidance });
  }

  // With another prompt, or none any more.
  compare() {
    this.send({ other_prompt: $("other").value.trim() || null });
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

  // By the user, who may want to save its JSON afterwards.
  stop() {
    this.stopping = true;
    this.send({ pause: true, record: true });
    setTimeout(() => this.end("Stopped."), this.socket.readyState === WebSocket.OPEN ? STOP_MILLISECONDS : 0);
  }

  // Another one takes its place.
  leave() {
    this.over = true;
    this.socket.close();
  }

  end(words) {
    if (this.over) return;
    this.over = true;
    this.feed();
    this.socket.close();
    if (page.session === this) {
      say(words);
      this.ended();
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
