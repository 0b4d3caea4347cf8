"""Run lm-eval on a loaded model: prompts, few-shot examples, filters and metrics are the harness's own."""

from __future__ import annotations

import copy
import io
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import KtError, WorkFailed, said_by
from ..model.model import TracedModel
from .tasks import BadTask, Chosen, lm_eval_module

CPU_ROWS = 8
"""Rows of a batch under batch_size="auto" where lm-eval's own search, which fills the memory, would fill the host's."""

_KEPT = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "n-samples", "higher_is_better")


@dataclass(frozen=True)
class Settings:
    """lm-eval's options under lm-eval's names (see `abilities`)."""

    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    gen_kwargs: str | Mapping[str, Any] | None = None
    batch_size: int | str = "auto"
    seed: int = 0
    confirm_run_unsafe_code: bool = False

    def __post_init__(self) -> None:
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise BadTask(f"num_fewshot {self.num_fewshot} is below zero; give the number of examples in the prompt")
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and float(self.limit).is_integer())):
            raise BadTask(f"limit {self.limit:g}: give a number of documents per task, or a share between 0 and 1")
        given = self.gen_kwargs
        if isinstance(given, str) and any("=" not in part for part in given.split(",")):
            raise BadTask(f"gen_kwargs {given!r}: write name=value pairs with commas, as temperature=0,max_gen_toks=64")

    @property
    def seeds(self) -> dict[str, int]:
        """lm-eval's four seeds; seed 0 gives its defaults, so that its own command line finds the same figures."""
        other = self.seed + 1234
        return {
            "random_seed": self.seed,
            "numpy_random_seed": other,
            "torch_random_seed": other,
            "fewshot_random_seed": other,
        }


def run_harness(model: TracedModel, chosen: Chosen, settings: Settings, progress: bool = False) -> dict[str, Any]:
    """lm-eval's results for the model as it stands now, `samples` included.

    Left out is what changes from run to run (dates, times, the machine), and standard errors: intervals come from the
    samples.

    Raises:
        BadTask: a task cannot be loaded, or asks for what the model or the settings do not have.
        WorkFailed: lm-eval stopped, or the model answered with NaN.
    """
    lm_eval = lm_eval_module()
    if settings.apply_chat_template and not getattr(model.tokenizer, "chat_template", None):
        raise BadTask(f"{model.name} has no chat template; leave out --apply-chat-template")
    with model.at_rest(), _quiet(progress), _random_states():
        results = _simple_evaluate(lm_eval, _wrapped(model, settings), chosen, settings)
    _refuse_nan(results["samples"])
    return {name: results[name] for name in _KEPT if name in results} | {
        "results": _without_errors(results["results"]),
        "groups": _without_errors(results.get("groups", {})),
        "samples": results["samples"],
        "lm_eval_version": results.get("lm_eval_version"),
    }


def _simple_evaluate(lm_eval: Any, wrapped: Any, chosen: Chosen, settings: Settings) -> dict[str, Any]:
    try:
        results = lm_eval.simple_evaluate(
            wrapped,
            tasks=copy.deepcopy(chosen.specs),
            task_manager=chosen.manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.fewshot_as_multiturn,
            system_instruction=settings.system_instruction,
            gen_kwargs=settings.gen_kwargs,
            confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
            # No cache of responses either: its keys know the model's name, not which edit is written into it.
            bootstrap_iters=0,
            **settings.seeds,
        )
    except (KtError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a task's own code may raise anything
        reason = said_by(error)
        raise WorkFailed(
            f"lm-eval stopped: {type(error).__name__}: {reason}; see whether the task runs with lm-eval alone"
        ) from error
    if results is None:
        raise WorkFailed("lm-eval gave no results in this process; run kt in one process, without torchrun")
    return dict(results)


def _wrapped(model: TracedModel, settings: Settings) -> Any:
    """The loaded module as lm-eval's own Hugging Face model."""
    size = settings.batch_size
    if size == "auto" and model.device.type != "cuda":
        size = CPU_ROWS
    # lm-eval may give the tokenizer a padding token: it gets a copy.
    tokenizer = copy.deepcopy(model.tokenizer)
    return lm_eval_module("lm_eval.models.huggingface").HFLM(
        pretrained=model.module, tokenizer=tokenizer, batch_size=size
    )


def _without_errors(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {task: {n: v for n, v in row.items() if "_stderr," not in n} for task, row in results.items()}


def _refuse_nan(samples: Mapping[str, list[dict[str, Any]]]) -> None:
    """lm-eval would count a NaN as a wrong answer, or as the first choice."""
    for task, rows in samples.items():
        for row in rows:
            if any(map(_is_nan, row["filtered_resps"])):
                raise WorkFailed(f"{task}, document {row['doc_id']}: a NaN; an edit or a dtype broke the model")


def _is_nan(response: Any) -> bool:
    value = response[0] if isinstance(response, tuple | list) and response else response
    return isinstance(value, float) and math.isnan(value)


@contextmanager
def _random_states() -> Iterator[None]:
    """lm-eval seeds every global generator; the caller's draws go on afterwards as if it had not."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Nothing of lm-eval on stdout, which holds our results; its bars on stderr, if at all; only errors of its log."""
    log = logging.getLogger("lm_eval")
    level = log.level
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        if not progress:
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(redirect_stderr(io.StringIO()))
            stack.enter_context(_children_muted())
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


@contextmanager
def _children_muted() -> Iterator[None]:
    """lm-eval asks git for a commit of the working folder; git's complaint that there is none helps nobody."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
