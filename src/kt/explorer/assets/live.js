// With a model behind the explorer: what is typed goes to it as messages, and its state is shown.

import { h } from "./dom.js";
import { chosenFact } from "./facts.js";

const FIELDS = [["prompt", "Prompt", "The capital of {} is"], ["subject", "Subject", "France"], ["answer", "Old answer", "Paris"], ["target", "New answer", "Rome"]];

/** host: {send(message), get(name)}; draw() brings the panel up to date, take(data) copies the chosen fact into it. */
export function livePanel(host) {
  const inputs = Object.fromEntries(FIELDS.map(([key, , example]) => [key, h("input", { type: "text", name: key, placeholder: example, autocomplete: "off", spellcheck: "false" })]));
  const methods = host.get("methods");
  const method = h("select", { name: "method", "aria-label": "Method of the edit" }, methods.map((name) => h("option", { value: name, selected: name === "intattn" }, name)));
  const send = (what, more = {}) => {
    const typed = Object.fromEntries(Object.entries(inputs).map(([key, input]) => [key, input.value]));
    host.send({ do: what, ...typed, method: method.value, ...more });
  };
  const trace = h("button", { type: "submit" }, "Trace");
  const edit = h("button", { type: "button", onclick: () => send("edit") }, "Edit");
  const said = h("p", { class: "x-said", role: "status" }), bar = h("progress", { "aria-label": "Progress", hidden: true });
  const edits = h("ul", { class: "x-edits", "aria-label": "Edits" });
  const form = h("form", { class: "x-form" },
    FIELDS.map(([key, label]) => h("label", { class: `x-field x-field-${key}` }, h("span", {}, label), inputs[key])),
    h("div", { class: "x-bar" }, trace, method, edit));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send("trace");
  });
  const panel = h("section", { class: "x-live", "aria-label": "Ask the model" }, form, said, bar, edits);

  function draw() {
    const { text = "", error = false, busy = false, done = 0, total = 0 } = host.get("status");
    said.textContent = text + (busy && total ? ` (${done} of ${total})` : busy ? " …" : "");
    said.classList.toggle("x-bad", error);
    bar.hidden = !busy;
    if (total) [bar.max, bar.value] = [total, done];
    else bar.removeAttribute("value");
    const rows = host.get("edits");
    for (const button of [trace, edit]) button.disabled = busy;
    edits.hidden = !rows.length;
    edits.replaceChildren(...rows.map(({ name, on }, place) => h("li", {},
      h("button", { type: "button", disabled: busy, "aria-pressed": String(on), "aria-label": `${on ? "Revert" : "Apply"} ${name}`, onclick: () => host.send({ do: on ? "revert" : "apply", edit: place }) }, on ? "Revert" : "Apply"),
      h("span", { class: on ? "x-on" : null }, name, on ? " (applied)" : ""))));
  }

  function take(data) {
    const fact = data.facts[chosenFact()];
    if (!fact) return;
    const template = fact.subject && fact.prompt.includes(fact.subject) ? fact.prompt.replace(fact.subject, () => "{}") : fact.prompt;
    Object.assign(inputs.prompt, { value: template });
    for (const [key, value] of [["subject", fact.subject], ["answer", fact.old], ["target", fact.new]]) inputs[key].value = value ?? "";
  }

  return { panel, draw, take };
}
