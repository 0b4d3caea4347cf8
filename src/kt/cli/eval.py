"""`kt eval`: how well an edit holds, reaches further, and leaves the rest alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import need
from ..runs.folder import FILES
from . import parse
from .command import BadOption
from .options import ChatOptions, FactOptions, ForceOptions, ModelOptions, Opt, RunOptions
from .session import Session, open_edit, session

if TYPE_CHECKING:
    from ..editing.stack import AnyEdit
    from ..evaluation import Scores
    from ..facts.fact import Fact
    from ..model.model import TracedModel


PROTOCOLS = ("tf", "gen", "prob", "wild", "mello", "ppl")
JUDGE_KEY = "KT_JUDGE_KEY"
VERDICTS = "judge.jsonl"


@dataclass(frozen=True)
class EvalOptions(RunOptions, ForceOptions, FactOptions, ChatOptions, ModelOptions):
    first = ("edit", "protocol")

    edit: Annotated[Path | None, Opt("--edit", help="Score the model with this edit (of kt apply-edit) in it.")] = None
    protocol: Annotated[
        str,
        Opt(
            "--protocol",
            help="Ways to ask: tf (teacher forcing), gen (greedy), prob (new against old answer), "
            "wild (free answers), mello (multi-hop questions in steps), ppl (held-out perplexity).",
        ),
    ] = "tf,gen"
    no_generate: Annotated[bool, Opt("--no-generate", help="Leave out what needs generated text: faster.")] = False
    no_control: Annotated[
        bool, Opt("--no-control", help="Do not also score a joint edit's MLP part alone, which takes as long again.")
    ] = False
    heldout: Annotated[
        str | None,
        Opt("--heldout", help="Text for ppl: .txt or .jsonl, one document a line [default: what ships with kt]."),
    ] = None
    no_cache: Annotated[bool, Opt("--no-cache", help="Score the unedited model anew, and keep its scores nowhere.")] = (
        False
    )
    kl: Annotated[bool, Opt("--kl", help="Also KL(unedited || edited) of the next token after neighbours.")] = False
    max_new_tokens: Annotated[int, Opt("--max-new-tokens", min=1, help="Most tokens of an answer under wild.")] = 64
    judge_url: Annotated[
        str | None,
        Opt("--judge-url", help="Let a judge read the answers under wild: an OpenAI-compatible URL (https://host/v1)."),
    ] = None
    log_samples: Annotated[
        str | None, Opt("--log-samples", help="Also every sample by itself, as samples.jsonl or .parquet: name which.")
    ] = None
    judge_model: Annotated[
        str | None, Opt("--judge-model", help=f"The judge's name there; its key is read from {JUDGE_KEY}.")
    ] = None


def evaluate(options: EvalOptions) -> None:
    """Score a model, or a model with an edit, on a facts file."""
    arguments = questions(options)
    with session(options) as s:
        from ..editing.hyper.editor import known_words
        from ..evaluation import distributions, evaluate
        from ..evaluation.perplexity import heldout_corpus
        from ..evaluation.scores import Comparison
        from ..facts.load import facts_from

        if "ppl" in arguments["protocols"]:
            heldout_corpus(options.heldout, options.model)  # refused here, before a model loads
        rows: dict[str, Any] = {"batch_size": parse.batch_size(options.batch_size)}
        arguments |= {"seed": options.seed, "judge": _judge(options, s)} | rows
        facts = s.load_facts()
        edit = open_edit(s, options.edit) if options.edit else None
        model = s.load_model()
        reference = None
        if options.kl:
            with s.progress("the unedited model's distributions") as tick:
                reference = distributions(model, facts, progress=tick, **rows)
        before = unedited(s, model, facts, arguments)
        if edit is None:
            before.save(s.run.file(FILES["after"]))
            log_samples(s, before, None, model)
            s.keep(before)
            return s.screen.tables(*before.tables())
        asked = arguments
        arguments = arguments | {"before": before, "reference": reference, "edited": edit}
        control = None if options.no_control else edit.control()
        scores: dict[str, Scores] = {}
        for name, part in (("after", edit), ("control", control)):
            if part is not None:
                with s.progress(f"{name} the edit" if name == "after" else "its control") as tick, part.applied(model):
                    scores[name] = evaluate(model, facts, progress=tick, **arguments)
                scores[name].save(s.run.file(FILES[name]))
        if (other := otherwise(model, edit.manifest.get("chat"))) is not None:
            scores |= asked_otherwise(s, other, facts, edit, asked)
        before = before.of_edited(facts, facts_from(edit.requests))
        if before.edited is not None:
            s.screen.say(f"kt: {before.about_records} by {options.edit}; success is that of these alone")
        if known := known_words(edit.manifest.get("editor_seen")):
            s.screen.say(f"kt: {known}")
        before.save(s.run.file(FILES["before"]))
        log_samples(s, scores["after"], before, model)
        compared = Comparison(before, **scores)
        s.keep(compared)
        s.screen.tables(*compared.tables())
    return None


def otherwise(model: TracedModel, solved: dict[str, Any] | None) -> TracedModel | None:
    """The model asked in the other way, where a chat template comes into it: an edit often holds in one of both alone.

    Args:
        solved: how the edit's requests were asked, by its file; None for as they stand.
    """
    if model.chat is not None:
        return model.asked("never")
    if solved is None:
        return None
    from dataclasses import fields

    from ..model.chat import Chat

    return model.asked(Chat(**{spec.name: solved[spec.name] for spec in fields(Chat) if spec.name in solved}))


def asked_otherwise(
    s: Session, model: TracedModel, facts: list[Fact], edit: AnyEdit, arguments: dict[str, Any]
) -> dict[str, Scores]:
    """The scores before and after an edit of a model that is asked in the other way."""
    from ..evaluation import evaluate
    from ..facts.load import facts_from

    s.screen.say(f"kt: scored again with prompts {'as they stand' if model.chat is None else 'in the chat template'}")
    before = unedited(s, model, facts, arguments)
    with s.progress("after the edit, asked otherwise") as tick, edit.applied(model):
        after = evaluate(model, facts, progress=tick, **(arguments | {"before": before, "edited": edit}))
    found = {"before_otherwise": before.of_edited(facts, facts_from(edit.requests)), "after_otherwise": after}
    for name, scores in found.items():
        scores.save(s.run.file(FILES[name]))
    return found


def unedited(s: Session, model: TracedModel, facts: list[Fact], arguments: dict[str, Any]) -> Scores:
    """The unedited model's scores: from kt's cache folder, unless `--no-cache` says otherwise."""
    from .._util.lock import default_cache
    from ..evaluation import evaluate, evaluate_cached

    with s.progress("unedited model") as tick:
        if s.options.no_cache:
            return evaluate(model, facts, progress=tick, **arguments)
        weights = s.run.manifest["model"]["fingerprint"]  # of gigabytes: hashed once a command
        cached = evaluate_cached(model, facts, default_cache(), weights, progress=tick, **arguments)
    if cached.file is not None:
        s.screen.say(f"kt: the unedited model's scores are those of {cached.file} (--no-cache scores again)")
    return cached.scores


def log_samples(s: Session, scores: Scores, before: Scores | None, model: TracedModel) -> None:
    """One row a sample, if `--log-samples` asks for it."""
    from ..evaluation.samples_file import sample_rows, write_samples

    if (kind := s.options.log_samples) is not None:
        write_samples(s.run.file(f"samples.{kind}"), sample_rows(scores, before, model.tokenizer.decode), kind)


def questions(options: EvalOptions) -> dict[str, Any]:
    """The arguments of `evaluate` that the options name; what cannot work is refused before a model loads."""
    protocols = parse.names(options.protocol, PROTOCOLS, "--protocol")
    if options.log_samples is not None:
        kind = parse.one(options.log_samples, ("jsonl", "parquet"), "--log-samples")
        if kind == "parquet":
            need("pyarrow", "--log-samples parquet", instead=", or write --log-samples jsonl")
    if options.no_generate:
        if "wild" in protocols:
            raise BadOption("--no-generate leaves nothing for wild to read; drop one of the two")
        protocols = tuple(name for name in protocols if name != "gen")
    needs = (
        (not protocols, "--no-generate leaves no protocol; add tf, prob or ppl to --protocol"),
        (options.heldout is not None and "ppl" not in protocols, "--heldout is read by ppl; add it to --protocol"),
        (options.kl and options.edit is None, "--kl compares an edited model with the unedited one; give --edit"),
        (options.judge_url is not None and "wild" not in protocols, "a judge reads wild; add it to --protocol"),
        (options.judge_url is not None and options.judge_model is None, "--judge-url needs --judge-model"),
        (options.judge_model is not None and options.judge_url is None, "--judge-model needs --judge-url"),
    )
    for wrong, message in needs:
        if wrong:
            raise BadOption(message)
    return {"protocols": protocols, "heldout": options.heldout, "max_new_tokens": options.max_new_tokens}


def _judge(options: EvalOptions, s: Session) -> Any:
    """The judge, if one is asked for; the verdicts of a run that this one replaces are taken over."""
    if options.judge_url is None:
        return None
    from ..evaluation import Judge

    cache, earlier = s.run.file(VERDICTS), s.path / VERDICTS
    if earlier.is_file():
        cache.write_bytes(earlier.read_bytes())
    return Judge(options.judge_url, options.judge_model or "", os.environ.get(JUDGE_KEY), cache)
