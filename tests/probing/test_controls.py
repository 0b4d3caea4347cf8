"""Controls and other subjects: drawn by texts alone, and never what the fact itself is about."""

from chat_templates import TEMPLATES, tokenizer_of
from families import tiny_model

import kt
import kt.model.tokens
from kt.model.chat import Chat, frame_of, in_turn, reader_of
from kt.probing.controls import Relations


def facts_of(*pairs, relation="capital"):
    return [kt.Fact("The {} is", s, answer=a, target=t, relation=relation, id=s) for s, a, t in pairs]


CAPITALS = facts_of(("France", "Paris", "Rome"), ("Italy", "Rome", "Warsaw"), ("Poland", "Warsaw", "Seattle"))
POOL = facts_of(
    ("Needle", "Seattle", None), ("Curie", "Danielle", None), ("Space", "Megan", None), ("Łódź", "Tomas", None)
)


def test_controls_are_other_answers_of_the_relation_in_an_order_that_the_facts_do_not_decide():
    tokenizer = tiny_model("qwen2").tokenizer
    fact = CAPITALS[0]
    old, new = (kt.model.tokens.target_ids(tokenizer, fact.prompt, t)[0] for t in ("Paris", "Rome"))
    found = Relations.of(CAPITALS, POOL).controls(tokenizer, fact, old, new, seed=0)
    assert found == Relations.of(CAPITALS[::-1], POOL[::-1]).controls(tokenizer, fact, old, new, seed=0)
    assert {c.text for c in found} <= {"Warsaw", "Seattle", "Danielle", "Megan", "Tomas"}
    assert len({c.token for c in found}) == len(found) > 2
    assert {old, new}.isdisjoint(c.token for c in found)
    orders = {Relations.of(CAPITALS, POOL).controls(tokenizer, fact, old, new, seed) for seed in range(8)}
    assert len(orders) > 1


def test_answers_that_no_edit_is_about_come_first():
    tokenizer = tiny_model("qwen2").tokenizer
    for seed in range(5):
        found = Relations.of(CAPITALS, POOL).controls(tokenizer, CAPITALS[0], -7, -8, seed, most=3)
        assert {c.text for c in found} <= {"Danielle", "Megan", "Tomas"}


def test_answers_of_other_relations_are_no_controls():
    tokenizer, others = tiny_model("qwen2").tokenizer, facts_of(("Nile", "Danielle", None), relation="river")
    found = Relations.of(CAPITALS[:2], others).controls(tokenizer, CAPITALS[0], -7, -8, 0)
    assert [c.text for c in found] == ["Rome"]


def test_no_answer_of_the_same_subject_is_a_control_of_it():
    tokenizer, also = tiny_model("qwen2").tokenizer, facts_of(("France", "Danielle", None))
    found = Relations.of(CAPITALS, also).controls(tokenizer, CAPITALS[0], -7, -8, 0)
    assert {c.text for c in found} == {"Rome", "Warsaw"}


def test_facts_that_name_no_relation_share_one_by_their_template():
    tokenizer = tiny_model("qwen2").tokenizer
    alike = [*facts_of(("Poland", "Warsaw", None), relation=""), kt.Fact("Of {}", "Curie", answer="Megan")]
    fact = facts_of(("France", "Paris", "Rome"), relation="")[0]
    found = Relations.of([fact], alike).controls(tokenizer, fact, -7, -8, 0)
    assert {c.text for c in found} == {"Warsaw"}


def test_a_fact_without_a_relation_has_that_of_its_template_where_the_pool_names_one():
    tokenizer = tiny_model("qwen2").tokenizer
    flat = kt.Fact("The  {} is", "France", answer="Paris", target="Rome")
    others = [*facts_of(("Poland", "Warsaw", None), relation="P36"), kt.Fact("Of {}", "Curie", "Megan", relation="P36")]
    assert {c.text for c in Relations.of([flat], others).controls(tokenizer, flat, -7, -8, 0)} == {"Warsaw", "Megan"}
    fact, pool = others[0], [flat]  # and the other way round: the fact names it, the pool does not
    assert {c.text for c in Relations.of([fact], pool).controls(tokenizer, fact, -7, -8, 0)} == {"Paris"}
    two = [*others, *facts_of(("Nile", "Seattle", None), relation="river")]  # whose template says nothing
    assert Relations.of([flat], two).controls(tokenizer, flat, -7, -8, 0) == ()


def test_elsewhere_is_the_same_prompt_about_subjects_with_other_answers():
    tokenizer = tiny_model("qwen2").tokenizer
    old, new = (kt.model.tokens.target_ids(tokenizer, "The France is", t)[0] for t in ("Paris", "Rome"))
    own = facts_of(("France", "Danielle", None))  # another answer of the same subject
    found = Relations.of(CAPITALS, [*POOL, *own]).elsewhere(tokenizer, CAPITALS[0], old, new, seed=0, most=9)
    assert {e.subject for e in found} == {"Poland", "Needle", "Curie", "Space", "Łódź"}
    assert all(e.prompt == f"The {e.subject} is" for e in found)


def test_another_subjects_prompt_stands_in_the_turn_of_the_facts_own():
    tokenizer = tokenizer_of(TEMPLATES["qwen 2.5"])
    reader = reader_of(tokenizer, frame_of(tokenizer, Chat()))
    facts = [kt.Fact("{} plays", s, answer=a, target="Rome") for s, a in (("Queen", "Seattle"), ("Who", "Paris"))]
    (other,) = Relations.of(facts).elsewhere(reader, facts[0], -7, -8, seed=0)
    assert not reader.in_reply(other.prompt), "alone it asks"
    assert reader.decode([other.token]) != reader.decode([kt.model.tokens.target_ids(reader, other.prompt, "Paris")[0]])
    behind = kt.model.tokens.target_ids(reader, in_turn(reader, other.prompt, facts[0].prompt), "Paris")
    assert other.token == behind[0] and reader.decode(behind) == " Paris"
