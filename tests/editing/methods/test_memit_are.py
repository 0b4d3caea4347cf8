"""MEMIT-ARE: an aim for each part of a long answer, against its formula in float64."""

import pytest
import torch
from chat_templates import TEMPLATES, tokenizer_of
from editing_help import statistics
from families import tiny_model
from in_parts import FACTS, LAYER, SEARCH, WINDOW, rows_of, solved, streams
from one_layer import close, delta

import kt
from kt.editing.closed_form.aims import Position, TargetSite
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.objective import NLL, Objective, StopBelow
from kt.editing.closed_form.parts import find_in_turn, parts_of
from kt.editing.methods import METHODS
from kt.facts.formats import read_record
from kt.model.sites import Kind, Site
from kt.model.tokens import joint_text, target_ids, token_ids, wanted_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|of the wanted change|norm of)")


def test_parts_follow_each_other_and_make_the_whole_answer(setting):
    model = setting[0]
    for fact in FACTS:
        own = [part.fact for part in parts_of(model, [fact], WINDOW)]
        sizes = [len(target_ids(model.tokenizer, p.prompt, p.target, p.target_prefix)) for p in own]
        assert sum(sizes) == len(target_ids(model.tokenizer, fact.prompt, fact.target))
        assert joint_text(own[-1].prompt, own[-1].target, own[-1].target_prefix) == joint_text(fact.prompt, fact.target)
    assert len(parts_of(model, FACTS[:1], WINDOW)) > 2
    assert parts_of(model, FACTS[2:], 50)[0].fact is FACTS[2], "a short answer is its own only part"


def test_a_part_is_searched_for_with_the_ones_before_in_place(setting):
    """The last loss is the mean -log p of a part's tokens, its δ and those before it added to the stream."""
    model = setting[0]
    parts, aim = parts_of(model, FACTS, WINDOW), TargetSite(Site(Kind.RESID, LAYER), Position.PROMPT_LAST)
    found = find_in_turn(model, parts, aim, Contexts(), Objective((NLL(),), steps=6, lr=0.3))
    shifts = found.wanted[aim] - found.before[aim]
    for number, (ids, columns) in enumerate(rows_of(model, FACTS)):
        own = [i for i, part in enumerate(parts) if part.owner == number]
        for nth, i in enumerate(own):
            put = [(columns[j], shifts[own[j]]) for j in range(nth + 1)]
            fact, first = parts[i].fact, columns[nth] + 1
            answer = target_ids(model.tokenizer, fact.prompt, fact.target, fact.target_prefix)
            assert tuple(ids[first : first + len(answer)]) == answer
            log_p = streams(model, ids, put)[2].log_softmax(-1)[first - 1 : first - 1 + len(answer)]
            close(found.loss[i].double(), -log_p[range(len(answer)), list(answer)].mean(), atol=1e-4, rtol=1e-4)


def test_all_parts_are_written_at_once_and_the_other_tokens_held(setting):
    """R Kᵀ (λC + K_r K_rᵀ + K Kᵀ)⁻¹."""
    edit, (k, r, held, moment) = solved(setting, "memit-are", mom2_update_weight=0.05)
    want = r @ k.T @ torch.linalg.inv(0.05 * moment + held @ held.T + k @ k.T)
    close(delta(setting, edit), want, atol=1e-4, rtol=1e-3)


def test_an_answer_of_a_whole_sentence_becomes_likelier_part_by_part(setting):
    """On a record as UnKE's, whose prompt is the subject."""
    model, corpus, cache = setting
    record = {"id": 1, "question": "The city of Warsaw is", "answer": FACTS[0].target, "para_question": "Warsaw is"}
    fact = read_record(record, "a record", "unke")
    settings = dict(statistics=statistics(model, corpus, cache), layers_mlp=(0, 1), window=WINDOW, **SEARCH)
    edit = kt.edit(model, [fact], method="memit-are", mom2_update_weight=0.01, **settings)
    before, after = edit.report[0].target_prob
    assert after > 10 * before


@pytest.mark.parametrize("method", ["memit-are", "alphaedit-are"])
def test_a_parts_search_goes_on_until_its_tokens_are_likely(method):
    """ARE's code stops at a mean loss of 0.01; at MEMIT's 0.05 fifty tokens together have a probability of 0.08."""
    stops = [term for term in METHODS[method].of({}).objective.terms if isinstance(term, StopBelow)]
    assert [stop.loss_bound for stop in stops] == [0.01]


@pytest.mark.parametrize("template", ["The city of {} is", "Which city is {}", "Which city is {}?"])
def test_in_a_chat_template_parts_that_end_a_sentence_stay_in_one_reply(template):
    """Their ids behind each other are those of prompt, answer and, in reply to the user, the end of the turn."""
    tokenizer = tokenizer_of(TEMPLATES["qwen 2.5"])
    model = tiny_model("llama", tokenizer=tokenizer, vocab_size=512).asked("always")
    fact = kt.Fact(template, "Warsaw", target="an old city. It is in Italy. It is where the Danes were born.")
    parts = [part.fact for part in parts_of(model, [fact], WINDOW)]
    assert len(parts) > 2
    head = TEMPLATES["qwen 2.5"].asked
    if template.endswith("is"):
        whole = f"{head.replace('QUESTION', 'Complete the sentence.')}{fact.prompt} {fact.target}"
    else:
        whole = f"{head.replace('QUESTION', fact.prompt)}{fact.target}<|im_end|>"
    want = tokenizer(whole, add_special_tokens=False)["input_ids"]
    context = Contexts.of(["It is old. {}"])
    for part in parts:
        before = token_ids(model.reader, part.prompt)
        target = wanted_ids(model.reader, part)
        assert [*before, *target] == want[: len(before) + len(target)]
        (behind,) = context.templates(part, model.reader)
        ids = token_ids(model.reader, behind.replace("{}", fact.subject))
        assert tokenizer.decode(ids) == tokenizer.decode(before).replace(fact.prompt, f"It is old. {fact.prompt}")
    assert len(before) + len(target) == len(want)
