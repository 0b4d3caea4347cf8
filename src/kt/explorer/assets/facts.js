// The table of facts: sorted, filtered, moved through by arrow keys. Failures stand first.

import { count, find, focused, h, number, percent, rank } from "./dom.js";
import { get, set } from "./state.js";
import { saveCsv } from "./save.js";

const STATES = [["✗", "failed"], ["!", "side effects"], ["✓", "holds"], ["·", "not edited"]];
const MOST = 300;
const SHOWS = [["", "all facts"], ["0", "failed"], ["1", "side effects"], ["2", "holds"], ["edited", "edited"], ["traced", "traced"], ["probed", "probed"]];

let data, body, note, head, all, list;
let visible = [];
let whole = false;

/** The fact that is shown: its place, or -1 for all together. */
export function chosenFact() {
  const given = get("fact");
  if (given === "all") return -1;
  const index = Number(given);
  return given !== "" && data.facts[index] ? index : data.first;
}

function value(fact, key) {
  if (key === "rank") return fact.rank?.[1];
  if (key === "residual") return fact.residual;
  return fact.scores[key]?.[1];
}

function shown(fact, key) {
  if (key === "rank") return rank(value(fact, key));
  return key === "residual" ? number(fact.residual, 2) : percent(value(fact, key));
}

function matches(fact) {
  const show = get("show"), sought = get("find").toLocaleLowerCase().trim();
  if (show && !(fact.was.includes(show) || String(fact.state) === show)) return false;
  const text = [fact.prompt, fact.old, fact.new, fact.id, fact.relation, STATES[fact.state][1]].join("\n").toLocaleLowerCase();
  return sought.split(/\s+/).every((word) => text.includes(word));
}

function sorted(indices) {
  const key = get("sort").replace(/^-/, ""), sign = get("sort").startsWith("-") ? -1 : 1;
  if (!key) return indices;
  const of = (index) => key === "fact" ? data.facts[index].prompt : key === "state" ? data.facts[index].state : value(data.facts[index], key);
  return [...indices].sort((a, b) => {
    const [x, y] = [of(a), of(b)];
    if (x === y) return a - b;
    if (x === null || x === undefined) return 1; // what was not measured stands last either way
    if (y === null || y === undefined) return -1;
    return sign * (x < y ? -1 : 1);
  });
}

function heading(key, name, help) {
  const now = get("sort"), by = now.replace(/^-/, "") === key ? (now.startsWith("-") ? "descending" : "ascending") : null;
  const next = by === "ascending" ? "-" + key : by === "descending" ? "" : key;
  const arrow = by === "ascending" ? " ↑" : by === "descending" ? " ↓" : "";
  return h("th", { role: "columnheader", scope: "col", "aria-sort": by ?? "none", class: key === "fact" || key === "state" ? null : "number" },
    h("button", { type: "button", title: help, "aria-label": name ? null : help, onclick: () => set({ sort: next }) }, name + arrow));
}

function row(index) {
  const fact = data.facts[index], on = index === chosenFact();
  const [sign, word] = STATES[fact.state];
  const answers = fact.new === null ? [fact.old ?? ""] : [h("span", { class: "x-old" }, fact.old ?? "?"), " → ", h("span", { class: "x-new" }, fact.new)];
  return h("tr", { role: "row", tabindex: on ? 0 : -1, "aria-selected": String(on), "data-fact": index, title: fact.problems.join("; ") || null },
    h("td", { role: "gridcell", class: `x-state x-state-${fact.state}` }, h("span", { role: "img", "aria-label": word, title: word }, sign)),
    h("td", { role: "gridcell", class: "x-fact" }, h("span", { class: "x-prompt" }, fact.prompt), h("span", { class: "x-answers" }, answers)),
    data.columns.map(({ key }) => {
      const bad = key !== "residual" && (key === "rank" ? value(fact, key) > 0 : value(fact, key) < 1);
      return h("td", { role: "gridcell", class: "number" + (bad ? " x-bad" : "") }, shown(fact, key));
    }));
}

/** A column's mean over the facts that have it, and how many those are. What is left of an old answer's lead is, as in its
 *  score, a share of all the leads together. */
function mean(key) {
  if (key === "residual") {
    const leads = data.facts.map((fact) => fact.lead).filter(Boolean);
    const [before, after] = [0, 1].map((state) => leads.reduce((sum, lead) => sum + lead[state], 0));
    return { n: leads.length, mean: before > 0 ? after / before : null };
  }
  const known = data.facts.map((fact) => value(fact, key)).filter((each) => each !== null && each !== undefined);
  return { n: known.length, mean: known.length ? known.reduce((a, b) => a + b, 0) / known.length : null };
}

function everything() {
  const on = chosenFact() === -1;
  return h("tr", { role: "row", tabindex: on ? 0 : -1, "aria-selected": String(on), "data-fact": -1, class: "x-all" },
    h("td", { role: "gridcell", class: "x-state" }, h("span", { role: "img", "aria-label": "mean" }, "x̄")),
    h("td", { role: "gridcell", class: "x-fact" }, data.facts.length === 1 ? "Mean over 1 fact" : `All ${data.facts.length} facts together`,
      data.columns.length && data.facts.length > 1 ? h("span", { class: "x-over" }, "means over n facts") : null),
    data.columns.map(({ key }) => {
      const all = mean(key), shown = key === "residual" || key === "rank" ? number(all.mean, key === "rank" ? 1 : 2) : percent(all.mean);
      return h("td", { role: "gridcell", class: "number" }, shown, h("span", { class: "x-over" }, `n = ${all.n}`));
    }));
}

function draw() {
  const inside = body.contains(focused());
  visible = sorted(data.facts.map((_, index) => index).filter((index) => matches(data.facts[index])));
  const rows = whole ? visible : visible.slice(0, MOST);
  head.replaceChildren(h("tr", { role: "row" }, heading("state", "", "Failures first"), heading("fact", "fact", "By prompt"), data.columns.map(({ key, name, help }) => heading(key, name, help))));
  body.replaceChildren(everything(), ...rows.map(row));
  if (!body.querySelector("[tabindex='0']")) body.firstChild.tabIndex = 0;
  const hidden = visible.length - rows.length;
  all.hidden = !hidden;
  all.textContent = `Show ${hidden} more`;
  note.textContent = visible.length === data.facts.length ? data.about : `${visible.length} of ${count(data.facts.length, "fact")}`;
  fit();
  if (inside) body.querySelector("[tabindex='0']").focus();
  const chosen = body.querySelector("[aria-selected='true']");
  if (chosen && (chosen.offsetTop < list.scrollTop + head.offsetHeight || chosen.offsetTop + chosen.offsetHeight > list.scrollTop + list.clientHeight))
    list.scrollTop = chosen.offsetTop - list.clientHeight / 3;
}

/** Where the columns do not fit, a fact is two lines or more: its prompt, then all its numbers. */
function fit() {
  list.classList.remove("x-stacked");
  list.classList.toggle("x-stacked", list.scrollWidth > list.clientWidth);
}

function move(event) {
  const rows = [...body.children], at = rows.indexOf(event.target.closest("tr"));
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1, PageDown: at + 10, PageUp: at - 10 }[event.key];
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    find(".x-map svg[role=grid]")?.focus();
  } else if (to !== undefined) {
    event.preventDefault();
    const next = rows[Math.min(rows.length - 1, Math.max(0, to))];
    next.focus();
    choose(next);
  }
}

function choose(line) {
  set({ fact: line.dataset.fact === "-1" ? "all" : line.dataset.fact, cell: "" });
}

/** The place of the next (or previous) fact of the list as it stands. */
export function step(by) {
  const order = [-1, ...visible], at = order.indexOf(chosenFact());
  const next = order[Math.min(order.length - 1, Math.max(0, at + by))];
  set({ fact: next === -1 ? "all" : next, cell: "" });
}

/** Numbers as CSV: every fact, before and after. */
function csv() {
  const columns = ["id", "prompt", "old", "new", "state", ...data.columns.flatMap(({ key }) => key === "residual" ? [key] : [`${key} before`, `${key} after`])];
  const rows = visible.map((index) => {
    const fact = data.facts[index];
    const pair = (key) => key === "residual" ? [fact.residual] : (key === "rank" ? fact.rank : fact.scores[key]) ?? [null, null];
    return [fact.id, fact.prompt, fact.old, fact.new, STATES[fact.state][1], ...data.columns.flatMap(({ key }) => pair(key))];
  });
  return { columns, rows };
}

export function factsPanel(given) {
  data = given;
  head = h("thead", {});
  body = h("tbody", { onkeydown: move, onclick: (event) => event.target.closest("tr") && choose(event.target.closest("tr")) });
  note = h("p", { class: "x-note", role: "status" });
  all = h("button", { type: "button", class: "x-more", onclick: () => ((whole = true), draw()) });
  const filter = h("input", { type: "search", placeholder: "Filter facts  /", "aria-label": "Filter facts", value: get("find"), oninput: () => set({ find: filter.value }) });
  const counts = ([key]) => !key || data.facts.some((fact) => fact.was.includes(key) || String(fact.state) === key);
  const show = h("select", { "aria-label": "Which facts", onchange: () => set({ show: show.value }) },
    SHOWS.filter(counts).map(([key, text]) => h("option", { value: key, selected: get("show") === key }, text)));
  filter.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === "ArrowDown") {
      event.preventDefault();
      body.querySelector("[tabindex='0']").focus();
    }
  });
  list = h("div", { class: "x-scroll x-list" }, h("table", { role: "grid", "aria-label": "Facts, one a row" }, head, body), all);
  const meanings = data.columns.length ? h("details", { class: "x-table" }, h("summary", {}, "What the columns say"),
    h("dl", { class: "x-pairs" }, data.columns.map(({ name, help }) => [h("dt", {}, name), h("dd", {}, help)]))) : null;
  const panel = h("section", { class: "x-facts", "aria-label": "Facts" },
    h("div", { class: "x-bar" }, filter, show, h("button", { type: "button", onclick: () => saveCsv("facts", csv()), "aria-label": "Facts as CSV" }, "CSV")),
    list, note, meanings);
  return { panel, draw, fit, filter, sync: () => ((filter.value = get("find")), (show.value = get("show"))) };
}
