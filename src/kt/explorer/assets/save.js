// Numbers as CSV and figures as SVG, made on the page and saved by the browser.

import { h } from "./dom.js";

function save(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = h("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** A cell of CSV. A text that a spreadsheet would read as a formula gets an apostrophe in front. */
export function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? "'" + value : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

export function toCsv({ columns, rows }) {
  return [columns, ...rows].map((row) => row.map(csvCell).join(",")).join("\r\n") + "\r\n";
}

export function saveCsv(name, table) {
  save(`kt-${name}.csv`, "text/csv", "\ufeff" + toCsv(table));
}

export function saveSvg(name, drawn) {
  const copy = (drawn.matches("svg") ? drawn : drawn.querySelector("svg")).cloneNode(true);
  for (const element of [copy, ...copy.querySelectorAll("*")]) {
    for (const attribute of ["tabindex", "role", "class", "aria-activedescendant"]) element.removeAttribute(attribute);
  }
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  save(`kt-${name}.svg`, "image/svg+xml", '<?xml version="1.0" encoding="UTF-8"?>\n' + new XMLSerializer().serializeToString(copy));
}
