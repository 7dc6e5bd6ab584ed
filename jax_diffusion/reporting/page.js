"use strict";
// Draws the curves and the films of samples from the JSON in #data (page.py, data). No library.
const page = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#3b82f6", "#e8772e", "#22a06b", "#c2409c", "#8b6cf0", "#c9a227", "#17a2b8", "#e05252"];
const HEIGHT = 220, LEFT = 54, RIGHT = 10, TOP = 10, BOTTOM = 24;
const view = { x: "step", smooth: 0, log: false, range: null };
const charts = [];

function node(name, attributes, parent, text) {
  const svg = ["svg", "path", "line", "text", "circle", "rect", "g", "clipPath"].includes(name);
  const e = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [k, v] of Object.entries(attributes || {})) e.setAttribute(k, v);
  if (text !== undefined) e.textContent = text;
  if (parent) parent.append(e);
  return e;
}

function said(v) {
  if (!Number.isFinite(v)) return String(v);
  const a = Math.abs(v);
  if (a >= 1e5 || (a < 1e-3 && a > 0)) {
    for (const [size, unit] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (a >= size && a < 1e18) return +(v / size).toPrecision(4) + " " + unit;
    return (+v.toPrecision(4)).toExponential();
  }
  return String(+v.toPrecision(5));
}

// Where `x` belongs in ascending `list`: the index of the nearest.
function nearest(list, x) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(list[low] - x) <= Math.abs(list[high] - x) ? low : high;
}

// Steps of a run as what the x axis shows; hours lie on a line between the steps whose time is known.
function place(run, steps) {
  if (view.x === "step") return steps;
  const { s, v } = run.hours;
  return steps.map((step) => {
    if (s.length < 2) return s.length ? v[0] : NaN;
    let i = nearest(s, step);
    if (s[i] === step) return v[i];
    i = Math.min(Math.max(s[i] < step ? i : i - 1, 0), s.length - 2);
    return v[i] + (v[i + 1] - v[i]) * (step - s[i]) / (s[i + 1] - s[i]);
  });
}

// An exponential moving average that begins at the first value.
function smoothed(values, weight) {
  let mean = 0, total = 0;
  return values.map((v) => {
    if (!Number.isFinite(v)) return NaN;
    mean = weight * mean + (1 - weight) * v;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}

function ticks(low, high, log, count) {
  if (log) {
    const out = [];
    for (let e = Math.floor(low); e <= Math.ceil(high); e++)
      for (const m of high - low > 3 ? [1] : high - low > 1 ? [1, 3] : [1, 2, 3, 5, 7]) {
        const t = e + Math.log10(m);
        if (t >= low && t <= high) out.push(t);
      }
    if (out.length >= 2) return out;
  }
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * ([1, 2, 5].find((m) => m * unit >= rough) || 10);
  const out = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9; t += step) out.push(t);
  return out;
}

class Chart {
  constructor(spec, parent) {
    this.box = node("div", { class: "chart" }, parent);
    const head = node("h4", {}, this.box);
    node("span", {}, head, spec.title);
    this.button = node("button", { "aria-pressed": "false", title: "logarithmic axis" }, head, "log");
    this.button.onclick = () => { this.log = !this.scale(); this.draw(); };
    this.svg = node("svg", { tabindex: 0, role: "img", "aria-label": spec.title }, this.box);
    this.lines = [];
    this.id = `clip${charts.length}`;
    page.runs.forEach((run, r) => spec.names.forEach((name, i) => {
      const found = run.series[name];
      if (!found) return;
      // Ordered parts (buckets, layers) take a ramp of colours, runs their own; both: the runs differ by dashes.
      const many = spec.names.length;
      const color = many > 1 ? (many > COLORS.length ? `hsl(${220 - 200 * i / (many - 1)} 70% 55%)` : COLORS[i])
        : COLORS[r % COLORS.length];
      const label = page.runs.length > 1 ? (many > 1 ? `${run.name}: ${name}` : run.name) : name;
      const means = found.ms ? { s: found.ms, v: found.mv.map(Number) } : null;
      this.lines.push({ run, label, color, dash: many > 1 && r ? `${2 + 2 * r} 3` : "", shown: true,
        s: found.s, v: found.v.map(Number), means: means || { s: found.s, v: found.v.map(Number) } });
    }));
    const legend = node("div", { class: "legend" }, this.box);
    if (this.lines.length > 1) for (const line of this.lines) {
      const b = node("button", { "aria-pressed": "true" }, legend);
      node("i", { style: `border-top: 3px ${line.dash ? "dotted" : "solid"} ${line.color}` }, b);
      node("span", {}, b, line.label);
      b.onclick = () => { line.shown = !line.shown; b.setAttribute("aria-pressed", line.shown); this.draw(); };
    }
    this.listen();
  }

  scale() { return this.log ?? view.log; }

  draw() {
    const width = this.svg.clientWidth || 400, smooth = view.smooth > 0;
    this.svg.replaceChildren();
    this.hideTip();
    const shown = this.lines.filter((l) => l.shown);
    for (const l of this.lines) {
      l.x = place(l.run, l.s);
      const values = smooth ? smoothed(l.means.v, view.smooth) : l.v;
      l.bold = smooth ? { x: place(l.run, l.means.s), v: values } : { x: l.x, v: values };
    }
    const positive = shown.some((l) => l.v.some((v) => v > 0 && Number.isFinite(v)));
    const log = this.scale() && positive;
    this.button.setAttribute("aria-pressed", log);
    const f = (v) => (log ? (v > 0 ? Math.log10(v) : NaN) : v);
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const l of shown) for (const x of l.x) { x0 = Math.min(x0, x); x1 = Math.max(x1, x); }
    if (view.range) [x0, x1] = view.range;
    for (const l of shown) l.v.forEach((v, i) => {
      if (l.x[i] < x0 || l.x[i] > x1 || !Number.isFinite(f(v))) return;
      y0 = Math.min(y0, f(v)); y1 = Math.max(y1, f(v));
    });
    if (!(x1 > x0)) { x0 = Number.isFinite(x0) ? x0 - 1 : 0; x1 = x0 + 2; }
    if (!(y1 >= y0)) { y0 = 0; y1 = 1; }
    if (y1 - y0 < 1e-12 * Math.max(1, Math.abs(y1))) { y0 -= Math.abs(y0) * .1 || 1; y1 += Math.abs(y1) * .1 || 1; }
    const pad = (y1 - y0) * .05;
    y0 -= pad; y1 += pad;
    const X = (x) => LEFT + (x - x0) / (x1 - x0) * (width - LEFT - RIGHT);
    const Y = (v) => HEIGHT - BOTTOM - (f(v) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
    Object.assign(this, { X, Y, x0, x1, width });
    const raw = (t) => (log ? 10 ** t : t);
    for (const t of ticks(y0, y1, log, 5)) {
      const y = Y(raw(t));
      node("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }, this.svg);
      node("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, this.svg, said(+raw(t).toPrecision(6)));
    }
    for (const t of ticks(x0, x1, false, Math.max(2, width / 110))) {
      const label = view.x === "step" ? Math.round(t).toLocaleString("en") : said(+t.toPrecision(6)) + " h";
      const centre = Math.min(X(t), width - 3.3 * label.length - 2);  // not beyond the edge
      node("text", { x: centre, y: HEIGHT - 6, "text-anchor": "middle" }, this.svg, label);
    }
    for (const run of page.runs) run.marks.forEach((m) => {
      const [x] = place(run, [m.step]);
      if (!(x >= x0 && x <= x1)) return;
      const line = node("line", { class: m.kind, x1: X(x), x2: X(x), y1: TOP, y2: HEIGHT - BOTTOM }, this.svg);
      node("title", {}, line, m.text);
    });
    for (const l of shown) {
      if (smooth) this.path(l.x, l.v, l, .25, 1);
      this.path(l.bold.x, l.bold.v, l, 1, 1.6);
      l.v.forEach((v, i) => {  // what is not finite is a mark at the top
        if (Number.isFinite(v) || !(l.x[i] >= x0 && l.x[i] <= x1)) return;
        node("path", { class: "broken", d: `M${X(l.x[i])} ${TOP + 8}l-4 -8h8z` }, this.svg);
      });
    }
    const clip = node("clipPath", { id: this.id }, this.svg);
    node("rect", { x: LEFT - 3, y: 0, width: Math.max(0, width - LEFT - RIGHT + 6), height: HEIGHT }, clip);
    this.overlay = node("g", {}, this.svg);
  }

  path(xs, values, line, opacity, width) {
    let d = "", pen = "M", inside = 0, previous = null;
    xs.forEach((x, i) => {
      const y = this.Y(values[i]);
      if (!Number.isFinite(y) || !Number.isFinite(x)) { pen = "M"; return; }
      const here = `${this.X(x).toFixed(1)} ${y.toFixed(1)}`;
      if (x < this.x0) { previous = here; return; }
      if (x > this.x1 && inside < 0) return;
      if (pen === "M" && previous) { d += "M" + previous; pen = "L"; previous = null; }
      d += pen + here;
      pen = "L";
      inside = x > this.x1 ? -1 : inside + 1;
    });
    const group = node("g", { "clip-path": `url(#${this.id})` }, this.svg);
    node("path", { d, fill: "none", stroke: line.color, "stroke-width": width, opacity,
      "stroke-dasharray": line.dash, "stroke-linejoin": "round" }, group);
    if (xs.length <= 60) xs.forEach((x, i) => {
      const y = this.Y(values[i]);
      if (Number.isFinite(y)) node("circle", { cx: this.X(x), cy: y, r: 2.2, fill: line.color, opacity }, group);
    });
  }

  hideTip() { if (this.tip) { this.tip.remove(); this.tip = null; } if (this.overlay) this.overlay.replaceChildren(); }

  // The values nearest to a place on the x axis.
  read(x) {
    const shown = this.lines.filter((l) => l.shown && l.x.length);
    if (!shown.length) return;
    this.hideTip();
    const at = shown.map((l) => ({ l, i: nearest(l.x, x) }));
    const first = at.reduce((a, b) => (Math.abs(a.l.x[a.i] - x) <= Math.abs(b.l.x[b.i] - x) ? a : b));
    this.at = first.l.x[first.i];
    const px = this.X(this.at);
    node("line", { class: "cursor", x1: px, x2: px, y1: TOP, y2: HEIGHT - BOTTOM }, this.overlay);
    this.tip = node("div", { class: "tip" }, this.box);
    const step = first.l.s[first.i], hours = view.x === "step" ? "" : ` (${said(this.at)} h)`;
    node("div", {}, this.tip, `step ${step.toLocaleString("en")}${hours}`);
    for (const { l, i } of at.slice(0, 24)) {
      const y = this.Y(l.v[i]);
      if (Number.isFinite(y)) node("circle", { cx: this.X(l.x[i]), cy: y, r: 3.5, fill: l.color }, this.overlay);
      const row = node("div", {}, this.tip);
      node("i", { style: `background:${l.color}` }, row);
      const off = l.s[i] === step ? "" : ` at ${l.s[i].toLocaleString("en")}`;
      row.append(`${this.lines.length > 1 ? l.label + " " : ""}${said(l.v[i])}${off}`);
    }
    const wide = this.tip.offsetWidth, left = px + 14 + wide < this.box.clientWidth ? px + 20 : Math.max(4, px - wide);
    this.tip.style.left = `${left}px`;
    this.tip.style.top = "36px";
  }

  listen() {
    const value = (e) => {
      const px = e.clientX - this.svg.getBoundingClientRect().left;
      return this.x0 + (px - LEFT) / (this.width - LEFT - RIGHT) * (this.x1 - this.x0);
    };
    let from = null;
    this.svg.onpointerdown = (e) => { if (e.pointerType === "mouse" && e.button === 0) from = value(e); this.read(value(e)); };
    this.svg.onpointermove = (e) => {
      this.read(value(e));
      if (from === null || !this.overlay) return;
      const [a, b] = [this.X(from), this.X(value(e))].sort((p, q) => p - q);
      node("rect", { class: "drag", x: a, y: TOP, width: b - a, height: HEIGHT - TOP - BOTTOM }, this.overlay);
    };
    this.svg.onpointerup = (e) => {
      const to = value(e);
      if (from !== null && Math.abs(this.X(to) - this.X(from)) > 8) { view.range = [from, to].sort((a, b) => a - b); redraw(); }
      from = null;
    };
    this.svg.onpointerleave = () => { from = null; this.hideTip(); };
    this.svg.onblur = () => this.hideTip();
    this.svg.ondblclick = () => { view.range = null; redraw(); };
    this.svg.onkeydown = (e) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[e.key], line = this.lines.find((l) => l.shown && l.x.length);
      if (!way || !line) return;
      e.preventDefault();
      const i = this.at === undefined ? 0 : nearest(line.x, this.at) + way;
      this.read(line.x[Math.min(Math.max(i, 0), line.x.length - 1)]);
    };
  }
}

let waiting = 0;
function redraw() {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => charts.forEach((c) => c.draw()));
}

function control(parent, label, element) {
  const outer = node("label", {}, parent, label);
  outer.append(element);
  return element;
}

function curves(parent) {
  if (!page.charts.length) { parent.hidden = true; return; }
  const bar = node("div", { class: "controls" }, parent);
  const smooth = control(bar, "smoothing", node("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0 }));
  const shown = node("output", {}, bar, "0");
  smooth.oninput = () => { view.smooth = +smooth.value; shown.textContent = smooth.value; redraw(); };
  const log = control(bar, "log scale", node("input", { type: "checkbox" }));
  log.onchange = () => { view.log = log.checked; charts.forEach((c) => { c.log = undefined; }); redraw(); };
  const axis = control(bar, "x axis", node("select"));
  for (const [value, text] of [["step", "steps"], ["hours", "hours since the start"]]) node("option", { value }, axis, text);
  axis.onchange = () => { view.x = axis.value; view.range = null; redraw(); };
  node("button", {}, bar, "whole range").onclick = () => { view.range = null; redraw(); };
  const kinds = new Set(page.runs.flatMap((r) => r.marks.map((m) => m.kind)));
  if (kinds.size) node("span", {}, bar, `dashed: ${[...kinds].join(", ")}`);
  let part = null, grid = null;
  for (const spec of page.charts) {
    if (spec.part !== part) {
      part = spec.part;
      node("h3", {}, parent, part);
      grid = node("div", { class: "charts" }, parent);
    }
    charts.push(new Chart(spec, grid));
  }
  redraw();
  addEventListener("resize", redraw);
}

function films(parent) {
  for (const run of page.runs) {
    const pictures = run.samples;
    if (!pictures.length) continue;
    parent.hidden = false;
    const film = node("div", { class: "film" }, parent);
    if (page.runs.length > 1) node("h3", {}, film, run.name);
    const image = node("img", {}, film), row = node("div", { class: "row" }, film);
    const slider = node("input", { type: "range", min: 0, max: pictures.length - 1, value: pictures.length - 1,
      "aria-label": "step of the samples" }, row);
    const label = node("output", {}, row);
    const show = () => {
      const { step, src } = pictures[slider.value];
      image.src = src;
      image.alt = `samples at step ${step}`;
      label.textContent = `step ${step.toLocaleString("en")}`;
    };
    slider.oninput = show;
    slider.hidden = pictures.length < 2;
    show();
  }
}

films(document.getElementById("samples"));
curves(document.getElementById("curves"));
