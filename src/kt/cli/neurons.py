"""`kt neurons`: the MLP neurons that an answer's probability is due to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from . import parse
from .options import ChatOptions, FactOptions, FigureOptions, ModelOptions, Opt, RunOptions
from .session import session


@dataclass(frozen=True)
class NeuronOptions(FigureOptions, RunOptions, FactOptions, ChatOptions, ModelOptions):
    steps: Annotated[int, Opt("--steps", min=1, help="Points of the integral.")] = 20
    threshold: Annotated[float, Opt("--threshold", help="Share of a prompt's largest attribution that counts.")] = 0.2
    shared: Annotated[
        float, Opt("--shared", help="Share of the prompt and its paraphrases at which a neuron has to count.")
    ] = 0.7
    at: Annotated[str, Opt("--at", help="The token whose neurons are asked about: last, subject_last.")] = "last"


def neurons(options: NeuronOptions) -> None:
    """Knowledge neurons: attribute each answer to MLP neurons by integrated gradients."""
    parse.one(options.at, ("last", "subject_last"), "--at")
    with session(options) as s:
        from ..tracing.neurons import knowledge_neurons

        facts, model = s.load_facts(), s.load_model()
        with s.progress("attributing facts") as tick:
            found = knowledge_neurons(
                model,
                facts,
                steps=options.steps,
                threshold=options.threshold,
                shared=options.shared,
                at=options.at,
                progress=tick,
                seed=options.seed,
            )
        s.keep(found)
        s.screen.tables(*found.tables())
