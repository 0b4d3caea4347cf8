// What is shown, as one text of settings. A page keeps it in its address, so that a link reproduces the view; a widget in
// the notebook.

const KEYS = ["fact", "map", "metric", "state", "cell", "answer", "at", "site", "sort", "show", "find", "theme"];

let listeners = [];
let current = {};
let keep = () => {};

function parsed(text) {
  const given = new URLSearchParams(text);
  return Object.fromEntries(KEYS.filter((key) => given.has(key)).map((key) => [key, given.get(key)]));
}

/** Begin with these settings; `write` is called with the text of all of them when some change. */
export function begin(text, write) {
  current = parsed(text);
  keep = write;
}

/** Take other settings, as when the address changes. */
export function follow(text) {
  const before = current;
  current = parsed(text);
  tell(KEYS.filter((key) => (before[key] ?? "") !== (current[key] ?? "")));
}

/** A setting; "" where there is none. */
export function get(key) {
  return current[key] ?? "";
}

/** Change settings, keep them and tell whoever listens. */
export function set(changes) {
  const changed = Object.keys(changes).filter((key) => String(changes[key] ?? "") !== get(key));
  if (!changed.length) return;
  for (const key of changed) current[key] = String(changes[key] ?? "");
  keep(new URLSearchParams(KEYS.filter((key) => current[key]).map((key) => [key, current[key]])).toString());
  tell(changed);
}

/** Call `listener` with the names of the settings that changed; what comes back ends it. */
export function listen(listener) {
  listeners.push(listener);
  return () => (listeners = listeners.filter((each) => each !== listener));
}

function tell(changed) {
  for (const listener of [...listeners]) listener(new Set(changed));
}
