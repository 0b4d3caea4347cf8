// Below: texts before and after, neighbours that changed, the weights, the curve of a sweep, and what is not there.

import { count, h, number, palette } from "./dom.js";
import { bars, key, lines } from "./chart.js";
import { figure } from "./figure.js";
import { chosenFact } from "./facts.js";

const ROLES = { edit: "prompt", paraphrase: "rephrased", portability: "follows from it", generation: "free text" };
const LINES = ["#3b7fc4", "#d1731a", "#8b6fc9", "#2a9d78", "#c2558a"];
const DASHES = [null, "6 4", "2 3", "8 3 2 3", "10 4"];

function compared(items, what, answer) {
  const after = items.some((item) => item.after !== null);
  const text = (value, other) => h("td", { role: "cell", class: value !== null && other !== null && value !== other ? "x-changed" : null }, value ?? "–");
  return h("div", { class: "x-scroll", tabindex: 0, role: "region", "aria-label": what }, h("table", { class: "x-texts", role: "table" }, // roles: a narrow page lays the rows out as grids
    h("caption", { class: "x-hidden" }, what),
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, ["prompt", answer, ...(after ? ["before", "after"] : ["text"])].map((name) => h("th", { scope: "col", role: "columnheader" }, name)))),
    h("tbody", { role: "rowgroup" }, items.map((item) => h("tr", { role: "row" },
      h("td", { role: "cell" }, item.prompt, item.role in ROLES ? h("span", { class: "x-role" }, ROLES[item.role]) : item.changed ? h("span", { class: "x-role x-bad" }, "next token changed") : item.rewritten ? h("span", { class: "x-role" }, "later text changed") : null),
      h("td", { role: "cell" }, item.answer ?? "–"), text(item.before, null), after ? text(item.after, item.before) : null)))));
}

function card(title, note, ...children) {
  return h("section", { class: "x-card" }, h("h3", {}, title), note ? h("p", { class: "x-note" }, note) : null, children);
}

function texts(fact) {
  if (!fact?.texts.length) return null;
  return card("Texts before and after", null, compared(fact.texts, "Texts before and after", "expected"));
}

function neighbours(fact) {
  if (!fact?.near.length) return null;
  const moved = fact.near.filter((item) => item.changed || item.rewritten), rest = fact.near.filter((item) => !moved.includes(item));
  const next = fact.near.filter((item) => item.changed).length;
  const later = moved.length - next, go = (n, one, more) => `${n} ${n === 1 ? one : more}`;
  const says = [next && `${next} of ${fact.near.length} ${next === 1 ? "gives" : "give"} another next token.`, later && `${go(later, "goes", "go")} on differently later.`].filter(Boolean).join(" ") || "None changed.";
  return card("Neighbours", says,
    moved.length ? compared(moved, "Neighbours that changed", "own answer") : null,
    rest.length ? h("details", { class: "x-table" }, h("summary", {}, count(rest.length, "neighbour") + " as before"), compared(rest, "Neighbours as before", "own answer")) : null);
}

function weights(data, width) {
  const c = palette();
  return data.edits.map((edit, i) => {
    const given = edit.weights.map((weight) => ({ name: weight.short, value: weight.relative, colour: c.accent }));
    return h("section", { class: "x-card" }, figure({
      name: `weights-${i + 1}`, title: "Size of the update, ‖ΔW‖/‖W‖", note: `${edit.name}${edit.alpha === null ? "" : `, α ${number(edit.alpha)}`}`,
      svg: bars({ bars: given, width, aria: `Relative size of the update of ${count(given.length, "weight")}`, shown: (value) => number(value) }),
      table: () => ({ columns: ["weight", "shape", "rank", "norm", "relative", "new / old norm"], rows: edit.weights.map((w) => [w.name, w.shape, w.rank, w.norm, w.relative, w.ratio]) }),
    }));
  });
}

function sweeps(data, width) {
  return data.sweeps.map((sweep, i) => {
    const colours = LINES, first = sweep.series[0];
    const named = sweep.named, xs = first.points.map((point, place) => (named ? place : point.x));
    const panels = sweep.panels.filter((panel) => !panel.open);
    const given = panels.map((panel, p) => ({
      name: panel.name, colour: colours[p % colours.length], dash: DASHES[p % DASHES.length],
      values: first.points.map((point) => point.metrics[panel.name]?.[0] ?? null), low: first.points.map((point) => point.metrics[panel.name]?.[1] ?? null), high: first.points.map((point) => point.metrics[panel.name]?.[2] ?? null),
    }));
    const rows = sweep.series.flatMap((series) => series.points.flatMap((point) => sweep.panels.map((panel) => [series.name, point.label, panel.name, ...(point.metrics[panel.name] ?? [null, null, null, null])])));
    return h("section", { class: "x-card" }, figure({
      name: `sweep-${i + 1}`, title: `Success by ${sweep.x}`, note: `${first.name}; ${count(sweep.facts, "fact")}; bands are 95% intervals` + (sweep.traced ? `; traced α ${number(sweep.traced[0])} marked` : ""),
      svg: lines({ lines: given, xs, names: named ? first.points.map((point) => point.label) : null, width, low: 0, high: 1, xTitle: sweep.x, at: sweep.traced ? sweep.traced[0] : null, band: sweep.traced?.[1] != null ? sweep.traced.slice(1) : null, aria: `Success by ${sweep.x}: ${given.map((line) => line.name).join(", ")}` }),
      legend: h("ul", { class: "x-key" }, given.map((line) => h("li", {}, key([line])[0], line.name))),
      table: () => ({ columns: ["method", sweep.x, "metric", "mean", "low", "high", "n"], rows }),
    }));
  });
}

function missing(data) {
  if (!data.missing.length) return null;
  return card("Not in these runs", null, h("ul", { class: "x-missing" },
    data.missing.map(({ what, command }) => h("li", {}, h("span", {}, what), command ? h("code", { tabindex: 0 }, command) : null))));
}

export function belowPanel(data) {
  const panel = h("div", { class: "x-below" });
  const draw = () => {
    const fact = data.facts[chosenFact()];
    const column = panel.clientWidth > 900 ? panel.clientWidth / 2 - 8 : panel.clientWidth || 640;
    const width = Math.min(640, Math.max(280, column - 34));
    const columns = [[texts(fact), weights(data, width)], [neighbours(fact), sweeps(data, width), missing(data)]];
    panel.replaceChildren(...columns.map((cards) => h("div", { class: "x-column" }, cards)));
  };
  return { panel, draw };
}
