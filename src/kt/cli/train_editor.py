"""`kt train-editor`: train MEND's or MALMEN's networks for a model; the file is what kt apply-edit edits with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from . import parse
from .command import BadOption, option_of
from .options import ChatOptions, FactOptions, FigureOptions, LongRunOptions, ModelOptions, Opt, SolveOptions
from .session import session


@dataclass(frozen=True)
class TrainOptions(FigureOptions, LongRunOptions, FactOptions, ChatOptions, ModelOptions):
    method: Annotated[str, Opt("--method", help="malmen or mend.")] = "malmen"
    layers_mlp: Annotated[str | None, option_of(SolveOptions, "layers_mlp")] = None
    modules: Annotated[
        str | None,
        Opt("--modules", help="Linear maps that are written [default: malmen mlp (down_proj), mend all of the MLP's]."),
    ] = None
    exclude: Annotated[
        str | None,
        Opt("--exclude", help="Facts that you will edit: records of their subjects are not trained on, nor checked."),
    ] = None
    set: Annotated[
        str | None, Opt("--set", help="Training settings: steps=300,edits=32,lr=0.002,rank=64 (docs/train-editor.md).")
    ] = None


def train_editor(options: TrainOptions) -> None:
    """Train an editor (MALMEN, MEND) on records with a target, a paraphrase and an unrelated prompt each."""
    from ..editing.config import linear_maps
    from ..editing.hyper.settings import TrainingSettings

    method = parse.one(options.method, ("malmen", "mend"), "--method")
    settings = parse.settings(options.set)
    TrainingSettings.given(settings)
    if options.modules is not None:
        linear_maps(options.modules)
    layers = parse.layers(options.layers_mlp, "--layers-mlp")
    if layers == ():
        raise BadOption("--layers-mlp none: an editor has to write a layer; give at least one")
    with session(options) as s:
        from ..facts.load import read_facts

        facts = s.load_facts()
        exclude = read_facts(options.exclude).facts if options.exclude else []
        from ..editing.hyper.train import train_editor as train
        from ..editing.method_names import MethodName

        def told(check: dict[str, Any]) -> None:
            scores = ", ".join(f"{n} {check[n]['mean']:.2f}" for n in ("success", "paraphrase", "locality"))
            s.screen.say(
                f"kt: step {check['step']}: loss {check['loss']:.3f}, held out {check['held_out_loss']:.3f} ({scores})"
            )

        model = s.load_model()
        with s.progress("training steps") as tick:
            editor = train(
                model,
                facts,
                MethodName(method),
                layers,
                options.modules,
                seed=options.seed,
                journal=s.journal(),
                progress=tick,
                on_check=told,
                exclude=exclude,
                **settings,
            )
        path = editor.save(s.run.file("editor.safetensors"))
        s.keep(editor)
        s.screen.tables(*editor.tables())
        s.screen.say(f"kt: edit with --method {options.method} --set editor={s.path / path.name}")
