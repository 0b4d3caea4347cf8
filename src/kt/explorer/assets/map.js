// Tokens (or heads, or sites) down, layers across. A click or Enter pins a cell; arrow keys move.

import { focused, h, number, palette, rank, s } from "./dom.js";
import { get, set } from "./state.js";
import { scaleOf } from "./colour.js";
import { choice, figure } from "./figure.js";
import { chosenFact } from "./facts.js";
import { headsAtOptions, LENS, metric, metrics, stateNow, states, tab, tabs, view } from "./views.js";

const FONT = "Inter, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif";

/** The pinned cell as [row, layer]; null where none is, or where the map has no such cell. */
export function pinned(seen) {
  const [row, layer] = get("cell").split(".").map(Number);
  return get("cell") && seen && row < seen.rows.length && layer < seen.layers.length ? [row, layer] : null;
}

/** The cell with the largest value, which stands in for a pinned one. */
export function strongest(seen) {
  const cells = seen.values.flatMap((row, r) => row.map((value, l) => [r, l, value === null ? -1 : Math.abs((seen.paint ?? ((v) => v))(value))]));
  const size = (cell) => (seen.kind === LENS && !seen.difference && metricIsRank(seen) ? -cell[2] : cell[2]);
  const best = cells.reduce((one, other) => (size(other) > size(one) ? other : one), cells[0]);
  return [best[0], best[1]];
}

function short(text, most) {
  const letters = [...text];
  return letters.length > most ? letters.slice(0, most - 1).join("") + "…" : text;
}

function legend(seen, scale) {
  const c = palette(), width = 220, stops = 24;
  const at = (i) => scale.low + ((scale.high - scale.low) * i) / (stops - 1);
  const ends = seen.paint && seen.kind === LENS && !seen.difference && metricIsRank(seen) ? [scale.low, scale.high].map((v) => 10 ** -v - 1) : [scale.low, scale.high];
  const svg = s("svg", { viewBox: `0 0 ${width} 14`, width, height: 14, "aria-hidden": true },
    Array.from({ length: stops }, (_, i) => s("rect", { x: (i * width) / stops, y: 0, width: width / stops + 0.5, height: 10, fill: scale.colour(at(i)) })),
    s("rect", { x: 0.5, y: 0.5, width: width - 1, height: 9.5, fill: "none", stroke: c.rule }));
  return h("div", { class: "x-legend" }, h("span", {}, seen.shown(ends[0])), svg, h("span", {}, seen.shown(ends[1])),
    h("span", { class: "x-note" }, seen.unit, seen.shared ? "; MLP and attention on one scale" : "",
      scale.below !== null && scale.below !== undefined ? `; blue: below zero, down to ${seen.shown(scale.below)}` : "", seen.q ? "; struck through: not told apart from zero (q ≥ 0.05)" : ""));
}

const metricIsRank = (seen) => seen.unit.startsWith("rank");

function drawing(seen, width, say) {
  const c = palette();
  const paint = seen.paint ?? ((value) => value);
  const painted = seen.scaled.filter((value) => value !== null).map(paint);
  const scale = scaleOf(painted, { diverging: seen.difference, ...(metricIsRank(seen) ? { low: Math.min(-1e-9, ...painted), high: 0 } : {}) });
  const most = width < 380 && seen.rowWord === "token" ? 15 : 24; // names of roles and sites are ours, and whole
  const labels = seen.rows.map((text) => short(text.replace(/^ /, "·"), most));
  const left = Math.min(0.5 * width, 16 + 6.6 * Math.max(...labels.map((text) => [...text].length)));
  const across = Math.max(5, Math.min(46, (width - left - 8) / seen.layers.length));
  const down = seen.rows.length > 24 ? 15 : 24;
  const top = 18, bottom = 36, gap = across > 9 ? 1.5 : 0.5;
  const total = left + across * seen.layers.length + 8, height = top + down * seen.rows.length + bottom;
  const every = Math.max(1, Math.ceil(24 / across));
  const pin = pinned(seen);
  const text = (x, y, value, more) => s("text", { x, y, "font-family": FONT, "font-size": 12, fill: c.muted, ...more }, value);
  const parts = [];
  const runs = []; // neighbouring edited layers stand in one frame
  for (const at of seen.layers.map((_, l) => l).filter((l) => seen.edited.includes(seen.layers[l]))) {
    if (runs.length && runs.at(-1)[1] === at - 1) runs.at(-1)[1] = at;
    else runs.push([at, at]);
  }
  for (const [first, last] of runs) {
    for (let at = first; at <= last; at += 1) parts.push(s("path", { d: `M${left + at * across + across / 2 - 4.5} 5h9l-4.5 7z`, fill: c.mark }));
    parts.push(s("rect", { x: left + first * across - 1.5, y: top - 2.5, width: (last - first + 1) * across + 1.5, height: down * seen.rows.length + 3, fill: "none", stroke: c.mark, "stroke-width": 1.5, "stroke-dasharray": "4 3", rx: 3, "pointer-events": "none" }));
  }
  const rows = seen.rows.map((name, r) => {
    const inSubject = seen.subject.includes(r);
    const cells = seen.layers.map((layer, l) => {
      const value = seen.values[r][l], said = `${name}, layer ${layer}: ${seen.shown(value)}`;
      return s("rect", {
        role: "gridcell", id: `x-cell-${r}-${l}`, "data-cell": `${r}.${l}`, "aria-label": said, "aria-selected": String(pin?.[0] === r && pin?.[1] === l),
        x: (left + l * across).toFixed(2), y: top + r * down, width: Math.max(1, across - gap).toFixed(2), height: down - gap, rx: across > 9 ? 2 : 0,
        fill: value === null ? c.empty : scale.colour(paint(value)),
      }, s("title", {}, said));
    });
    const struck = seen.q && across > 7 ? s("path", { "aria-hidden": true, "pointer-events": "none", stroke: c.muted, "stroke-opacity": 0.4, fill: "none", d: seen.q[r].map((q, l) => q < 0.05 && q !== null ? "" : `M${(left + l * across + 2).toFixed(1)} ${top + (r + 1) * down - gap - 3}l${(across - gap - 4).toFixed(1)} ${-(down - gap - 6)}`).join("") }) : null;
    return s("g", { role: "row", "aria-label": name },
      s("g", { role: "rowheader" }, text(left - 10, top + r * down + down / 2 + 4, labels[r], { "text-anchor": "end", fill: inSubject ? c.ink : c.muted, "font-weight": inSubject ? 650 : 400 })),
      inSubject ? s("rect", { x: left - 6, y: top + r * down, width: 2.5, height: down - gap, fill: c.ink, "aria-hidden": true }) : null, cells, struck);
  });
  const axis = seen.layers.flatMap((layer, l) => l % every ? [] : [text(left + l * across + across / 2, height - bottom + 15, layer, { "text-anchor": "middle" })]);
  const cursor = s("rect", { width: across - gap + 3, height: down - gap + 3, fill: "none", stroke: c.ink, "stroke-width": 2, rx: 3, visibility: "hidden", "pointer-events": "none" });
  const ring = pin && s("rect", { x: left + pin[1] * across - 2, y: top + pin[0] * down - 2, width: across - gap + 4, height: down - gap + 4, fill: "none", stroke: c.accent, "stroke-width": 3, rx: 4, "pointer-events": "none" });
  const svg = s("svg", { viewBox: `0 0 ${total.toFixed(1)} ${height}`, width: total.toFixed(1), height, tabindex: 0, role: "grid", "aria-label": `${seen.title}: ${seen.rowWord}s down, layers across. Arrow keys move, Enter pins a cell.` },
    rows, s("g", { "aria-hidden": true }, axis, text(left + (across * seen.layers.length) / 2, height - 5, "layer", { "text-anchor": "middle" }), parts), s("g", { "aria-hidden": true }, ring, cursor));
  let at = pin ?? [0, 0];
  const place = ([r, l]) => {
    at = [r, l];
    cursor.setAttribute("x", left + l * across - 1.5);
    cursor.setAttribute("y", top + r * down - 1.5);
    svg.setAttribute("aria-activedescendant", `x-cell-${r}-${l}`);
    say(`${seen.rows[r]}, layer ${seen.layers[l]}: ${seen.shown(seen.values[r][l])}`);
  };
  svg.addEventListener("focus", () => (cursor.setAttribute("visibility", "visible"), place(at)));
  svg.addEventListener("blur", () => cursor.setAttribute("visibility", "hidden"));
  svg.addEventListener("mousemove", (event) => {
    const cell = event.target.closest("[data-cell]")?.dataset.cell.split(".").map(Number);
    if (cell) say(`${seen.rows[cell[0]]}, layer ${seen.layers[cell[1]]}: ${seen.shown(seen.values[cell[0]][cell[1]])}`);
  });
  svg.addEventListener("click", (event) => {
    const cell = event.target.closest("[data-cell]")?.dataset.cell;
    if (cell) set({ cell: cell === get("cell") ? "" : cell });
  });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step) {
      const clamp = (value, n) => Math.min(n - 1, Math.max(0, value));
      place([clamp(at[0] + step[0], seen.rows.length), clamp(at[1] + step[1], seen.layers.length)]);
    } else if (event.key === "Home" || event.key === "End") place([at[0], event.key === "Home" ? 0 : seen.layers.length - 1]);
    else if (event.key === "Enter" || event.key === " ") set({ cell: at.join(".") === get("cell") ? "" : at.join(".") });
    else if (event.key === "Escape") set({ cell: "" });
    else return;
    event.preventDefault();
  });
  return { svg, scale };
}

function table(seen) {
  const spread = seen.low ? ["low", "high"] : seen.sd ? ["sd"] : [];
  const columns = [seen.rowWord, "layer", "value", ...spread, ...(seen.q ? ["q", "n"] : [])];
  const rows = seen.rows.flatMap((name, r) => seen.layers.map((layer, l) => [name, layer, seen.values[r][l], ...spread.map((each) => seen[each][r][l]), ...(seen.q ? [seen.q[r][l], seen.n[r][l]] : [])]));
  return { columns, rows };
}

/** The middle of the page; `draw()` brings it up to date. */
export function mapPanel(data) {
  const panel = h("section", { class: "x-map", "aria-label": "Map of tokens and layers" });
  const draw = () => {
    const active = panel.contains(focused()) ? focused() : null, pressed = active?.dataset.value;
    const seen = view(data), list = tabs(data);
    const fact = data.facts[chosenFact()];
    const readout = h("p", { class: "x-readout", role: "status" }, "");
    const say = (text) => (readout.textContent = text);
    const strip = h("div", { class: "x-tabs", role: "tablist", "aria-label": "What is mapped" }, list.map(([key, label]) =>
      h("button", { type: "button", role: "tab", id: `x-tab-${key}`, "aria-selected": String(key === tab(data)), "aria-controls": "x-map", tabindex: key === tab(data) ? 0 : -1, "data-value": key, onclick: () => set({ map: key, cell: "" }) }, label)));
    strip.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      const keys = list.map(([key]) => key), next = keys[(keys.indexOf(tab(data)) + by + keys.length) % keys.length];
      set({ map: next, cell: "" });
      panel.querySelector("[role='tab'][aria-selected='true']").focus();
    });
    const options = states(data), controls = h("div", { class: "x-bar" });
    if (options.length > 1) controls.append(choice("State", options, stateNow(data), (state) => set({ state })));
    if (metrics(data).length > 1) controls.append(choice("Measure", metrics(data), metric(data), (name) => set({ metric: name })));
    if (tab(data) === LENS) controls.append(choice("Answer", [["old", "old answer"], ["new", "new answer"]], get("answer") === "new" ? "new" : "old", (answer) => set({ answer })));
    if (tab(data) === "heads" && headsAtOptions(data).length > 1) controls.append(choice("Token", headsAtOptions(data), get("at") || headsAtOptions(data)[0][0], (at) => set({ at })));
    const title = h("h3", { class: "x-title" }, fact ? [fact.prompt, " ", h("span", { class: "x-answers" }, h("span", { class: "x-old" }, fact.old ?? "?"), fact.new === null ? null : [" → ", h("span", { class: "x-new" }, fact.new)])] : `All ${data.facts.length} facts together`);
    const inside = [];
    if (fact?.problems.length) inside.push(h("p", { class: "x-problems" }, fact.problems.join(" · ")));
    if (!seen) inside.push(h("p", { class: "x-note" }, "This was not measured of this fact."));
    else {
      if (seen.untraced) inside.push(h("p", { class: "x-note" }, "This fact was not traced; the map is the mean of those that were. To trace it: ", h("code", {}, command(data.commands.trace, fact))));
      const width = Math.max(260, (panel.clientWidth || 640) - 34);
      const { svg, scale } = drawing(seen, width, say);
      inside.push(figure({
        name: `map-${seen.kind}`, title: seen.title, note: seen.about, svg: h("div", { class: "x-draw" }, svg), legend: null, table: () => table(seen),
      }));
      const shape = inside.at(-1);
      shape.querySelector(".x-draw").after(readout, legend(seen, scale));
      if (seen.edited.length) shape.querySelector(".x-legend").append(h("span", { class: "x-note" }, h("span", { class: "x-edited" }, "▼"), ` edited: ${seen.edited.length === 1 ? "layer" : "layers"} ${seen.edited.join(", ")}`));
    }
    inside.push(outcome(fact));
    panel.replaceChildren(title, strip, controls, h("div", { id: "x-map", role: "tabpanel", "aria-labelledby": `x-tab-${tab(data)}` }, inside.filter(Boolean)));
    if (active?.tagName === "svg") panel.querySelector("svg[tabindex]")?.focus();
    else if (pressed) panel.querySelector(`[data-value="${CSS.escape(pressed)}"]`)?.focus();
  };
  return { panel, draw };
}

function outcome(fact) {
  if (!fact?.prob) return null;
  const answers = [["new answer", fact.prob, "x-new"], ["old answer", fact.oldProb, "x-old"]].filter(([, pair]) => pair);
  return h("table", { class: "x-small" }, h("caption", {}, "Probability of the whole answer"), h("thead", {}, h("tr", {}, ["answer", "before", "after"].map((name, i) => h("th", { scope: "col", class: i ? "number" : null }, name)))),
    h("tbody", {}, answers.map(([name, pair, kind]) => h("tr", {}, h("th", { scope: "row" }, h("span", { class: kind }, name)), pair.map((value) => h("td", { class: "number" }, number(value)))),
    ), fact.rank ? h("tr", {}, h("th", { scope: "row" }, "new answer's rank"), fact.rank.map((value) => h("td", { class: "number" }, rank(value)))) : null));
}

/** A command for one fact, as a shell takes it. */
export function command(words, fact) {
  const quote = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\"'\"'")}'`);
  const template = fact.subject && fact.prompt.includes(fact.subject) ? fact.prompt.replace(fact.subject, () => "{}") : fact.prompt;
  const given = [["--prompt", template], ["--subject", fact.subject], ["--answer", fact.old], ["--target", fact.new]].filter(([, value]) => value);
  return [...words, ...given.flat()].map(quote).join(" ");
}
