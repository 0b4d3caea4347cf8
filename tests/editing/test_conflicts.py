"""New requests against earlier edits: one fact by words, and what a prompt reads of what was written."""

from dataclasses import replace

import pytest
import torch
from editing_help import CONTEXTS, REQUESTS, solve

from kt.editing.closed_form.aims import Position
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.keys import fact_keys
from kt.editing.conflicts import conflicts, overlaps, positions, same_fact
from kt.editing.resolve import read_requests
from kt.facts.fact import Fact
from kt.model.update import Dense

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")
FACT = Fact("The mother tongue of {} is", "Marie Curie", target="Polish", relation="P103")
NEW = {"prompt": "{} was born in", "subject": "Danielle Darrieux", "target_new": "Warsaw"}


@pytest.fixture(scope="module")
def solved(setting):
    return setting[0], solve(*setting, method="memit")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"target": "Italian"}, "target"),
        ({}, "same"),
        ({"target": "POLISH", "subject": "marie  curie", "template": "the mother tongue of {} is "}, "same"),
        ({"template": "{} speaks", "target": "Italian"}, "target"),
        ({"template": "{} speaks", "relation": ""}, None),
        ({"template": "{} speaks", "relation": "P19"}, None),
        ({"relation": "", "target": "Italian"}, "target"),
        ({"subject": "Pierre Curie"}, None),
    ],
)
def test_one_fact_is_one_subject_with_one_relation_or_template(changes, what):
    assert same_fact(replace(FACT, **changes), FACT) == what


def test_the_overlap_is_what_a_key_reads_of_each_facts_own_column(solved):
    model, edit = solved
    new, old = (read_requests(model, some) for some in ([NEW], REQUESTS))
    wanted = torch.zeros(1, 2)
    for name, update in edit.updates.items():
        site = model.site_of(name)
        (k,) = fact_keys(model, new, Contexts.of(CONTEXTS), site, Position.SUBJECT_LAST).T
        own = fact_keys(model, old, Contexts.of(CONTEXTS), site, Position.SUBJECT_LAST)
        for j in range(2):
            u = update.right[j].double()
            wanted[0, j] += (u @ k) / (u @ own[:, j]) / len(edit.names)
    found = overlaps(model, new, edit)
    assert found.measure == "overlap"
    torch.testing.assert_close(found.values.float(), wanted, atol=1e-5, rtol=1e-4)
    # The first request's subject is the new one's: its column is the one that is read.
    assert abs(found.values[0, 0]) > 2 * abs(found.values[0, 1])


def test_a_fact_reads_all_of_its_own_part(solved):
    model, edit = solved
    found = overlaps(model, read_requests(model, REQUESTS), edit)
    torch.testing.assert_close(found.values.diagonal(), torch.ones(2).double())
    assert found.values[0, 1].abs() < 0.9 and found.values[1, 0].abs() < 0.9


def test_of_a_dense_update_the_keys_cosine_stands_in(solved):
    model, edit = solved
    dense = replace(edit, updates={name: Dense(u.dense()) for name, u in edit.updates.items()})
    found = overlaps(model, read_requests(model, [NEW]), dense)
    assert found.measure == "cosine" and found.values.abs().max() <= 1
    assert found.values[0, 0] > found.values[0, 1]


def test_an_edit_without_keys_conflicts_by_its_words_alone(solved):
    model, edit = solved
    bare = replace(edit, keys={})
    assert overlaps(model, read_requests(model, [NEW]), bare) is None
    assert conflicts(model, [NEW], [bare], overlap=0) == []
    (found,) = conflicts(model, [REQUESTS[0] | {"target_new": "Polish"}], [bare])
    assert (found.what, found.target, found.earlier_target, found.overlap) == ("target", "Polish", "Italy", None)


def test_conflicts_name_the_edit_and_both_requests(solved):
    model, edit = solved
    other = replace(edit, manifest=edit.manifest | {"requests": edit.manifest["requests"][1:]}, keys={})
    before = model.fingerprint()
    found = conflicts(model, [REQUESTS[1], NEW], [other, edit], overlap=0.01)
    assert model.fingerprint() == before
    assert [(c.edit, c.what, c.prompt, c.earlier_prompt) for c in found if c.what == "same"] == [
        (1, "same", "The city of the Space Needle", "The city of the Space Needle"),
        (2, "same", "The city of the Space Needle", "The city of the Space Needle"),
    ]
    assert ("keys", "Danielle Darrieux was born in", 2) in [(c.what, c.prompt, c.edit) for c in found]
    assert all(c.what != "keys" for c in conflicts(model, [REQUESTS[1], NEW], [other, edit], overlap=10.0))


def test_keys_are_read_where_the_edits_method_reads_them(setting):
    model = setting[0]
    edit = solve(*setting, method="jeep")
    read = positions(model, edit)
    low, high = (model.weight_name(site) for site in map(model.site_of, (edit.names[0], edit.names[-1])))
    assert read[low] is Position.SUBJECT_LAST and read[high] is Position.PROMPT_LAST
    made_up = replace(edit, manifest=edit.manifest | {"hyper_parameters": {"layers_mlp": "x", "other": 1}})
    assert set(positions(model, made_up).values()) == {Position.SUBJECT_LAST}


def test_prunes_columns_are_no_requests_parts(setting):
    model = setting[0]
    facts = read_requests(model, REQUESTS)
    pruned = solve(*setting, method="memit", update_guard="prune")
    assert overlaps(model, facts, pruned).measure == "cosine"
    assert overlaps(model, facts, solve(*setting, method="memit")).measure == "overlap"
