// Four seeds of one prompt, made as jobs and shown side by side, the most likely first.

import { $, bits } from "./common.js";

const SEEDS = 4;
const LOOK = 500; // milliseconds between looks at the jobs
const still = window.matchMedia("(prefers-reduced-motion: reduce)");
let latest = 0; // the run that is shown; those before it give up

export async function makeFour(asked) {
  const run = ++latest;
  const jobs = [];
  const list = $("four_list");
  for (const video of list.querySelectorAll("video")) URL.revokeObjectURL(video.src);
  list.replaceChildren();
  $("four_error").textContent = "";
  try {
    for (let index = 0; index < SEEDS; index += 1) {
      jobs.push(await ask("v1/videos", { method: "POST", body: JSON.stringify(
        { ...asked, seed: (asked.seed + index) % 2 ** 32, surprise: true }) }));
    }
    while (jobs.some((job) => job.status !== "done")) {
      await new Promise((resolve) => setTimeout(resolve, LOOK));
      if (run !== latest) return;
      await look(jobs);
    }
    await Promise.all(jobs.map(async (job) => {
      const answer = await fetch(job.url.slice(1), { headers: { accept: "video/mp4" } });
      if (!answer.ok) throw new Error((await answer.json()).error);
      job.source = URL.createObjectURL(await answer.blob());
    }));
    if (run !== latest) return;
    jobs.sort((one, other) => one.bits_per_dimension - other.bits_per_dimension);
    list.replaceChildren(...jobs.map(shown));
    $("four_state").textContent = `Ranked by likelihood: seed ${jobs[0].seed} is the most likely.`;
  } catch (error) {
    if (run !== latest) return;
    $("four_state").textContent = "";
    $("four_error").textContent = error.message;
  } finally {
    for (const job of jobs) fetch(job.url.slice(1), { method: "DELETE" }).catch(() => {});
  }
}

async function ask(url, options) {
  const answer = await fetch(url, options);
  const held = await answer.json();
  if (!answer.ok) throw new Error(held.error);
  return held;
}

async function look(jobs) {
  for (const job of jobs) if (job.status !== "done") Object.assign(job, await ask(job.url.slice(1)));
  const failed = jobs.find((job) => job.status === "failed");
  if (failed) throw new Error(failed.error);
  const sum = (name) => jobs.reduce((total, job) => total + job[name], 0);
  $("four_state").textContent = `Made ${sum("frames_made")} of ${sum("frames")} frames.`;
}

function shown(job, index) {
  const item = document.createElement("li");
  const video = document.createElement("video");
  Object.assign(video, { src: job.source, muted: true, loop: true, controls: true, playsInline: true,
                         autoplay: !still.matches });
  video.setAttribute("aria-label", `Seed ${job.seed}, number ${index + 1} by likelihood`);
  const words = document.createElement("p");
  words.textContent = `Seed ${job.seed}: ${bits(job.bits_per_dimension)}`;
  const take = document.createElement("button");
  take.type = "button";
  take.textContent = `Take seed ${job.seed}`;
  take.addEventListener("click", () => { $("seed").value = job.seed; $("seed").focus(); });
  item.append(video, words, take);
  return item;
}
