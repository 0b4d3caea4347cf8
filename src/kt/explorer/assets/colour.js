// Colours of cells. Viridis (van der Walt and Smith, CC0) is read by every kind of colour vision and changes evenly in
// lightness; its first steps are replaced so that zero has nearly the colour of the page. Blue and orange stand for below
// and above zero.

import { isDark } from "./dom.js";

const DARK = ["#1f2330", "#32316a", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const PALE = ["#fbfbf0", "#e6f0c0", "#b5dd8f", "#6ec58a", "#35a58c", "#26828e", "#31688e", "#3e4989", "#482878", "#440154"];
const BLUE = ["#d3e3f1", "#92bfe0", "#4a90c4", "#1f5f99", "#0b3566"];
const ORANGE = ["#fbe3cc", "#f6b880", "#e5833a", "#b35806", "#6b3000"];
const BLUE_DARK = ["#1c2a38", "#23486b", "#2f72ad", "#5aa5e0", "#a9d4f7"];
const ORANGE_DARK = ["#33261a", "#66401a", "#a8631c", "#e08c3a", "#ffc78a"];

function between(colours, share) {
  const at = Math.min(1, Math.max(0, share)) * (colours.length - 1);
  const low = Math.floor(at), high = Math.min(low + 1, colours.length - 1), part = at - low;
  const channel = (colour, i) => parseInt(colour.slice(1 + 2 * i, 3 + 2 * i), 16);
  const mixed = [0, 1, 2].map((i) => Math.round(channel(colours[low], i) * (1 - part) + channel(colours[high], i) * part));
  return "#" + mixed.map((value) => value.toString(16).padStart(2, "0")).join("");
}

/**
 * A scale for numbers: {colour(value), low, high, diverging}.
 * It diverges where asked to, or (without a `low` end) where a quarter of the top lies below zero.
 */
export function scaleOf(numbers, { diverging = false, low = null, high = null } = {}) {
  const known = numbers.filter((value) => value !== null && Number.isFinite(value));
  const top = high ?? Math.max(1e-9, ...known), bottom = low ?? Math.min(0, ...known);
  const [up, down, plain] = isDark() ? [ORANGE_DARK, BLUE_DARK, DARK] : [ORANGE, BLUE, PALE];
  if (diverging || (low === null && bottom < -0.25 * top)) {
    const end = Math.max(Math.abs(top), Math.abs(bottom));
    const middle = isDark() ? "#20252d" : "#f7f7f5";
    const colour = (value) => value === 0 ? middle : between([middle, ...(value > 0 ? up : down)], Math.abs(value) / end);
    return { colour, low: -end, high: end, diverging: true };
  }
  const start = low ?? 0;
  const below = bottom < start ? bottom : null; // small and negative: blue, in steps as large as above zero
  const colour = (value) => value >= start ? between(plain, (value - start) / (top - start || 1)) : between([plain[0], ...down], -value / top);
  return { colour, low: start, high: top, below, diverging: false };
}
