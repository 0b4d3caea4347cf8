"""The options that commands share, each written once; parse.py reads their values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .command import BadOption, Options, as_flag

Opt = typer.Option


@dataclass(frozen=True)
class ModelOptions(Options):
    heading = "Model"

    model: Annotated[str, Opt("--model", "-m", help="demo, a local folder, or a Hub id (repo@revision).")] = "demo"
    dtype: Annotated[str, Opt("--dtype", help="auto, float32/fp32, bfloat16/bf16, float16/fp16.")] = "auto"
    device: Annotated[str, Opt("--device", help="auto, cpu, cuda:0, mps.")] = "auto"
    device_map: Annotated[
        str | None,
        Opt("--device-map", help="auto, balanced, sequential, or a JSON file: a large model on several devices."),
    ] = None
    trust_remote_code: Annotated[bool, Opt("--trust-remote-code", help="Run the code that a Hub repository ships.")] = (
        False
    )
    layout: Annotated[
        Path | None, Opt("--layout", help="A TOML or JSON file that names parts of a model that kt does not find.")
    ] = None
    remote: Annotated[
        bool, Opt("--remote", help="Trace and probe on NDIF, which has the weights (needs NDIF_API_KEY).")
    ] = False

    def __post_init__(self) -> None:
        if self.remote:
            refuse_remote(self)


@dataclass(frozen=True)
class ChatOptions(Options):
    """Options of the commands that ask a model prompts."""

    heading = "Model"

    chat: Annotated[
        str | None,
        Opt(
            "--chat",
            help="Ask prompts in the model's chat template: always, never, or auto: where it has one and ends its "
            "turns as that does [default: auto].",
        ),
    ] = None
    system: Annotated[str | None, Opt("--system", help="The chat's system prompt [default: the template's own].")] = (
        None
    )
    thinking: Annotated[
        str | None, Opt("--thinking", help="Open replies with thoughts: on or off, where the template knows it.")
    ] = None
    chat_turn: Annotated[
        str | None,
        Opt(
            "--chat-turn",
            help="A prompt is the user's turn (user), begins the reply (reply), or, by its last mark, one of both "
            "(auto) [default: auto].",
        ),
    ] = None


REMOTE = ("heatmap", "alpha", "probe")
"""Commands that only read a model through traces."""


def refuse_remote(options: ModelOptions) -> None:
    """Refuse options that a remote model cannot serve, before anything is loaded or sent.

    Raises:
        BadOption: the command, or one of its options, needs the weights here.
    """
    from ..model.ndif import REASON

    if options.command not in REMOTE:
        raise BadOption(f"--remote has no place with kt {options.command}: {REASON}; it is for {', '.join(REMOTE)}")
    needed = {"--edit": getattr(options, "edit", None) is not None}
    needed["--method atp"] = getattr(options, "method", None) == "atp"
    for what, given in needed.items():
        if given:
            raise BadOption(f"{what} needs the weights here, and with --remote they are not: {REASON}")
    for name, default in (("dtype", "auto"), ("device", "auto"), ("device_map", None)):
        if getattr(options, name) != default:
            raise BadOption(f"{as_flag(name)} of a remote model is NDIF's to choose; leave it out")


@dataclass(frozen=True)
class ForceOptions(Options):
    """Options of the commands that write an edit from a file into the model."""

    heading = "Model"

    force: Annotated[
        bool, Opt("--force", help="Write an edit also into other weights than it was solved for; says what differs.")
    ] = False


@dataclass(frozen=True)
class FactOptions(Options):
    heading = "Facts"

    facts: Annotated[
        str,
        Opt("--facts", "-f", help="demo, lre (real facts), a JSON, JSONL or CSV file or folder, or hf:repo[:file]."),
    ] = "demo"
    limit: Annotated[str | None, Opt("--limit", help="Only the first N facts, or a range of them: 10-20.")] = None
    format: Annotated[
        str | None, Opt("--format", help="The data set's format, if its keys do not show it (kt ls datasets).")
    ] = None
    zsre_target: Annotated[
        str, Opt("--zsre-target", help="Of zsRE, what is edited in: answer (as MEMIT has it) or alt (EasyEdit).")
    ] = "answer"
    known_to: Annotated[
        str | None, Opt("--known-to", help="Of known_1000, only the facts flagged as known to this model.")
    ] = None
    join: Annotated[
        str | None,
        Opt(
            "--join",
            help='Text between prompt and answer: "" for none, "\\n" a line end [default: by script and brackets].',
        ),
    ] = None
    prompt: Annotated[str | None, Opt("--prompt", help='One fact by hand: "The capital of {} is".')] = None
    subject: Annotated[str | None, Opt("--subject", help="The subject of --prompt.")] = None
    answer: Annotated[str | None, Opt("--answer", help="What the model says to --prompt now.")] = None
    foil: Annotated[str | None, Opt("--foil", help="A wrong answer of the same relation, to contrast with.")] = None
    target: Annotated[str | None, Opt("--target", help="What an edit should make the model say.")] = None


@dataclass(frozen=True)
class RunOptions(Options):
    heading = "Run"

    batch_size: Annotated[str, Opt("--batch-size", "-b", help="auto or a number; results do not depend on it.")] = (
        "auto"
    )
    seed: Annotated[int, Opt("--seed", min=0, help="Every random draw comes from it.")] = 0
    out: Annotated[Path | None, Opt("--out", "-o", help="Run folder [default: runs/<UTC time>-<command>-<model>].")] = (
        None
    )
    overwrite: Annotated[
        bool,
        Opt(
            "--overwrite",
            help="Let a run that stands at --out move aside, its new name is said; --json and figures replace any file "
            "that is not read.",
        ),
    ] = False


@dataclass(frozen=True)
class LongRunOptions(RunOptions):
    heading = "Run"

    resume: Annotated[
        Path | None, Opt("--resume", metavar="DIR", help="Go on with an interrupted run; repeat its options.")
    ] = None


@dataclass(frozen=True)
class FigureOptions(Options):
    heading = "Figure"

    html: Annotated[Path | None, Opt("--html", help="Write the figure as one self-contained HTML file.")] = None
    png: Annotated[Path | None, Opt("--png", help="Write the figure as PNG (needs Chromium).")] = None
    svg: Annotated[Path | None, Opt("--svg", help="Write the figure as SVG (needs Chromium).")] = None


@dataclass(frozen=True)
class TraceOptions(Options):
    heading = "Trace"

    noise: Annotated[str, Opt("--noise", help="Noise in standard deviations of the embeddings.")] = "3s"
    corrupt: Annotated[str, Opt("--corrupt", help="noise, or swap: the subject for another of its length.")] = "noise"
    samples: Annotated[int, Opt("--samples", min=1, help="Noise draws per fact.")] = 10
    window: Annotated[int, Opt("--window", min=1, help="Layers restored together, centred.")] = 1
    keep: Annotated[str, Opt("--keep", help="known: only facts that the model answers; all.")] = "known"
    at: Annotated[
        int | None, Opt("--at", min=0, help="The answer's token to trace (0: its first), behind those before it.")
    ] = None


@dataclass(frozen=True)
class SolveOptions(Options):
    """Options that decide an edit, beside its method and α."""

    heading = "Settings of the edit"

    preset: Annotated[
        str | None, Opt("--preset", help="Hyper-parameters by name (kt ls presets lists them), or a TOML file.")
    ] = None
    variant: Annotated[str | None, Opt("--variant", help="The preset as set for one data set: zsre, mcf.")] = None
    layers_mlp: Annotated[str | None, Opt("--layers-mlp", help="Layers whose MLP is written: 4-8.")] = None
    layers_attn: Annotated[str | None, Opt("--layers-attn", help="Layers whose attention is written: 2-4.")] = None
    set: Annotated[
        str | None, Opt("--set", help="More hyper-parameters: v_lr=0.1,mom2_update_weight=100,layers_high=5-6.")
    ] = None
    statistics: Annotated[
        Path | None, Opt("--statistics", help="A safetensors file of key second moments by module name.")
    ] = None
    corpus: Annotated[
        str,
        Opt("--corpus", help="Text for the key moments: auto (english; demo for the demo model), a file, hf:repo."),
    ] = "auto"
    max_tokens: Annotated[
        int | None,
        Opt(
            "--max-tokens",
            min=1,
            help="Tokens of the corpus that are counted [default: 100000; of english 25000, or 5 for each element of "
            "down_proj's keys if more].",
        ),
    ] = None
