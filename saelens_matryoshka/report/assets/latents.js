// The browser of latents: filter, order, pages; only what is on the page is built.
"use strict";

const PER_PAGE = 20;

function shade(value, largest = 255) { return value ? `rgb(var(--heat) / calc(${(0.08 + 0.92 * value / largest).toFixed(3)} * var(--heat-max)))` : ""; }

// Line breaks and tabs get a faint sign, which stands for them unless they are kept.
function tokenSpan(text, props, breaks) {
  const span = el("span", props);
  for (const part of visible(text).split(/(\n|\t)/)) {
    if (part === "\n") span.append(el("span", { class: "sub" }, "↵"), breaks ? "\n" : "");
    else if (part === "\t") span.append(el("span", { class: "sub" }, "⇥"), breaks ? "\t" : "");
    else if (part) span.append(part);
  }
  return span;
}

// A token by itself: its spaces at the ends are shown, too.
function tokenCode(text, props = {}) {
  const code = el("code", props);
  for (const part of visible(text).split(/(^ +| +$|\n|\t)/)) {
    if (part === "") continue;
    const sign = part === "\n" ? "↵" : part === "\t" ? "⇥" : /^ +$/.test(part) ? (part.length > 4 ? `·${part.length}·` : "·".repeat(part.length)) : null;
    code.append(sign ? el("span", { class: "sub" }, sign) : part);
  }
  return code;
}

function contextNode(latents, example, single) {
  const breaks = !single && document.getElementById("breaks").checked;
  const node = el("div", { class: single ? "ctx line" : "ctx" });
  const from = single ? Math.max(0, example.peak - 7) : 0;
  for (const piece of latents.pieces(example.ids, from, example.length)) {
    let act = 0;
    for (let i = piece.from; i < piece.to; i++) act = Math.max(act, example.acts[i]);
    const peak = piece.from <= example.peak && example.peak < piece.to;
    const props = { class: peak ? "tok peak" : "tok", style: act ? { background: shade(act) } : {} };
    node.append(tokenSpan(piece.text, props, breaks));
  }
  return node;
}

function levelName(meta, level) { return `level ${level + 1}`; }
function levelDot(meta, level) { return el("i", { class: "dot", style: { background: levelColour(level, meta.widths.length) } }); }

function jump(latents, j, note) {
  const code = tokenCode(latents.label(j));
  return el("a", { class: "jump", href: `#latent-${j}`, title: levelName(latents.meta, latents.level[j]) }, levelDot(latents.meta, latents.level[j]), el("b", {}, `#${j}`), code, note ? el("span", {}, note) : null);
}

function pager(parent, page, pages, go) {
  const field = el("input", { type: "number", min: "1", max: String(pages), value: String(page + 1), "aria-label": "Page" });
  field.addEventListener("change", () => go(Math.min(pages, Math.max(1, Math.round(+field.value) || 1)) - 1));
  parent.replaceChildren();
  if (pages > 1) parent.append(
    el("button", { type: "button", disabled: page === 0, "aria-label": "Previous page", onclick: () => go(page - 1) }, "←"),
    field, `of ${WHOLE.format(pages)}`,
    el("button", { type: "button", disabled: page === pages - 1, "aria-label": "Next page", onclick: () => go(page + 1) }, "→"));
}

function logitColumn(latents, j, tokens, values, tint) {
  const n = latents.meta.n_logits, column = el("div");
  for (let i = j * n; i < (j + 1) * n; i++)
    column.append(el("div", { class: "logit" }, tinted(latents.tokenText(tokens[i]), tint), `${(values[i] / 32767 * latents.meta.logit_scale).toFixed(2)}`));
  return column;
}
function tinted(text, tint) {
  const code = tokenCode(text);
  code.style.setProperty("--tint", `var(--${tint})`);
  return code;
}

function logitChips(latents, j, most) {
  const n = latents.meta.n_logits, chips = el("span", { class: "chips" });
  for (let i = j * n; i < j * n + Math.min(most, n); i++) chips.append(tokenCode(latents.tokenText(latents.topToken[i]), { class: "chip" }));
  return chips;
}

function histogramNode(latents, j) {
  const n = latents.meta.n_bins, bins = latents.histogram.subarray(j * n, (j + 1) * n);
  let last = n; while (last > 1 && !bins[last - 1]) last--;
  const width = 280, height = 54, drawing = svg("svg", { viewBox: `0 0 ${width} ${height + 15}`, width: "100%", role: "img", "aria-label": "Histogram of its activations" });
  for (let i = 0; i < last; i++) if (bins[i]) {
    const h = Math.max(1, (bins[i] / 255) * height);
    const bar = svg("rect", { x: (i / last) * width, y: height - h, width: width / last - 0.7, height: h, fill: "rgb(var(--heat))", "fill-opacity": 0.25 + 0.6 * (i / last) });
    drawing.append(bar);
  }
  drawing.append(svg("line", { class: "axis", x1: 0, x2: width, y1: height, y2: height }), svg("text", { x: 0, y: height + 13 }, "0"), svg("text", { x: width / 2, y: height + 13, "text-anchor": "middle" }, "activation (√ of counts)"), svg("text", { x: width, y: height + 13, "text-anchor": "end" }, short(latents.scale[j] * last / n)));
  return drawing;
}

function exampleList(latents, j, from, to) {
  const box = document.createDocumentFragment(), shown = new Set();
  for (let e = 0; e < from; e++) { const other = latents.example(j, e); if (other) shown.add(other.start + other.peak); }
  for (let e = from; e < to; e++) {
    const example = latents.example(j, e);
    if (example && !shown.has(example.start + example.peak)) box.append(el("div", { class: "example" }, el("span", { class: "val" }, example.value < 1000 ? example.value.toPrecision(3) : short(example.value)), contextNode(latents, example, false)));
  }
  return box;
}

function detailNode(latents, j) {
  const meta = latents.meta, left = el("div"), right = el("div");
  if (latents.fired[j]) {
    left.append(el("h4", {}, "Strongest, one per prompt"), exampleList(latents, j, 0, meta.n_top));
    const rest = exampleList(latents, j, meta.n_top, latents.examples);
    if (rest.childNodes.length) left.append(el("h4", {}, "Across its range, drawn at random"), rest);
  } else left.append(el("p", { class: "missing" }, `It fired on none of the ${WHOLE.format(meta.n_tokens)} tokens.`));
  if (meta.n_logits) right.append(el("h4", { title: "decoder direction · gain of the final norm · W_U" }, "Logits it raises and lowers"), el("div", { class: "logits" }, logitColumn(latents, j, latents.topToken, latents.topValue, "heat"), logitColumn(latents, j, latents.bottomToken, latents.bottomValue, "cool")));
  else if (meta.no_logits) right.append(el("h4", {}, "Logits"), el("p", { class: "stat" }, meta.no_logits));
  if (latents.fired[j]) right.append(el("h4", {}, `Activations, mean ${short(latents.mean[j])}`), histogramNode(latents, j));
  if (latents.parent[j] >= 0) right.append(el("h4", {}, "Refines"), el("div", { class: "links" }, jump(latents, latents.parent[j], latents.cosine(j).toFixed(2))));
  const children = Array.from(latents.children(j)).sort((a, b) => latents.parentCosine[b] - latents.parentCosine[a]);
  if (children.length) right.append(el("h4", {}, `Refined by ${WHOLE.format(children.length)}${children.length > 6 ? ", the nearest" : ""}`), el("div", { class: "links" }, ...children.slice(0, 6).map((c) => jump(latents, c, latents.cosine(c).toFixed(2)))));
  if (meta.n_nearest) {
    const links = [];
    for (let i = j * meta.n_nearest; i < (j + 1) * meta.n_nearest; i++) links.push(jump(latents, latents.nearest[i], (latents.nearestCosine[i] / 100).toFixed(2)));
    right.append(el("h4", { title: "cosine of decoder directions" }, "Nearest of all"), el("div", { class: "links" }, ...links));
  }
  return el("div", { class: "detail" }, left, right);
}

class Browser {
  constructor(latents) {
    this.latents = latents;
    this.get = (id) => document.getElementById(id);
    const { meta } = latents, filter = this.get("filter-level");
    filter.append(el("option", { value: "all" }, "all"), ...meta.widths.map((width, l) => el("option", { value: String(l) }, `${l + 1}: ${WHOLE.format(l ? meta.widths[l - 1] : 0)} to ${WHOLE.format(width - 1)}`)));
    const powers = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1];
    this.get("density-low").append(el("option", { value: "0" }, "0"), ...powers.map((p) => el("option", { value: String(p) }, percent(p))));
    this.get("density-high").append(...powers.map((p) => el("option", { value: String(p) }, percent(p))), el("option", { value: "1" }, "100%"));
    this.defaults = { search: "", "search-in": "all", "filter-level": "all", "filter-state": "live", "density-low": "0", "density-high": "1", sort: "id" };
    let timer = 0;
    for (const id of Object.keys(this.defaults)) this.get(id).addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => this.update(), id === "search" ? 160 : 0); });
    this.get("breaks").addEventListener("input", () => document.querySelectorAll(".latent.open").forEach((box) => box.querySelector(".detail").replaceWith(detailNode(this.latents, +box.dataset.latent))));
    this.get("reset").addEventListener("click", () => { this.reset(); this.update(); });
    this.reset();
  }

  reset() { for (const [id, value] of Object.entries(this.defaults)) this.get(id).value = value; }

  matches(query) {
    const where = this.get("search-in").value, latents = this.latents;
    const found = new Uint8Array(latents.count);
    const add = (mask) => mask.forEach((hit, j) => { if (hit) found[j] = 1; });
    const number = /^#?(\d+)$/.exec(query.trim());
    if (where === "all" && number && +number[1] < latents.count) found[+number[1]] = 1;
    if (where === "all" && query.trim().startsWith("#") && number) return found;
    if (where === "all" || where === "contexts") add(latents.inContexts(query));
    if (where === "peaks") add(latents.inPeaks(query));
    if (where === "all" || where === "logits") add(latents.inLogits(query));
    return found;
  }

  update(open) {
    const latents = this.latents, value = (id) => this.get(id).value;
    const query = value("search").toLowerCase(), hit = query ? this.matches(query) : null;
    const level = value("filter-level"), state = value("filter-state"), low = +value("density-low"), high = +value("density-high");
    const found = [];
    for (let j = 0; j < latents.count; j++) {
      if (hit && !hit[j]) continue;
      if (level !== "all" && latents.level[j] !== +level) continue;
      if (state !== "all" && (latents.fired[j] > 0) !== (state === "live")) continue;
      const density = latents.density(j);
      if (density < low || density > high) continue;
      found.push(j);
    }
    const by = { dense: (j) => -latents.fired[j], rare: (j) => latents.fired[j] || Infinity, max: (j) => -latents.largest[j], refined: (j) => (latents.parent[j] < 0 ? Infinity : -latents.parentCosine[j]), new: (j) => (latents.parent[j] < 0 ? Infinity : latents.parentCosine[j]) }[value("sort")];
    if (by) { const keys = Float64Array.from({ length: latents.count }, (_, j) => by(j)); found.sort((a, b) => (keys[a] === keys[b] ? a - b : keys[a] - keys[b])); }
    this.found = found;
    this.get("count").textContent = found.length === latents.count ? `${WHOLE.format(found.length)} latents` : `${WHOLE.format(found.length)} of ${WHOLE.format(latents.count)} latents`;
    this.show(0, open);
  }

  show(page, open) {
    const pages = Math.max(1, Math.ceil(this.found.length / PER_PAGE)), list = this.get("list");
    list.replaceChildren(...this.found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map((j) => this.row(j, j === open)));
    if (!this.found.length) list.append(el("p", { class: "missing" }, "No latent is like that."));
    pager(this.get("pager"), page, pages, (next) => { this.show(next); this.get("latents").scrollIntoView(); });
  }

  row(j, open) {
    const latents = this.latents, meta = latents.meta, best = latents.example(j, 0);
    const name = el("span", {}, el("span", { class: "id" }, `#${j}`), el("br"), el("span", { class: "badge" }, levelDot(meta, latents.level[j]), levelName(meta, latents.level[j])));
    const stat = el("span", { class: "stat" });
    if (latents.fired[j]) stat.append(el("b", {}, percent(latents.density(j))), " of tokens", el("br"), "max ", el("b", {}, short(latents.largest[j])));
    else stat.append("dead");
    const chips = logitChips(latents, j, 5);
    const button = el("button", { class: "row", type: "button", "aria-expanded": "false" }, name, stat, chips, best ? contextNode(latents, best, true) : el("span"));
    const box = el("article", { class: "latent", "data-latent": String(j) }, button);
    const toggle = () => {
      const opened = box.classList.toggle("open");
      button.setAttribute("aria-expanded", String(opened));
      if (opened) box.append(detailNode(latents, j)); else box.querySelector(".detail").remove();
    };
    button.addEventListener("click", toggle);
    if (open) toggle();
    return box;
  }

  open(j) {
    this.reset();
    this.get("filter-state").value = "all";
    this.get("search").value = `#${j}`;
    this.update(j);
    this.get("latents").scrollIntoView();
  }
}
