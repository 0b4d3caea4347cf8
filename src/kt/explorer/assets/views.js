// The numbers of one map: which rows and layers, which values, for the fact, tab, metric and state in the address.

import { count, number, rank } from "./dom.js";
import { get } from "./state.js";
import { chosenFact } from "./facts.js";

const UNIT = 10_000, COARSE = 1_000;
const HEADS_AT = { subject_last: "last subject token", last: "last token" };
export const LENS = "lens";

const plain = (cells, unit = UNIT) => cells?.map((row) => row.map((value) => (value === null ? null : value / unit)));
const minus = (one, other) => one.map((row, r) => row.map((value, l) => value === null || other[r]?.[l] == null ? null : value - other[r][l]));

/** The tabs that some run fills: [[key, label], ...]. */
export function tabs(data) {
  const kinds = Object.assign({}, ...data.traces.map((trace) => trace.kinds));
  return [...Object.entries(kinds), ...(data.lens ? [[LENS, "Lens"]] : [])];
}

export function tab(data) {
  const known = tabs(data).map(([key]) => key);
  return known.includes(get("map")) ? get("map") : known[0];
}

/** A fact's reading in a trace; the means where the fact is not in it. */
function reading(trace, fact) {
  return (fact >= 0 && trace.facts[fact]) || trace.mean || Object.values(trace.facts)[0];
}

/** The states that can be shown: those of the traces or of the lens, and their difference. */
export function states(data) {
  const fact = chosenFact();
  if (tab(data) === LENS) {
    const named = data.lens.states.map((state, i) => [i, state]).filter(([, state]) => fact < 0 ? state.mean : state.facts[fact]);
    const options = named.map(([i, state]) => [String(i), state.name]);
    return options.length === 2 ? [...options, ["diff", "difference"]] : options;
  }
  const fits = data.traces.map((trace, i) => [i, trace]).filter(([, trace]) => trace.kinds[tab(data)]);
  const there = fits.filter(([, trace]) => fact < 0 || trace.facts[fact]);
  const options = (there.length ? there : fits).map(([i, trace]) => [String(i), trace.name]);
  if (options.length !== 2) return options;
  const [a, b] = options.map(([i]) => reading(data.traces[i], fact));
  const facts = options.map(([i]) => Object.keys(data.traces[i].facts).join());
  if ((fact < 0 || !there.length) && facts[0] !== facts[1]) return options; // means over other facts do not compare
  const same = a.rows.join("\n") === b.rows.join("\n") && data.traces[options[0][0]].layers === data.traces[options[1][0]].layers;
  return same ? [...options, ["diff", "difference"]] : options;
}

export function stateNow(data) {
  const known = states(data).map(([key]) => key);
  return known.includes(get("state")) ? get("state") : known[0];
}

export function metrics(data) {
  if (tab(data) === LENS) return [["rank", "rank"], ["prob", "probability"]];
  const trace = data.traces.find((each) => each.kinds[tab(data)]);
  const names = { prob: "probability", logit_diff: "logit difference" };
  return Object.keys(trace.metrics).map((metric) => [metric, names[metric]]);
}

export function metric(data) {
  const known = metrics(data).map(([key]) => key);
  return known.includes(get("metric")) ? get("metric") : tab(data) === LENS ? "rank" : known.at(-1);
}

/** The map on show: {rows, layers, values, title, unit, ...}, or null where nothing was measured. */
export function view(data) {
  return tab(data) === LENS ? lensView(data) : traceView(data);
}

function traceView(data) {
  const fact = chosenFact(), kind = tab(data), name = metric(data), shown = stateNow(data);
  if (shown === undefined) return null;
  const difference = shown === "diff";
  const [first, second] = states(data).map(([key]) => data.traces[key]);
  const trace = difference ? second : data.traces[shown];
  const own = reading(trace, fact);
  const one = fact >= 0 && Boolean(trace.facts[fact]);
  const of = (from) => {
    const cells = reading(from, fact).cells[kind]?.[name];
    return kind === "heads" ? cells?.[headsAt(own)] : cells;
  };
  const cells = of(trace);
  if (!cells) return null;
  const values = difference ? minus(plain(of(second).v), plain(of(first).v)) : plain(cells.v);
  const shared = kind === "mlp" || kind === "attn" ? ["mlp", "attn"].filter((each) => own.cells[each]?.[name]) : [kind];
  const scaled = kind === "heads" || difference ? values : shared.flatMap((each) => plain(own.cells[each][name].v));
  return {
    kind, trace, own, one, difference, values,
    layers: values[0].map((_, layer) => layer),
    rows: kind === "heads" ? values.map((_, head) => `head ${head}`) : own.rows,
    subject: kind === "heads" ? [] : own.subject,
    rowWord: kind === "heads" ? "head" : one || !trace.mean ? "token" : "role",
    scaled: scaled.flat(), shared: shared.length > 1 && !difference,
    sd: difference ? null : plain(cells.sd, COARSE), low: difference ? null : plain(cells.low), high: difference ? null : plain(cells.high),
    q: difference ? null : cells.q, n: difference ? null : cells.n,
    unit: difference ? `${second.name} less ${first.name}` : trace.metrics[name],
    title: trace.kinds[kind] + (kind === "heads" ? `, ${HEADS_AT[headsAt(own)]}` : ""),
    edited: kind === "hidden" ? [] : data.edited[kind === "heads" ? "attn" : kind] ?? [],
    shown: (value) => number(value),
    about: one || !trace.mean
      ? `p(answer) ${number(own.clean, 2)} clean, ${number(own.corrupted, 2)} corrupted; foil ${own.foil}${own.hidden ? `; ${count(own.hidden, "token")} far before the subject left out` : ""}`
      : `mean over ${count(trace.n, "fact")}; p(answer) ${number(own.clean, 2)} clean, ${number(own.corrupted, 2)} corrupted`,
    untraced: fact >= 0 && !one,
  };
}

export function headsAtOptions(data) {
  const trace = data.traces.find((each) => each.kinds.heads), own = trace && reading(trace, chosenFact());
  return Object.keys(own?.cells.heads?.[metric(data)] ?? {}).map((role) => [role, HEADS_AT[role]]);
}

function headsAt(own) {
  const known = Object.keys(Object.values(own.cells.heads)[0] ?? {});
  return known.includes(get("at")) ? get("at") : known[0];
}

const POINTS = { subject_last: "subject", prediction: "last token" }, SITES = { resid: "residual", attn: "attention", mlp: "MLP" };

/** rank or prob of an answer in a state of the lens: [position][kind][layer]. */
export function lensOf(data, state, name, answer) {
  const fact = chosenFact(), from = data.lens.states[state];
  const own = fact >= 0 ? from.facts[fact] : from.mean;
  return own ? own[name].map((position) => position.map((kind) => kind[answer])) : null;
}

const MAPPED = { mlp: "mlp", attn: "attn", heads: "attn", hidden: "resid" }, READ = ["resid", "attn", "mlp"];

/**
 * The most probable tokens of a cell, by state: {states: [{name, tokens: [{text, prob, answer}]}], of}.
 * `why` says instead what stands in the way: "fact" (none is chosen), "token" (not read there) or "run" (none kept).
 */
export function topsOf(data, seen, r, l) {
  const fact = chosenFact(), lens = data.lens;
  if (fact < 0) return { why: "fact" };
  const layer = lens?.layers.indexOf(seen.layers[l]) ?? -1;
  const named = (lens?.states ?? []).filter((state) => state.tops[fact]);
  if (!named.length || layer < 0) return { why: "run" };
  const positions = Object.keys(POINTS), sites = READ.length;
  const heads = seen.kind === "heads" && headsAt(seen.own);
  const places = seen.kind === LENS ? [positions[Math.floor(r / sites)]]
    : heads ? [{ last: "prediction" }[heads] ?? heads]
    : [seen.one && String(seen.own.tokens?.[r] ?? r), r === seen.subject.at(-1) && positions[0], r === seen.rows.length - 1 && positions[1]];
  const at = places.find((place) => named[0].tops[fact].at[place]);
  if (at === undefined) return { why: "token" };
  const kind = seen.kind === LENS ? r % sites : READ.indexOf(MAPPED[seen.kind]);
  const first = named[0].tops[fact].at[at];
  const states = named.filter((state) => state.tops[fact].at[at]).map((state) => {
    const { at: cells, answers } = state.tops[fact], cell = cells[at][kind][layer] || first[kind][layer], half = cell.length / 2;
    const tokens = cell.slice(0, half).map((token, i) => ({ text: lens.tokens[token], prob: cell[half + i] === null ? null : cell[half + i] / COARSE, answer: answers.indexOf(token) }));
    return { name: state.name, tokens };
  });
  return { states, of: lens.kinds[READ[kind]], heads: Boolean(heads) };
}

/** What stands for the facts of some states of the lens, and how many those are. */
export function overFacts(name, states) {
  const ns = [...new Set(states.filter((state) => state.mean).map((state) => state.n))];
  const over = ns.length === 1 ? count(ns[0], "fact") : states.map((state) => `${count(state.n, "fact")} (${state.name})`).join(", ");
  return `${name === "rank" ? "median" : "mean"} over ${over}`;
}

function lensView(data) {
  const name = metric(data), shown = stateNow(data), answer = get("answer") === "new" ? 1 : 0;
  if (shown === undefined) return null;
  const difference = shown === "diff";
  const [first, second] = states(data).map(([key]) => key);
  const read = (state) => lensOf(data, state, name, answer).flat();
  const log = (rows) => rows.map((row) => row.map((value) => Math.log10(1 + value)));
  const raw = read(difference ? second : shown);
  const values = !difference ? raw : name === "rank" ? minus(log(raw), log(read(first))) : minus(raw, read(first));
  const which = answer ? "new answer" : "old answer";
  return {
    kind: LENS, difference, values, layers: data.lens.layers, one: chosenFact() >= 0,
    rows: Object.values(POINTS).flatMap((position) => Object.values(SITES).map((site) => `${site}, ${position}`)),
    subject: [0, 1, 2], rowWord: "site", edited: [],
    paint: !difference && name === "rank" ? (value) => -Math.log10(1 + value) : (value) => value,
    scaled: values.flat(), unit: difference ? (name === "rank" ? "log₁₀ of 1 + rank, after less before" : "probability, after less before") : `${name === "rank" ? "rank (0 is the top)" : "probability"} of the ${which}`,
    title: `Logit lens, ${which}`,
    shown: (value) => (name === "rank" && !difference ? rank(value) : number(value)),
    about: chosenFact() >= 0 ? "read through the final norm and the unembedding" : overFacts(name, difference ? data.lens.states : [data.lens.states[shown]]),
  };
}
