"""MEMIT-ARE and AlphaEdit-ARE: an aim for each part of a long answer, against their formulas in float64."""

import pytest
import torch
from editing_help import statistics
from one_layer import close, delta

import kt
from kt.editing.closed_form.aims import Position, TargetSite
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.objective import NLL, Objective
from kt.editing.closed_form.parts import find_in_turn, parts_of
from kt.errors import KtError
from kt.facts.formats import read_record
from kt.model.sites import Kind, Site
from kt.model.tokens import joint_text, target_ids, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|of the wanted change|norm of)")
FACTS = [
    kt.Fact("The mother tongue of {} is", "Danielle Darrieux", target="Italy and the city of {} Warsaw in France"),
    kt.Fact("The city of the {} is", "Space Needle", target="Warsaw, and Paris is"),
    kt.Fact("{} plays", "Megan Rapinoe", target="soccer"),
]
LAYER, WINDOW = 1, 4
SEARCH = dict(v_num_grad_steps=8, v_lr=0.3, clamp_norm_factor=20.0, v_weight_decay=0.0)


def rows_of(model, facts):
    """Each request's tokens with its answer, and the columns of its aims."""
    rows = []
    for number, fact in enumerate(facts):
        ids = token_ids(model.tokenizer, joint_text(fact.prompt, fact.target))
        own = [part.fact for part in parts_of(model, facts, WINDOW) if part.owner == number]
        rows.append((ids, [len(token_ids(model.tokenizer, part.prompt)) - 1 for part in own]))
    return rows


def streams(model, ids, put=()):
    """What down_proj reads, and the stream behind the block, at every token; `put`: (token, δ) to add to the latter."""
    seen = {}

    def behind(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        for token, shift in put:
            hidden[0, token] += shift
        seen["hidden"] = hidden[0].clone()
        return output

    block = model.module.get_submodule(model.layout.path(Kind.RESID, LAYER))
    hooks = [
        model.linear(Site(Kind.MLP, LAYER)).register_forward_hook(lambda m, i, o: seen.update(key=i[0][0].clone())),
        block.register_forward_hook(behind),
    ]
    with torch.no_grad():
        logits = model.module(input_ids=torch.tensor([ids])).logits[0]
    for hook in hooks:
        hook.remove()
    return seen["key"].double(), seen["hidden"].double(), logits.double()


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


@pytest.mark.parametrize("method", ["memit-are", "alphaedit-are"])
def test_all_parts_are_written_at_once_and_the_other_tokens_held(setting, method):
    """R Kᵀ (λC + K_r K_rᵀ + K Kᵀ)⁻¹, and in P's null space R KᵀP (K KᵀP + K_r K_rᵀP + L2)⁻¹."""
    model, corpus, cache = setting
    moments = statistics(model, corpus, cache)
    weights = {"mom2_update_weight": 0.05} if method == "memit-are" else {"L2": 1e-3, "nullspace_threshold": 0.5}
    settings = dict(layers_mlp=(LAYER,), window=WINDOW, **weights, **SEARCH)
    edit = kt.edit(model, FACTS, method=method, statistics=moments, **settings)
    keys, others, residuals = [], [], []
    wanted = iter(edit.targets[f"hidden.{LAYER}@last"].double())
    for ids, columns in rows_of(model, FACTS):
        read, now, _ = streams(model, ids)
        keys += [read[c] for c in columns]
        others += [read[c] for c in range(len(ids)) if c not in columns]
        residuals += [next(wanted) - now[c] for c in columns]
    k, r, held = (torch.stack(each).T for each in (keys, residuals, others))
    moment = moments.moment_of(model.weight_name(Site(Kind.MLP, LAYER))).matrix()
    if method == "memit-are":
        want = r @ k.T @ torch.linalg.inv(0.05 * moment + held @ held.T + k @ k.T)
    else:
        values, vectors = torch.linalg.eigh(moment)
        p = vectors[:, values < 0.5] @ vectors[:, values < 0.5].T
        want = r @ k.T @ p @ torch.linalg.inv((k @ k.T + held @ held.T) @ p + 1e-3 * torch.eye(len(p)).double())
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


def test_parts_are_not_written_at_the_subject():
    with pytest.raises(KtError, match="token before them"):
        kt.editing.methods.METHODS["memit-are"](layers_mlp=(1,), fact_token="subject_last")
