"use strict";
/* Tables of a comparison. Every number is taken from the data as it is; nothing is computed here but the order of rows. */

const number = (value, digits) => (value === null || value === undefined ? "" : value.toFixed(digits));
const counted = (value, what) => `${value} ${what}${value === 1 ? "" : "s"}`;
const clipsOf = (stream) => counted(stream.clips, "clip") + (stream.films === null || stream.films === undefined ? "" : ` of ${counted(stream.films, "film")}`);
const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);

/* columns: {head, title, text, cell(row) -> nodes, order(row) -> number | string | null, first: the better way round}. */
function sortable(rows, columns, { caption, classes = () => "", tall = false }) {
  const body = make("tbody");
  const heads = columns.map((column, index) => make("th", { scope: "col", class: column.text ? "text" : null, title: column.title || null },
    make("button", { type: "button", onclick: () => sort(index) }, ...parted(column.head))));
  let [by, down] = [null, false];
  const fill = (list) => body.replaceChildren(...list.map((row) => make("tr", { class: classes(row) || null, "data-id": row.id || row.key || null },
    ...columns.map((column, index) => make(index ? "td" : "th", { scope: index ? null : "row", class: column.text && index ? "text" : null }, ...[column.cell(row)].flat())))));
  const sort = (index) => {
    const column = columns[index];
    down = by === index ? !down : column.first !== "up";
    by = index;
    heads.forEach((head, i) => (i === index ? head.setAttribute("aria-sort", down ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
    const missing = (value) => value === null || value === undefined;
    fill([...rows].sort((a, b) => {
      const [x, y] = [column.order(a), column.order(b)];
      if (missing(x) || missing(y)) return missing(x) - missing(y);  // what was not measured stands last, either way
      return (down ? -1 : 1) * (typeof x === "string" ? x.localeCompare(y) : x - y);
    }));
  };
  fill(rows);
  return make("div", { class: tall ? "scroll tall" : "scroll", tabindex: "0", role: "region", "aria-label": caption },
    make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body));
}

function plain(head, rows) {
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": head[0] }, make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((text, i) => make("th", { scope: "col", class: i ? "text" : null }, text)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell, i) => make(i ? "td" : "th", { scope: i ? null : "row", class: i ? "text" : null }, ...parted(cell))))))));
}

/* A score with its interval and what it differs from the baseline by. */
function scored(score, digits) {
  if (!score) return "";
  if (score.mean === null) return "not finite";
  const parts = [make("span", { class: score.best ? "best" : null }, number(score.mean, digits))];
  if (score.low !== null) parts.push(make("small", {}, `${number(score.low, digits)} to ${number(score.high, digits)}`));
  if (score.delta) {
    const [mean, low, high] = score.delta;
    parts.push(make("small", {}, `Δ ${signed(mean, digits)}${low === null ? "" : ` (${signed(low, digits)} to ${signed(high, digits)})`}`));
  }
  return parts;
}

/* Rows that are always shown; others, such as numbers of steps and controls, are there when they are asked for. */
const plainRow = (row) => row.kind !== "method" || row.method === "teacher";

function resultTable(report, stream, every) {
  const columns = report.columns.filter((column) => column.stream === stream.name);
  const rows = report.rows.filter((row) => (every || plainRow(row)) && columns.some((column) => row.scores[column.id]));
  const list = [{ head: "decoder", text: true, cell: (row) => parted(row.label), order: (row) => row.label, first: "up" }];
  for (const column of columns) {
    list.push({
      head: `${column.label}${column.unit ? ` (${column.unit})` : ""}${column.of_truth ? "" : column.higher_is_better ? " ↑" : " ↓"}`,
      title: column.of_truth ? "nearer the truth's is better; differences are from the truth" : column.higher_is_better ? "higher is better" : "lower is better", first: column.higher_is_better ? "down" : "up",
      cell: (row) => scored(row.scores[column.id], column.digits), order: (row) => (row.scores[column.id] ? row.scores[column.id].mean : null),
    });
  }
  const speed = (row) => (row.speed && !row.speed.failed ? row.speed : null);
  if (rows.some((row) => row.speed)) {
    list.push({
      head: "frames/s", order: (row) => (speed(row) ? speed(row).fps : null),
      cell: (row) => (speed(row) ? [number(speed(row).fps, 1), make("small", {}, `${number(speed(row).fps_low, 1)} to ${number(speed(row).fps_high, 1)}`)] : row.speed ? row.speed.failed : ""),
    });
  }
  if (rows.some((row) => speed(row) && speed(row).peak_gib !== null)) {
    list.push({ head: "peak GiB", first: "up", cell: (row) => (speed(row) ? number(speed(row).peak_gib, 2) : ""), order: (row) => (speed(row) ? speed(row).peak_gib : null) });
  }
  if (rows.some((row) => row.parameters)) {
    list.push({ head: "M parameters", first: "up", cell: (row) => (row.parameters ? number(row.parameters / 1e6, 2) : ""), order: (row) => row.parameters });
  }
  if (rows.some((row) => row.compression)) {
    list.push({ head: "compression", cell: (row) => number(row.compression, 0), order: (row) => row.compression });
  }
  const minutes = (row) => { const run = row.kind === "run" && report.runs.find((one) => one.name === row.run); return run ? run.total_minutes : null; };
  if (rows.some((row) => minutes(row) !== null)) {
    list.push({ head: "minutes trained", first: "up", cell: (row) => number(minutes(row), 1), order: minutes });
  }
  return sortable(rows, list, {
    caption: `results on ${stream.name}`,
    classes: (row) => [row.id === report.baseline ? "baseline" : "", row.kind].join(" ").trim(),
  });
}

/* Every clip of a stream by every run, for one metric. go(stream, key) shows a clip, where there are frames of it. */
function clipTable(report, column, every, go) {
  const rows = report.rows.filter((row) => (every || plainRow(row)) && row.clips[column.id] && Object.keys(row.clips[column.id]).length && row.kind !== "floor");
  const keys = [...new Set(rows.flatMap((row) => Object.keys(row.clips[column.id])))];
  const shown = new Map(report.shown.filter((clip) => clip.stream === column.stream).map((clip) => [clip.key, clip]));
  const base = (rows.find((row) => row.id === report.baseline) || rows[0]).clips[column.id];
  keys.sort((a, b) => (column.higher_is_better ? 1 : -1) * ((base[a] ?? 0) - (base[b] ?? 0)));
  const list = [
    { head: "clip", text: true, first: "up", cell: (row) => make("span", { class: "mono" }, ...parted(row.key)), order: (row) => row.key },
    { head: "film", text: true, order: (row) => (shown.has(row.key) ? 1 : 0), cell: (row) => (shown.has(row.key) ? make("button", { type: "button", onclick: () => go(shown.get(row.key)) }, shown.get(row.key).why) : "") },
    ...rows.map((row) => ({
      head: row.label, first: column.higher_is_better ? "down" : "up",
      cell: (clip) => number(row.clips[column.id][clip.key], column.digits), order: (clip) => row.clips[column.id][clip.key] ?? null,
    })),
  ];
  return sortable(keys.map((key) => ({ key })), list, { caption: `${column.label} of every clip of ${column.stream}`, classes: (row) => (shown.has(row.key) ? "chosen" : ""), tall: true });
}
