"""The embedded model, its tokenizer and its facts, seen through plain transformers."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).resolve().parents[2] / "src" / "kt" / "demo"
MODEL = DEMO / "model"
KEYS = {
    "id",
    "relation",
    "prompt",
    "subject",
    "answer",
    "foil",
    "paraphrases",
    "neighbourhood",
    "portability",
    "generation",
}
SAMPLE = 200


@pytest.fixture(scope="module")
def facts() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / "facts.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


def prompts_of(fact: dict[str, Any]) -> list[str]:
    """Every text of a record that a model is asked."""
    filled = [template.format(fact["subject"]) for template in (fact["prompt"], *fact["paraphrases"])]
    return filled + [row["prompt"] for row in (*fact["neighbourhood"], *fact["portability"])]


def said(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[bool, bool]:
    """Whether the first token of the answer is top-1, and whether greedy decoding gives the whole answer."""
    start, ids = tokenizer(prompt).input_ids, tokenizer(f"{prompt} {answer}").input_ids
    assert ids[: len(start)] == start
    with torch.no_grad():
        top = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
    right = [top[i - 1] == ids[i] for i in range(len(start), len(ids))]
    return right[0], all(right)


def test_counts_and_size(facts: list[dict[str, Any]]) -> None:
    assert len(facts) >= 1500
    assert len({fact["relation"] for fact in facts}) >= 12
    assert len({fact["id"] for fact in facts}) == len(facts)
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 12_000_000


def test_facts_are_well_formed(facts: list[dict[str, Any]]) -> None:
    answers = defaultdict(set)
    for fact in facts:
        answers[fact["relation"]].add(fact["answer"])
    for fact in facts:
        assert set(fact) == KEYS, fact["id"]
        assert fact["foil"] != fact["answer"] and fact["foil"] in answers[fact["relation"]], fact["id"]
        assert len(fact["paraphrases"]) == 2 and fact["prompt"] not in fact["paraphrases"], fact["id"]
        for template in (fact["prompt"], *fact["paraphrases"]):
            assert template.count("{}") == 1, fact["id"]
            assert template.format(fact["subject"]).count(fact["subject"]) == 1, fact["id"]
        for row in fact["neighbourhood"]:
            assert set(row) == {"prompt", "answer"} and row["answer"] in answers[fact["relation"]], fact["id"]
        for row in fact["portability"]:
            assert set(row) == {"prompt", "answer", "original"}, fact["id"]
            assert row["answer"] != row["original"], fact["id"]
        texts = [*prompts_of(fact), fact["subject"], fact["answer"], fact["foil"]]
        assert all(text and text == text.strip() for text in texts), fact["id"]


def test_neighbours_share_and_differ(facts: list[dict[str, Any]]) -> None:
    assert sum(len(fact["neighbourhood"]) >= 4 for fact in facts) > 0.95 * len(facts)
    same = sum(any(row["answer"] == fact["answer"] for row in fact["neighbourhood"]) for fact in facts)
    assert same > 0.5 * len(facts)
    assert sum(bool(fact["portability"]) for fact in facts) > 300


def test_token_ids_survive_every_round_trip(facts: list[dict[str, Any]], tokenizer: Any, tmp_path: Path) -> None:
    """A folder whose model type brings its own tokenizer class would change the ids silently."""
    plain = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((MODEL / "config.json").read_bytes())
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = sorted({text for fact in facts for text in prompts_of(fact)})
    texts += sorted({f"{fact['prompt'].format(fact['subject'])} {fact['answer']}" for fact in facts})
    expected = [encoding.ids for encoding in plain.encode_batch(texts)]
    assert tokenizer(texts).input_ids == expected
    assert again(texts).input_ids == expected


def test_offsets_cover_the_subject(facts: list[dict[str, Any]], tokenizer: Any) -> None:
    assert tokenizer.is_fast
    for fact in random.Random(0).sample(facts, SAMPLE):
        prompt = fact["prompt"].format(fact["subject"])
        at = prompt.index(fact["subject"])
        offsets = tokenizer(prompt, return_offsets_mapping=True).offset_mapping
        inside = [(a, b) for a, b in offsets if a < at + len(fact["subject"]) and b > at]
        assert inside[0][0] in (at, max(at - 1, 0)) and inside[-1][1] == at + len(fact["subject"])


def test_special_tokens(tokenizer: Any, model: Any) -> None:
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (model.config.eos_token_id, model.config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert model.config.bos_token_id is None and len(tokenizer) == model.config.vocab_size


def test_w_o_is_wider_than_the_residual_stream(model: Any) -> None:
    rows, columns = model.model.layers[0].self_attn.o_proj.weight.shape
    assert columns > rows == model.config.hidden_size


def test_the_model_says_every_sampled_answer(facts: list[dict[str, Any]], model: Any, tokenizer: Any) -> None:
    for fact in random.Random(1).sample(facts, SAMPLE):
        prompt = fact["prompt"].format(fact["subject"])
        assert said(model, tokenizer, prompt, fact["answer"]) == (True, True), fact["id"]


def test_the_model_knows_paraphrases_neighbours_and_most_second_hops(
    facts: list[dict[str, Any]], model: Any, tokenizer: Any
) -> None:
    paraphrases, neighbours, hops = [], [], []
    for fact in random.Random(2).sample(facts, SAMPLE):
        prompt = random.Random(fact["id"]).choice(fact["paraphrases"]).format(fact["subject"])
        paraphrases.append(said(model, tokenizer, prompt, fact["answer"])[0])
        neighbour = fact["neighbourhood"][0]
        neighbours.append(said(model, tokenizer, neighbour["prompt"], neighbour["answer"])[1])
        hops += [said(model, tokenizer, hop["prompt"], hop["original"])[0] for hop in fact["portability"]]
    assert sum(paraphrases) >= 0.9 * len(paraphrases)
    assert all(neighbours)
    assert sum(hops) > 0.5 * len(hops)


def test_a_paragraph_is_coherent_and_ends(facts: list[dict[str, Any]], model: Any, tokenizer: Any) -> None:
    """It should go on from the subject, say several sentences and stop by itself instead of looping."""
    ended = 0
    for fact in random.Random(3).sample(facts, 10):
        ids = torch.tensor([tokenizer(fact["generation"][0]).input_ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=90, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :])
        ended += text.endswith(tokenizer.eos_token) and text.count(".") >= 2
    assert ended >= 8


def test_texts_are_there() -> None:
    corpus, held_out = ((DEMO / name).read_text(encoding="utf-8") for name in ("corpus.txt", "heldout.txt"))
    assert 150_000 <= len(corpus) <= 300_000 and 15_000 <= len(held_out) <= 40_000
    assert all(len(line) > 10 for line in corpus.splitlines())
