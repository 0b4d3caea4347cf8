"""The fact explorer: what goes into the page, and what a reader does with it in a real Chromium."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shlex
import shutil
import sys
import zlib
from dataclasses import replace
from html import unescape
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from page_driver import drive

import kt
from kt._util.text import visible
from kt.cli import main
from kt.demo.loop import run_loop
from kt.errors import KtError
from kt.evaluation.scores import Comparison
from kt.explorer import explore, write_report
from kt.explorer.maps import trace_map
from kt.explorer.numbers import COARSE, UNIT
from kt.explorer.page import bundle, packed, page_data
from kt.explorer.rows import Rows
from kt.figures import heatmap
from kt.probing import Probe
from kt.probing.lens import KINDS, POSITIONS, LensReading
from kt.report import Figure, Section, render
from kt.runs.folder import FILES
from kt.runs.report import Run
from kt.tracing.means import grid

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = os.environ.get("AXE_CORE", "")
"""A copy of axe-core's axe.min.js (`npm install axe-core`), which is not shipped."""
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


@pytest.fixture(scope="module")
def loop():
    """A small whole loop on the demo model."""
    facts = kt.load_facts("demo", limit=400)
    return run_loop(kt.load("demo"), facts, n_trace=3, n_edits=2, samples=2, n_probe=4, max_tokens=2000)


@pytest.fixture(scope="module")
def run(loop, tmp_path_factory):
    """Its files, with a manifest as a command leaves one."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    folder.mkdir()
    loop.save(folder)
    config = {"model": "demo", "facts": "my facts.json", "limit": "3", "dtype": "auto"}
    manifest = {"command_line": ["kt", "demo", "--out", str(folder)], "config": config, "model": {"id": "demo"}}
    return Run(folder, manifest, folder)


def unpacked(text):
    """The data as the page's script reads it."""
    return json.loads(zlib.decompress(base64.b64decode(text)))


@pytest.fixture(scope="module")
def data(run):
    return unpacked(packed(page_data([run])))


@pytest.fixture(scope="module")
def page(run):
    return write_report([run], run.folder.parent / "report.html")


def test_facts_are_joined_by_their_prompt_and_the_edited_ones_come_first(data, loop):
    prompts = [fact["prompt"] for fact in data["facts"]]
    assert len(prompts) == len(set(prompts))
    assert {fact.prompt for fact in loop.trace.facts} | {r.prompt for r in loop.edit.report} <= set(prompts)
    edited = [fact for fact in data["facts"] if "edited" in fact["was"]]
    assert data["facts"][:2] == edited and all({"scored", "probed"} <= set(fact["was"]) for fact in edited)
    request = next(r for r in loop.edit.report if r.prompt == edited[0]["prompt"])
    assert (edited[0]["old"], edited[0]["new"]) == (request.answer, request.target)
    assert edited[0]["rank"] == list(request.target_rank)
    success = loop.after.values["edit_success_tf_exact"]
    assert [f["scores"]["edit_success_tf_exact"][1] for f in edited] == [success[f["id"]] for f in edited]
    assert [fact["state"] for fact in data["facts"]] == sorted(fact["state"] for fact in data["facts"])


def test_a_map_holds_the_effects_that_were_measured(data, loop):
    [trace] = data["traces"]
    fact = loop.trace.facts[0]
    [place] = [i for i, each in enumerate(data["facts"]) if each["prompt"] == fact.prompt]
    shown = trace["facts"][str(place)]
    tokens = loop.trace.shown_tokens(fact)
    assert shown["rows"] == [fact.tokens[token] for token in tokens]
    for kind in loop.trace.kinds:
        cells = np.array(shown["cells"][kind]["logit_diff"]["v"]) / UNIT
        np.testing.assert_allclose(cells, fact.effect(kind, "logit_diff").T[tokens], atol=0.51 / UNIT)
    mean = np.array(trace["mean"]["cells"]["mlp"]["prob"]["v"]) / UNIT
    np.testing.assert_allclose(mean, grid(loop.trace, "mlp", "prob")["values"], atol=0.51 / UNIT)
    assert data["edited"]["mlp"] and data["edited"]["attn"]


def test_tokens_far_before_the_subject_are_left_out_of_a_map_and_counted():
    """A chat template's, for one; a row still knows which token it is, for what was read there."""
    far = "One day in spring, as all of us know, and as they say at home, the government of {} meets in"
    fact = kt.Fact(id="1", prompt=far, subject="Bulgaria", answer="Sofia", foil="Rome")
    trace = kt.causal_trace(kt.load("demo"), [fact], kinds=("mlp",), samples=1, keep="all")
    [traced] = trace.facts
    [own] = trace_map(trace, "a", Rows([trace]))["facts"].values()
    assert own["tokens"] == trace.shown_tokens(traced) and own["tokens"][0] == own["hidden"] == traced.span.start - 4
    assert [row.strip() for row in own["rows"]] == [traced.tokens[t].strip() for t in own["tokens"]]
    effects = traced.effects("mlp", "prob").mean(-1)
    assert np.allclose(own["cells"]["mlp"]["prob"]["v"], effects[:, own["tokens"]].T * UNIT, atol=0.51)
    assert own["subject"][0] == 4 and own["tokens"][4] == traced.span.start


def test_the_lens_holds_ranks_before_and_after(data, loop):
    states = {state["name"]: state for state in data["lens"]["states"]}
    assert set(states) == {"before", "after"}
    fact = loop.residual.facts[0]
    [place] = [i for i, each in enumerate(data["facts"]) if each["prompt"] == fact.prompt]
    for name, state in states.items():
        rank = np.array(state["facts"][str(place)]["rank"])
        assert (rank == loop.residual.readings[name].rank[0, ..., :2].transpose(0, 1, 3, 2)).all()


def test_the_top_tokens_of_a_cell_are_those_of_the_lens_before_and_after(data, loop, run):
    states, texts = data["lens"]["states"], data["lens"]["tokens"]
    known = loop.residual.metadata["tokens"]
    changed, named = 0, []
    for i, fact in enumerate(loop.residual.facts):
        place = str(next(n for n, each in enumerate(data["facts"]) if each["prompt"] == fact.prompt))
        before = states[0]["tops"][place]["at"]
        for state in states:
            reading, tops = loop.residual.readings[state["name"]], state["tops"][place]
            for token, place_of in zip((fact.original_id, fact.target_id), tops["answers"], strict=True):
                assert place_of is None or texts[place_of] == visible(known[str(token)])
            named += [place_of for place_of in tops["answers"] if place_of is not None]
            for (p, at), k, layer in product(enumerate(POSITIONS), range(len(KINDS)), loop.residual.layers):
                cell = tops["at"][at][k][layer]
                changed += state is not states[0] and cell != 0
                cell = cell or before[at][k][layer]
                ids, prob = reading.top[i, p, k, layer], reading.top_prob[i, p, k, layer]
                assert [texts[token] for token in cell[: len(ids)]] == [visible(known[str(t)]) for t in ids]
                np.testing.assert_allclose(np.array(cell[len(ids) :]) / COARSE, prob, atol=0.51 / COARSE)
    assert changed > 10 and named
    probe = Probe.load(run.folder / "probe.safetensors")
    first = probe.reading.rank == 0
    assert (probe.reading.top[..., :1].repeat(2, -1) == ids_of(probe))[first].all() and first.any()


def ids_of(probe):
    """The two answers' first tokens, in the shape of the ranks."""
    ids = np.array([[fact.original_id, fact.target_id] for fact in probe.facts])
    return np.broadcast_to(ids[:, None, None, None], probe.reading.rank.shape)


def test_a_run_without_top_tokens_is_shown_and_says_how_they_are_read(loop, tmp_path):
    readings = {name: r._replace(top=None, top_prob=None) for name, r in loop.residual.readings.items()}
    replace(loop.residual, readings=readings).save(tmp_path / "residual.safetensors")
    data = page_data([Run.of(tmp_path)])
    assert all(set(state["tops"].values()) == {None} for state in data["lens"]["states"])
    assert data["commands"]["probe"][:2] == ["kt", "probe"]


def test_neighbours_that_changed_are_those_whose_next_token_did(data, loop):
    before = {(s.record, *s.key): s for s in loop.before.samples}
    near = [s for s in loop.after.samples if s.role == "neighbourhood"]
    moved = sum(s.predicted_ids[0] != before[(s.record, *s.key)].predicted_ids[0] for s in near)
    shown = [item for fact in data["facts"] for item in fact["near"]]
    assert len(shown) == len(near) and sum(item["changed"] for item in shown) == moved


def test_what_is_missing_is_named_with_a_command_that_can_be_pasted(data, run):
    commands = {each["what"]: shlex.split(each["command"]) for each in data["missing"]}
    assert commands["Success by α"] == ["kt", "sweep", "alpha", "-m", "demo", "-f", "my facts.json", "--limit", "3"]
    merged = commands["Maps of the edited model"]
    assert merged[:3] == ["kt", "export", str(run.folder / "edit.safetensors")] and "&&" in merged
    assert not any("locality" in what for what in commands)


def test_a_trace_alone_is_shown_with_what_it_lacks(loop, tmp_path):
    loop.trace.save(tmp_path / "arrays.safetensors")
    data = page_data([Run.of(tmp_path)])
    assert data["lens"] is None and data["edits"] == [] and data["first"] == -1 and data["columns"] == []
    assert {each["command"].split()[1] for each in data["missing"]} == {
        *("heatmap", "apply-edit", "eval", "probe", "sweep")
    }
    assert explore([tmp_path]).save(tmp_path / "page.html").stat().st_size < 200_000


EVIL = "</script><!-- <script>\u2028\u2029<img src=x onerror=alert(1)> \ud800 \u202e{{7*7}}"


def test_nothing_in_the_data_can_act_on_the_page():
    text = packed({EVIL: [EVIL]})
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", text)
    assert unpacked(text) == {EVIL: [EVIL]}


def test_modules_stand_behind_what_they_import_and_the_page_runs_no_other_script(loop, tmp_path):
    script = bundle()
    assert "import {" not in script and "export " not in script
    made = [script.index(f"const kt_{name} = ") for name in ("dom", "state", "facts", "views", "map", "main")]
    assert made == sorted(made)
    loop.trace.save(tmp_path / "arrays.safetensors")
    html = explore(tmp_path).html
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)[1]
    assert "script-src &#39;sha256-" in policy and "script-src &#39;unsafe" not in policy
    assert not re.search(r'(src|href)="(?!#|data:)', html)


def test_in_a_notebook_it_is_a_frame_in_which_nothing_leaves_the_page(loop, tmp_path):
    loop.trace.save(tmp_path / "arrays.safetensors")
    shown = explore(tmp_path)
    frame = shown._repr_html_()
    assert frame.startswith("<iframe") and frame.count("<") == 2 and unescape(frame).count(shown.html) == 1
    assert repr(shown) == "Explorer()"


def test_explore_refuses_what_is_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["explore"]) == 2 and "run folders" in capsys.readouterr().err
    (tmp_path / "page.html").write_text("mine")
    assert main(["explore", ".", "-o", "page.html"]) == 2 and (tmp_path / "page.html").read_text() == "mine"
    for runs in ([], tmp_path):
        with pytest.raises(KtError, match="no facts to explore"):
            explore(runs)


@browser
def test_the_probability_of_an_answer_that_no_float_can_hold_is_told_by_its_logarithm(loop, tmp_path):
    first, *rest = loop.edit.report
    report = [replace(first, target_prob=(0.0, 0.25), answer_prob=(0.5, 0.0)), *rest]
    logs = [{"target": [-1000.0, float(np.log(0.25))], "answer": [float(np.log(0.5)), -950.0]}, *({} for _ in rest)]
    edit = kt.Edit(loop.edit.updates, loop.edit.manifest | {"log_probs": logs}, report=report)
    [row] = [row.as_dict() for row in Rows([edit]).rows if row.prompt == first.prompt]
    assert row["prob"] == ["5.1e-435", 0.25] and row["oldProb"] == [0.5, "2.6e-413"]
    edit.save(tmp_path / FILES["edit"])
    loop.trace.save(tmp_path / FILES["trace"])

    async def visit(tab):
        await tab.open(path, address=f"#fact={[r.prompt for r in Rows([edit]).rows].index(first.prompt)}")
        cells = await tab.js("[...document.querySelectorAll('table.x-small tbody td')].map(e => e.innerText)")
        assert cells[:4] == ["5.1e-435", "0.250", "0.500", "2.6e-413"]

    path = explore([tmp_path]).save(tmp_path / "page.html")
    drive(visit)


@browser
def test_keys_and_clicks_move_through_facts_and_cells_and_the_address_keeps_them(page, data):
    async def visit(tab):
        await tab.open(page)
        assert await tab.js("document.querySelector('tr[aria-selected=true]').dataset.fact") == "0"
        await tab.press("j")
        assert await tab.js("location.hash") == "#fact=1"
        await tab.click("[data-value=attn]")
        await tab.click("[data-cell='1.2']")
        assert await tab.js("location.hash") == "#fact=1&map=attn&cell=1.2"
        assert "layer 2" in await tab.js("document.querySelector('.x-pin').innerText")
        await tab.js("document.querySelector('.x-map svg[role=grid]').focus()")
        await tab.press("ArrowDown", "ArrowRight", "Enter")
        assert await tab.js("location.hash.split('cell=')[1]") == "2.3"
        await tab.press("Escape")
        assert "cell" not in await tab.js("location.hash")
        await tab.press("/")
        await tab.press(*"map")
        shown = await tab.js("[...document.querySelectorAll('.x-list tbody .x-prompt')].map(e => e.innerText)")
        named = [" ".join(str(fact[n]) for n in ("prompt", "old", "new", "id", "relation")) for fact in data["facts"]]
        found = [fact["prompt"] for fact, text in zip(data["facts"], named, strict=True) if "map" in text.lower()]
        assert shown == found and 0 < len(found) < len(data["facts"])
        await tab.press("Escape", "?")
        assert await tab.js("document.querySelector('dialog').open")
        address = await tab.js("location.hash")
        await tab.open(page, address="#fact=0&map=lens&cell=3.4")
        tops = await tab.js("[...document.querySelectorAll('.x-tops tbody .x-token')].map(e => e.innerText)")
        cells = [state["tops"]["0"]["at"]["prediction"][0][4] for state in data["lens"]["states"]]
        wanted = [cells[0], cells[1] or cells[0]]
        shown = [data["lens"]["tokens"][wanted[i % 2][i // 2]] for i in range(2 * 5)]
        assert [text.strip("· ") for text in tops] == [text.strip() or "–" for text in shown]
        await tab.open(page, address="#fact=all")
        assert "choose a fact" in await tab.js("document.querySelector('.x-detail').innerText")
        await tab.open(page, address="#fact=0&map=lens&state=diff&metric=prob&answer=new&cell=3.4&theme=dark")
        seen = await tab.js("document.querySelector('.x-map').innerText")
        assert "after less before" in seen and "new answer" in seen
        assert await tab.js("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)"
        assert await tab.js("document.querySelector('[data-cell=\"3.4\"]').getAttribute('aria-selected')") == "true"
        assert "find=map" in address

    drive(visit)


@browser
def test_a_row_of_means_says_of_how_many_facts_each_is_and_agrees_with_the_head(page, data, loop):
    """Of 10 edited facts among 122, say; and a share of leads is no mean of shares, which count a small lead fully."""

    async def visit(tab):
        await tab.open(page)
        shown = await tab.js("[...document.querySelectorAll('.x-all .number')].map(e => e.innerText)")
        seen = {column["key"]: text.split("\n") for column, text in zip(data["columns"], shown, strict=True)}
        score = loop.residual.score
        assert seen.pop("residual") == [f"{score.mean:.2f}".replace("-", "\N{MINUS SIGN}"), f"n = {score.n}"]
        assert f"{score.mean:.3f}" in await tab.js("document.querySelector('.cards').innerText")
        means = {key: loop.after.metrics[key] for key in seen}
        assert seen == {key: [f"{mean.mean:.0%}", f"n = {mean.n}"] for key, mean in means.items()}
        assert all(mean.n < len(data["facts"]) for mean in means.values())
        await tab.open(page, address="#fact=all&map=lens")
        assert f"over {score.n} facts" in await tab.js("document.querySelector('.x-map').innerText")

    drive(visit)


def test_of_several_edits_the_table_shows_the_one_that_the_head_is_about(loop):
    """The head takes the first; the rows of the same facts do too."""
    first, second = (
        loop.after,
        replace(loop.after, values={"edit_success_tf_exact": dict.fromkeys(loop.after.records, 0.0)}),
    )
    pairs = [Comparison(loop.before, scores) for scores in (first, second)]
    for given in (pairs, pairs[::-1]):
        rows = [row for row in Rows(given).rows if row.scores]
        wanted = given[0].after.values["edit_success_tf_exact"]
        assert rows and all(row.scores["edit_success_tf_exact"][1] == wanted[row.id] for row in rows)


@browser
def test_every_figure_has_a_table_and_saves_its_numbers(page):
    async def visit(tab):
        await tab.open(page)
        figures = await tab.js("document.querySelectorAll('.x-figure').length")
        assert figures >= 4
        await tab.js("document.querySelectorAll('.x-figure .x-table').forEach(e => { e.open = true; })")
        await tab.until(f"document.querySelectorAll('.x-figure table').length === {figures}")
        await tab.js(
            "window.saved = []; URL.createObjectURL = blob => { saved.push(blob); return '#'; };"
            "document.querySelectorAll('.x-figure .x-save button').forEach(e => e.click())"
        )
        texts = await tab.js("Promise.all(saved.map(blob => blob.text()))")
        tables = [list(csv.reader(io.StringIO(text.lstrip("\ufeff")))) for text in texts if "<svg" not in text]
        assert len(tables) == figures and all(len(rows) > 1 and len({len(r) for r in rows}) == 1 for rows in tables)
        assert all("var(" not in text and "<svg" in text[:200] for text in texts if "<svg" in text)
        return texts

    drive(visit)


@browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_figure_of_a_report_stands_on_the_ground_of_the_page(tmp_path, dark):
    sections = [Section("A figure", [Figure(heatmap(np.eye(2), ["a", " b"], title="t"), "a caption")])]
    path = tmp_path / "report.html"
    path.write_text(render("t", sections), encoding="utf-8")

    async def visit(tab):
        await tab.open(path, 1400, dark, ready="document.querySelector('.plot .main-svg') !== null")
        left, top = await tab.js("(r => [r.x, r.y + scrollY])(document.querySelector('.plot').getBoundingClientRect())")
        shot = base64.b64encode((await tab.picture(tmp_path / "page.png")).read_bytes()).decode()
        await tab.send("Page.navigate", url="about:blank")
        code = f"""(async () => {{
            const image = new Image(), canvas = document.createElement("canvas").getContext("2d");
            image.src = "data:image/png;base64,{shot}";
            await image.decode();
            Object.assign(canvas.canvas, {{ width: image.width, height: image.height }});
            canvas.drawImage(image, 0, 0);
            return [[5, 5], [{left} + 20, {top} + 5]].map(at => canvas.getImageData(...at, 1, 1).data.join());
        }})()"""
        page, figure = await tab.js(code)
        assert page == figure and (page == "255,255,255,255") != dark

    drive(visit)


@browser
@pytest.mark.parametrize(
    ("width", "dark"), [(420, False), (420, True), (768, False), (1400, False), (1400, True), (2000, False)]
)
def test_nothing_is_wider_than_the_page_and_axe_finds_nothing_serious(page, tmp_path, width, dark):
    async def visit(tab):
        await tab.open(page, width, dark)
        for wide in ("documentElement", "querySelector('.x-list')"):  # every column of the facts is in sight
            assert await tab.js(f"document.{wide}.scrollWidth <= document.{wide}.clientWidth")
        picture = await tab.picture(tmp_path / "page.png")
        assert picture.stat().st_size > 50_000
        if AXE:
            await tab.js(Path(AXE).read_text(encoding="utf-8") + ";0")
            found = await tab.js("axe.run().then(f => f.violations.map(v => [v.impact, v.id, v.nodes[0].html]))")
            assert [each for each in found if each[0] in ("serious", "critical")] == []

    drive(visit)


@browser
def test_a_folded_section_draws_its_figures_when_it_is_opened(page):
    async def visit(tab):
        await tab.open(page, 420)
        assert await tab.js("typeof Plotly") == "undefined"
        await tab.click("details.section > summary")
        await tab.until("document.querySelectorAll('details[open] .main-svg').length > 0")
        drawn, around = (f"[...document.querySelectorAll('details[open] {name}')]" for name in (".main-svg", ".plot"))
        # A figure is no smaller than can be read: it scrolls in its own frame, and the page does not.
        await tab.until(f"{around}.every(e => e.getBoundingClientRect().right <= 421)")
        await tab.until(f"{drawn}.every(e => Math.abs(e.getBoundingClientRect().width - 570) < 2)")
        assert await tab.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")

    drive(visit)


@browser
def test_each_result_alone_is_drawn_and_two_traces_give_their_difference(run, tmp_path):
    pages, heads = [], {}
    for name in ("edit.safetensors", "probe.safetensors", "residual.safetensors", "scores.json", "arrays.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(run.folder / name, folder)
        pages.append(explore(folder).save(tmp_path / f"{name}.html"))
    twice = explore([folder, shutil.copytree(folder, tmp_path / "again")]).save(tmp_path / "twice.html")

    async def visit(tab):
        for page in pages:
            await tab.open(page)
            await tab.press("j", "t", "k")
            heads[page.name] = await tab.js("document.querySelector('h1').innerText")
        await tab.open(twice, address="#state=diff&map=attn")
        shown = await tab.js("[...document.querySelectorAll('[data-cell]')].map(e => e.getAttribute('aria-label'))")
        assert shown and all(label.endswith(": 0.000") for label in shown)

    drive(visit)
    assert "edited by" in heads["edit.safetensors.html"] and "traced" in heads["arrays.safetensors.html"]


def tiled(loop, n=200, layers=30):
    """A trace and a residual of many facts with random numbers, which deflate worse than real ones."""
    rng = np.random.default_rng(0)
    facts, old = [], loop.trace.facts
    for i in range(n):
        fact = old[i % len(old)]
        shape = (layers, len(fact.tokens), len(fact.corrupted["prob"]))
        patched = {
            kind: {m: (0.1 + rng.exponential(0.05, shape)).astype(np.float32) for m in ("prob", "logit_diff")}
            for kind in loop.trace.kinds
        }
        facts.append(replace(fact, index=i, prompt=f"{fact.prompt} {i}", patched=patched))
    trace = replace(loop.trace, facts=tuple(facts), metadata=dict(loop.trace.metadata) | {"n_layers": layers})
    residual, which = loop.residual, np.arange(n) % len(loop.residual.facts)

    def grown(reading):
        rank = rng.integers(0, 49_152, (n, *reading.rank.shape[1:3], layers, reading.rank.shape[-1])).astype(np.int32)
        prob = (rng.random(rank.shape) ** 4).astype(np.float32)
        top = rng.zipf(1.3, (*rank.shape[:-1], 5)).clip(max=49_151).astype(np.int32)
        first = np.sort(prob[..., :1] * rng.random(top.shape) ** 2)[..., ::-1].astype(np.float32)
        return LensReading(prob, rank, reading.start_prob[which], reading.start_rank[which], None, top, first)

    return trace, replace(
        residual,
        facts=tuple(replace(residual.facts[which[i]], index=i, prompt=fact.prompt) for i, fact in enumerate(facts)),
        controls=tuple(residual.controls[i] for i in which),
        layers=tuple(range(layers)),
        readings={state: grown(reading) for state, reading in residual.readings.items()},
        elsewhere=np.repeat(residual.elsewhere[which], 4, axis=3)[..., :layers],
        attacks=replace_attacks(residual.attacks, which),
        metadata=dict(residual.metadata) | {"vocab": 49_152, "tokens": {str(i): f" word{i}" for i in range(49_152)}},
    )


def replace_attacks(attacks, which):
    return type(attacks)(attacks.names, attacks.before[which], attacks.after[which])


@browser
@pytest.mark.slow
def test_two_hundred_facts_of_thirty_layers_stay_below_five_megabytes(loop, tmp_path):
    trace, residual = tiled(loop)
    trace.save(tmp_path / "arrays.safetensors")
    residual.save(tmp_path / "residual.safetensors")
    page = explore(tmp_path).save(tmp_path / "page.html")

    async def visit(tab):
        times = []
        for _ in range(5):
            await tab.open(page)
            times.append(await tab.js("performance.getEntriesByName('kt-drawn')[0].startTime / 1000"))
        return times

    size, times = page.stat().st_size / 1e6, sorted(drive(visit))
    longest = max(len(fact.tokens) for fact in trace.facts)
    sys.stderr.write(f"{size:.2f} MB, up to {longest} tokens; drawn after {times[0]:.2f} to {times[-1]:.2f} s\n")
    assert size < 5 and times[0] < 3
