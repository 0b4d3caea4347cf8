"""SCR: of the nearest facts the first that the model confirms; a prompt that none answers is read as it is."""

from editing_help import REQUESTS
from families import tiny_model

import kt
from kt.editing import context_edit
from kt.model.effects import rendered


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


def test_a_model_confirms_by_yes_against_no():
    model = tiny_model("llama", max_position_embeddings=4096)
    answers = {context_edit.confirms(model, f"{name} speaks Welsh", f"{name} speaks") for name in ("Ann", "Bob")}
    assert answers <= {True, False}
    assert kt.edit(model, REQUESTS, "scr").effect.select == 3
