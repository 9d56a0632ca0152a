// Small SVG charts: lines and steps, labelled axes, values under the pointer. Nothing is drawn from a string of HTML.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (key === "class") node.className = value;
    else if (key === "style") Object.assign(node.style, value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node && typeof value !== "string") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(tag, attributes = {}, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Ordered colours for the levels, coarse to fine, of enough contrast with the ground they are on.
const STOPS = matchMedia("(prefers-color-scheme: dark)").matches
  ? [[142, 122, 255], [214, 96, 190], [240, 116, 82], [232, 176, 60]]
  : [[91, 63, 212], [190, 58, 160], [230, 92, 56], [190, 128, 8]];
function levelColour(level, nLevels) {
  const at = nLevels > 1 ? (level / (nLevels - 1)) * (STOPS.length - 1) : 0;
  const low = Math.min(Math.floor(at), STOPS.length - 2), part = at - low;
  const rgb = STOPS[low].map((value, i) => Math.round(value + part * (STOPS[low + 1][i] - value)));
  return `rgb(${rgb.join(" ")})`;
}

const WHOLE = new Intl.NumberFormat("en-US");
function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  for (const [limit, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (size >= limit) return `${+(value / limit).toPrecision(3)}${unit}`;
  if (size < 1e-3) return value.toExponential(1).replace("e-", "e−");
  return `${+value.toPrecision(3)}`;
}
const percent = (value) => `${+(value * 100).toPrecision(3)}%`;

function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(+(i * step).toPrecision(12));
  return ticks;
}

function logTicks(low, high, count) {
  const ticks = [], decades = Math.log10(high / low), marks = decades > 2.5 ? [1] : decades > 1 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
    for (const m of marks) { const t = +(m * 10 ** e).toPrecision(6); if (t >= low * 0.999 && t <= high * 1.001) ticks.push(t); }
  const every = Math.ceil(ticks.length / Math.max(2, count));
  return ticks.filter((_, i) => i % every === 0);
}

function scale(kind, low, high, from, to) {
  const f = kind === "log" ? Math.log : (v) => v;
  const a = f(low), b = f(high);
  return (value) => from + ((f(value) - a) / (b - a || 1)) * (to - from);
}

// options: title, note, x: {label, kind, ticks, format, values?}, y: {label, kind, format, low, high},
// series: [{name, colour, x: [], y: [], dots, step, dash}], lines: [{y, name}], height
function chart(parent, options) {
  const figure = el("figure", { class: "chart" }, el("figcaption", {}, options.title, options.note ? el("small", {}, options.note) : null));
  parent.append(figure);
  const drawing = svg("svg", { role: "img", "aria-label": options.title });
  const tip = el("div", { class: "tip", hidden: true });
  figure.append(drawing, tip);
  const draw = () => drawChart(figure, drawing, tip, options);
  new ResizeObserver(draw).observe(figure);
  return figure;
}

function extent(arrays, kind) {
  let low = Infinity, high = -Infinity;
  for (const values of arrays) for (const v of values)
    if (v !== null && Number.isFinite(v) && (kind !== "log" || v > 0)) { low = Math.min(low, v); high = Math.max(high, v); }
  return low > high ? [kind === "log" ? 0.1 : 0, 1] : [low, high];
}

function drawChart(figure, drawing, tip, { series, x, y, lines = [], height = 190 }) {
  const width = figure.clientWidth - 28;
  if (width < 60) return;
  drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
  drawing.setAttribute("height", height);
  drawing.replaceChildren();
  const fx = x.format || short, fy = y.format || short;
  let [x0, x1] = extent(series.map((s) => s.x), x.kind), [y0, y1] = extent([...series.map((s) => s.y), lines.map((l) => l.y)], y.kind);
  if (y.low !== undefined && y.kind !== "log") y0 = Math.min(y0, y.low);
  if (y.high !== undefined) y1 = Math.max(y1, y.high);
  if (x0 === x1) { if (x.kind === "log") { x0 /= 2; x1 *= 2; } else { x0 -= 1; x1 += 1; } }
  if (y.kind === "log") { if (y1 / y0 < 1.3) { y0 /= 1.2; y1 *= 1.2; } }
  else if (y0 === y1) { y1 = y0 + (Math.abs(y0) || 1); if (y0 > 0) y0 = 0; }
  else { const pad = (y1 - y0) * 0.05; if (!(y.low === y0)) y0 -= pad; if (!(y.high === y1)) y1 += pad; }
  if (series.some((s) => s.dots)) { if (x.kind === "log") { const r = (x1 / x0) ** 0.04; x0 /= r; x1 *= r; } else { const p = (x1 - x0) * 0.04; x0 -= p; x1 += p; } }
  const yTicks = y.kind === "log" ? logTicks(y0, y1, 5) : niceTicks(y0, y1, Math.max(2, Math.floor(height / 45)));
  const labels = yTicks.map(fy), left = Math.max(...labels.map((l) => l.length)) * 6.3 + 10;
  const right = width - 10, top = 18, bottom = height - 34;
  const px = scale(x.kind, x0, x1, left, right), py = scale(y.kind, y0, y1, bottom, top);
  drawing.append(svg("text", { x: 0, y: 8 }, y.label));
  yTicks.forEach((t, i) => drawing.append(svg("line", { class: "grid", x1: left, x2: right, y1: py(t), y2: py(t) }), svg("text", { x: left - 7, y: py(t) + 3.5, "text-anchor": "end" }, labels[i])));
  const candidates = x.ticks ? x.ticks.filter((t) => t >= x0 && t <= x1) : x.kind === "log" ? logTicks(x0, x1, width / 70) : niceTicks(x0, x1, Math.floor(width / 65));
  let reach = -Infinity;
  for (const t of candidates) {
    const label = fx(t), half = label.length * 3.2, centre = Math.min(Math.max(px(t), half), width - half);
    drawing.append(svg("line", { class: "axis", x1: px(t), x2: px(t), y1: bottom, y2: bottom + 4 }));
    if (centre - half < reach + 6) continue;
    reach = centre + half;
    drawing.append(svg("text", { x: centre, y: bottom + 16, "text-anchor": "middle" }, label));
  }
  drawing.append(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  drawing.append(svg("text", { x: (left + right) / 2, y: height - 3, "text-anchor": "middle" }, x.label));
  for (const line of lines) {
    drawing.append(svg("line", { class: "cross", x1: left, x2: right, y1: py(line.y), y2: py(line.y) }), svg("text", { x: right, y: py(line.y) - 4, "text-anchor": "end" }, line.name));
  }
  for (const s of series) {
    let path = "", pen = false;
    s.x.forEach((value, i) => {
      const v = s.y[i];
      if (v === null || !Number.isFinite(v) || (y.kind === "log" && v <= 0)) { pen = false; return; }
      const at = `${px(value).toFixed(1)} ${py(v).toFixed(1)}`;
      path += !pen ? (s.step ? `M${px(value).toFixed(1)} ${bottom}V${py(v).toFixed(1)}` : `M${at}`) : s.step ? `H${px(value).toFixed(1)}V${py(v).toFixed(1)}` : `L${at}`;
      pen = true;
    });
    drawing.append(svg("path", { d: path, fill: "none", stroke: s.colour, "stroke-width": s.dots ? 1.5 : 1.8, "stroke-linejoin": "round", "stroke-opacity": s.dots ? 0.45 : 1 }));
    if (s.dots) s.x.forEach((value, i) => s.y[i] !== null && drawing.append(svg("circle", { cx: px(value), cy: py(s.y[i]), r: 4.5, fill: s.dots[i] })));
  }
  const cross = svg("line", { class: "cross", y1: top, y2: bottom, visibility: "hidden" });
  drawing.append(cross);
  const hide = () => { tip.hidden = true; cross.setAttribute("visibility", "hidden"); };
  drawing.onpointerleave = hide;
  drawing.onpointermove = (event) => {
    const box = drawing.getBoundingClientRect(), at = event.clientX - box.left, longest = series.reduce((a, b) => (b.x.length > a.x.length ? b : a));
    let best = 0;
    longest.x.forEach((value, i) => { if (Math.abs(px(value) - at) < Math.abs(px(longest.x[best]) - at)) best = i; });
    const where = longest.x[best];
    if (where === undefined) return hide();
    cross.setAttribute("x1", px(where)); cross.setAttribute("x2", px(where)); cross.setAttribute("visibility", "visible");
    tip.replaceChildren(el("div", {}, `${(x.exact || fx)(where)} ${x.unit || ""}`));
    for (const s of series) {
      const i = s === longest ? best : s.x.indexOf(where), v = i < 0 ? null : s.y[i];
      if (v === null || v === undefined) continue;
      tip.append(el("div", {}, el("i", { class: "dot", style: { background: s.dots ? s.dots[i] : s.colour } }), s.name ? `${s.name} ` : "", el("b", {}, (y.exact || fy)(v))));
    }
    tip.hidden = false;
    const room = figure.clientWidth - tip.offsetWidth - 8, x_ = px(where) + 26;
    tip.style.left = `${Math.max(4, x_ > room ? px(where) - tip.offsetWidth + 2 : x_)}px`;
    tip.style.top = `${drawing.offsetTop + 14}px`;
  };
}

function legend(parent, names, colours) {
  names.forEach((name, i) => parent.append(el("span", {}, el("i", { class: "dot", style: { background: colours[i] } }), name)));
}
