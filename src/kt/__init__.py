"""Find where a language model keeps a fact, and rewrite it there.

    import kt
    model = kt.load("demo")
    trace = kt.causal_trace(model, kt.load_facts("demo", limit=100))

Public names are imported on first use (PEP 562), so that `import kt` and `kt --help` never load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._util.lazy import attach

if TYPE_CHECKING:
    from .capability.run import Abilities, abilities
    from .editing import Edit, EditSession, key_statistics
    from .editing.hyper.editor import Editor
    from .editing.hyper.train import train_editor
    from .editing.session import edit
    from .editing.stack import EditStack
    from .errors import KtError
    from .evaluation import Scores, evaluate
    from .experiments import Sweep
    from .experiments.case_study import CaseStudy, case_study
    from .experiments.layer_search import find_layers
    from .experiments.sequence import run_edits
    from .explorer import explore
    from .explorer.widget import widget
    from .facts.fact import Fact, Prompt
    from .facts.load import iter_facts, load_facts, read_facts
    from .model.chat import Chat
    from .model.load import load
    from .model.model import TracedModel
    from .model.sites import Kind, Site
    from .probing import Probe, contrast_probe
    from .recipes import run_recipe
    from .residual import Residual, residual_fact
    from .tracing import Balance, Screen, Trace, balance_factor, causal_trace, peak_inflation
    from .tracing.neurons import knowledge_neurons
    from .tracing.screen import screen

__version__ = "0.1.0"

_HOMES = {
    "load": ".model.load",
    "Chat": ".model.chat",
    "TracedModel": ".model.model",
    "Kind": ".model.sites",
    "Site": ".model.sites",
    "Fact": ".facts.fact",
    "Prompt": ".facts.fact",
    "load_facts": ".facts.load",
    "read_facts": ".facts.load",
    "iter_facts": ".facts.load",
    "causal_trace": ".tracing",
    "Trace": ".tracing",
    "balance_factor": ".tracing",
    "Balance": ".tracing",
    "screen": ".tracing",
    "Screen": ".tracing",
    "peak_inflation": ".tracing",
    "contrast_probe": ".probing",
    "Probe": ".probing",
    "knowledge_neurons": ".tracing.neurons",
    "residual_fact": ".residual",
    "Residual": ".residual",
    "edit": ".editing.session",
    "Edit": ".editing",
    "train_editor": ".editing.hyper.train",
    "Editor": ".editing.hyper.editor",
    "EditSession": ".editing",
    "EditStack": ".editing.stack",
    "run_edits": ".experiments.sequence",
    "find_layers": ".experiments.layer_search",
    "key_statistics": ".editing",
    "evaluate": ".evaluation",
    "abilities": ".capability",
    "Abilities": ".capability",
    "case_study": ".experiments.case_study",
    "CaseStudy": ".experiments.case_study",
    "Scores": ".evaluation",
    "Sweep": ".experiments",
    "explore": ".explorer",
    "widget": ".explorer.widget",
    "run_recipe": ".recipes",
    "KtError": ".errors",
}

__all__ = [  # noqa: RUF022 -- in the order of use
    "load",
    "Chat",
    "TracedModel",
    "Kind",
    "Site",
    "load_facts",
    "read_facts",
    "iter_facts",
    "Fact",
    "Prompt",
    "causal_trace",
    "Trace",
    "balance_factor",
    "Balance",
    "screen",
    "Screen",
    "peak_inflation",
    "knowledge_neurons",
    "contrast_probe",
    "Probe",
    "key_statistics",
    "edit",
    "Edit",
    "train_editor",
    "Editor",
    "EditSession",
    "EditStack",
    "residual_fact",
    "Residual",
    "run_edits",
    "find_layers",
    "evaluate",
    "Scores",
    "Sweep",
    "explore",
    "widget",
    "run_recipe",
    "abilities",
    "Abilities",
    "case_study",
    "CaseStudy",
    "KtError",
]


__getattr__, __dir__ = attach(__name__, _HOMES)
