"use strict";
// The grid: rows of the data that the page carries, filtered, sorted, and one pair of images at a time in large.

const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const TIE = 1e-6;
const state = { search: "", category: "", scorer: 0, sort: "given", model: 1, blind: false };
const salt = String(Math.random());
let shown = [];
let large = null; // { row, left, right }: indices of a shown row and of two models

const scoreOf = (row, model) => row.cells[model]?.scores[state.scorer] ?? null;

// Of a model over the one that it is compared with; null where one has no score, or it is compared with none.
function gain(row, model) {
  const { against } = data.models[model];
  const [own, other] = [scoreOf(row, model), scoreOf(row, against)];
  return against === model || own === null || other === null ? null : own - other;
}

const margin = (row) => gain(row, state.model);

function winners(row) {
  const scores = row.cells.map((_, model) => scoreOf(row, model));
  const known = scores.filter((score) => score !== null);
  const best = Math.max(...known);
  if (known.length < 2 || best - Math.min(...known) <= TIE) return new Set();
  return new Set(scores.flatMap((score, model) => (score !== null && best - score <= TIE ? [model] : [])));
}

// Equal for a row as long as the page is open, so that nothing moves while one looks.
function hash(text) {
  let value = 2166136261;
  for (const letter of text) value = Math.imul(value ^ letter.codePointAt(0), 16777619);
  value = Math.imul(value ^ (value >>> 15), 2246822507);
  return (value ^ (value >>> 13)) >>> 0;
}

function order(row) {
  const models = data.models.map((_, model) => model);
  if (!state.blind) return models;
  const key = (model) => hash(`${salt} ${data.rows.indexOf(row)} ${model}`);
  return models.sort((a, b) => key(a) - key(b));
}

const nameOf = (row, model) =>
  state.blind ? String.fromCodePoint(65 + order(row).indexOf(model)) : data.models[model].name;

// The scores by the scorers that are not chosen.
function others(row, model) {
  const scores = row.cells[model]?.scores ?? [];
  const texts = data.scorers.flatMap(({ name, decimals }, index) =>
    index === state.scorer ? [] : [`${name} ${scores[index]?.toFixed(decimals) ?? "none"}`],
  );
  return element("span", { className: "others muted", textContent: texts.join(" · ") });
}

function caption(row, model) {
  const parts = [element("span", { className: "name", textContent: nameOf(row, model) })];
  const score = scoreOf(row, model);
  if (data.scorers.length && !state.blind) {
    const decimals = data.scorers[state.scorer].decimals;
    const text = score === null ? "no score" : score.toFixed(decimals);
    parts.push(element("span", { className: "score", textContent: text }));
    const change = gain(row, model);
    if (change !== null) {
      const direction = Math.abs(change) <= TIE ? "muted" : change > 0 ? "up" : "down";
      const sign = change < 0 ? "−" : "+";
      parts.push(element("span", { className: direction, textContent: sign + Math.abs(change).toFixed(decimals) }));
    }
  }
  if (data.scorers.length > 1 && !state.blind) parts.push(others(row, model));
  return element("figcaption", {}, ...parts);
}

function figure(row, model, best) {
  const cell = row.cells[model];
  const box = element("figure", { className: best.has(model) && !state.blind ? "winner" : "" });
  box.dataset.model = model;
  if (!cell) {
    box.append(element("div", { className: "empty muted", textContent: "no image" }));
  } else {
    const button = element("button", { type: "button", className: "open" });
    button.setAttribute("aria-label", `Enlarge ${nameOf(row, model)}: ${row.prompt}`);
    button.append(picture({ src: cell.src, alt: "", loading: "lazy", decoding: "async" }));
    if (cell.width) button.style.setProperty("--shape", cell.width / cell.height);
    button.addEventListener("click", () => open(shown.indexOf(row), model));
    box.append(button);
  }
  box.append(caption(row, model));
  return box;
}

function section(row) {
  const best = winners(row);
  const header = element("header", {}, element("p", { className: "prompt", textContent: row.prompt }));
  const note = [row.note, row.category].filter(Boolean).join(" · ");
  if (note) header.append(element("span", { className: "muted", textContent: note }));
  return element("article", { className: "row" }, header, ...order(row).map((model) => figure(row, model, best)));
}

const fits = (row) =>
  (!state.category || row.category === state.category) &&
  state.search.split(/\s+/).every((word) => row.prompt.toLowerCase().includes(word));

function sorted(rows) {
  const value = {
    gain: (row) => -margin(row),
    loss: (row) => margin(row),
    close: (row) => Math.abs(margin(row)),
  }[state.blind ? "given" : state.sort];
  if (!value) return rows;
  const known = (row) => (margin(row) === null ? 1 : 0);
  return [...rows].sort((a, b) => known(a) - known(b) || value(a) - value(b));
}

function show() {
  document.body.classList.toggle("blind", state.blind);
  shown = sorted(data.rows.filter(fits));
  by("rows").replaceChildren(...shown.map(section));
  by("none").hidden = shown.length > 0;
  by("count").textContent =
    shown.length === data.rows.length ? `${shown.length} rows` : `${shown.length} of ${data.rows.length} rows`;
  for (const id of ["scorer", "sort", "model"]) by(id).disabled = state.blind;
  by("blind").setAttribute("aria-pressed", String(state.blind));
}

// --- in large -------------------------------------------------------------------------------------------------------

const drawn = (row) => order(row).filter((model) => row.cells[model]);

function open(index, model) {
  const row = shown[index];
  const rest = drawn(row).filter((other) => other !== model);
  // Against the model that it is compared with; the first, which is compared with none, against the best of the others.
  const best = rest.toSorted((a, b) => (scoreOf(row, b) ?? -Infinity) - (scoreOf(row, a) ?? -Infinity))[0];
  const { against } = data.models[model];
  const rival = state.blind ? rest[0] : rest.includes(against) ? against : best;
  const sides = [model, rival].filter((side) => side !== undefined);
  sides.sort((a, b) => order(row).indexOf(a) - order(row).indexOf(b));
  large = { row: index, model, sides };
  showLarge();
  if (!by("large").open) by("large").showModal();
}

function showLarge() {
  const row = shown[large.row];
  const best = winners(row);
  by("large-prompt").textContent = row.prompt;
  by("sides").replaceChildren(
    ...large.sides.map((model) => {
      const box = element("figure", { className: best.has(model) && !state.blind ? "winner" : "" });
      box.dataset.model = model;
      box.append(picture({ src: row.cells[model].src, alt: nameOf(row, model) }), caption(row, model));
      return box;
    }),
  );
  by("previous").disabled = large.row === 0;
  by("next").disabled = large.row === shown.length - 1;
  by("rival").hidden = drawn(row).length < 3;
}

function turn(step) {
  const row = shown[large.row + step];
  if (!row) return;
  const place = large.model;
  const there = drawn(row);
  if (large.sides.every((model) => there.includes(model))) {
    large = { ...large, row: large.row + step };
    large.sides = large.sides.toSorted((a, b) => order(row).indexOf(a) - order(row).indexOf(b));
    showLarge();
  } else if (there.length) {
    open(large.row + step, there.includes(place) ? place : there[0]);
  }
}

function changeRival(step) {
  const row = shown[large.row];
  const rest = drawn(row).filter((model) => model !== large.model);
  if (rest.length < 2) return;
  const now = rest.findIndex((model) => large.sides.includes(model));
  const next = rest[(now + step + rest.length) % rest.length];
  large.sides = [large.model, next].sort((a, b) => order(row).indexOf(a) - order(row).indexOf(b));
  showLarge();
}

// --- controls -------------------------------------------------------------------------------------------------------

function fill(select, texts, hidden) {
  select.replaceChildren(...texts.map(([value, textContent]) => element("option", { value, textContent })));
  select.hidden = hidden;
}

async function copy() {
  const text = data.command;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Not allowed here: the command is shown and selected, one key away from being copied.
    by("how").open = true;
    getSelection().selectAllChildren(by("command"));
    if (!document.execCommand("copy")) {
      by("copy").textContent = "Selected below";
      return;
    }
  }
  by("copy").textContent = "Copied";
  setTimeout(() => (by("copy").textContent = "Copy command"), 1500);
}

function setUp() {
  document.body.style.setProperty("--columns", data.models.length);
  const heads = data.models.map((model) =>
    element(
      "div",
      {},
      element("strong", { textContent: model.name }),
      element("div", { className: "muted", textContent: model.note }),
    ),
  );
  by("models").replaceChildren(element("div"), ...heads);
  const categories = [...new Set(data.rows.map((row) => row.category).filter(Boolean))].sort();
  fill(by("category"), [["", "All categories"], ...categories.map((name) => [name, name])], !categories.length);
  fill(by("scorer"), data.scorers.map((scorer, index) => [index, scorer.name]), data.scorers.length < 2);
  const rivals = data.models.flatMap((model, index) => (model.against === index ? [] : [[index, `of ${model.name}`]]));
  if (rivals.length) state.model = rivals[0][0];
  fill(by("model"), rivals, rivals.length < 2 || !data.scorers.length);
  by("sort").hidden = !data.scorers.length || !rivals.length;
  by("blind").hidden = data.models.length < 2;
  by("command").textContent = data.command;
  by("copy").hidden = by("how").hidden = !data.command;
  for (const id of ["category", "sort"]) by(id).addEventListener("change", () => ((state[id] = by(id).value), show()));
  for (const id of ["scorer", "model"]) {
    by(id).addEventListener("change", () => ((state[id] = Number(by(id).value)), show()));
  }
  by("search").addEventListener("input", () => ((state.search = by("search").value.toLowerCase().trim()), show()));
  by("blind").addEventListener("click", () => ((state.blind = !state.blind), show()));
  by("copy").addEventListener("click", copy);
  by("close").addEventListener("click", () => by("large").close());
  by("previous").addEventListener("click", () => turn(-1));
  by("next").addEventListener("click", () => turn(1));
  by("rival").addEventListener("click", () => changeRival(1));
  by("large").addEventListener("keydown", (event) => {
    const act = { ArrowLeft: [turn, -1], ArrowRight: [turn, 1], ArrowUp: [changeRival, -1], ArrowDown: [changeRival, 1] };
    if (!(event.key in act)) return;
    event.preventDefault();
    const [function_, step] = act[event.key];
    function_(step);
  });
  setUpTheme(by("theme"));
  show();
}

setUp();
