"use strict";
/* The report: what data.js holds, as tables and films. A clip's frames lie in a script of their own and are read when it is
   looked at: scripts, unlike requests, may be read from a folder that no server serves. */

const REPORT = window.REPORT;
const when = (date) => String(date).replace("T", " ").replace("+00:00", " UTC");
const at = (id) => document.getElementById(id);
const films = new Map();  // clip's number -> what its script held
const waiting = new Map();
const loading = new Map();  // clip's number -> the promise of what its script holds
let now = null;  // the clip that is shown: its script was read
let coming = null;  // the clip that is being read
let turn = 0;  // loading that was overtaken by another choice is dropped
let view = null;

/* Called by clips/<number>.js: {methods: {id: [base64 of a picture, ...]}, slices: {id: data URL}}. */
window.arrived = (index, content) => {
  films.set(index, content);
  waiting.get(index)?.();
};

function load(index) {
  if (!loading.has(index)) loading.set(index, new Promise((resolve, reject) => {
    waiting.set(index, () => resolve(films.get(index)));
    document.head.append(make("script", { src: `clips/${index}.js`, onerror: () => { loading.delete(index); reject(new Error(`clips/${index}.js is not there`)); } }));
  }));
  return loading.get(index);
}

function bytes(text) {
  const raw = atob(text);
  return Uint8Array.from({ length: raw.length }, (_, i) => raw.charCodeAt(i));
}

const decoded = new Map();  // of the clip that is shown: method -> pictures
async function pictures(content, method) {
  if (!decoded.has(method)) decoded.set(method, Promise.all(content.methods[method].map((frame) => picture(bytes(frame)))));
  return decoded.get(method);
}

async function choose(clip, scroll = false) {
  const mine = ++turn;
  coming = clip;
  press(clip);
  let content = null;
  try {
    content = await load(clip.index);
  } catch (error) {
    if (mine !== turn) return;
    coming = null;
    press(now);
    at("scores").textContent = error.message;
    return;
  }
  if (mine !== turn) return;
  [now, coming] = [clip, null];
  decoded.clear();
  for (const [side, other] of [["left", 0], ["right", 1]]) {
    const kept = at(side).value;
    const ids = clip.methods.map((method) => method.id);
    at(side).replaceChildren(...clip.methods.map((method) => make("option", { value: method.id }, method.label)));
    at(side).value = ids.includes(kept) ? kept : ids[Math.min(other, ids.length - 1)];
  }
  at("slices").replaceChildren(...clip.methods.map((method) => make("figure", {},
    make("img", { src: content.slices[method.id], alt: `the middle row over time, ${method.label}` }), make("figcaption", {}, ...parted(method.label)))));
  at("videos").replaceChildren(...clip.videos.map((video) => make("figure", {},
    make("video", { src: video.file, controls: true, loop: true, muted: true, preload: "none", poster: content.posters[video.file], "aria-label": video.text }),
    make("figcaption", {}, `${video.text}. `, make("a", { href: video.file, download: video.file.split("/").pop() }, "mp4")))));
  await pair();
  if (scroll) at("films").scrollIntoView({ behavior: "smooth" });
}

function press(clip) {
  document.querySelectorAll("#shown button").forEach((button) => button.setAttribute("aria-pressed", String(Number(button.dataset.index) === clip?.index)));
}

async function pair() {
  if (coming || !now) return;  // choose() takes what is selected when the clip is there
  const mine = ++turn;
  const content = films.get(now.index);
  const [left, right] = [at("left").value, at("right").value];
  const [a, b] = await Promise.all([pictures(content, left), pictures(content, right)]);
  if (mine !== turn) return;
  const label = (id) => now.methods.find((method) => method.id === id).label;
  view.show(a, b, [label(left), label(right)], REPORT.fps);
  at("scores").textContent = REPORT.columns.filter((column) => column.stream === now.stream && column.per_clip && REPORT.named.includes(column.name)).map((column) => {
    const [x, y] = [left, right].map((id) => REPORT.rows.find((row) => row.id === id)?.clips[column.id]?.[now.key]);
    return `${column.label} ${number(x, column.digits) || "–"} | ${number(y, column.digits) || "–"}`;
  }).join(", ");
  document.body.dataset.ready = `${now.index}/${left}/${right}`;
}

function buildFilms() {
  view = new PairView(at("player"), { height: 460, exchange: () => at("exchange").click() });
  at("choice").textContent = REPORT.choice;
  at("shown").replaceChildren(...REPORT.shown.map((clip) => make("button", { type: "button", "data-index": clip.index, "aria-pressed": "false", title: clip.key, onclick: () => choose(clip) }, `${clip.stream}: ${clip.why}`)));
  for (const side of ["left", "right"]) at(side).addEventListener("change", pair);
  at("exchange").addEventListener("click", () => {
    [at("left").value, at("right").value] = [at("right").value, at("left").value];
    pair();
  });
  if (REPORT.shown.length) choose(REPORT.shown[0]);
}

function buildTables() {
  const others = REPORT.rows.filter((row) => !plainRow(row)).length;
  const every = make("input", { type: "checkbox", checked: others <= 4, onchange: () => { results(); list(); } });
  if (others) at("every").append(make("label", {}, every, ` all methods that the runs were evaluated with (${others} more rows)`));
  const results = () => at("tables").replaceChildren(...REPORT.streams.flatMap((stream) => {
    const stride = stream.stride === 1 ? "" : stream.stride === null ? ", not evenly spaced" : `, every ${stream.stride}. frame`;
    return [make("h3", {}, `${stream.name}: ${clipsOf(stream)}, ${stream.frames} frames of ${stream.size[0]}×${stream.size[1]}${stride}`), resultTable(REPORT, stream, every.checked)];
  }));
  const brackets = REPORT.notes.find((note) => note.startsWith("Brackets: ")) || "95 % interval of the mean over clips.";
  at("notes").append(make("p", { class: "faint" }, `Below a mean: its ${brackets.replace("Brackets: ", "")} And its difference Δ from the baseline, ${REPORT.baseline}, on the same clips. Where nothing was measured nothing stands.`));
  at("notes").append(...REPORT.notes.filter((note) => !note.startsWith("Brackets:")).map((note) => make("p", { class: "faint" }, note)));
  const columns = REPORT.columns.filter((column) => column.per_clip);
  const picked = make("select", { "aria-label": "clips and metric", onchange: () => list() }, ...columns.map((column) => make("option", { value: column.id }, `${column.stream}: ${column.label}`)));
  const list = () => {
    const column = columns.find((one) => one.id === picked.value);
    if (column) at("perclip").replaceChildren(clipTable(REPORT, column, every.checked, (clip) => choose(clip, true)));
  };
  at("columns").append(make("label", {}, "clips and metric ", picked));
  results();
  list();
}

function buildRest() {
  at("figures").replaceChildren(...REPORT.plots.map((plot) => make("figure", {}, make("img", { src: plot.file, alt: plot.text }), make("figcaption", {}, plot.text))));
  const papers = REPORT.papers.map((paper) => [paper.paper, paper.where, paper.what || "", paper.setting || "", Object.entries(paper.values).map(([name, value]) => `${name} ${value}`).join(", ")]);
  at("theirs").append(make("p", { class: "faint" }, "Measured by the papers' authors, on their data and machines: never in a column with ours."),
    papers.length ? plain(["paper", "where", "what", "setting", "their figures"], papers) : make("p", {}, "none for these runs"));
  const protocols = REPORT.columns.map((column) => make("details", {}, make("summary", {}, `${column.stream}: ${column.label}`), plain(["of the protocol", "is"], Object.entries(column.protocol).map(([key, value]) => [key, typeof value === "string" ? value : JSON.stringify(value)]))));
  const made = REPORT.rows.filter((row) => row.kind !== "floor").map((row) => [row.label, Object.entries(row.made).map(([key, value]) => `${key}: ${typeof value === "string" ? value : JSON.stringify(value)}`).join("; ")]);
  at("protocols").append(make("p", { class: "faint" }, "What decides each column's numbers; equal for all rows of the column."), ...protocols, make("h3", {}, "How the pixels were made"), plain(["decoder", "with"], made));
  at("ran").append(plain(["run", "what it is", "started from", "weights", "trained", "parameters", "evaluated"], REPORT.runs.map((run) => [
    run.name, run.header, run.start + (run.pretrained ? " (what that was trained for is in no cost here)" : ""), `${run.weights.kind}, step ${run.weights.step}`,
    run.total_minutes === null ? "not measured" : `${number(run.total_minutes, 1)} min on ${run.device_kind || "?"}, ${run.total_steps ?? "?"} steps, ${run.total_clips_seen ?? "?"} clips`,
    `${number(run.parameters / 1e6, 3)} M`, when(run.evaluated)])));
  const versions = Object.entries(REPORT.versions).map(([name, version]) => `${name} ${version}`).join(", ");
  const machine = Object.entries(REPORT.machine).map(([name, value]) => `${name}: ${value}`).join(", ");
  at("about").textContent = `${when(REPORT.date)}; baseline: ${REPORT.baseline}; every number as make compare gives it`;
  at("foot").append(make("p", {}, "Made by ", make("code", {}, REPORT.command)), make("p", {}, `${when(REPORT.date)}; ${versions}${machine ? `; speed measured on ${machine}` : ""}; ${REPORT.megabytes} MB of frames and videos`));
  if (REPORT.left_out.length) {
    at("left-out").hidden = false;
    at("left-out").append(...REPORT.left_out.map((text) => make("p", { class: "note" }, text)));
  }
}

at("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
});
buildTables();
buildRest();
buildFilms();
