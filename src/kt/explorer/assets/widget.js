// The explorer in a notebook's cell, with a kernel behind it: anywidget calls `render`.

import { h } from "./dom.js";
import { mount, unpacked } from "./main.js";
import { begin, listen, set } from "./state.js";
import { livePanel } from "./live.js";

/** The theme of the notebook around it, where it says one: JupyterLab, VS Code, Colab, marimo. */
function around() {
  const { body, documentElement: page } = document, lab = body.dataset.jpThemeLight;
  if (lab) return lab === "true" ? "light" : "dark";
  const classes = `${body.className} ${page.className} ${page.getAttribute("theme") ?? ""} ${body.dataset.vscodeThemeKind ?? ""}`;
  if (/\bvscode-dark\b|\bvscode-high-contrast\b(?!-light)|\bdark\b/.test(classes)) return "dark";
  return /\bvscode-light\b|\blight\b/.test(classes) ? "light" : "";
}

/** One view: `model` holds what the kernel says, `el` is its place. What comes back ends it. */
export function render({ model, el }) {
  const within = h("div", { class: "kt-root" }), explorer = h("div", { id: "kt-explorer" });
  const host = { get: (name) => model.get(name), send: (message) => model.send(message) };
  const live = livePanel(host);
  el.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's own keys: "d d" deletes a cell
  const shadow = h("div", {}), inside = shadow.attachShadow({ mode: "open" });
  within.append(live.panel, explorer);
  inside.append(h("style", {}, model.get("style")), within);
  el.replaceChildren(shadow);
  within.addEventListener("keydown", (event) => event.stopPropagation());

  let end = () => {}, latest = 0;
  begin(model.get("view"), (text) => {
    model.set("view", text);
    model.save_changes();
  });
  async function show() {
    const turn = (latest += 1), data = await unpacked(model.get("data"));
    if (turn !== latest) return;
    end();
    const unmount = mount(explorer, data, { themed: within, keys: explorer, own: around, outer: [document.body, document.documentElement] });
    const deaf = listen((changed) => changed.has("fact") && live.take(data));
    end = () => (unmount(), deaf());
    if (data.chosen !== null) set({ fact: data.chosen });
    explorer.dataset.ready = "";
  }
  const events = [["change:data", show], ["change:status", live.draw], ["change:edits", live.draw]];
  for (const [event, react] of events) model.on(event, react);
  live.draw();
  show();
  return () => {
    for (const [event, react] of events) model.off(event, react);
    end();
  };
}
