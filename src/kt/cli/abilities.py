"""`kt abilities`: what an edit does to abilities that have nothing to do with it, through lm-eval.

A command of its own and no part of `kt eval`: it asks no facts, and `--limit`, `--tasks` or `--batch-size` mean here
what they mean in lm-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import need
from . import parse
from .command import BadOption
from .options import ForceOptions, ModelOptions, Opt, RunOptions
from .session import open_edit, session

if TYPE_CHECKING:
    from ..capability.tasks import Spec


@dataclass(frozen=True)
class AbilityOptions(RunOptions, ForceOptions, ModelOptions):
    tasks: Annotated[
        str | None, Opt("--tasks", "-t", help="Tasks of lm-eval, with commas; patterns (mmlu_*) and YAML files too.")
    ] = None
    preset: Annotated[
        str | None, Opt("--preset", help="gsm8k-two-shot: GSM8K with two examples (the paper's B.4), and perplexity.")
    ] = None
    edit: Annotated[Path | None, Opt("--edit", help="Also run with this edit (of kt apply-edit), and compare.")] = None
    num_fewshot: Annotated[int | None, Opt("--num-fewshot", min=0, help="Worked examples in the prompt.")] = None
    limit: Annotated[
        float | None, Opt("--limit", "-L", help="Documents per task, or the share of them below 1: for trying out.")
    ] = None
    include_path: Annotated[
        Path | None, Opt("--include-path", help="A folder with tasks of your own; their code is run.")
    ] = None
    apply_chat_template: Annotated[
        bool, Opt("--apply-chat-template", help="Put the prompts into the tokenizer's chat template.")
    ] = False
    system_instruction: Annotated[str | None, Opt("--system-instruction", help="A system prompt.")] = None
    gen_kwargs: Annotated[
        str | None, Opt("--gen-kwargs", help="Generation arguments of lm-eval: temperature=0,max_gen_toks=64.")
    ] = None
    log_samples: Annotated[
        bool, Opt("--log-samples", "-s", help="Keep every document, response and score: samples_*.jsonl.")
    ] = False


def abilities(options: AbilityOptions) -> None:
    """Run tasks of lm-eval on a model, and on the model with an edit."""
    if (options.tasks is None) == (options.preset is None):
        raise BadOption("give either --tasks (as gsm8k,mmlu) or --preset (gsm8k-two-shot), one of them")
    with session(options) as s:
        tasks = options.tasks or _preset(options.preset or "")
        need("lm_eval", "a measurement of general abilities")
        from ..capability import abilities as measure
        from ..capability.tasks import choose
        from ..evaluation.samples_file import write_samples

        chosen = choose(tasks, options.include_path)
        edit = open_edit(s, options.edit) if options.edit else None
        model = s.load_model()
        result = measure(
            model,
            chosen,
            edit,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            seed=options.seed,
            progress=s.screen.progress_bars,
            apply_chat_template=options.apply_chat_template,
            system_instruction=options.system_instruction,
            gen_kwargs=options.gen_kwargs,
            batch_size=parse.batch_size(options.batch_size),
        )
        result.save(s.run.file("abilities.json"))
        if options.log_samples:
            for name, rows in result.sample_files():
                write_samples(s.run.file(f"{name}.jsonl"), rows)
        s.keep(result)
        s.screen.tables(*result.tables())


def _preset(name: str) -> Sequence[Spec]:
    from ..capability import PRESETS

    if name not in PRESETS:
        raise BadOption(f"--preset {name!r}: no such preset of abilities; choose {', '.join(PRESETS)}, or give --tasks")
    return PRESETS[name]
