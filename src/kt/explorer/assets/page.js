// The explorer on a page of its own: its data stands beside this script, its settings in the address.

import { mount, unpacked } from "./main.js";
import { begin, follow } from "./state.js";

const root = document.getElementById("kt-explorer");
const settings = () => (location.hash.includes("=") ? location.hash.slice(1) : "");

function keep(text) {
  try {
    history.replaceState(null, "", text ? "#" + text : location.pathname + location.search);
  } catch {
    // A page inside a sandboxed frame has no address of its own.
  }
}

begin(settings(), keep);
addEventListener("hashchange", () => {
  if (!location.hash || location.hash.includes("=")) follow(settings()); // else a heading of the report
});
unpacked(document.getElementById("kt-data").textContent.trim()).then((data) => {
  performance.mark("kt-data");
  mount(root, data, { themed: document.documentElement, keys: window });
  root.dataset.ready = "";
  performance.mark("kt-drawn");
});
