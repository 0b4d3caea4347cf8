"""CPU time of scoring a model beside the plain loop: one prompt at a time, a forward a metric, a generation a wish.

    python benchmarks/speed/eval_speed.py  # 20 records on a random GPT-2 of 12 layers, d_model 768
    python benchmarks/speed/eval_speed.py --small  # 3 records, 4 layers, d_model 128: seconds

Records as in CounterFact: an edit prompt, two rephrased ones, ten neighbours that share the old answer. The model never
ends a text, so no row leaves its batch early, as rows of a real model do.
"""

from __future__ import annotations

import random
import string
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import Row, command, counted, measured, product_rate
from trace_speed import random_gpt2
from transformers import LogitsProcessorList

import kt
from kt.evaluation import Sample, evaluate, evaluate_cached
from kt.evaluation.run import LONGER_TOKENS, TEXT_TOKENS, TEXT_TOP_K
from kt.facts import Fact, Prompt
from kt.model.sampling import SeededGumbel

BOUND = 1e-3
"""Of a joint log probability of order 10, after twelve layers in another order of summation; argmaxes must be equal."""

TEMPLATES = ("{} works in", "{} lives near", "home of {}:", "the city of {} is")
NEIGHBOURS = 10


def model_and_facts(small: bool) -> tuple[kt.TracedModel, list[Fact]]:
    """A model that writes only tokens with a text (all others have logit 0), and records with drawn names."""
    model = random_gpt2(*((4, 128) if small else (12, 768)))
    with torch.no_grad():
        model.module.get_input_embeddings().weight[len(model.tokenizer) - 1 :] = 0
    draw = random.Random(0)

    def name(letters: int) -> str:
        return "".join(draw.choices(string.ascii_lowercase, k=letters))

    facts = []
    for number in range(3 if small else 20):
        template, *others = draw.sample(TEMPLATES, 3)
        answer, target = name(1), name(2)
        near = tuple(Prompt(template.replace("{}", name(5)), answer) for _ in range(NEIGHBOURS))
        facts.append(
            Fact(
                template,
                name(5),
                answer=answer,
                target=target,
                id=str(number),
                rephrasings=tuple(others),
                neighbours=near,
            )
        )
    return model, facts


# The plain way ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_answer(model: kt.TracedModel, prompt: str, answer: str) -> tuple[list[int], float]:
    """The argmax where each of the answer's tokens is due, and the answer's log probability: one forward."""
    start = len(model.tokenizer(prompt)["input_ids"])
    ids = torch.tensor([model.tokenizer(f"{prompt} {answer}")["input_ids"]])
    log_probs = model.module(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
    return log_probs.argmax(-1).tolist(), float(log_probs.gather(1, ids[0, start:, None]).sum())


def plain_text(model: kt.TracedModel, prompt: str, tokens: int, sampled: bool = False) -> str:
    """One continuation: one call of `generate`."""
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    noise = LogitsProcessorList([SeededGumbel([prompt], 0, TEXT_TOP_K)] if sampled else [])
    out = model.module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, logits_processor=noise,
        pad_token_id=model.tokenizer.pad_token_id,
    )  # fmt: skip
    return str(model.tokenizer.decode(out[0, ids.shape[1] :]))


def plain_forced(model: kt.TracedModel, samples: list[Sample], rivals: bool) -> list[Any]:
    asked = [s for s in samples if s.answer is not None]
    own = [plain_answer(model, s.prompt, str(s.answer)) for s in asked]
    others = [plain_answer(model, s.prompt, s.rival) for s in asked if rivals and s.rival is not None]
    return own + [([], log_prob) for _, log_prob in others]


def plain_texts(model: kt.TracedModel, samples: list[Sample]) -> list[str]:
    texts = []
    for s in samples:
        if s.role == "generation":
            room = (TEXT_TOKENS - len(model.tokenizer(s.prompt)["input_ids"])) // 10 * 10
            texts.append(plain_text(model, s.prompt, room, sampled=True))
        elif s.role != "answer":
            n = len(model.tokenizer(f" {s.answer}")["input_ids"])
            texts += [plain_text(model, s.prompt, n), plain_text(model, s.prompt, max(n, LONGER_TOKENS))]
    return texts


# What kt's scores hold of the same -----------------------------------------------------------------------------------


def forced_of(samples: list[Sample], rivals: bool) -> list[Any]:
    asked = [s for s in samples if s.answer is not None]
    own = [(list(s.predicted_ids), s.log_prob) for s in asked]
    return own + [([], s.rival_log_prob) for s in asked if rivals and s.rival is not None]


def texts_of(samples: list[Sample]) -> list[str]:
    texts: list[Any] = []
    for s in samples:
        if s.role == "generation":
            texts.append(s.text)
        elif s.role != "answer":
            texts += [s.exact_text, s.text]
    return texts


def apart(ours: list[Any], theirs: list[Any]) -> float:
    """The largest difference of log probabilities; infinite where an argmax differs."""
    same = [a[0] for a in ours] == [b[0] for b in theirs]
    return max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True)) if same else float("inf")


def other_texts(ours: list[str], theirs: list[str]) -> float:
    """How many texts differ."""
    return float(sum(a != b for a, b in zip(ours, theirs, strict=True)))


class Ways(NamedTuple):
    """What is compared: of our samples, of the plain loop, how far apart they may be."""

    ours: Callable[[list[Sample]], list[Any]]
    plain: Callable[[kt.TracedModel, list[Sample]], list[Any]]
    gap: Callable[[list[Any], list[Any]], float]
    bound: float
    says: str


# Rows -------------------------------------------------------------------------------------------------------------


def rows(small: bool) -> Iterator[Row]:
    """Teacher forcing, the comparison of two answers, text, and scores from the cache."""
    torch.set_num_threads(1)
    model, facts = model_and_facts(small)
    rate, size = product_rate(), f"{len(facts)} records, {model.n_layers} layers, d_model {model.d_model}"
    evaluate(model, facts[:1], protocols=("tf",))  # whatever is made once

    spent: dict[str, int] = {}

    def beside(name: str, protocols: tuple[str, ...], ways: Ways, few: int = len(facts)) -> Row:
        """The plain loop does the first `few` records; its time is scaled up to all."""
        scores, ours = measured(lambda: evaluate(model, facts, protocols=protocols))
        samples = [s for s in scores.samples if s.record in scores.records[:few]]
        answers, theirs = measured(lambda: ways.plain(model, samples))
        theirs = theirs._replace(**{of: getattr(theirs, of) * len(facts) / few for of in ("cpu_s", "wall_s")})
        spent[name] = counted(lambda: evaluate(model, facts, protocols=protocols))
        gap = ways.gap(ways.ours(samples), answers)
        note = "" if few == len(facts) else f"the reference: {few} records, its time scaled up"
        return Row(f"scores: {name}", size, ways.says, ours, theirs, spent[name], rate, gap, ways.bound, note=note)

    forward = "one prompt and answer a forward"
    for name, protocols, rivals in (("tf", ("tf",), False), ("tf, prob", ("tf", "prob"), True)):
        ours, plain = partial(forced_of, rivals=rivals), partial(plain_forced, rivals=rivals)
        yield beside(name, protocols, Ways(ours, plain, apart, BOUND, forward))
    yield beside(
        "gen", ("gen",), Ways(texts_of, plain_texts, other_texts, 0.0, "one prompt and length a generation"), 3
    )
    yield from_cache(model, facts, rate, size, spent["tf"] + spent["gen"])


def from_cache(model: kt.TracedModel, facts: list[Fact], rate: float, size: str, spared: int) -> Row:
    """The unedited model's scores, the second time; the model is hashed in that time too."""
    asked: dict[str, Any] = {"protocols": ("tf", "gen")}
    with tempfile.TemporaryDirectory() as folder:
        first, theirs = measured(lambda: evaluate_cached(model, facts, Path(folder), **asked))
        again, ours = measured(lambda: evaluate_cached(model, facts, Path(folder), **asked))
        assert first.file is None and again.file is not None
        paths = [scores.save(Path(folder) / f"{i}.json") for i, scores in enumerate((first.scores, again.scores))]
        same = paths[0].read_bytes() == paths[1].read_bytes()
    part, note = "scores: tf, gen, from the cache", "counted: the work that the cache spares"
    return Row(part, size, "kt.evaluate itself", ours, theirs, spared, rate, float(not same), 0.0, note=note)


if __name__ == "__main__":
    raise SystemExit(command(rows, __doc__))
