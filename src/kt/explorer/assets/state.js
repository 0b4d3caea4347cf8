// What is shown, kept in the address behind "#": a link reproduces the view.

const KEYS = ["fact", "map", "metric", "state", "cell", "answer", "at", "site", "sort", "show", "find", "theme"];

const listeners = [];
let current = read();

function read() {
  const given = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
  return Object.fromEntries(KEYS.filter((key) => given.has(key)).map((key) => [key, given.get(key)]));
}

/** A setting from the address; "" where it names none. */
export function get(key) {
  return current[key] ?? "";
}

/** Change settings, write them into the address and tell whoever listens. */
export function set(changes) {
  const changed = Object.keys(changes).filter((key) => String(changes[key] ?? "") !== get(key));
  if (!changed.length) return;
  for (const key of changed) current[key] = String(changes[key] ?? "");
  const kept = KEYS.filter((key) => current[key]).map((key) => [key, current[key]]);
  const address = kept.length ? "#" + new URLSearchParams(kept) : location.pathname + location.search;
  try {
    history.replaceState(null, "", address);
  } catch {
    // A page inside a sandboxed frame has no address of its own.
  }
  tell(changed);
}

/** Call `listener` with the names of the settings that changed. */
export function listen(listener) {
  listeners.push(listener);
}

function tell(changed) {
  for (const listener of listeners) listener(new Set(changed));
}

addEventListener("hashchange", () => {
  if (location.hash && !location.hash.includes("=")) return; // a heading of the report
  const before = current;
  current = read();
  tell(KEYS.filter((key) => (before[key] ?? "") !== (current[key] ?? "")));
});
