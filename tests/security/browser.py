"""Pages in a real headless Chromium: what their elements turned into once their scripts had run."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--allow-file-access-from-files", "--virtual-time-budget=120000", "--window-size=1280,2400"),
)
LOOK = """
const FRAMES = [...document.querySelectorAll("iframe")];
const URLS = ["href", "xlink:href", "src", "srcset", "data", "action", "formaction", "poster", "background"];
const OURS = ["kt-draw", "kt-data", "kt-app"];  // at most one element each counts as the page's own script
function unfolded(page) {
  for (const details of page.querySelectorAll("details")) details.open = true;
  return true;
}
const ready = frame => frame.contentDocument.readyState === "complete" && unfolded(frame.contentDocument)
  && [...frame.contentDocument.querySelectorAll(".plotly-graph-div")].every(div => div.querySelector(".main-svg"));
const hovered = FRAMES.map(() => 0);
function hover(frame, number) {  // the labels of one trace a figure; they are drawn a moment later
  const Plotly = frame.contentWindow.Plotly;
  for (const div of Plotly ? frame.contentDocument.querySelectorAll(".plotly-graph-div") : []) {
    const trace = div.data[number % div.data.length];
    const point = {curveNumber: number % div.data.length, pointNumber: trace.type === "heatmap" ? [0, 0] : 0};
    try { Plotly.Fx.hover(div, [point], (trace.xaxis || "x") + (trace.yaxis || "y")); }
    catch { continue; }  // a trace without points
  }
}
function look(frame, place) {
  const page = frame.contentDocument, elements = [...page.querySelectorAll("*")];
  const attributes = elements.flatMap(e => [...e.attributes].map(a => [e.tagName.toLowerCase(), a.name, a.value]));
  return {
    ready: ready(frame), hovered: hovered[place], title: page.title,
    text: page.body.innerText, drawn: [...page.querySelectorAll("svg")].map(svg => svg.textContent).join(" "),
    figures: page.querySelectorAll(".plotly-graph-div .main-svg").length,
    urls: attributes.filter(([, name]) => URLS.includes(name)),
    handlers: attributes.filter(([, name]) => name.startsWith("on")),
    scripts: page.querySelectorAll("script").length - OURS.filter(id => page.getElementById(id)).length,
    charts: page.querySelectorAll(".plotly-graph-div").length,
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
  };
}
let waits = 0, round = 0;
const timer = setInterval(() => {
  if (!FRAMES.every(ready) && (waits += 1) < 400) return;
  FRAMES.forEach((frame, place) => {
    hovered[place] += frame.contentDocument.querySelectorAll(".hoverlayer text").length;
    hover(frame, round);
  });
  if ((round += 1) < 12) return;
  clearInterval(timer);
  document.getElementById("found").textContent = JSON.stringify(FRAMES.map(look));
}, 300);
"""


def opened(pages: Sequence[Path], folder: Path, seconds: float = 300.0) -> list[dict[str, Any]]:
    """What `LOOK` says of each page, all of them opened by one browser, each in a frame of its own."""
    assert CHROMIUM is not None
    frames = "".join(f'<iframe width="1200" height="2000" src="file://{quote(str(page))}"></iframe>' for page in pages)
    around = folder / "frames.html"
    around.write_text(f'<meta charset="utf-8"><pre id="found"></pre>{frames}<script>{LOOK}</script>', encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", around.as_uri()]
    shown = subprocess.run(command, capture_output=True, timeout=seconds, check=True).stdout.decode("utf-8", "replace")
    found = re.search(r'<pre id="found">(.+?)</pre>', shown, re.DOTALL)
    assert found is not None, "the pages were not ready in time"
    return json.loads(html.unescape(found[1]))
