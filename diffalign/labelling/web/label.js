"use strict";
// Start, judging and results. A vote is sent until the server has it: it survives a reload and a server that is away.

const by = (id) => document.getElementById(id);
const RETRY_MS = 1000;
const KEYS = {
  1: "left", ArrowLeft: "left",
  2: "right", ArrowRight: "right",
  3: "tie", 0: "tie", t: "tie", ArrowDown: "tie",
  s: "skip", u: "undo", Backspace: "undo",
}; // prettier-ignore
let annotator = null;
let state = null;
let busy = true; // a vote is on its way, or the images are not there yet

const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

function trouble(text) {
  by("trouble").hidden = !text;
  by("trouble").textContent = text || "";
}

// The answer to a request; asks again while the server is away. Throws where the server says no.
async function ask(path, body) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  for (;;) {
    let response;
    try {
      response = await fetch(path, options);
    } catch {
      trouble(`The server does not answer. ${body ? "Your vote is kept here and sent again." : "Trying again."}`);
      await wait(RETRY_MS);
      continue;
    }
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    trouble("");
    return answer;
  }
}

// --- judging --------------------------------------------------------------------------------------------------------

const api = (what = "") => `/api/label/${encodeURIComponent(annotator)}${what}`;
const pendingKey = () => `diffalign-pending-${annotator}`;

async function send(pending) {
  busy = true;
  remember(pendingKey(), JSON.stringify(pending));
  try {
    state = await ask(api(pending.choice === "undo" ? "/undo" : "/vote"), pending);
    remember(pendingKey(), null);
  } catch (error) {
    remember(pendingKey(), null);
    state = await ask(api());
    trouble(`That vote does not count: ${error.message}`);
  }
  showItem();
}

function choose(choice) {
  if (busy) return;
  if (choice === "undo") {
    if (state.undo) send({ item: state.undo, choice });
    return;
  }
  if (!state.item) return;
  for (const side of document.querySelectorAll(".side")) {
    side.classList.toggle("chosen", choice === "tie" || side.dataset.choice === choice);
  }
  send({ item: state.item.id, choice });
}

function showItem() {
  const { item } = state;
  by("judge").hidden = !item;
  by("done").hidden = Boolean(item);
  by("progress").max = state.total;
  by("progress").value = state.done;
  by("count").textContent = `${state.done} of ${state.total} · ${annotator}`;
  by("undo").disabled = by("undo-last").disabled = !state.undo;
  if (!item) {
    busy = false;
    return;
  }
  by("prompt").textContent = item.prompt || "(no prompt)";
  let missing = 2;
  const loaded = () => (missing -= 1) === 0 && (busy = false);
  for (const side of document.querySelectorAll(".side")) {
    const image = picture({ alt: `${side.dataset.choice} image`, draggable: false });
    image.addEventListener("load", loaded);
    image.addEventListener("error", () => {
      trouble("An image cannot be shown. Skip this pair, or start the server again.");
      loaded();
    });
    image.src = item[side.dataset.choice];
    side.classList.remove("chosen");
    side.replaceChildren(image);
  }
  if (state.next) for (const side of ["left", "right"]) new Image().src = state.next[side];
}

async function startJudging() {
  by("progress").hidden = false;
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.metaKey || event.altKey) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const choice = event.ctrlKey ? key === "z" && "undo" : KEYS[key];
    if (!choice) return;
    event.preventDefault();
    choose(choice);
  });
  for (const button of document.querySelectorAll("[data-choice]")) {
    button.addEventListener("click", () => choose(button.dataset.choice));
  }
  for (const id of ["undo", "undo-last"]) by(id).addEventListener("click", () => choose("undo"));
  const pending = remember(pendingKey());
  if (pending) await send(JSON.parse(pending));
  else {
    state = await ask(api());
    showItem();
  }
}

// --- start and results ----------------------------------------------------------------------------------------------

// Columns of numbers stand to the right.
function table(heads, rows) {
  const cell = (tag, value, column) => {
    const first = rows[0][column];
    const className = typeof first === "number" ? "number" : first.className === "interval" ? "graph" : "";
    return element(tag, { className }, value instanceof Node ? value : String(value));
  };
  const line = (tag, values) => element("tr", {}, ...values.map((value, column) => cell(tag, value, column)));
  const body = element("tbody", {}, ...rows.map((row) => line("td", row)));
  return element("table", {}, element("thead", {}, line("th", heads)), body);
}

async function showStart() {
  const start = await ask("/api/start");
  by("start").hidden = false;
  by("count").textContent = `${start.total} pairs`;
  if (start.annotators.length) {
    const rows = start.annotators.map(({ name, done, total }) => [
      element("a", { href: `/label/${encodeURIComponent(name)}`, textContent: name }),
      `${done} of ${total}`,
    ]);
    by("annotators").replaceChildren(table(["Go on as", "Votes"], rows));
  }
  by("who").addEventListener("submit", (event) => {
    event.preventDefault();
    const name = by("name").value.trim();
    if (name) location.href = `/label/${encodeURIComponent(name)}`;
  });
  by("name").focus();
}

const percent = (share) => `${(100 * share).toFixed(0)} %`;

function interval({ rate, low, high }) {
  const box = element("div", { className: "interval", title: `${percent(low)} to ${percent(high)}` });
  const line = element("i");
  line.style.left = `${100 * low}%`;
  line.style.width = `${100 * (high - low)}%`;
  const dot = element("b");
  dot.style.left = `${100 * rate}%`;
  box.append(line, dot);
  return box;
}

const rated = (name, row) => [
  name,
  percent(row.rate),
  interval(row),
  `${percent(row.low)} to ${percent(row.high)}`,
  row.n,
];

async function showResults() {
  const results = await ask("/api/results");
  const box = by("results");
  box.hidden = false;
  box.replaceChildren(element("h1", { textContent: "What the votes say" }));
  const part = (title, heads, rows) => {
    if (rows.length) box.append(element("h2", { textContent: title }), table(heads, rows));
  };
  const heads = ["", "share", "", "95 % interval", "pairs"];
  const counts = Object.entries(results.counts);
  part("People prefer", heads, results.win_rates.map((row) => rated(`${row.model} to ${row.against}`, row)));
  const own = results.by_annotator.map((row) => rated(`${row.annotator}: ${row.model} to ${row.against}`, row));
  part("Each annotator prefers", heads, own);
  part("Rewards agree with people", heads, Object.entries(results.agreement).map((entry) => rated(...entry)));
  const between = results.between.map((row) => [row.annotators.join(" and "), percent(row.share), row.n]);
  part("People agree with each other", ["", "share", "pairs"], between);
  const kinds = ([name, kinds]) => [name, kinds.first + kinds.second, kinds.tie, kinds.skip];
  part("Votes", ["", "choices", "ties", "skipped"], counts.map(kinds));
  if (!counts.length) box.append(element("p", { textContent: "No votes yet." }));
}

function open() {
  setUpTheme(by("theme"));
  const [, place, name] = location.pathname.split("/");
  if (place === "label") {
    annotator = decodeURIComponent(name);
    return startJudging();
  }
  return place === "results" ? showResults() : showStart();
}

open().catch((error) => trouble(error.message));
