"""Training an editor: its gradient through the model, its bytes, its file, and what is refused."""

import copy
import random
import warnings
from dataclasses import replace

import pytest
import torch
from chat_templates import TEMPLATES
from editing_help import REQUESTS, TRAINING, editor_file, records
from families import tiny_model

import kt
from kt.editing.hyper.editor import known_words
from kt.editing.hyper.settings import TrainingSettings
from kt.editing.hyper.train import Lot, Records, _sites, _Training, split_records
from kt.editing.ultraedit import Running
from kt.errors import BadFile, KtError
from kt.model.chat import Chat
from kt.runs.journal import Journal

METHODS = ("malmen", "mend")


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.mark.parametrize("method", METHODS)
def test_the_networks_gradient_is_that_of_the_outer_loss_through_the_edited_model(method):
    tiny = tiny_model("gpt2")  # others normalise in float32 whatever their dtype
    double = kt.load(tiny.module.double(), tokenizer=tiny.tokenizer)
    settings = TrainingSettings.of(method, {"rank": 3, "edits": 5, "c_edit": 1.0})
    parts = Records(records(), [], [], {})
    training = _Training(double, method, _sites(double, method, (1, 2), None), parts, settings, 0, Journal())
    editor = training.editor
    for parameter in editor.networks.double().parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    editor.running = {shape: Running(**its) for shape, its in training._statistics().items()}
    lot = Lot.drawn(records(), 5, random.Random(0))
    pairs, _ = training._pairs(lot.facts)
    before = double.fingerprint()
    reading = training._read(lot, pairs, learns=True)
    editor.surrogate(pairs, reading.gradients).backward()
    assert double.fingerprint() == before and not any(p.requires_grad for p in double.module.parameters())
    for name, parameter in editor.networks.named_parameters():
        place = int(parameter.grad.abs().argmax())
        flat, losses = parameter.data.view(-1), []
        middle, step = float(flat[place]), 1e-5
        for sign in (1, -1):
            flat[place] = middle + sign * step
            losses.append(training._read(lot, pairs, learns=False).loss)
        flat[place] = middle
        found = float(parameter.grad.view(-1)[place])
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(found, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("method", METHODS)
def test_training_helps_held_out_records_and_a_resumed_one_gives_the_same_bytes(llama, method, tmp_path):
    before = llama.fingerprint()
    made = TRAINING | {"steps": 12}
    whole = kt.train_editor(llama, records(), method, **made)
    assert llama.fingerprint() == before
    assert [check["step"] for check in whole.history] == [0, 3, 6, 9, 12]
    assert min(check["held_out_loss"] for check in whole.history[1:]) < whole.history[0]["held_out_loss"]
    told = []

    def cut(check):
        told.append(check["step"])
        if check["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kt.train_editor(llama, records(), method, journal=Journal(tmp_path), on_check=cut, **made)
    resumed = kt.train_editor(
        llama, records(), method, journal=Journal(tmp_path), on_check=lambda c: told.append(c["step"]), **made
    )
    assert told == [0, 3, 6, 0, 3, 6, 9, 12]
    one, two = whole.save(tmp_path / "one"), resumed.save(tmp_path / "two")
    assert one.read_bytes() == two.read_bytes() and whole.digest == resumed.digest
    other = kt.train_editor(llama, records(), method, seed=1, **TRAINING)
    assert other.digest != whole.digest


def test_training_stops_when_held_out_records_gain_nothing(llama):
    editor = kt.train_editor(llama, records(), "malmen", **(TRAINING | {"lr": 1e-30, "steps": 60, "patience": 2}))
    assert [check["step"] for check in editor.history] == [0, 3, 6] and editor.manifest["best_step"] == 0


def test_no_subject_is_on_both_sides_and_what_cannot_train_is_counted(llama):
    twice = [replace(fact, template="The capital of {} is") for fact in records()]
    spoilt = [replace(records()[0], target=None), replace(twice[0], rephrasings=()), replace(twice[1], neighbours=())]
    spoilt.append(replace(twice[2], neighbours=(kt.Prompt(f"The age of {twice[2].subject} is"),)))
    parts = split_records(llama, [*records(), *twice, *spoilt, records()[3]], 0.25, seed=0)
    sides = [{fact.subject for fact in side} for side in (parts.train, parts.held_out)]
    assert not sides[0] & sides[1] and len(parts.train) + len(parts.held_out) == 48 and len(sides[1]) == 6
    assert parts.left_out == {
        "without a target": 1,
        "without a paraphrase": 1,
        "without an unrelated prompt": 2,
        "with an earlier one's prompt": 1,
    }
    third = split_records(llama, records(), 0.2, 0, 0.07, exclude=records()[:2])
    names = third.subjects()
    assert [len(side) for side in names.values()] == [16, 4, 2] and third.left_out == {"of an excluded subject": 2}
    assert len(set().union(*names.values()) - {"ana rome", "ana paris"}) == 22
    lot = Lot.drawn(parts.train, 8, random.Random(1))
    assert not any(fact.subject in prompt for fact in lot.facts for prompt, _, _ in lot.unrelated)


def test_the_file_is_read_whole_or_refused(llama, tmp_path):
    path = editor_file(llama, "malmen", tmp_path)
    editor = kt.Editor.load(path)
    assert editor.save(tmp_path / "again").read_bytes() == path.read_bytes()
    assert [str(site) for site in editor.sites] == ["mlp.0", "mlp.1"]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    (tmp_path / "changed").write_bytes(content)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "text").write_text("{}")
    edit = kt.edit(llama, REQUESTS, "malmen", editor=path)
    edit.save(tmp_path / "edit")
    for name, words in (
        ("changed", "digest"),
        ("cut", "not a whole"),
        ("text", "not a whole"),
        ("edit", "edit of kt"),
        ("none", "no such file"),
    ):
        with pytest.raises(BadFile, match=words) as caught:
            kt.edit(llama, REQUESTS, "malmen", editor=tmp_path / name)
        assert "\n" not in str(caught.value)


def test_an_edit_says_how_many_of_its_subjects_the_editor_knew(llama, tmp_path):
    path = editor_file(llama, "malmen", tmp_path)
    editor = kt.Editor.load(path)
    split = editor.manifest["subjects"].items()
    sides = {side: [f for f in records() if f.subject.casefold() in names] for side, names in split}
    for some, known, warned in ((sides["test"], 0, False), (sides["train"][:2] + sides["held_out"][:1], 3, True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            edit = kt.edit(llama, some, "malmen", editor=path, check=False)
        seen = edit.manifest["editor_seen"]
        assert seen["subjects"] == len(some) and seen["train"] + seen["held_out"] == known
        words = "3 of 3 subjects were in the training of the editor"
        assert words in (known_words(seen) or "") if warned else known_words(seen) is None
        assert any(words in str(each.message) for each in caught) is warned
    assert known_words(None) is None and known_words({"subjects": 1, "train": "one", "held_out": 0}) is None
    editor.manifest.pop("subjects")  # files of before say nothing
    assert kt.Editor.load(editor.save(tmp_path / "old")).seen(records()) is None


def test_what_the_checks_read_is_counted_apart_from_what_is_held_out(llama, tmp_path):
    path = editor_file(llama, "malmen", tmp_path, rows=2, edits=3, held_out=0.3, test=0.0, steps=3)
    editor, told = kt.Editor.load(path), kt.Editor.load(path).manifest
    assert told["n_held_out"] == 7 and told["n_checked"] == 3
    assert {check["success"]["n"] for check in editor.history} == {3}
    assert "7 of other subjects held out (3 of them are read by the checks)" in editor.tables()[0].caption
    held_out = [fact for fact in records() if fact.subject.casefold() in told["subjects"]["held_out"]]
    read = [fact for fact in held_out if fact.subject.casefold() in told["subjects"]["checked"]]
    unread = [fact for fact in held_out if fact not in read]
    assert len(read) == 3 and editor.seen(read)["checked"] == 3
    edit = kt.edit(llama, unread, "malmen", editor=path, check=False)
    seen = edit.manifest["editor_seen"]
    assert seen["held_out"] == 4 and seen["checked"] == 0 and known_words(seen) is None
    older = {side: n for side, n in seen.items() if side != "checked"}  # which knew of no limit
    assert "4 of 4 subjects were" in known_words(older)
    mixed = kt.EditStack([edit, kt.Edit(edit.updates, edit.manifest | {"editor_seen": older})])
    assert mixed.manifest["editor_seen"]["checked"] == 4


def test_the_total_of_steps_and_a_stack_keep_what_the_editor_knew(llama, tmp_path):
    path = editor_file(llama, "malmen", tmp_path)
    editor = kt.Editor.load(path)
    sides = {
        side: [f for f in records() if f.subject.casefold() in n] for side, n in editor.manifest["subjects"].items()
    }
    first, second = sides["train"][0], sides["held_out"][0]
    again = replace(first, template="The city of the {}", target="Rome" if first.target != "Rome" else "Paris")
    with kt.EditSession(llama, "malmen", editor=path, check=False) as session:
        steps = [session.edit([fact]) for fact in (first, second, again)]
        total = session.total()
        path.rename(tmp_path / "moved")
        without_file = session.total()
    assert total.manifest["editor"] == without_file.manifest["editor"] == editor.digest
    assert total.manifest["editor_seen"] == editor.seen([first, second, again])
    assert "2 of 2 subjects were" in known_words(total.manifest["editor_seen"])
    stack = kt.EditStack(steps)
    for one in (stack, stack.as_sum(), without_file):
        assert one.manifest["editor"] == editor.digest
        assert "3 of 3 subjects were" in known_words(one.manifest["editor_seen"]), (
            "a subject of two edits counts in each"
        )
    other = kt.edit(llama, [first], "ft", num_steps=1, check=False)
    mixed, none = kt.EditStack([other, steps[0]]).manifest, kt.EditStack([other]).manifest
    assert mixed["editor_seen"] == steps[0].manifest["editor_seen"] and not {"editor", "editor_seen"} & {*none}
    old = steps[1].manifest | {"editor": "0" * 64, "editor_seen": None}  # by an editor that does not say
    two = kt.EditStack([steps[0], kt.Edit(steps[1].updates, old)])
    assert two.manifest["editor"] == f"{editor.digest} + {'0' * 64}"
    assert kt.EditStack([two.edits[1]]).manifest["editor_seen"] is None


def test_a_step_varies_prompts_and_targets_within_a_relation(llama):
    facts = [replace(fact, relation=fact.subject[0]) for fact in records()]
    settings = TrainingSettings.of("malmen", {"variety": 1.0, "edits": 4, "min_edits": 2})
    parts = Records(facts, [], [], {})
    training = _Training(llama, "malmen", _sites(llama, "malmen", (1,), None), parts, settings, 0, Journal())
    draw, targets = random.Random(0), {}
    assert {training._size(draw) for _ in range(99)} == {2, 3, 4}
    for fact in facts:
        varied = training._varied(fact, draw)
        assert varied.prompt in fact.paraphrases and fact.prompt in varied.paraphrases
        targets.setdefault(fact.relation, set()).add(varied.target)
        assert varied.target in {other.target for other in facts if other.relation == fact.relation}
    assert any(len(each) > 1 for each in targets.values())
    plain = training._varied(replace(facts[0], rephrasings=("no place",)), random.Random(1))
    assert plain.prompt == facts[0].prompt


def test_an_edit_by_an_editor_is_an_ordinary_edit_in_factors(llama, tmp_path):
    path = editor_file(llama, "malmen", tmp_path)
    edit = kt.edit(llama, REQUESTS, "malmen", editor=path)
    assert all(0 < update.rank < 32 for update in edit.updates.values())
    assert edit.manifest["editor"] == kt.Editor.load(path).digest
    assert edit.manifest["hyper_parameters"]["editor"] == path.name
    remedies = [line.split("; ")[-1] for line in edit.verdict.warnings]
    assert remedies and not any("layers" in remedy for remedy in remedies), "they are the editor's"
    with kt.EditSession(llama, "malmen", editor=path) as session:
        for request in REQUESTS:
            session.edit([request])
        assert session.total().names == edit.names


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("modules", [None, "mlp.experts.1", "mlp.shared.0"])
def test_a_mixture_of_experts_is_refused_before_a_record_is_read(method, modules):
    mixture = tiny_model("qwen2_moe")
    with pytest.raises(KtError, match=r"mlp.* mixture of experts, and a trained editor takes") as caught:
        kt.train_editor(mixture, [], method, layers_mlp=(1, 2), modules=modules)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_an_editor_fits_the_config_tokenizer_and_chat_that_it_was_trained_with(llama, tmp_path):
    path = editor_file(llama, "malmen", tmp_path)
    alone = kt.load(tiny_model("llama").module, tokenizer=copy.deepcopy(llama.tokenizer))
    kt.edit(alone, REQUESTS, "malmen", editor=path, check=False)
    alone.module.config.rope_theta = 1.0
    theta = kt.load(alone.module, tokenizer=llama.tokenizer)
    words = copy.deepcopy(llama.tokenizer)
    words.add_tokens(["Warsaw"])
    other_words = kt.load(llama.module, tokenizer=words)
    chatting = kt.load(llama.module, tokenizer=copy.deepcopy(llama.tokenizer))
    chatting.tokenizer.chat_template = TEMPLATES["qwen 2.5"].source
    asked, system = chatting.asked("always"), chatting.asked(Chat(system="Be brief."))
    (tmp_path / "chat").mkdir()
    with_chat = editor_file(asked, "malmen", tmp_path / "chat")
    kt.edit(asked, REQUESTS, "malmen", editor=with_chat, check=False)
    for model, file, why in (
        (theta, path, "trained with rope_theta"),
        (other_words, path, "another tokenizer"),
        (asked, path, "as they stand, and LlamaForCausalLM is asked in a chat template"),
        (chatting, with_chat, "in a chat template, and LlamaForCausalLM is asked as they stand"),
        (system, with_chat, "other settings of it"),
    ):
        assert model.fingerprint() == llama.fingerprint()
        with pytest.raises(KtError, match=why) as caught:
            kt.edit(model, REQUESTS, "malmen", editor=file, check=False)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_an_editor_of_an_older_kt_edits_and_one_line_says_what_was_not_compared(llama, tmp_path):
    editor = kt.Editor.load(editor_file(llama, "malmen", tmp_path))
    for name in ("identity", "chat", "versions", "n_checked"):
        editor.manifest.pop(name)
    editor.manifest["subjects"].pop("checked")
    old = editor.save(tmp_path / "old")
    with pytest.warns(UserWarning, match="did not note config and tokenizer: only its weights") as said:
        for _ in range(2):
            kt.edit(llama, REQUESTS, "malmen", editor=old, check=False)
    assert sum("did not note" in str(each.message) for each in said) == 1
    assert kt.Editor.load(old).tables()[0].caption


@pytest.mark.parametrize("method", ["ice", "grace"])
def test_an_edit_beside_the_weights_is_no_part_of_the_model_that_an_editor_is_for(llama, method, tmp_path):
    path = editor_file(llama, "malmen", tmp_path)
    settings = {"v_num_grad_steps": 2} if method == "grace" else {}
    beside = kt.edit(llama, REQUESTS, method, check=False, **settings)
    with beside.applied(llama):
        for refused in (
            lambda: kt.train_editor(llama, records(), "malmen"),
            lambda: kt.edit(llama, REQUESTS, "malmen", editor=path),
        ):
            with pytest.raises(KtError, match="has an edit beside its weights") as caught:
                refused()
            assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    below = kt.EditStack([beside])
    run = kt.run_edits(
        llama, REQUESTS, method="malmen", evaluate="none", below=below, keep_history=False, editor=path, check=False
    )
    assert run.edits[0].manifest["stands_on"] == [beside.digest] and not llama.effects


def test_what_does_not_fit_is_one_line(llama, tmp_path):
    path = editor_file(llama, "malmen", tmp_path)
    other = tiny_model("llama", seed=1)
    for change, words in (
        (lambda: kt.edit(llama, REQUESTS, "malmen"), "needs an editor"),
        (lambda: kt.edit(llama, REQUESTS, "mend", editor=path), "editor of malmen"),
        (lambda: kt.edit(other, REQUESTS, "malmen", editor=path), "other weights"),
        (lambda: kt.edit(llama, REQUESTS, "malmen", editor=path, layers=(2,)), "layers 0,1"),
        (lambda: kt.train_editor(llama, records()[:9], "malmen"), "9 records of 9 can train"),
        (lambda: kt.train_editor(llama, REQUESTS, "malmen"), "2 without a paraphrase"),
        (lambda: kt.train_editor(llama, records(), "memit"), "malmen, mend"),
        (lambda: kt.train_editor(llama, records(), rnak=3), "rnak"),
        (lambda: kt.train_editor(llama, records(), steps=0), "steps"),
        (lambda: kt.train_editor(llama, records(), held_out=1.0), "held_out"),
        (lambda: kt.train_editor(llama, records(), held_out=0.5, test=0.5), "test 0.5"),
        (lambda: kt.train_editor(llama, records(), variety=1.5), "variety"),
        (lambda: kt.train_editor(llama, records(), exclude=records()), "24 of an excluded subject"),
        (lambda: kt.train_editor(llama, records(), layers_mlp=(9,)), "layers 0 to 2"),
        (lambda: kt.train_editor(llama, records(), lr=0.0), "lr 0 trains nothing"),
        (lambda: kt.train_editor(llama, records(), c_edit=0.0, c_loc=0.0), "c_edit and c_loc 0"),
        (lambda: kt.train_editor(llama, records(), modules="mlp.nothing"), "nothing"),
    ):
        with pytest.raises(KtError, match=words) as caught:
            change()
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2, words
