"use strict";
const COLORS = ["#1f5fbf", "#c8541b", "#2a8a57", "#8a4fb0", "#b08a00", "#00838f", "#ad1457", "#5d4037"];
const NAMES = { macs: "MACs", params: "parameters", latency_1: "ms, batch 1", latency_32: "ms, batch 32" };
const $ = (id) => document.getElementById(id);
const MARGIN = { left: 52, right: 14, top: 10, bottom: 40 };
let DATA, chosen = null;

function svg(name, attributes, parent, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}

function html(name, attributes, parent, text) {
  const node = document.createElement(name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}

function short(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  for (const [unit, scale] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) if (size >= scale) return +(x / scale).toPrecision(3) + unit;
  return size < 1e-3 ? x.toExponential(0) : String(+x.toPrecision(3));
}

function ticks(low, high, log, most) {
  const found = [];
  if (log) {
    for (const steps of [[1, 2, 5], [1, 3], [1]]) {
      found.length = 0;
      for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
        for (const m of steps) { const x = m * 10 ** e; if (x >= low * 0.999 && x <= high * 1.001) found.push(x); }
      if (found.length <= most) break;
    }
    if (found.length >= 2) return found.filter((_, i) => i % Math.ceil(found.length / most) === 0);
    found.length = 0;
  }
  const raw = (high - low) / most, base = 10 ** Math.floor(Math.log10(raw));
  const step = base * [1, 2, 5, 10].find((m) => m * base >= raw);
  const first = Math.ceil(low / step);  // counted: a sum of steps need not grow
  for (let i = 0; i <= most + 1 && (first + i) * step <= high + step / 1e6; i++) found.push(+((first + i) * step).toPrecision(10));
  return found;
}

// Not Math.min(...values): a browser takes no hundred thousand arguments.
function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const x of values) { if (x < low) low = x; if (x > high) high = x; }
  return [low, high];
}

// Axes with labels; returns functions from values to places.
function axes(holder, points, options) {
  holder.replaceChildren();
  const width = Math.max(holder.clientWidth || 600, 260), height = options.height;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": options.label || "" }, holder);
  const range = (values, log, pad) => {
    let [low, high] = extent(values);
    if (low === high) { low -= log ? low / 2 : 0.5; high += log ? high : 0.5; }
    return log ? [low / (high / low) ** pad, high * (high / low) ** pad] : [low - pad * (high - low), high + pad * (high - low)];
  };
  const [x0, x1] = range(points.map((p) => p[0]), options.logX, 0.04), [y0, y1] = range(points.map((p) => p[1]), options.logY, 0.07);
  const scale = (low, high, log, from, to) => (v) => {
    const t = log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low);
    return from + t * (to - from);
  };
  const x = scale(x0, x1, options.logX, MARGIN.left, width - MARGIN.right), y = scale(y0, y1, options.logY, height - MARGIN.bottom, MARGIN.top);
  for (const tick of ticks(x0, x1, options.logX, Math.max(3, width / 90))) {
    svg("line", { class: "axis", x1: x(tick), x2: x(tick), y1: MARGIN.top, y2: height - MARGIN.bottom }, root);
    svg("text", { x: x(tick), y: height - MARGIN.bottom + 16, "text-anchor": "middle" }, root, short(tick));
  }
  for (const tick of ticks(y0, y1, options.logY, Math.max(3, height / 50))) {
    svg("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) }, root);
    svg("text", { x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, root, short(tick));
  }
  svg("text", { x: (MARGIN.left + width - MARGIN.right) / 2, y: height - 6, "text-anchor": "middle" }, root, options.x);
  svg("text", { transform: `translate(13 ${(height - MARGIN.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, root, options.y);
  return { root, x, y };
}

// What a run is coloured by: its method without the numbers.
function kind(run) { return run.method.replace(/ (lambda|S_D)=\S+/g, "").replace(/ [\d.,e+-]+(?= |$)/g, ""); }

function legend(holder, items) {
  holder.replaceChildren();
  for (const [mark, color, text] of items) {
    const item = html("span", {}, holder);
    html("span", { style: `color:${color}` }, item, mark + " ");
    item.append(text);
  }
}

function scatter() {
  const group = $("group").value, cost = $("cost").value;
  const all = DATA.runs.map((run, i) => ({ run, i })).filter(({ run }) => run.group === group);
  const runs = all.filter(({ run }) => run.compressed[cost] && run.compressed.error !== null);
  const dense = all.filter(({ run }) => run.dense[cost] && run.dense.error !== null).map(({ run }) => run.dense);
  const papers = DATA.published.filter((p) => p.group === group && p[cost]);
  for (const row of document.querySelectorAll("#runs tbody tr")) row.hidden = row.dataset.group !== group;
  const points = [...runs.map(({ run }) => [run.compressed[cost], run.compressed.error]), ...dense.map((d) => [d[cost], d.error]), ...papers.map((p) => [p[cost], p.error])];
  if (!points.length) { $("scatter").replaceChildren(); html("p", { class: "small" }, $("scatter"), "No finished run yet."); $("legend").replaceChildren(); return; }
  const height = Math.min(440, Math.max(280, $("scatter").clientWidth * 0.55));
  const plot = axes($("scatter"), points, { height, logX: true, x: NAMES[cost], y: "test error, %", label: "Error against cost" });
  const kinds = [...new Set(runs.map(({ run }) => kind(run)))], color = (run) => COLORS[kinds.indexOf(kind(run)) % COLORS.length];
  const most = extent(runs.map(({ run }) => run.compressed.params || 1))[1];
  const front = [];
  for (const { run } of [...runs].sort((a, b) => a.run.compressed[cost] - b.run.compressed[cost] || a.run.compressed.error - b.run.compressed.error))
    if (!front.length || run.compressed.error < front[front.length - 1].compressed.error) front.push(run);
  svg("path", { class: "front", d: "M" + front.map((run) => `${plot.x(run.compressed[cost])} ${plot.y(run.compressed.error)}`).join("L") }, plot.root);
  for (const d of dense) svg("path", { d: diamond(plot.x(d[cost]), plot.y(d.error), 5), fill: "#1c2430" }, plot.root);
  for (const p of papers) {
    const [x, y] = [plot.x(p[cost]), plot.y(p.error)];
    const mark = svg("path", { d: `M${x} ${y - 6}L${x + 6} ${y + 5}L${x - 6} ${y + 5}Z`, fill: "none", stroke: "#6b7480" }, plot.root);
    svg("title", {}, mark, `${p.label}: ${p.error} % at ${short(p[cost])}`);
  }
  for (const { run, i } of [...runs].sort((a, b) => b.run.compressed.params - a.run.compressed.params)) {
    const radius = 4 + 9 * Math.sqrt((run.compressed.params || 0) / most);
    const ball = svg("circle", { class: "run" + (i === chosen ? " chosen" : ""), cx: plot.x(run.compressed[cost]), cy: plot.y(run.compressed.error), r: radius, fill: color(run), stroke: front.includes(run) ? "#000" : color(run), tabindex: 0 }, plot.root);
    svg("title", {}, ball, `${run.name}: ${run.method}\n${run.compressed.error.toFixed(2)} % at ${short(run.compressed[cost])} ${NAMES[cost]}`);
    ball.addEventListener("click", () => { location.hash = "run" + i; });
    ball.addEventListener("keydown", (event) => { if (event.key === "Enter") location.hash = "run" + i; });
  }
  const items = kinds.map((name, k) => ["●", COLORS[k % COLORS.length], name]);
  if (dense.length) items.push(["◆", "#1c2430", "dense"]);
  if (papers.length) items.push(["△", "#6b7480", "published"]);
  items.push(["- -", "#1c2430", "Pareto front"], ["", "", "ball: parameters"]);
  legend($("legend"), items);
}

function diamond(x, y, r) { return `M${x} ${y - r}L${x + r} ${y}L${x} ${y + r}L${x - r} ${y}Z`; }

// Charts are drawn when all their boxes are in place, at the width they then have.
const drawings = [];

// Lines over steps: series = [[label, points, color]]
function lines(grid, title, series, options) {
  series = series.map(([label, points, color]) => [label, points.filter((p) => p[1] !== null && (!options.logY || p[1] > 0) && (!options.logX || p[0] > 0)), color]).filter((s) => s[1].length);
  if (!series.length) return;
  const box = html("div", {}, grid);
  html("h3", {}, box, title);
  const holder = html("div", { class: "chart" }, box);
  drawings.push(() => drawLines(holder, title, series, options));
  if (series.length > 1 || series[0][0]) {
    const caption = html("figcaption", {}, box), few = series.slice(0, 8);
    legend(caption, few.map(([label, , color]) => ["—", color, label]));
    if (series.length > few.length) html("span", {}, caption, `and ${series.length - few.length} more`);
  }
}

function drawLines(holder, title, series, options) {
  const plot = axes(holder, series.flatMap((s) => s[1]), { height: 220, ...options, label: title });
  for (const [label, points, color] of series) {
    const line = svg("path", { fill: "none", stroke: color, "stroke-width": 1.6, "stroke-opacity": 0.85, d: "M" + points.map((p) => `${plot.x(p[0]).toFixed(1)} ${plot.y(p[1]).toFixed(1)}`).join("L") }, plot.root);
    svg("title", {}, line, label);
    if (points.length === 1) svg("circle", { cx: plot.x(points[0][0]), cy: plot.y(points[0][1]), r: 3, fill: color }, plot.root);
  }
}

function bars(grid, title, layers, quantity) {
  const shown = layers.filter((layer) => layer[quantity][0]);
  if (!shown.length) return;
  const box = html("div", {}, grid);
  html("h3", {}, box, title);
  const holder = html("div", { class: "chart" }, box);
  drawings.push(() => drawBars(holder, title, shown, quantity));
}

function drawBars(holder, title, shown, quantity) {
  const width = Math.max(holder.clientWidth || 300, 260);
  const row = shown.length > 24 ? 9 : 18, height = shown.length * row + 6, left = Math.min(150, width * 0.4);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title }, holder);
  const most = Math.max(...shown.map((layer) => layer[quantity][0])), scale = (v) => ((width - left - 8) * v) / most;
  shown.forEach((layer, i) => {
    const y = i * row + 2, text = layer.name.length > 22 ? "…" + layer.name.slice(-21) : layer.name;
    if (row > 10 || i % 2 === 0) svg("text", { x: left - 6, y: y + Math.min(row, 14) - 3, "text-anchor": "end", style: `font-size:${row > 10 ? 12 : 9}px` }, root, text);
    const bar = svg("rect", { x: left, y, width: scale(layer[quantity][0]), height: row - 3, fill: "#dfe3e8" }, root);
    svg("rect", { x: left, y, width: Math.max(1, scale(layer[quantity][1] || 0)), height: row - 3, fill: COLORS[0] }, root);
    svg("title", {}, bar, `${layer.name}: ${short(layer[quantity][0])} to ${short(layer[quantity][1] || 0)}, ${layer.structure}`);
  });
}

function hue(i, n) { return `hsl(${Math.round(215 + (300 * i) / Math.max(n, 1)) % 360} 60% 42%)`; }

function detail() {
  const match = /^#run(\d+)$/.exec(location.hash), run = match && DATA.runs[+match[1]];
  const panel = $("detail");
  chosen = run ? +match[1] : null;
  panel.hidden = !run;
  for (const row of document.querySelectorAll("#runs tr[data-run]")) row.classList.toggle("chosen", +row.dataset.run === chosen);
  if (run && $("group").value !== run.group) $("group").value = run.group;
  scatter();
  if (!run) return;
  panel.replaceChildren();
  html("button", { class: "close", "aria-label": "Close" }, panel, "×").addEventListener("click", () => { history.replaceState(null, "", "#"); detail(); });
  html("h2", {}, panel, run.name);
  html("p", { class: "small" }, panel, `${run.method}. ${run.status}. ${run.directory}`);
  html("pre", { class: "wrapped" }, panel, run.command);
  const grid = html("div", { class: "grid" }, panel), c = run.curves, names = Object.keys(run.ranks);
  const step = { x: "optimizer step" };
  lines(grid, "Ranks at each C step", names.map((name, i) => [name, run.ranks[name], hue(i, names.length)]), { ...step, y: "rank" });
  lines(grid, "Gap ‖W − Θ‖ / ‖W‖ at each C step", [["", c.gap || [], COLORS[1]]], { ...step, y: "gap", logY: true });
  lines(grid, "Loss before and after each distortion", [["before", c.before || [], COLORS[0]], ["after", c.after || [], COLORS[1]]], { ...step, y: "loss" });
  if (!c.gap) lines(grid, "Δw = ‖w − w̃‖² / N(w)", [["", c.delta_w || [], COLORS[2]]], { ...step, y: "Δw", logY: true });
  lines(grid, "Validation accuracy", [["", c.val || [], COLORS[2]]], { ...step, y: "accuracy" });
  lines(grid, "Training loss", [["", c.loss || [], COLORS[3]]], { ...step, y: "loss", logY: true });
  const spectra = run.layers.filter((layer) => layer.spectrum.length);
  lines(grid, "Singular values of the dense layers", spectra.map((layer, i) => [layer.name, layer.spectrum, hue(i, spectra.length)]), { x: "index", y: "σ / σ₁", logX: true, logY: true });
  bars(grid, "MACs of every layer, dense and compressed", run.layers, "macs");
  bars(grid, "Parameters of every layer, dense and compressed", run.layers, "params");
  for (const draw of drawings.splice(0)) draw();
  if (run.layers.length) {
    const box = html("details", {}, panel);
    html("summary", {}, box, "Layer by layer");
    const table = html("table", { class: "numbers" }, html("div", { class: "scroll" }, box));
    const head = html("tr", {}, table);
    const answers = run.layers.some((layer) => layer.response !== null);
    for (const name of ["layer", "structure", "MACs", "to", "params", "to", ...(answers ? ["response error"] : []), ""]) html("th", {}, head, name);
    for (const layer of run.layers) {
      const row = html("tr", {}, table);
      for (const text of [layer.name, layer.structure, ...layer.macs.map((x) => (x === null ? "" : short(x))), ...layer.params.map((x) => (x === null ? "" : short(x))), ...(answers ? [layer.response === null ? "" : `${(100 * layer.response).toPrecision(2)} %`] : []), layer.note]) html("td", {}, row, text);
    }
  }
  const box = html("details", {}, panel);
  html("summary", {}, box, "config.yaml");
  html("pre", {}, box, run.config);
  panel.scrollIntoView({ block: "nearest" });
}

async function load() {
  const bytes = Uint8Array.from(atob($("data").textContent.trim()), (c) => c.charCodeAt(0));
  DATA = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
  const groups = [...new Set(DATA.runs.map((run) => run.group))];
  const finished = (group) => DATA.runs.filter((run) => run.group === group && run.compressed.error !== null).length;
  for (const group of groups) html("option", { value: group }, $("group"), group);
  if (groups.length) $("group").value = groups.reduce((a, b) => (finished(b) > finished(a) ? b : a));
  $("group").addEventListener("change", () => { history.replaceState(null, "", "#"); detail(); });
  $("cost").addEventListener("change", scatter);
  addEventListener("hashchange", detail);
  addEventListener("resize", detail);
  detail();
  document.body.dataset.ready = "1";
}
load();
