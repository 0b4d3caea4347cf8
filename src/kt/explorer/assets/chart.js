// Lines by layer (or by α) and bars by weight, as SVG with its own colours.

import { palette, s } from "./dom.js";

const FONT = "Inter, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif";
const HEIGHT = 190;

function ticks(low, high, scale) {
  if (scale === "rank") return [0, 1, 10, 100, 1e3, 1e4, 1e5, 1e6].filter((value) => value <= Math.max(high, 1));
  const step = 10 ** Math.floor(Math.log10((high - low || 1) / 2));
  const by = [1, 2, 5, 10].map((k) => k * step).find((each) => (high - low) / each <= 5) ?? step;
  const found = [];
  for (let at = Math.ceil(low / by - 1e-9) * by; at <= high + by * 1e-6; at += by) found.push(Number(at.toPrecision(12)));
  return found;
}

const label = (value) => (Math.abs(value) >= 1000 ? `${value / 1000}k` : String(value).replace("-", "−"));

/**
 * lines: [{name, values, colour, dash, low?, high?}] over xs; scale "rank" is log(1 + rank) with 0 on top.
 * marks: layers to shade; at: a layer to mark.
 */
export function lines({ lines: given, xs, names = null, width = 420, scale = "linear", low = null, high = null, xTitle = "layer", marks = [], at = null, aria, band = null }) {
  const c = palette(), left = 44, right = 12, top = 10, bottom = 36, inner = width - left - right, tall = HEIGHT - top - bottom;
  const known = given.flatMap((line) => [line.values, line.low ?? [], line.high ?? []].flat()).filter((v) => v !== null && v !== undefined && Number.isFinite(v));
  const [bottomValue, topValue] = [low ?? Math.min(0, ...known), high ?? Math.max(...known, 1e-9)];
  const log = (value) => Math.log10(1 + value);
  const y = scale === "rank" ? (value) => top + (log(value) / (log(Math.max(topValue, 1)) || 1)) * tall : (value) => top + tall - ((value - bottomValue) / (topValue - bottomValue || 1)) * tall;
  const ends = [Math.min(...xs), Math.max(...xs)];
  const x = (value) => left + (ends[0] === ends[1] ? 0.5 : (value - ends[0]) / (ends[1] - ends[0])) * inner;
  const text = (px, py, value, more) => s("text", { x: px, y: py, "font-family": FONT, "font-size": 11, fill: c.muted, ...more }, value);
  const half = xs.length > 1 ? Math.min(14, inner / (xs.length - 1) / 2) : 10;
  const grid = ticks(scale === "rank" ? 0 : bottomValue, topValue, scale).map((value) => [
    s("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), stroke: c.rule }),
    text(left - 6, y(value) + 4, label(value), { "text-anchor": "end" })]);
  const every = Math.max(1, Math.ceil(xs.length / (inner / (names ? 64 : 26))));
  const axis = xs.flatMap((value, i) => i % every ? [] : [text(x(value), HEIGHT - bottom + 15, names ? names[i] : label(value), { "text-anchor": "middle" })]);
  const path = (values) => {
    let d = "", pen = false;
    values.forEach((value, i) => {
      if (value === null || value === undefined || !Number.isFinite(value)) return (pen = false);
      d += `${pen ? "L" : "M"}${x(xs[i]).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = true;
    });
    return d;
  };
  const area = (line) => {
    const there = xs.map((_, i) => i).filter((i) => Number.isFinite(line.low[i] ?? NaN) && Number.isFinite(line.high[i] ?? NaN));
    if (there.length < 2) return null;
    const points = [...there.map((i) => [xs[i], line.high[i]]), ...there.reverse().map((i) => [xs[i], line.low[i]])];
    return s("path", { d: "M" + points.map(([a, b]) => `${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("L") + "Z", fill: line.colour, "fill-opacity": 0.15 });
  };
  const shapes = given.map((line) => [
    line.low ? area(line) : null,
    s("path", { d: path(line.values), fill: "none", stroke: line.colour, "stroke-width": 2, "stroke-dasharray": line.dash ?? null, "stroke-linejoin": "round" }),
    line.values.map((value, i) => (value === null || !Number.isFinite(value) ? null : s("circle", { cx: x(xs[i]), cy: y(value), r: xs.length > 24 ? 1.8 : 2.8, fill: line.hollow ? c.panel : line.colour, stroke: line.colour, "stroke-width": 1.4 },
      s("title", {}, `${line.name}, ${names ? names[i] : `${xTitle} ${xs[i]}`}: ${Number(value.toPrecision(4))}`))))]);
  return s("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": aria },
    marks.map((value) => s("rect", { x: x(value) - half, y: top, width: 2 * half, height: tall, fill: c.mark, "fill-opacity": 0.13 })),
    band ? s("rect", { x: x(band[0]), y: top, width: Math.max(2, x(band[1]) - x(band[0])), height: tall, fill: c.accent, "fill-opacity": 0.12 }) : null,
    grid, at === null ? null : s("line", { x1: x(at), x2: x(at), y1: top, y2: top + tall, stroke: c.accent, "stroke-width": 2 }),
    shapes, axis, text(left + inner / 2, HEIGHT - 4, xTitle, { "text-anchor": "middle" }));
}

/** bars: [{name, value, colour, note}], largest scale 1.15 of the top. */
export function bars({ bars: given, width = 520, aria, shown }) {
  const c = palette(), row = 24, left = Math.min(0.46 * width, 14 + 6.6 * Math.max(...given.map((bar) => bar.name.length)));
  const top = Math.max(...given.map((bar) => bar.value ?? 0), 1e-9), inner = width - left - 64;
  return s("svg", { viewBox: `0 0 ${width} ${given.length * row + 4}`, width, height: given.length * row + 4, role: "img", "aria-label": aria },
    given.map((bar, i) => [
      s("text", { x: left - 8, y: i * row + 17, "text-anchor": "end", "font-family": FONT, "font-size": 12, fill: c.ink }, bar.name),
      s("rect", { x: left, y: i * row + 5, width: Math.max(1, ((bar.value ?? 0) / top) * inner), height: row - 8, rx: 2, fill: bar.colour }, s("title", {}, `${bar.name}: ${shown(bar.value)}`)),
      s("text", { x: left + Math.max(1, ((bar.value ?? 0) / top) * inner) + 6, y: i * row + 17, "font-family": FONT, "font-size": 12, fill: c.muted }, shown(bar.value))]));
}

/** What a line's colour and dash mean, beside a chart. */
export function key(given) {
  return given.map((line) => s("svg", { width: 26, height: 10, "aria-hidden": true },
    s("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: line.colour, "stroke-width": 2.5, "stroke-dasharray": line.dash ?? null }),
    s("circle", { cx: 13, cy: 5, r: 3, fill: line.hollow ? palette().panel : line.colour, stroke: line.colour, "stroke-width": 1.4 })));
}
