"""The explorer with a model behind it: messages in, state out; and once in a real Chromium."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from editing_help import fast
from page_driver import drive
from test_explorer import AXE, browser, unpacked

import kt
from kt.errors import KtError, install_hint
from kt.explorer.live import Live
from kt.explorer.page import bundle

FT = fast("ft", layers_mlp=(2,))
TYPED = {"prompt": "The capital of {} is", "subject": "France", "answer": "", "target": ""}


@pytest.fixture(scope="module")
def model():
    return kt.load("demo")


def weights(model):
    return {name: weight.clone() for name, weight in model.module.state_dict().items()}


def same(model, before):
    return all(torch.equal(weight, before[name]) for name, weight in model.module.state_dict().items())


def shown(live):
    return unpacked(live.state["data"])


def test_a_typed_prompt_is_traced_and_read_at_every_token(model):
    heard = []
    live = Live(model, changed=heard.append, samples=2)
    assert shown(live)["facts"] == []
    heard.clear()
    live.act({"do": "trace", **TYPED})
    assert not live.state["status"]["error"] and heard.count("data") == 1 and heard.count("status") > 3
    data = shown(live)
    [fact] = data["facts"]
    assert data["chosen"] == 0 and fact["prompt"] == "The capital of France is" and fact["old"]
    rows, [state] = data["traces"][0]["facts"]["0"]["rows"], data["lens"]["states"]
    assert set(state["tops"]["0"]["at"]) == {*map(str, range(len(rows))), "subject_last", "prediction"}
    top = state["tops"]["0"]["at"]
    assert top[str(len(rows) - 1)] == top["prediction"]
    assert fact["texts"][0]["before"].startswith(fact["old"])


def test_an_option_of_an_edit_goes_by_every_name_that_an_edit_takes(model):
    live = Live(model, samples=2, layers=(2,))  # as docs/explore.md has it
    live.act({"do": "edit", **TYPED, "target": "Rome", "method": "ft"})
    assert [weight.split(".")[2] for weight in live.edits[0].updates] == ["2"]
    live.revert()
    with pytest.raises(KtError, match="the widget takes no layer"):
        Live(model, layer=(2,))


def test_an_edit_is_applied_reverted_and_applied_again_and_the_model_is_its_old_self_without_it(model):
    before = weights(model)
    live = Live(model, samples=2, **FT)
    typed = TYPED | {"target": "Rome"}
    live.act({"do": "trace", **typed})
    live.act({"do": "edit", **typed, "method": "ft"})
    assert not live.state["status"]["error"], live.state["status"]
    assert [edit["on"] for edit in live.state["edits"]] == [True] and not same(model, before)
    written = weights(model)
    data = shown(live)
    assert [state["name"] for state in data["lens"]["states"]] == ["before", "after"]
    text = data["facts"][0]["texts"][0]
    assert text["before"] != text["after"] and data["edits"][0]["weights"] and data["edited"]["mlp"] == [2]
    live.act({"do": "trace", **typed})
    assert [trace["name"] for trace in shown(live)["traces"]] == ["before", "after"]
    live.act({"do": "revert", "edit": 0})
    assert same(model, before) and live.state["edits"][0]["on"] is False
    live.act({"do": "apply", "edit": 0})
    assert same(model, written)
    other = {"do": "edit", "prompt": "The capital of {} is", "subject": "Italy", "target": "Oslo", "method": "ft"}
    live.act(other)
    assert [edit["on"] for edit in live.state["edits"]] == [True, True]
    live.act({"do": "revert", "edit": 1})
    assert same(model, written)
    live.act({"do": "revert"})
    assert same(model, before) and len(shown(live)["facts"]) == 2


def test_of_an_edit_that_puts_text_before_prompts_the_text_is_shown_and_no_layer_is_read(model):
    live = Live(model, samples=2)
    typed = TYPED | {"target": "Rome"}
    live.act({"do": "edit", **typed, "method": "ice"})
    status, data = live.state["status"], shown(live)
    assert not status["error"] and "read bare prompts" in status["text"]
    assert [state["name"] for state in data["lens"]["states"]] == ["before"]
    text = data["facts"][0]["texts"][0]
    assert text["before"] and text["after"] and text["before"] != text["after"]
    live.act({"do": "trace", **typed})
    status = live.state["status"]
    assert status["error"] and "a trace reads bare prompts" in status["text"] and not shown(live)["traces"]
    live.revert()
    live.act({"do": "trace", **typed})
    assert not live.state["status"]["error"] and shown(live)["traces"]


def test_the_layer_of_an_adapter_is_marked_as_edited(model):
    live = Live(model, samples=2, layers=(2,), v_num_grad_steps=5)
    live.act({"do": "edit", **TYPED, "target": "Rome", "method": "grace"})
    data = shown(live)
    assert data["edited"] == {"mlp": [2]} and [state["name"] for state in data["lens"]["states"]] == ["before", "after"]
    live.revert()


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"do": "trace", "prompt": "The capital of France is"}, "subject"),
        ({"do": "trace", "prompt": "The capital of {} is", "subject": ""}, "subject"),
        ({"do": "trace", "prompt": "No place for it", "subject": "France"}, "France"),
        ({"do": "edit", **TYPED}, "new answer"),
        ({"do": "edit", **TYPED, "target": "Rome", "method": "memti"}, "memit"),
        ({"do": "apply", "edit": 7}, "there is no edit 7"),
        ({"do": "revert", "edit": "0"}, "there is no edit"),
        ({"do": "explode"}, "asks for nothing known"),
        ({}, "asks for nothing known"),
    ],
)
def test_what_cannot_be_done_is_said_in_the_status_and_changes_nothing(model, message, says):
    before = weights(model)
    live = Live(model)
    live.act(message)
    assert live.state["status"]["error"] and says in live.state["status"]["text"]
    assert same(model, before) and shown(live)["facts"] == []


def test_an_edit_that_fails_leaves_those_that_were_applied(model):
    live = Live(model, samples=2, **FT)
    live.act({"do": "edit", **TYPED, "target": "Rome", "method": "ft"})
    written = weights(model)
    live.act({"do": "edit", **TYPED, "target": "Rome", "method": "no such"})
    assert live.state["status"]["error"] and same(model, written) and live.on == [0]
    live.revert()


def test_edits_of_runs_can_be_applied(model, tmp_path):
    fact = kt.Fact("The capital of {} is", "France", "Paris", target="Rome", id="1")
    kt.edit(model, [fact], method="ft", **FT).save(tmp_path / "edit.safetensors")
    before = weights(model)
    live = Live(model, tmp_path)
    assert [edit["on"] for edit in live.state["edits"]] == [False] and shown(live)["facts"][0]["new"] == "Rome"
    live.act({"do": "apply", "edit": 0})
    assert not same(model, before)
    live.revert()
    assert same(model, before)


def test_without_anywidget_the_message_names_the_extra(model, monkeypatch):
    from kt.explorer import widget

    monkeypatch.setitem(sys.modules, "anywidget", None)
    widget._kind.cache_clear()
    with pytest.raises(KtError, match="anywidget") as raised:
        kt.widget(model)
    assert install_hint("widget") in str(raised.value)
    widget._kind.cache_clear()


def test_the_widget_takes_messages_and_keeps_the_view(model):
    pytest.importorskip("anywidget")
    shown_by = kt.widget(model, samples=2)
    assert shown_by.status["text"].startswith(model.name) and "ft" in shown_by.methods
    shown_by._handle_custom_msg({"do": "trace", **TYPED}, [])
    assert unpacked(shown_by.data)["facts"][0]["prompt"] == "The capital of France is"
    assert "view" in shown_by.keys and "export default" in shown_by._esm


def test_page_and_widget_are_made_of_the_same_modules():
    from kt.explorer.widget import script

    page, given = bundle(), script()
    shared = [part for part in page.split("const kt_")[1:] if not part.startswith("page")]
    assert len(shared) > 8 and all(part in given for part in shared)
    assert "location" not in given and "document.documentElement.dataset" not in given


STAND_IN = """<!doctype html><html lang="en"><title>widget</title>
<body data-jp-theme-light="false"><main></main><script>
const heard = {}, sent = [], state = STATE, place = document.querySelector("main");
const model = {
  get: (name) => state[name], send: (message) => sent.push(message), save_changes() {}, off() {},
  set: (name, value) => { state[name] = value; }, on: (event, react) => { (heard[event] ??= []).push(react); },
};
function told(given) {
  Object.assign(state, given);
  for (const name of Object.keys(given)) for (const react of heard["change:" + name] ?? []) react();
}
const root = () => place.firstChild.shadowRoot;
const code = URL.createObjectURL(new Blob([SCRIPT], { type: "text/javascript" }));
import(code).then((module) => module.default.render({ model, el: place }));
</script></body></html>"""
"""What a notebook does with the widget: a place, its state, and messages to the kernel."""


@browser
def test_in_a_browser_it_sends_what_is_typed_and_shows_what_the_model_answers(model, tmp_path):
    from kt.explorer.widget import script, style

    live = Live(model, samples=2, **FT)
    state = {"view": "", "style": style(), **live.state}
    quoted = [json.dumps(part).replace("</", "<\\/") for part in (state, script())]
    page = tmp_path / "widget.html"
    page.write_text(STAND_IN.replace("STATE", quoted[0]).replace("SCRIPT", quoted[1]), encoding="utf-8")

    async def visit(tab):
        ready = "root()?.querySelector('#kt-explorer')?.dataset.ready === ''"
        await tab.open(page, ready=f"place.firstChild && {ready}")

        async def answer():
            [message] = await tab.js("sent.splice(0)")
            live.act(message)
            await tab.js(f"told({json.dumps(live.state)})")

        await tab.js("root().querySelector('input[name=prompt]').focus()")
        await tab.press(*"d {}?")  # no shortcut of the page or the notebook
        for name, text in (TYPED | {"target": "Rome"}).items():
            await tab.js(f"root().querySelector('input[name={name}]').value = {text!r}")
        await tab.js("root().querySelector('select').value = 'ft'; root().querySelector('[type=submit]').click()")
        await answer()
        await tab.until("root().querySelectorAll('[data-cell]').length > 8")
        await tab.js("[...root().querySelectorAll('.x-live button')].find(e => e.textContent === 'Edit').click()")
        await answer()
        await tab.until("root().querySelector('.x-edits button')?.textContent === 'Revert'")
        await tab.js(
            "root().querySelector('[data-cell=\"4.6\"]').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
        )
        heads = await tab.js("[...root().querySelectorAll('.x-tops thead th')].map(e => e.textContent)")
        assert heads == ["rank", "before", "after"] and "cell=4.6" in await tab.js("state.view")
        ground = "getComputedStyle(root().querySelector('.kt-root')).backgroundColor"
        assert await tab.js(ground) == "rgb(18, 22, 28)"
        await tab.js("document.body.dataset.jpThemeLight = 'true'")  # the notebook's theme is changed
        await tab.until(f"{ground} === 'rgb(255, 255, 255)'")
        await tab.picture(tmp_path / "widget.png")
        if AXE:
            await tab.js(Path(AXE).read_text(encoding="utf-8") + ";0")
            found = await tab.js("axe.run().then(f => f.violations.map(v => [v.impact, v.id, v.nodes[0].html]))")
            assert [each for each in found if each[0] in ("serious", "critical")] == []
        await tab.js("root().querySelector('.x-edits button').click()")
        await answer()
        await tab.until("root().querySelector('.x-edits button')?.textContent === 'Apply'")

    drive(visit)
    assert live.on == []
