// Puts the page together: what is small at once, the latents when they are unpacked.
"use strict";

const PAGE = JSON.parse(document.getElementById("page-data").textContent);
const byId = (id) => document.getElementById(id);
const colours = PAGE.widths.map((_, l) => levelColour(l, PAGE.widths.length));
const prefixName = (width) => `${WHOLE.format(width)}`;

document.querySelectorAll(".dot[data-level]").forEach((dot) => { dot.style.background = colours[dot.dataset.level]; });

function prefixCharts(rows) {
  const box = byId("prefix-charts"), ofWidth = { label: "latents in the prefix (log scale)", kind: "log", ticks: rows.map((r) => r.width), format: (v) => WHOLE.format(v), unit: "latents" };
  const l0 = { label: "L0, active latents per token", format: short, unit: "active latents" };
  const dots = colours;
  const add = (title, key, axis, xs, y) => rows.every((r) => r[key] !== null) && chart(box, { title, x: axis, y, series: [{ x: xs, y: rows.map((r) => r[key]), colour: "var(--faint)", dots }] });
  const fvu = { label: "fraction of variance unexplained", low: 0 }, ce = { label: "cross-entropy recovered, zero ablation", format: percent };
  add("FVU by width", "fvu", ofWidth, rows.map((r) => r.width), fvu);
  add("FVU by L0", "fvu", l0, rows.map((r) => r.l0), fvu);
  add("CE recovered by width", "ce_recovered", ofWidth, rows.map((r) => r.width), ce);
  add("CE recovered by L0", "ce_recovered", l0, rows.map((r) => r.l0), ce);
}

function trainingCharts(log) {
  const box = byId("training-charts"), x = { label: "training tokens", unit: "tokens", exact: (v) => WHOLE.format(v), low: 0 };
  const one = (key) => [{ x: log.tokens, y: log[key], colour: "var(--accent)" }];
  const has = (key) => log[key] && log[key].some((v) => v !== null);
  if (has("loss")) chart(box, { title: "Loss", x, y: { label: "sum over levels, log scale", kind: "log" }, series: one("loss") });
  const perPrefix = Object.entries(log.fvu_per_prefix).map(([width, values]) => ({ name: prefixName(+width), x: log.tokens, y: values, colour: colours[PAGE.widths.indexOf(+width)] || "var(--faint)" }));
  if (perPrefix.length) chart(box, { title: "FVU of every prefix", x, y: { label: "fraction of variance unexplained", low: 0 }, series: perPrefix });
  else if (has("fvu")) chart(box, { title: "FVU", x, y: { label: "fraction of variance unexplained", low: 0 }, series: one("fvu") });
  if (has("l0")) chart(box, { title: "L0", x, y: { label: "active latents per token", low: 0 }, series: one("l0"), lines: PAGE.k ? [{ y: PAGE.k, name: `k = ${PAGE.k}` }] : [] });
  if (has("dead")) chart(box, { title: "Dead latents", x, y: { label: "share of all latents", low: 0, format: percent }, series: one("dead") });
  if (has("threshold")) chart(box, { title: "Threshold", x, y: { label: "smallest activation kept, or its average", low: 0 }, series: one("threshold") });
  if (has("lr")) chart(box, { title: "Learning rate", x, y: { label: "of Adam, per step", low: 0 }, series: one("lr") });
  if (perPrefix.length) legend(byId("training-legend"), PAGE.widths.map((w) => `prefix of ${prefixName(w)}`), colours);
}

function densityChart(density) {
  const series = density.counts.map((counts, l) => {
    const size = PAGE.widths[l] - (l ? PAGE.widths[l - 1] : 0), x = [], y = [];
    counts.forEach((count, i) => { x.push(10 ** density.edges[i]); y.push(count / size); });
    x.push(10 ** density.edges[counts.length]); y.push(0);
    return { name: `level ${l + 1}:`, x, y, colour: colours[l], step: true };
  });
  chart(byId("density-chart"), { title: "Firing density by level", height: 230, x: { label: "share of tokens a latent fires on (log scale)", kind: "log", format: percent, exact: (v) => `from ${percent(v)}`, unit: "of tokens on" }, y: { label: "share of the level's latents", low: 0, format: percent }, series });
  legend(byId("density-legend"), density.dead.map((dead, l) => {
    const size = PAGE.widths[l] - (l ? PAGE.widths[l - 1] : 0);
    return `level ${l + 1}: ${WHOLE.format(size)} latents, ${WHOLE.format(dead)} dead (${percent(dead / size)})`;
  }), colours);
}

function matrix(relations) {
  const n = PAGE.widths.length, table = el("table", { class: "matrix" }), head = el("tr", {}, el("th"));
  for (let c = 0; c < n - 1; c++) head.append(el("th", {}, el("i", { class: "dot", style: { background: colours[c] } }), `parent in level ${c + 1}`));
  table.append(el("thead", {}, head));
  const body = el("tbody");
  for (let r = 1; r < n; r++) {
    const row = el("tr", {}, el("th", { scope: "row" }, el("i", { class: "dot", style: { background: colours[r] } }), `level ${r + 1}, ${WHOLE.format(PAGE.widths[r] - PAGE.widths[r - 1])} latents`));
    for (let c = 0; c < n - 1; c++) {
      if (c >= r) { row.append(el("td", { class: "none" })); continue; }
      const share = relations.parents_in[r][c];
      row.append(el("td", { style: { background: `rgb(var(--heat) / ${(0.04 + 0.5 * share).toFixed(3)})` } }, el("b", {}, percent(share)), el("small", {}, `cos ${relations.mean_cosine[r][c].toFixed(2)}`)));
    }
    body.append(row);
  }
  table.append(body);
  byId("matrix").append(table, el("p", { class: "count" }, "Share of a level's latents (row) whose parent is in a coarser level (column); below it, the mean cosine to the nearest latent of that level."));
}

function families(latents) {
  const n = latents.meta.widths.length, select = byId("family-level");
  select.append(el("option", { value: "all" }, "all levels"), ...latents.meta.widths.slice(0, -1).map((_, l) => el("option", { value: String(l) }, `level ${l + 1}`)));
  const PER = 8;
  let found = [];
  const near = (j, least) => Array.from(latents.children(j)).filter((c) => latents.cosine(c) >= least).sort((a, b) => latents.parentCosine[b] - latents.parentCosine[a]);
  const show = (page) => {
    const least = +byId("family-cosine").value || 0;
    byId("families").replaceChildren(...found.slice(page * PER, (page + 1) * PER).map(({ j, count }) => {
      const children = near(j, least);
      return el("div", { class: "family" }, el("div", {}, jump(latents, j), el("span", { class: "badge" }, `refined by ${WHOLE.format(count)}`), logitChips(latents, j, 4)),
        el("div", { class: "children" }, ...children.slice(0, 12).map((c) => jump(latents, c, latents.cosine(c).toFixed(2))), children.length > 12 ? el("span", { class: "badge" }, `and ${WHOLE.format(children.length - 12)} more`) : null));
    }));
    pager(byId("family-pager"), page, Math.max(1, Math.ceil(found.length / PER)), show);
  };
  const update = () => {
    const least = (+byId("family-cosine").value || 0) * 10000, level = select.value, sort = byId("family-sort").value;
    found = [];
    for (let j = 0; j < latents.count; j++) {
      if (level !== "all" && latents.level[j] !== +level) continue;
      let count = 0, sum = 0;
      for (const c of latents.children(j)) if (latents.parentCosine[c] >= least) { count++; sum += latents.parentCosine[c]; }
      if (count) found.push({ j, count, mean: sum / count });
    }
    if (sort === "children") found.sort((a, b) => b.count - a.count || a.j - b.j);
    if (sort === "cosine") found.sort((a, b) => b.mean - a.mean || a.j - b.j);
    byId("family-count").textContent = `${WHOLE.format(found.length)} parents with children at such a cosine`;
    show(0);
  };
  for (const id of ["family-level", "family-sort", "family-cosine"]) byId(id).addEventListener("input", update);
  byId("families-box").hidden = n < 2;
  update();
}

// The section under the navigation bar is marked in it.
function followScroll() {
  const links = [...document.querySelectorAll("nav a")];
  const mark = () => {
    const here = links.filter((a) => document.querySelector(a.hash).getBoundingClientRect().top < 140).pop();
    links.forEach((a) => a.classList.toggle("here", a === here));
  };
  let waiting = false;
  addEventListener("scroll", () => {
    if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; mark(); }); }
  }, { passive: true });
  mark();
}

async function start() {
  if (PAGE.prefixes) prefixCharts(PAGE.prefixes);
  if (PAGE.log) trainingCharts(PAGE.log);
  if (PAGE.density) densityChart(PAGE.density);
  if (PAGE.widths.length > 1) matrix(PAGE.relations);
  followScroll();
  if (!PAGE.latents) return;
  await new Promise((done) => setTimeout(done));  // what is above is shown first
  const block = byId("latent-data");
  const latents = new Latents(await unpack(block.textContent, PAGE.latents.layout), PAGE.latents);
  block.remove();
  const browser = new Browser(latents);
  if (PAGE.widths.length > 1) families(latents);
  byId("loading").remove();
  byId("browser").hidden = false;
  const follow = () => {
    const match = /^#latent-(\d+)$/.exec(location.hash);
    if (match && +match[1] < latents.count) browser.open(+match[1]);
  };
  browser.update();
  addEventListener("hashchange", follow);
  document.addEventListener("click", (event) => {  // a link to where the address already points
    const link = event.target.closest("a.jump");
    if (link && link.hash === location.hash) { event.preventDefault(); follow(); }
  });
  follow();
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  const loading = byId("loading");
  if (loading) loading.textContent = `The latents could not be unpacked: ${error.message}. This page needs a browser of 2023 or later.`;
  throw error;
});
