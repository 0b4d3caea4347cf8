// The page: panels drawn from the data beside this script, and the keys that work everywhere.

import { h } from "./dom.js";
import { get, listen, set } from "./state.js";
import { factsPanel, step } from "./facts.js";
import { mapPanel } from "./map.js";
import { detailPanel } from "./detail.js";
import { belowPanel } from "./below.js";
import { tab, tabs } from "./views.js";

const KEYS = [
  ["↑ ↓", "previous, next fact (in the table); in the map the row above, below"], ["← →", "in the map the layer before, after; in the tabs the next tab"],
  ["Enter", "from the table into the map; in the map pin the cell"], ["Esc", "unpin; leave the filter"],
  ["/", "filter the facts"], ["j k", "next, previous fact, wherever you are"], ["t", "next tab"], ["d", "dark or light"], ["?", "this help"],
];

/** The data beside this script: JSON, deflated, as base64. */
async function unpacked() {
  const letters = atob(document.getElementById("kt-data").textContent.trim());
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i += 1) bytes[i] = letters.charCodeAt(i); // ten times as fast as Uint8Array.from
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
}

const root = document.getElementById("kt-explorer");

function theme() {
  const set = get("theme");
  if (set === "dark" || set === "light") document.documentElement.dataset.theme = set;
  else delete document.documentElement.dataset.theme;
}

function nextTheme() {
  const dark = get("theme") ? get("theme") === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  set({ theme: dark ? "light" : "dark" });
}

const help = h("dialog", { class: "x-help", "aria-labelledby": "x-help-title" },
  h("h2", { id: "x-help-title" }, "Keys"),
  h("dl", {}, KEYS.map(([keys, what]) => [h("dt", {}, keys.split(" ").map((key) => h("kbd", {}, key))), h("dd", {}, what)])),
  h("p", { class: "x-note" }, "What is shown stands in the address: copy it, and the link opens the same view."),
  h("form", { method: "dialog" }, h("button", { autofocus: true }, "Close")));

async function start() {
  const data = await unpacked();
  performance.mark("kt-data");
  theme();
  const facts = factsPanel(data);
  const panels = { map: mapPanel(data), detail: detailPanel(data), below: belowPanel(data) };
  const shown = tabs(data).length ? panels.map.panel : null;

  root.replaceChildren(
    h("h2", { class: "x-hidden" }, "Fact explorer"),
    h("div", { class: "x-tools" },
      h("button", { type: "button", onclick: nextTheme, "aria-label": "Dark or light" }, "◐"),
      h("button", { type: "button", onclick: () => help.showModal(), "aria-label": "Keys and help" }, "?")),
    h("div", { class: shown ? "x-grid" : "x-grid x-no-map" }, data.facts.length ? facts.panel : null, shown, shown ? panels.detail.panel : null), panels.below.panel, help);

  function draw() {
    if (shown) {
      panels.map.draw();
      panels.detail.draw();
    }
    panels.below.draw();
  }

  listen((changed) => {
    if (changed.has("theme")) theme();
    if (["fact", "sort", "show", "find"].some((key) => changed.has(key))) facts.draw();
    if (changed.has("find") || changed.has("show")) facts.sync();
    if (["fact", "map", "metric", "state", "cell", "answer", "at", "site", "theme"].some((key) => changed.has(key))) draw();
  });

  addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || help.open;
    if (event.key === "Escape" && event.target === facts.find) return facts.find.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = {
      "/": () => facts.find.focus(), "?": () => help.showModal(), d: nextTheme, j: () => step(1), k: () => step(-1),
      t: () => {
        const keys = tabs(data).map(([key]) => key);
        if (keys.length) set({ map: keys[(keys.indexOf(tab(data)) + 1) % keys.length], cell: "" });
      },
      Escape: () => set({ cell: "" }),
    }[event.key];
    if (!act || event.defaultPrevented) return;
    event.preventDefault();
    act();
  });

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let wide = root.clientWidth;
  new ResizeObserver(() => {
    if (Math.abs(root.clientWidth - wide) < 2) return;
    wide = root.clientWidth;
    draw();
  }).observe(root);
  facts.draw();
  draw();
  root.dataset.ready = "";
  performance.mark("kt-drawn");
}

start();
