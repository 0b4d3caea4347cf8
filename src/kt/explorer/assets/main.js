// The explorer in an element: panels drawn from data, and the keys that work everywhere in it.

import { h, isDark, stand } from "./dom.js";
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

/** Data as it stands in a page: JSON, deflated, as base64. */
export async function unpacked(text) {
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i += 1) bytes[i] = letters.charCodeAt(i); // ten times as fast as Uint8Array.from
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
}

function helpDialog() {
  return h("dialog", { class: "x-help", "aria-labelledby": "x-help-title" },
    h("h2", { id: "x-help-title" }, "Keys"),
    h("dl", {}, KEYS.map(([keys, what]) => [h("dt", {}, keys.split(" ").map((key) => h("kbd", {}, key))), h("dd", {}, what)])),
    h("p", { class: "x-note" }, "What is shown stands in the address of a page: copy it, and the link opens the same view."),
    h("form", { method: "dialog" }, h("button", { autofocus: true }, "Close")));
}

/**
 * Draw the explorer of `data` into `root`. `themed` carries data-theme, `keys` is where keys are heard, `own` the theme
 * of what is around it, as the attributes of the elements `outer` tell. What comes back ends it.
 */
export function mount(root, data, { themed, keys, own = () => "", outer = [] }) {
  stand(root, themed);
  const theme = () => {
    const chosen = get("theme") || own();
    if (chosen === "dark" || chosen === "light") themed.dataset.theme = chosen;
    else delete themed.dataset.theme;
  };
  const nextTheme = () => set({ theme: isDark() ? "light" : "dark" });
  theme();
  const help = helpDialog(), facts = factsPanel(data);
  const panels = { map: mapPanel(data), detail: detailPanel(data), below: belowPanel(data) };
  const shown = tabs(data).length ? panels.map.panel : null;

  root.replaceChildren(
    h("h2", { class: "x-hidden" }, "Fact explorer"),
    h("div", { class: "x-tools" },
      h("button", { type: "button", onclick: nextTheme, "aria-label": "Dark or light" }, "◐"),
      h("button", { type: "button", onclick: () => help.showModal(), "aria-label": "Keys and help" }, "?")),
    h("div", { class: "x-body" },
      h("div", { class: shown ? "x-grid" : "x-grid x-no-map" }, data.facts.length ? facts.panel : null, shown, shown ? panels.detail.panel : null), panels.below.panel), help);

  function draw() {
    if (shown) {
      panels.map.draw();
      panels.detail.draw();
    }
    panels.below.draw();
  }

  const deaf = listen((changed) => {
    if (changed.has("theme")) theme();
    if (["fact", "sort", "show", "find"].some((key) => changed.has(key))) facts.draw();
    if (changed.has("find") || changed.has("show")) facts.sync();
    if (["fact", "map", "metric", "state", "cell", "answer", "at", "site", "theme"].some((key) => changed.has(key))) draw();
  });

  function press(event) {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || help.open;
    if (event.key === "Escape" && event.target === facts.filter) return facts.filter.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = {
      "/": () => facts.filter.focus(), "?": () => help.showModal(), d: nextTheme, j: () => step(1), k: () => step(-1),
      t: () => {
        const kinds = tabs(data).map(([key]) => key);
        if (kinds.length) set({ map: kinds[(kinds.indexOf(tab(data)) + 1) % kinds.length], cell: "" });
      },
      Escape: () => set({ cell: "" }),
    }[event.key];
    if (!act || event.defaultPrevented) return;
    event.preventDefault();
    act();
  }

  const system = matchMedia("(prefers-color-scheme: dark)");
  const turn = () => (theme(), draw());
  let wide = root.clientWidth;
  const watch = new ResizeObserver(() => {
    if (Math.abs(root.clientWidth - wide) < 2) return;
    wide = root.clientWidth;
    facts.fit();
    draw();
  });
  const around = new MutationObserver(() => {
    const before = themed.dataset.theme;
    theme();
    if (themed.dataset.theme !== before) draw();
  });
  for (const element of outer) around.observe(element, { attributes: true });
  keys.addEventListener("keydown", press);
  system.addEventListener("change", turn);
  watch.observe(root);
  facts.draw();
  draw();
  return () => {
    keys.removeEventListener("keydown", press);
    system.removeEventListener("change", turn);
    watch.disconnect();
    around.disconnect();
    deaf();
  };
}
