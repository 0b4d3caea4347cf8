"""SCR: of the nearest facts the first that the model confirms; a prompt that none answers is read as it is."""

import pytest
from editing_help import REQUESTS
from families import tiny_model

import kt
from kt.editing import context_edit
from kt.model.effects import rendered
from kt.model.scoring import teacher_force


def test_the_model_is_asked_about_the_nearest_facts_and_where_it_confirms_none_the_prompt_stays(monkeypatch):
    model, asked = tiny_model("llama", max_position_embeddings=4096), []
    facts = [kt.Fact("{} speaks", name, target="Welsh") for name in ("Ann", "Bob", "Eve", "Zoe")]
    edit = kt.edit(model, facts, "scr", candidates=2)
    prompt = "Ann speaks to Bob and Bob"

    def confirms(answer):
        def confirm(model, fact, prompt):
            asked.append(fact)
            return fact == answer

        return confirm

    for answer, text in (("Ann speaks Welsh", "New Fact: Ann speaks Welsh\nPrompt: " + prompt), ("Eve", prompt)):
        monkeypatch.setattr(context_edit, "confirms", confirms(answer))
        with edit.applied(model):
            assert rendered(model, prompt) == rendered(model, prompt) == text
    assert asked == ["Bob speaks Welsh", "Ann speaks Welsh"] * 2, "asked once a prompt, the nearest first"
    with edit.applied(model):
        assert rendered(model, "Ann speaks") == "New Fact: Ann speaks Welsh\nPrompt: Ann speaks"
    assert len(asked) == 4, "a request's own prompt is not asked about"


@pytest.mark.parametrize("order", [("scr", "ice"), ("ice", "scr")])
def test_in_a_stack_the_model_is_asked_about_the_facts_of_scr_alone(monkeypatch, order, tmp_path):
    model, asked = tiny_model("llama", max_position_embeddings=4096), []
    monkeypatch.setattr(context_edit, "confirms", lambda model, fact, prompt: asked.append(fact))
    known = {"scr": ("Ann", "speaks", "Welsh"), "ice": ("Bob", "lives in", "Rome")}
    edits = [
        kt.edit(model, [kt.Fact(f"{{}} {verb}", name, target=target)], method, check=False)
        for method in order
        for name, verb, target in [known[method]]
    ]
    stack = kt.EditStack(edits)
    loaded = kt.Edit.load(stack.as_sum().save(tmp_path / "both.safetensors"))
    for one in (stack, loaded):
        with one.applied(model):
            assert rendered(model, "Yes, Bob lives").startswith("New Fact: Bob lives in Rome"), "at once"
            assert asked == []
            assert rendered(model, "Yes, Ann eats") == "Yes, Ann eats" and asked == ["Ann speaks Welsh"]
            assert rendered(model, "Ann speaks").startswith("New Fact: Ann speaks Welsh"), "its own prompt"
            # Where the model does not confirm the nearest, the next is put there by its own rule.
            assert rendered(model, "Ann speaks of Bob").startswith("New Fact: Bob")
            asked.clear()


@pytest.mark.parametrize(
    ("template", "subject", "prompt", "own"),
    [
        ("The capital of {}", "Nigeria", "The capital of Niger", False),
        ("The capital of {}", "Nigeria", "The capital of Nigeria", True),
        ("The capital of {}", "Nigeria", "The capital of ", True),
        ("{}的首都是", "法国", "法国的首都是", True),
        ("เมืองหลวงของ{}คือ", "ฝรั่งเศส", "เมืองหลวงของฝรั่งเศสคือ", True),
        ("{}의 수도는", "프랑스", "프랑스의 수도는", True),
        ("La capitale de {} est", "l'Équateur", "La capitale de l'É", False),
    ],
)
def test_only_a_fact_that_begins_with_the_prompt_up_to_the_end_of_a_word_is_taken_unasked(
    monkeypatch, template, subject, prompt, own
):
    model = tiny_model("llama", max_position_embeddings=4096)
    edit = kt.edit(model, [kt.Fact(template, subject, target="Rome")], "scr", check=False)
    asked = []
    monkeypatch.setattr(context_edit, "confirms", lambda model, fact, prompt: asked.append(fact))
    assert (edit.effect.rendered(model, prompt) != prompt) is own
    assert asked == ([] if own else list(edit.effect.documents))


@pytest.mark.parametrize(("yes", "no", "confirmed"), [(-0.2, -2.0, True), (-2.0, -0.2, False), (0.0, -9.0, True)])
def test_a_model_confirms_by_yes_against_no(monkeypatch, yes, no, confirmed):
    model = tiny_model("llama", max_position_embeddings=4096)

    def scored(model, rows, **options):
        real = teacher_force(model, rows, **options)
        return {question: real[question]._replace(log_prob={"yes": yes, "no": no}[question[1]]) for question in real}

    monkeypatch.setattr(context_edit, "teacher_force", scored)
    assert context_edit.confirms(model, "Ann speaks Welsh", "Ann speaks") is confirmed


def test_three_facts_are_asked_about_by_default():
    model = tiny_model("llama", max_position_embeddings=4096)
    assert kt.edit(model, REQUESTS, "scr").effect.select == 3
