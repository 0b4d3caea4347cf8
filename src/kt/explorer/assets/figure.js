// A figure with what stands around it: its title, CSV and SVG, and the table of its numbers.

import { digits, h } from "./dom.js";
import { saveCsv, saveSvg } from "./save.js";

const LONG = 400;
const open = new Set(); // tables that the reader opened stay open when a figure is drawn again

/** A table of plain values, numbers to the right. */
export function plainTable({ columns, rows }, caption) {
  const numeric = columns.map((_, i) => rows.some((row) => typeof row[i] === "number"));
  const shown = rows.slice(0, LONG);
  return h("div", { class: "x-scroll", tabindex: 0, role: "region", "aria-label": caption },
    h("table", {},
      h("caption", { class: "x-hidden" }, caption),
      h("thead", {}, h("tr", {}, columns.map((name, i) => h("th", { scope: "col", class: numeric[i] ? "number" : null }, name)))),
      h("tbody", {}, shown.map((row) => h("tr", {}, row.map((value, i) => h("td", { class: numeric[i] ? "number" : null }, typeof value === "number" ? digits(value) : value ?? "–")))))),
    rows.length > LONG ? h("p", { class: "x-note" }, `The first ${LONG} of ${rows.length} rows; CSV has all.`) : null);
}

/** A table that is its own figure: {name, title, note, table} and the table as it is shown. */
export function tabled({ name, title, note, table }, shown) {
  return h("div", { class: "x-tabled" },
    h("div", { class: "x-figure-head" },
      h("h4", {}, title, note ? h("span", { class: "x-note" }, note) : null),
      h("div", { class: "x-save" }, h("button", { type: "button", onclick: () => saveCsv(name, table()), "aria-label": `${title} as CSV` }, "CSV"))),
    shown);
}

/** {name, title, note, svg, legend, table: () => ({columns, rows})} as an element. */
export function figure({ name, title, note, svg, legend, table, controls }) {
  const numbers = h("details", { class: "x-table", open: open.has(name) },
    h("summary", {}, "Table"));
  const build = () => {
    if (numbers.open && numbers.children.length === 1) numbers.append(plainTable(table(), title));
    if (numbers.open) open.add(name);
    else open.delete(name);
  };
  numbers.addEventListener("toggle", build);
  if (numbers.open) build();
  return h("figure", { class: "x-figure", "data-figure": name },
    h("div", { class: "x-figure-head" },
      h("figcaption", {}, h("strong", {}, title), note ? h("span", { class: "x-note" }, note) : null),
      h("div", { class: "x-save" },
        h("button", { type: "button", onclick: () => saveCsv(name, table()), "aria-label": `${title} as CSV` }, "CSV"),
        svg ? h("button", { type: "button", onclick: () => saveSvg(name, svg), "aria-label": `${title} as SVG` }, "SVG") : null)),
    controls ?? null, legend ?? null, svg ?? null, numbers);
}

/** A group of buttons of which one is pressed. */
export function choice(label, options, chosen, choose) {
  return h("div", { class: "x-choice", role: "group", "aria-label": label },
    options.map(([value, text]) =>
      h("button", { type: "button", "aria-pressed": String(value === chosen), onclick: () => choose(value), "data-value": value }, text)));
}

/** A labelled select. */
export function menu(label, options, chosen, choose) {
  const select = h("select", { onchange: () => choose(select.value), "aria-label": label },
    options.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
  return select;
}
