"use strict";
// Everything that comes from runs is set as text, never as HTML.
const COLUMNS = [
  ["name", "run", "text"], ["architecture", "architecture", "text"], ["required_length", "length", 0],
  ["budget", "budget", 0], ["seed", "seed", 0], ["state", "state", "text"], ["step", "step", 0],
  ["pass_rate_start", "pass rate before", 3], ["pass_rate_end", "after", 3], ["gain", "gain", 3],
  ["rollout_tokens_per_s", "tokens/s", 0], ["cache_kib", "cache KiB", 0], ["minutes", "minutes", 1],
];
const $ = (id) => document.getElementById(id);
let data = JSON.parse($("data").textContent);
let sort = { key: null, descending: false };
let figuresAllowed = false;
let observer = null;

function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  if (className) node.className = className;
  return node;
}

function fill(select, options, keep) {
  select.replaceChildren(...options.map(([value, label]) => {
    const option = make("option", label);
    option.value = value;
    return option;
  }));
  if (keep !== undefined && options.some(([value]) => value === keep)) select.value = keep;
}

function written(value, form) {
  if (value === null || value === undefined) return "–";
  if (form === "text") return value;
  return value.toLocaleString("en", { minimumFractionDigits: form, maximumFractionDigits: form });
}

function renderVerdict() {
  document.title = data.title + " – rlscale report";
  $("title").textContent = data.title;
  $("state").textContent = data.state;
  $("headline").textContent = data.verdict.headline;
  $("findings").replaceChildren(...data.verdict.findings.map((text) => make("li", text)));
  $("missing").hidden = data.verdict.missing.length === 0;
  $("missing").querySelector("summary").textContent = `What these runs cannot tell (${data.verdict.missing.length})`;
  $("missing").querySelector("ul").replaceChildren(...data.verdict.missing.map((text) => make("li", text)));
}

// A figure is drawn when it comes into view, and again when one of its choices changes.
function renderFigures() {
  if (observer) observer.disconnect();
  observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) { observer.unobserve(entry.target); entry.target.draw(); }
    }
  }, { rootMargin: "200px" });
  const before = {};
  for (const card of $("cards").children) before[card.dataset.id] = [...card.querySelectorAll("select")].map((s) => s.value);
  $("cards").replaceChildren(...data.figures.map((figure) => {
    const card = make("article", null, figure.wide ? "card wide" : "card");
    card.dataset.id = figure.id;
    card.append(make("h3", figure.title), make("p", figure.caption, "caption"));
    const controls = make("div", null, "controls");
    const selects = figure.choices.map((choice, i) => {
      const label = make("label", choice.label + " ");
      const select = make("select");
      fill(select, choice.options.map((option, j) => [String(j), option]), (before[figure.id] || [])[i]);
      label.append(select);
      controls.append(label);
      return select;
    });
    if (selects.length) card.append(controls);
    const plot = make("div", null, "plot");
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", figure.title + ". " + figure.caption);
    card.append(plot);
    plot.draw = () => {
      plot.drawn = true;
      const shown = figure.plots[selects.map((s) => s.value).join("/")];
      Plotly.react(plot, shown.data, shown.layout, {
        responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"],
      });
    };
    for (const select of selects) select.addEventListener("change", () => plot.draw());
    if (figuresAllowed) observer.observe(plot);
    return card;
  }));
}

function figuresReady() {
  figuresAllowed = true;
  for (const plot of document.querySelectorAll(".plot")) observer.observe(plot);
  // What is printed has been scrolled past by nobody.
  window.addEventListener("beforeprint", () => {
    for (const plot of document.querySelectorAll(".plot")) if (!plot.drawn) plot.draw();
  });
}

function renderTable() {
  const header = make("tr");
  for (const [key, label, form] of COLUMNS) {
    const cell = make("th", null, form === "text" ? "text" : "");
    cell.scope = "col";
    if (sort.key === key) cell.setAttribute("aria-sort", sort.descending ? "descending" : "ascending");
    const button = make("button", label);
    button.addEventListener("click", () => {
      sort = { key, descending: sort.key === key && !sort.descending };
      renderTable();
    });
    cell.append(button);
    header.append(cell);
  }
  $("table").querySelector("thead").replaceChildren(header);
  renderRows();
}

function renderRows() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const architecture = $("architecture").value, state = $("run-state").value;
  let rows = data.runs.filter((run) =>
    (architecture === "" || run.architecture === architecture) && (state === "" || run.state === state) &&
    words.every((word) => run.text.includes(word)));
  if (sort.key) {
    const sign = sort.descending ? -1 : 1;
    rows = [...rows].sort((a, b) => {
      const x = a[sort.key], y = b[sort.key];
      if (x === y) return 0;
      if (x === null) return 1;  // what there is not goes last, whichever way the rest goes
      if (y === null) return -1;
      return sign * (typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true }));
    });
  }
  $("count").textContent = `${rows.length} of ${data.runs.length} runs`;
  waiting = rows;
  $("table").querySelector("tbody").replaceChildren();
  moreRows();
}

// Rows are made as the reader scrolls towards them.
let waiting = [];
function moreRows() {
  $("table").querySelector("tbody").append(...waiting.splice(0, 60).map((run) => {
    const row = make("tr", null, run.state === "failed" ? "failed" : "");
    if (run.id === $("left").value) row.classList.add("left");
    if (run.id === $("right").value) row.classList.add("right");
    for (const [key, , form] of COLUMNS) {
      const cell = make("td", key === "name" ? null : written(run[key], form), form === "text" ? "text" : "");
      if (key === "name") {
        const button = make("button", run.name);
        button.title = "Compare: the first run picked goes left, the next one right";
        button.addEventListener("click", () => pick(run.id));
        cell.append(button);
      }
      if (key === "state" && run.reason) cell.title = run.reason;
      row.append(cell);
    }
    return row;
  }));
}

let nextSide = "left";
function pick(id) {
  $(nextSide).value = id;
  nextSide = nextSide === "left" ? "right" : "left";
  renderCompare();
  renderRows();
}

function setting(run, key) {
  return key in run.settings ? run.settings[key] : data.common[key];
}

function renderCompare() {
  const [left, right] = ["left", "right"].map((side) => data.runs.find((run) => run.id === $(side).value));
  const head = make("tr");
  head.append(make("th", "setting"), make("th", left.name), make("th", right.name), make("th", "most runs"));
  $("settings").querySelector("thead").replaceChildren(head);
  const keys = [...new Set([...Object.keys(left.settings), ...Object.keys(right.settings)])].sort();
  const rows = keys.map((key) => {
    const row = make("tr");
    row.append(make("td", key), ...[setting(left, key), setting(right, key), data.common[key]].map((v) => make("td", v === undefined ? "–" : v)));
    return row;
  });
  if (!rows.length) {
    const row = make("tr"), cell = make("td", "Both have the settings that most runs have.");
    cell.colSpan = 4;
    row.append(cell);
    rows.push(row);
  }
  $("settings").querySelector("tbody").replaceChildren(...rows);

  const which = $("sample-step").value;
  const pairs = [];
  const count = Math.max(left.samples[which].length, right.samples[which].length);
  for (let i = 0; i < count; i++) {
    const pair = make("div", null, "pair");
    pair.append(sample(left, left.samples[which][i], "left"), sample(right, right.samples[which][i], "right"));
    pairs.push(pair);
  }
  if (!pairs.length) pairs.push(make("p", "Neither run has sample rollouts yet.", "caption"));
  $("samples").replaceChildren(...pairs);
}

function sample(run, shown, side) {
  const card = make("div", null, "sample " + side);
  card.append(make("strong", run.name));
  if (!shown) { card.append(make("p", "no sample", "caption")); return card; }
  const verdict = (shown.reward === 1 ? "right" : `reward ${written(shown.reward, 2)}`) + (shown.truncated ? ", truncated" : "");
  card.append(make("span", ` · step ${shown.step} · `), make("span", verdict, shown.reward === 1 ? "right-answer" : "wrong-answer"));
  const list = make("dl");
  for (const part of ["prompt", "completion", "answer"]) {
    const value = make("dd");
    value.append(make("pre", shown[part]));
    list.append(make("dt", part === "answer" ? "right answer" : part), value);
  }
  card.append(list);
  return card;
}

function render() {
  renderVerdict();
  const all = [["", "all"]];
  const values = (key) => [...new Set(data.runs.map((run) => run[key]))].sort().map((v) => [v, v]);
  fill($("architecture"), all.concat(values("architecture")), $("architecture").value);
  fill($("run-state"), all.concat(values("state")), $("run-state").value);
  const names = data.runs.map((run) => [run.id, run.name]);
  const [left, right] = [$("left").value, $("right").value];
  fill($("left"), names, left || data.pair[0]);
  fill($("right"), names, right || data.pair[1]);
  renderFigures();
  renderTable();
  renderCompare();
}

$("table").parentElement.addEventListener("scroll", (event) => {
  const box = event.target;
  if (box.scrollTop + 2 * box.clientHeight > box.scrollHeight) moreRows();
});
for (const id of ["filter", "architecture", "run-state"]) $(id).addEventListener("input", renderRows);
for (const id of ["left", "right", "sample-step"]) $(id).addEventListener("change", () => { renderCompare(); renderRows(); });
render();

// Served live, the page asks for news and draws itself again when there are some.
if (data.live_s) {
  setInterval(async () => {
    try {
      const answer = await fetch("data?stamp=" + encodeURIComponent(data.stamp));
      if (answer.status === 200) { data = await answer.json(); render(); }
    } catch { $("state").textContent = "rlscale report --live has ended; this is its last page."; }
  }, 1000 * data.live_s);
}
