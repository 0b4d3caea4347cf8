"""Continuations: merged wishes, rounds and rows that leave give what one wish at a time in plain Hugging Face gives."""

import pytest
import torch
from families import byte_level_tokenizer, sentencepiece_tokenizer, tiny_model

from kt.model import sampling as module
from kt.model.sampling import SeededGumbel, continuations, continue_one_by_one, continued
from kt.model.tokens import token_ids

PROMPTS = ("The capital of Italy is", "Her", "Marie Curie was born in", "São Paulo, Łódź,")
WISHES = [(prompt, n) for prompt in PROMPTS for n in (1, 3, 14)] + [(PROMPTS[0], 25), (PROMPTS[1], 3)]
TOP_FIVE = {"do_sample": True, "top_k": 5, "seed": 3}


def made(family):
    if family == "gpt2":
        return tiny_model("gpt2", tokenizer=byte_level_tokenizer())
    tokenizer = sentencepiece_tokenizer()
    return tiny_model(family, tokenizer=tokenizer, vocab_size=len(tokenizer))


@pytest.fixture(params=["gpt2", "llama", "gemma3_text"])
def model(request):
    return made(request.param)


def plain(model, prompt, tokens):
    """Ids that greedy `generate` of the bare module adds to one prompt."""
    ids = torch.tensor([token_ids(model.tokenizer, prompt)])
    added = model.module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tuple(added[0, ids.shape[1] :].tolist())


def end_early(model, after=4):
    """Make a token that the first prompt's text holds early an end of text; how long the texts then are."""
    model.module.generation_config.eos_token_id = [plain(model, PROMPTS[0], after + 1)[after]]
    return [len(plain(model, prompt, 25)) for prompt in PROMPTS]


@pytest.mark.parametrize("batch_size", ["auto", 1, 3])
@pytest.mark.parametrize("sampling", [{}, TOP_FIVE], ids=["greedy", "sampled"])
def test_merged_wishes_equal_continue_one_by_one(model, sampling, batch_size):
    found = continuations(model, WISHES, batch_size, **sampling)
    assert found == continue_one_by_one(model, WISHES, **sampling) and set(found) == set(WISHES)


@pytest.mark.parametrize("sampling", [{}, TOP_FIVE], ids=["greedy", "sampled"])
def test_an_end_of_text_ends_the_longer_wishes_and_cuts_no_shorter_one(model, sampling):
    lengths = end_early(model)
    assert min(lengths) < 14 < 25 in lengths  # some end, some do not
    assert continuations(model, WISHES, **sampling) == continue_one_by_one(model, WISHES, **sampling)


def test_rounds_add_the_tokens_of_one_plain_generation(model):
    end_early(model)
    found = continued(model, PROMPTS, [25, 3, 14, 20])
    assert [row.added for row in found] == [plain(model, p, n) for p, n in zip(PROMPTS, (25, 3, 14, 20), strict=True)]


def test_rows_that_are_done_leave_the_batch(model):
    lengths = end_early(model)
    seen = []
    model.module.get_input_embeddings().register_forward_hook(lambda _m, ids, _out: seen.append(len(ids[0])))
    continued(model, PROMPTS, [25] * 4)
    rows = [sum(length > 10 * (step // 10) for length in lengths) for step in range(25)]
    assert seen == rows[: len(seen)] and seen[0] == 4 > seen[-1]


def test_a_prompt_is_continued_once_for_its_longest_wish(model, monkeypatch):
    asked = []

    def noted(model, prompts, limits, **sampling):
        asked.extend(zip(prompts, limits, strict=True))
        return continued(model, prompts, limits, **sampling)

    monkeypatch.setattr(module, "continued", noted)
    fulfilled = []
    continuations(model, WISHES, done=fulfilled.append)
    assert sorted(asked) == sorted([(PROMPTS[0], 25), *((p, 14) for p in PROMPTS[1:])])
    assert sum(fulfilled) == len(set(WISHES))


def test_no_batch_is_larger_than_asked_or_than_the_budget(model, monkeypatch):
    sizes = []

    def noted(model, prompts, limits, **sampling):
        sizes.append((len(prompts), max(limits)))
        return continued(model, prompts, limits, **sampling)

    monkeypatch.setattr(module, "continued", noted)
    wishes = [(prompt, 5) for prompt in PROMPTS]
    continuations(model, wishes, 3)
    assert sizes == [(3, 5), (1, 5)]
    sizes.clear()
    longest = max(len(token_ids(model.tokenizer, prompt)) for prompt in PROMPTS)
    monkeypatch.setattr(module, "AUTO_WRITTEN_TOKENS", 2 * (longest + 5))
    continuations(model, wishes)
    assert sum(n for n, _ in sizes) == 4 and 1 < len(sizes) < 4 and sizes[-1] == (2, 5)


def test_no_row_is_taken_beyond_the_models_last_position():
    model = made("gpt2")  # 128 positions, and an error beyond them
    long = "x " * 61
    room = 128 - len(token_ids(model.tokenizer, long))
    assert 0 < room < 10
    wishes = [(long, room), (PROMPTS[0], 12)]
    assert continuations(model, wishes) == continue_one_by_one(model, wishes)


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
def test_a_rule_that_counts_from_the_start_of_a_text_sees_it_whole():
    model = made("llama")
    rules = model.module.generation_config
    rules.eos_token_id, rules.min_new_tokens = list(range(0, model.vocab_size, 4)), 12
    expected = [plain(model, prompt, 25) for prompt in PROMPTS]
    assert any(12 < len(text) < 20 for text in expected)  # ended soon after it might
    assert [row.added for row in continued(model, PROMPTS, [25] * 4)] == expected
    assert continuations(model, WISHES) == continue_one_by_one(model, WISHES)


@pytest.mark.parametrize(
    "rule",
    [
        {"use_cache": False},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.5},
        {"min_length": 20},
    ],
    ids=lambda rule: next(iter(rule)),
)
def test_a_rule_of_the_generation_config_counts_in_a_batch_as_for_one_prompt(model, rule):
    """Padding is none of a row's tokens; a config that keeps no cache changes no text."""
    end_early(model)
    rules = model.module.generation_config
    rules.pad_token_id = rules.eos_token_id[0]  # as many models have it: a penalty of padding would be one of the end
    rules.update(**rule)
    expected = [plain(model, prompt, 25) for prompt in PROMPTS]
    assert [row.added for row in continued(model, PROMPTS, [25] * 4)] == expected
    assert continuations(model, WISHES) == continue_one_by_one(model, WISHES)


@pytest.mark.parametrize(
    "asked",
    [
        {"return_dict_in_generate": True, "output_scores": True},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.5},
        {"stop_strings": ["a", "e"]},
        {"token_healing": True},
        {"prompt_lookup_num_tokens": 3},
        {"max_time": 1e-9},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_a_generation_config_that_asks_for_another_search_or_result_gives_the_greedy_text(asked):
    model = made("llama")
    expected = [plain(model, prompt, 25) for prompt in PROMPTS]
    model.module.generation_config.update(**asked)
    assert [row.added for row in continued(model, PROMPTS, [25] * 4)] == expected


def test_noise_is_that_of_the_whole_vocabulary_and_goes_on_with_the_rows_that_stay():
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    ours, whole = (SeededGumbel(("a", "b", "c"), 7, top_k) for top_k in (5, None))
    for rows in ([0, 1, 2], [0, 2]):
        noisy, all_noisy = ours(None, scores[rows]), whole(None, scores[rows])
        floor = scores[rows].topk(5).values[:, -1:]
        assert torch.equal(noisy, all_noisy.masked_fill(scores[rows] < floor, -torch.inf))
        for sampler in (ours, whole):
            sampler.keep([0, 2] if len(rows) == 3 else [0, 1])
    alone = SeededGumbel(("c",), 7, None)
    first, second = alone(None, scores[[2]]), alone(None, scores[[2]])
    again = SeededGumbel(("a", "b", "c"), 7, None)
    assert torch.equal(again(None, scores)[2:], first)
    again.keep([2])
    assert torch.equal(again(None, scores[[2]]), second)
    drawn = torch.rand(50, generator=torch.Generator().manual_seed(again_seed("c", 7)))
    assert torch.equal(first[0], scores[2] - (-drawn.clamp(1e-12, 1 - 1e-7).log()).log())


def again_seed(text, seed):
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed} {text}".encode()).digest()[:7], "big")
