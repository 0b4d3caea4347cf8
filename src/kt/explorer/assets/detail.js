// Right: the pinned cell, and the two answers through the layers.

import { count, focused, h, number, palette, rank } from "./dom.js";
import { get, set } from "./state.js";
import { key, lines } from "./chart.js";
import { choice, figure, menu, tabled } from "./figure.js";
import { chosenFact } from "./facts.js";
import { command, pinned, strongest } from "./map.js";
import { LENS, lensOf, metric, overFacts, topsOf, view } from "./views.js";

const SITES = ["resid", "attn", "mlp"], POSITIONS = ["subject_last", "prediction"];

function pairs(list) {
  return h("dl", { class: "x-pairs" }, list.filter(Boolean).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

function cell(data, seen) {
  const pin = pinned(seen);
  const [r, l] = pin ?? strongest(seen), at = (values) => values?.[r]?.[l];
  const spread = seen.low
    ? ["95% interval", at(seen.low) === null ? "–" : `${number(at(seen.low))} to ${number(at(seen.high))} over ${count(at(seen.n), "fact")}`]
    : seen.sd && ["± SD", `${number(at(seen.sd))} over ${count(seen.trace.draws, "noise draw")}`];
  const q = at(seen.q), others = [];
  if (seen.own && seen.kind !== "heads" && !seen.difference) {
    for (const [kind, label] of Object.entries(seen.trace.kinds)) {
      const cells = seen.own.cells[kind]?.[metric(data)];
      if (kind !== "heads" && kind !== seen.kind && cells) others.push([label, number(cells.v[r][l] === null ? null : cells.v[r][l] / 10_000)]);
    }
  }
  return [
    h("p", { class: "x-pin" }, h("span", { class: "x-big" }, seen.shown(at(seen.values))), h("span", {}, `${seen.title}, layer ${seen.layers[l]}, ${seen.rowWord} “${seen.rows[r].trim()}”`)),
    h("p", { class: "x-note" }, seen.unit),
    pairs([spread, q !== null && q !== undefined && ["q (differs from 0)", number(q)], ...others.map(([label, value]) => [`${label}, same cell`, value])]),
    pin ? h("button", { type: "button", onclick: () => set({ cell: "" }) }, "Unpin") : h("p", { class: "x-note" }, "Click a cell of the map, or press Enter on it, to see that one."),
  ];
}

/** The most probable tokens of the cell, before and after the edit side by side. */
function tops(data, seen) {
  const [r, l] = pinned(seen) ?? strongest(seen), found = topsOf(data, seen, r, l), fact = data.facts[chosenFact()];
  const title = "Top tokens";
  if (found.why) {
    const how = {
      fact: () => ["Top tokens are those of one prompt: choose a fact."],
      token: () => ["Top tokens were read at the subject's last token and at the last one. For every token, in a notebook: ", h("code", {}, data.commands.widget)],
      run: () => ["These runs kept no top tokens of this fact. To read them: ", h("code", {}, command(data.commands.probe, fact))],
    }[found.why];
    return [h("h4", {}, title), h("p", { class: "x-note" }, how())];
  }
  const ranks = Math.max(...found.states.map((state) => state.tokens.length));
  const known = new Set(found.states[0].tokens.map((token) => token.text));
  const cells = (state, i) => {
    const token = state.tokens[i], fresh = state !== found.states[0] && !known.has(token.text);
    return [h("td", { class: ["x-token", fresh && "x-changed", ["x-old", "x-new"][token.answer]].filter(Boolean).join(" ") }, token.text.replace(/^ /, "·") || "–"), h("td", { class: "number" }, number(token.prob))];
  };
  const table = () => ({
    columns: ["rank", ...found.states.flatMap(({ name }) => [name, `${name}: probability`])],
    rows: Array.from({ length: ranks }, (_, i) => [i, ...found.states.flatMap(({ tokens }) => [tokens[i].text, tokens[i].prob])]),
  });
  const note = `${found.of}${found.heads ? " (all heads)" : ""}, layer ${seen.layers[l]}, read as the model's output: token and probability`;
  return tabled({ name: "top-tokens", title, note, table }, h("div", { class: "x-scroll", tabindex: 0, role: "region", "aria-label": title }, h("table", { class: "x-tops" },
    h("caption", { class: "x-hidden" }, `${title}: ${note}`),
    h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "number" }, "rank"), found.states.map(({ name }) => h("th", { scope: "colgroup", colspan: 2 }, name)))),
    h("tbody", {}, Array.from({ length: ranks }, (_, i) => h("tr", {}, h("th", { scope: "row", class: "number" }, String(i)), found.states.map((state) => cells(state, i))))))));
}

/** Old and new answer before and after, as lines. */
function curves(data, name) {
  const c = palette(), p = POSITIONS.indexOf(get("site") && get("site").split(".")[0]), k = SITES.indexOf(get("site").split(".")[1]);
  const position = p < 0 ? 1 : p, site = k < 0 ? 0 : k, states = data.lens.states;
  const found = [];
  states.forEach((state, i) => {
    for (const [answer, word] of [[0, "old"], [1, "new"]]) {
      const read = lensOf(data, i, name, answer);
      if (read) found.push({ name: `${word} answer${states.length > 1 ? ", " + state.name : ""}`, values: read[position][site], colour: answer ? c.new : c.old, dash: state.name === "after" || states.length === 1 ? null : "5 4", hollow: state.name !== "after" && states.length > 1 });
    }
  });
  return found;
}

function lensPart(data, seen, width) {
  const [position, site] = get("site") ? get("site").split(".") : ["prediction", "resid"];
  const found = curves(data, "rank");
  if (!found.length) return [h("p", { class: "x-note" }, "The answers of this fact were not followed through the layers.")];
  const pin = pinned(seen), layer = pin && seen.kind !== LENS ? seen.layers[pin[1]] : pin ? seen.layers[pin[1]] : null;
  const layers = data.lens.layers, at = layers.includes(layer) ? layer : null;
  const marks = site === "resid" ? [] : data.edited[site] ?? [];
  const chart = (name, title, more) => {
    const given = curves(data, name);
    return figure({
      name: `lens-${name}`, title, note: chosenFact() < 0 ? overFacts(name, data.lens.states) : "",
      svg: lines({ lines: given, xs: layers, width, marks, at, aria: `${title} by layer: ${given.map((line) => line.name).join(", ")}`, ...more }),
      table: () => ({ columns: ["layer", ...given.map((line) => line.name)], rows: layers.map((each, i) => [each, ...given.map((line) => line.values[i])]) }),
    });
  };
  const here = at === null ? null : h("p", { class: "x-note" }, `Layer ${at}: `, found.map((line, i) => [i ? "; " : "", `${line.name} rank ${rank(line.values[layers.indexOf(at)])}`]));
  return [
    h("div", { class: "x-bar" },
      choice("Position", [["subject_last", "subject"], ["prediction", "last token"]], position, (value) => set({ site: `${value}.${site}` })),
      menu("Where it is read", SITES.map((each) => [each, data.lens.kinds[each]]), site, (value) => set({ site: `${position}.${value}` }))),
    h("ul", { class: "x-key" }, found.map((line, i) => h("li", {}, key([line])[0], line.name))),
    chart("rank", "Rank (0 is the top)", { scale: "rank" }), chart("prob", "Probability", { low: 0 }), here];
}

export function detailPanel(data) {
  const panel = h("section", { class: "x-detail", "aria-label": "Pinned cell and answers by layer" });
  const draw = () => {
    const active = panel.contains(focused()) ? focused() : null;
    const value = active?.dataset.value, menuFocused = active?.tagName === "SELECT";
    const seen = view(data);
    const width = Math.min(560, Math.max(280, (panel.clientWidth || 360) - 34));
    panel.replaceChildren(...[
      seen ? [h("h3", {}, pinned(seen) ? "Pinned cell" : "Strongest cell"), cell(data, seen), tops(data, seen)] : null,
      data.lens ? [h("h3", {}, "Old and new answer through the layers"), lensPart(data, seen, width)] : null,
    ].flat(3).filter(Boolean));
    if (value) panel.querySelector(`[data-value="${CSS.escape(value)}"]`)?.focus();
    else if (menuFocused) panel.querySelector("select")?.focus();
  };
  return { panel, draw };
}
