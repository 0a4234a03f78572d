"use strict";
/* Two films on one canvas, frame by frame: divider, both, difference, one of them; zoom, pan, play, step.
   Frames are ImageBitmaps of equal size and are drawn pixel by pixel. Shared by the report and the blind vote, so nothing
   in here knows what the films are; their names come from the caller. Every text enters the page as text, never as markup. */

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/* A long name that may be broken where its parts meet. */
function parted(text) {
  return String(text).split(/(?<=[_+/,])/).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));
}

const MODES = [["split", "divider"], ["pair", "side by side"], ["difference", "difference"], ["a", "only left"], ["b", "only right"]];
const SPEEDS = [0.1, 0.25, 0.5, 1, 2];
const GAINS = [1, 2, 4, 8, 16, 32];
const KEYS = [
  ["Space or K", "play, pause"], [", and .", "one frame back, one frame on"], ["Home and End", "first and last frame"],
  ["arrows on the divider", "move it (with Shift in larger steps; Home and End: to the edges)"],
  ["arrows elsewhere", "pan"], ["+ and -", "zoom in and out"], ["0", "fit to the window"], ["1", "one pixel of the film is one of the screen"],
  ["D", "difference on and off"], ["M", "next way of looking: divider, side by side, difference, left, right"],
  ["[ and ]", "gain of the difference"], ["X", "exchange left and right"], ["mouse", "drag pans; the wheel zooms once the film was clicked"],
];

class PairView {
  /* root: an empty element. options: height (CSS pixels), exchange (called when left and right are to be exchanged), through (called
     once after show() when so many frames were gone on to as the films have). */
  constructor(root, options = {}) {
    this.films = [[], []];
    this.size = [1, 1];
    this.frame = 0;
    this.fps = 16;
    this.mode = "split";
    this.gain = 4;
    this.divider = 0.5;
    this.zoom = null;  // screen pixels per film pixel; null: fitted
    this.center = [0.5, 0.5];  // of the film, in its pixels
    this.playing = false;
    this.exchange = options.exchange || null;
    this.through = options.through || null;
    this.gone = 0;  // frames that were gone on by since show(); NaN once that was told
    this.build(root, options);
  }

  build(root, options) {
    this.root = root;
    root.classList.add("view");
    this.canvas = make("canvas", { role: "img", tabindex: "0", "aria-label": "the film" });
    this.handle = make("div", {
      class: "divider", role: "slider", tabindex: "0", "aria-label": "divider between left and right",
      "aria-orientation": "horizontal", "aria-valuemin": "0", "aria-valuemax": "100", "aria-valuenow": "50",
    });
    this.names = [make("span", { class: "name left" }), make("span", { class: "name right" })];
    this.stage = make("div", { class: "stage" }, this.canvas, this.handle, ...this.names);
    this.stage.style.height = `${options.height || 480}px`;
    this.play = make("button", { type: "button", "aria-label": "play", onclick: () => this.toggle() }, "▶");
    const back = make("button", { type: "button", "aria-label": "one frame back", onclick: () => this.step(-1) }, "◀|");
    const on = make("button", { type: "button", "aria-label": "one frame on", onclick: () => this.step(1) }, "|▶");
    this.seek = make("input", { type: "range", min: "0", max: "0", value: "0", "aria-label": "frame", class: "seek", oninput: () => this.go(Number(this.seek.value)) });
    this.count = make("output", { class: "count" });
    this.speed = this.select("speed", SPEEDS.map((s) => [s, `${s}×`]), 1, () => {});
    this.look = this.select("view", MODES, "split", () => this.setMode(this.look.value));
    this.gains = this.select("gain", GAINS.map((g) => [g, `${g}×`]), 4, () => { this.gain = Number(this.gains.value); this.draw(); });
    this.zooms = make("span", { class: "group" },
      make("button", { type: "button", "aria-label": "zoom out", onclick: () => this.zoomBy(0.5) }, "−"),
      make("button", { type: "button", "aria-label": "zoom in", onclick: () => this.zoomBy(2) }, "+"),
      make("button", { type: "button", onclick: () => this.fit() }, "fit"),
      make("button", { type: "button", "aria-label": "one film pixel per screen pixel", onclick: () => this.setZoom(1) }, "1:1"));
    this.status = make("output", { class: "status", "aria-live": "polite" });
    const keys = make("details", { class: "keys" }, make("summary", {}, "keyboard"),
      make("dl", {}, ...KEYS.flatMap(([key, what]) => [make("dt", {}, key), make("dd", {}, what)])));
    this.tools = make("div", { class: "tools", role: "group", "aria-label": "player" },
      back, this.play, on, this.seek, this.count, this.label("speed", this.speed), this.label("view", this.look),
      this.label("gain", this.gains), this.zooms);
    root.replaceChildren(this.stage, this.tools, this.status, keys);
    this.listen();
  }

  select(name, choices, chosen, change) {
    const options = choices.map(([value, text]) => make("option", { value, selected: value === chosen }, text));
    return make("select", { "aria-label": name, onchange: change }, ...options);
  }

  label(text, control) { return make("label", {}, `${text} `, control); }

  listen() {
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.handle.addEventListener("keydown", (event) => this.dividerKey(event));
    this.drag(this.handle, (event) => {
      const box = this.stage.getBoundingClientRect();
      this.setDivider((event.clientX - box.left) / box.width);
    });
    let last = null;
    this.drag(this.canvas, (event) => {
      if (last) this.pan(event.clientX - last[0], event.clientY - last[1]);
      last = [event.clientX, event.clientY];
    }, () => { last = null; });
    this.canvas.addEventListener("wheel", (event) => {
      if (document.activeElement !== this.canvas) return;  // else the page could not be scrolled past it
      event.preventDefault();
      this.zoomBy(event.deltaY < 0 ? 1.25 : 0.8, event);
    }, { passive: false });
    new ResizeObserver(() => this.draw()).observe(this.stage);
  }

  drag(element, move, end = () => {}) {
    element.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      element.setPointerCapture(event.pointerId);
      element.focus();
      move(event);
      const stop = () => {
        element.removeEventListener("pointermove", move);
        element.removeEventListener("pointerup", stop);
        element.removeEventListener("pointercancel", stop);
        end();
      };
      element.addEventListener("pointermove", move);
      element.addEventListener("pointerup", stop);
      element.addEventListener("pointercancel", stop);
      event.preventDefault();
    });
  }

  key(event) {
    const tag = event.target.tagName;
    if (tag === "SELECT" || (tag === "INPUT" && event.target !== this.seek) || event.ctrlKey || event.metaKey || event.altKey) return;
    if (tag === "INPUT" && ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) return;
    if ((tag === "BUTTON" || tag === "SUMMARY") && (event.key === " " || event.key === "Enter")) return;
    const step = 40;
    const actions = {
      " ": () => this.toggle(), k: () => this.toggle(), ",": () => this.step(-1), ".": () => this.step(1),
      Home: () => this.go(0), End: () => this.go(this.length - 1),
      ArrowLeft: () => this.pan(step, 0), ArrowRight: () => this.pan(-step, 0), ArrowUp: () => this.pan(0, step), ArrowDown: () => this.pan(0, -step),
      "+": () => this.zoomBy(2), "=": () => this.zoomBy(2), "-": () => this.zoomBy(0.5), 0: () => this.fit(), 1: () => this.setZoom(1),
      d: () => this.setMode(this.mode === "difference" ? "split" : "difference"),
      m: () => this.setMode(MODES[(MODES.findIndex(([name]) => name === this.mode) + 1) % MODES.length][0]),
      "[": () => this.nextGain(-1), "]": () => this.nextGain(1), x: () => this.exchange && this.exchange(),
    };
    const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  dividerKey(event) {
    const step = event.shiftKey ? 0.1 : 0.01;
    const to = { ArrowLeft: this.divider - step, ArrowDown: this.divider - step, ArrowRight: this.divider + step, ArrowUp: this.divider + step, Home: 0, End: 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    this.setDivider(to);
  }

  get length() { return Math.min(this.films[0].length, this.films[1].length); }

  /* left, right: lists of ImageBitmaps; names: what stands in the corners; fps: of the film at speed 1. */
  show(left, right, names, fps) {
    const changed = left.length && (left[0].width !== this.size[0] || left[0].height !== this.size[1]);
    this.films = [left, right];
    if (left.length) this.size = [left[0].width, left[0].height];
    if (changed) this.fit(false);
    this.names.forEach((element, side) => { element.textContent = names[side]; });
    this.fps = fps;
    this.seek.max = String(Math.max(0, this.length - 1));
    this.go(Math.min(this.frame, Math.max(0, this.length - 1)));
    this.gone = 0;
    this.advance(0);
  }

  /* Films are through when all frames after the first were gone on to. */
  advance(by) {
    this.gone += by;
    if (!this.through || !(this.gone >= this.length - 1)) return;
    this.gone = NaN;
    this.through();
  }

  toggle() {
    this.playing = !this.playing;
    this.play.textContent = this.playing ? "❚❚" : "▶";
    this.play.setAttribute("aria-label", this.playing ? "pause" : "play");
    if (!this.playing) return;
    let before = performance.now();
    let due = 0;
    const tick = (now) => {
      if (!this.playing || !this.root.isConnected) return;
      due += Math.min(0.25, (now - before) / 1000) * this.fps * Number(this.speed.value);  // a page in the background stands still
      before = now;
      if (due >= 1 && this.length) {
        const by = Math.floor(due);
        this.go((this.frame + by) % this.length);
        this.advance(by);
        due -= by;
      }
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  step(by) {
    if (this.playing) this.toggle();
    if (!this.length) return;
    this.go((this.frame + by + this.length) % this.length);
    this.advance(Math.max(0, by));
  }

  go(frame) {
    this.frame = frame;
    this.seek.value = String(frame);
    this.count.textContent = `${frame + 1} / ${this.length}`;
    this.draw();
  }

  setMode(mode) {
    this.mode = mode;
    this.look.value = mode;
    this.handle.hidden = mode !== "split";
    this.root.dataset.mode = mode;
    this.draw();
  }

  nextGain(by) {
    const at = GAINS.indexOf(this.gain) + by;
    this.gain = GAINS[Math.max(0, Math.min(GAINS.length - 1, at))];
    this.gains.value = String(this.gain);
    this.draw();
  }

  setDivider(share) {
    this.divider = Math.max(0, Math.min(1, share));
    this.handle.setAttribute("aria-valuenow", String(Math.round(100 * this.divider)));
    this.draw();
  }

  get ratio() { return window.devicePixelRatio || 1; }

  /* Width and height of what one film is drawn into, in screen pixels. */
  viewport() { return [this.canvas.width / (this.mode === "pair" ? 2 : 1), this.canvas.height]; }

  scale() {
    if (this.zoom !== null) return this.zoom;
    const [width, height] = this.viewport();
    const exact = Math.min(width / this.size[0], height / this.size[1]);
    return exact > 1 ? Math.floor(exact) : exact;  // whole pixels where it is enlarged
  }

  fit(draw = true) {
    this.zoom = null;
    this.center = [this.size[0] / 2, this.size[1] / 2];
    if (draw) this.draw();
  }

  setZoom(zoom) { this.zoom = Math.max(0.05, Math.min(64, zoom)); this.draw(); }

  zoomBy(factor, event = null) {
    const before = this.scale();
    const zoom = Math.max(0.05, Math.min(64, before * factor));
    if (event) {  // what is under the pointer stays there
      const box = this.canvas.getBoundingClientRect();
      const [width, height] = this.viewport();
      const x = (((event.clientX - box.left) * this.ratio) % width) - width / 2;
      const y = (event.clientY - box.top) * this.ratio - height / 2;
      this.center[0] += x / before - x / zoom;
      this.center[1] += y / before - y / zoom;
    }
    this.setZoom(zoom);
  }

  pan(dx, dy) {
    const scale = this.scale();
    if (this.zoom === null) this.zoom = scale;
    this.center[0] = Math.max(0, Math.min(this.size[0], this.center[0] - (dx * this.ratio) / scale));
    this.center[1] = Math.max(0, Math.min(this.size[1], this.center[1] - (dy * this.ratio) / scale));
    this.draw();
  }

  /* Drawn at most once per refresh of the screen. */
  draw() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => { this.pending = false; this.paint(); });
  }

  paint() {
    const box = this.stage.getBoundingClientRect();
    const [width, height] = [Math.max(1, Math.round(box.width * this.ratio)), Math.max(1, Math.round(box.height * this.ratio))];
    if (this.canvas.width !== width || this.canvas.height !== height) [this.canvas.width, this.canvas.height] = [width, height];
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    this.handle.style.left = `${100 * this.divider}%`;
    if (!this.length) return;
    const [left, right] = this.films.map((film) => film[this.frame]);
    const split = Math.round(this.divider * width);
    const half = Math.floor(width / 2);
    if (this.mode === "split") {
      this.place(context, left, 0, split, 0, width);
      this.place(context, right, split, width, 0, width);
    } else if (this.mode === "pair") {
      this.place(context, left, 0, half, 0, half);
      this.place(context, right, half, width, half, width);
    } else {
      this.place(context, this.mode === "difference" ? this.difference(left, right) : this.mode === "a" ? left : right, 0, width, 0, width);
    }
    this.status.textContent = this.describe();
  }

  describe() {
    const zoom = this.scale();
    const shown = this.mode === "difference" ? `, |left − right| × ${this.gain}` : "";
    return `${this.size[0]}×${this.size[1]}, ${zoom >= 1 ? Number(zoom.toFixed(2)) : zoom.toFixed(2)} screen pixels per pixel${shown}`;
  }

  /* Draw between the columns from and to; the film's centre of view lies in the middle of begin and end. */
  place(context, film, from, to, begin, end) {
    if (to <= from) return;
    const scale = this.scale();
    context.save();
    context.beginPath();
    context.rect(from, 0, to - from, this.canvas.height);
    context.clip();
    context.imageSmoothingEnabled = scale < 1;
    const x = Math.round((begin + end) / 2 - this.center[0] * scale);
    const y = Math.round(this.canvas.height / 2 - this.center[1] * scale);
    context.drawImage(film, x, y, Math.round(this.size[0] * scale), Math.round(this.size[1] * scale));
    context.restore();
  }

  difference(left, right) {
    const [a, b] = [pixels(left), pixels(right)];
    for (let i = 0; i < a.data.length; i += 4) {
      for (let c = 0; c < 3; c += 1) a.data[i + c] = Math.abs(a.data[i + c] - b.data[i + c]) * this.gain;  // clamped at 255
    }
    const canvas = new OffscreenCanvas(a.width, a.height);
    canvas.getContext("2d").putImageData(a, 0, 0);
    return canvas;
  }
}

/* The bytes of a picture, RGBA. */
function pixels(film) {
  const canvas = new OffscreenCanvas(film.width, film.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(film, 0, 0);
  return context.getImageData(0, 0, film.width, film.height);
}

/* Bytes of a picture's file as a picture whose numbers are the file's. */
function picture(bytes, type = "image/webp") {
  return createImageBitmap(new Blob([bytes], { type }), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
}
