// Elements from data. Texts become text nodes and attributes only: no string is ever read as mark-up.

const SVG = "http://www.w3.org/2000/svg";
const page = { root: null, themed: null };

/** Where the explorer stands, and the element whose data-theme and colours count for it. */
export function stand(root, themed) {
  Object.assign(page, { root, themed });
}

/** The element of the explorer that has the focus, also inside a shadow root. */
export function focused() {
  return page.root.getRootNode().activeElement;
}

/** The first element of the explorer that a selector finds. */
export function find(selector) {
  return page.root.querySelector(selector);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true && !name.startsWith("aria-") ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** An HTML element: h("p", {class: "note"}, "text", child, ...). */
export function h(name, attributes, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** An SVG element. */
export function s(name, attributes, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

/** The colours of the current theme, written into figures so that a saved one looks the same elsewhere. */
export function palette() {
  const style = getComputedStyle(page.themed);
  const of = (name) => style.getPropertyValue("--" + name).trim();
  const names = ["ink", "muted", "rule", "paper", "panel", "accent", "old", "new", "mark", "empty"];
  return Object.fromEntries(names.map((name) => [name, of(name)]));
}

export function isDark() {
  const set = page.themed.dataset.theme;
  return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** 0.1234 as 0.123; small numbers in e-notation; nothing as a dash. What no float can hold comes as a text. */
export function number(value, digits = 3) {
  if (typeof value === "string") return value;
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value !== 0 && Math.abs(value) < 0.5 * 10 ** -digits) return value.toExponential(1);
  return (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : value.toFixed(digits)).replace("-", "−");
}

/** A number with the four digits that the page keeps, and no others. */
export function digits(value) {
  return String(Number.isInteger(value) ? value : Math.abs(value) < 0.0005 ? Number(value).toExponential(1) : Number(value.toPrecision(4))).replace(/^-/, "−");
}

/** 0, 1 and 0.25 as 0%, 100% and 25%. */
export function percent(value) {
  return value === null || value === undefined ? "–" : `${Math.round(100 * value)}%`;
}

export function rank(value) {
  return value === null || value === undefined ? "–" : Number.isInteger(value) ? value.toLocaleString("en") : number(value, 1);
}

export function count(n, noun) {
  return `${n} ${noun}${n === 1 ? "" : "s"}`;
}
