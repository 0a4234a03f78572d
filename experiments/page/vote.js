"use strict";
/* The blind vote. All that the server tells is two addresses; which side is what stays there. */

const at = (id) => document.getElementById(id);
const TOKEN = "vote-participant";
let trial = null;  // what may be answered now
let view = null;
let turn = 0;  // what was overtaken, by another participant say, is dropped
let played = () => {};  // called when the films were played to their end

async function ask(path, body) {
  const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  const content = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(content.error), { status: answer.status });
  return content;
}

/* A film: number of pictures, then each one's length and bytes; what follows fills it up to a common size. */
async function film(address) {
  const answer = await fetch(`/film/${address}`);
  if (!answer.ok) throw new Error("a film could not be read");
  const buffer = await answer.arrayBuffer();
  const numbers = new DataView(buffer);
  const frames = [];
  let place = 4;
  for (let i = 0; i < numbers.getUint32(0); i += 1) {
    const length = numbers.getUint32(place);
    frames.push(picture(new Uint8Array(buffer, place + 4, length)));
    place += 4 + length;
  }
  return Promise.all(frames);
}

function enable(on) { for (const side of ["left", "none", "right"]) at(`choose-${side}`).disabled = !on; }

function show(id) { for (const one of ["welcome", "question", "thanks"]) at(one).hidden = one !== id; }

function trouble(error) {
  at("trouble").hidden = false;
  at("trouble").textContent = `${error.message}. Reload the page to go on.`;
}

/* An answer is taken when both films were played once, from beginning to end: the server waits as long as they take. */
async function next() {
  const mine = ++turn;
  const participant = localStorage.getItem(TOKEN);
  enable(false);
  trial = null;
  const found = await ask("/api/next", { participant });
  if (mine !== turn) return;
  at("progress").max = found.total;
  at("progress").value = found.done;
  at("another").hidden = false;
  if (!found.trial) { show("thanks"); return; }
  show("question");
  view = view || new PairView(at("player"), { height: 520, through: () => played() });
  const [left, right] = await Promise.all([film(found.left), film(found.right)]);
  if (mine !== turn) return;
  await ask("/api/shown", { participant, trial: found.trial });
  if (mine !== turn) return;
  const time = new Promise((done) => setTimeout(done, 1000 * found.seconds));
  const end = new Promise((done) => { played = done; });
  view.frame = 0;
  view.setDivider(0.5);
  view.setMode("split");
  view.fit(false);
  view.show(left, right, ["left", "right"], found.fps);
  if (!view.playing) view.toggle();
  document.body.dataset.shown = found.trial;
  await Promise.all([time, end]);
  if (mine !== turn) return;
  trial = found.trial;
  enable(true);
  document.body.dataset.trial = trial;
}

async function vote(choice) {
  if (!trial || at("choose-left").disabled) return;
  enable(false);
  const answered = trial;
  trial = null;
  try {
    await ask("/api/vote", { participant: localStorage.getItem(TOKEN), trial: answered, choice });
    await next();
  } catch (error) { trouble(error); }
}

for (const side of ["left", "none", "right"]) at(`choose-${side}`).addEventListener("click", () => vote(side));
document.addEventListener("keydown", (event) => {
  if (at("question").hidden || event.ctrlKey || event.metaKey || event.altKey || ["SELECT", "INPUT"].includes(event.target.tagName)) return;
  if (event.repeat) return;  // a key that is held answers once
  const choice = { f: "left", g: "none", h: "right" }[event.key.toLowerCase()];
  if (choice) vote(choice);
});
at("begin").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    localStorage.setItem(TOKEN, (await ask("/api/begin", { name: at("name").value })).participant);
    await next();
  } catch (error) { trouble(error); }
});
at("another").addEventListener("click", () => {
  if (at("thanks").hidden && !confirm("Somebody else goes on at this screen? What you answered is kept; the rest cannot be answered later.")) return;
  turn += 1;
  trial = null;
  enable(false);
  if (view && view.playing) view.toggle();
  localStorage.removeItem(TOKEN);
  at("another").hidden = true;
  at("trouble").hidden = true;
  at("name").value = "";
  delete document.body.dataset.trial;
  show("welcome");
});
if (localStorage.getItem(TOKEN)) {
  next().catch((error) => {
    if (error.status === 403) { localStorage.removeItem(TOKEN); show("welcome"); } else trouble(error);
  });
}
