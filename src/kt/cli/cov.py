"""`kt cov`: second moments of the keys over a corpus, which solving an edit needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .._util.text import count
from . import parse
from .command import BadOption, option_of
from .options import ChatOptions, ModelOptions, Opt, RunOptions, SolveOptions
from .session import session


@dataclass(frozen=True)
class CovOptions(RunOptions, ChatOptions, ModelOptions):
    first = ("corpus", "layers_attn", "max_tokens")

    corpus: Annotated[str, option_of(SolveOptions, "corpus")] = SolveOptions.corpus
    layers_mlp: Annotated[str | None, Opt("--layers-mlp", help="Layers of down_proj: 4-8, none [default: all].")] = None
    layers_attn: Annotated[str | None, Opt("--layers-attn", help="Layers of W_o: 2-4, none [default: all].")] = None
    max_tokens: Annotated[int | None, option_of(SolveOptions, "max_tokens")] = SolveOptions.max_tokens
    until: Annotated[
        float | None,
        Opt("--until", help="Stop when doubling the tokens changes no moment by more than this share: 0.05."),
    ] = None
    cache: Annotated[Path | None, Opt("--cache", help="Where the moments are kept [default: the user's cache].")] = None


def cov(options: CovOptions) -> None:
    """Take the second moments of the keys over a corpus, into the cache."""
    mlp = parse.layers(options.layers_mlp, "--layers-mlp")
    attn = parse.layers(options.layers_attn, "--layers-attn")
    if mlp == attn == ():
        raise BadOption("--layers-mlp none and --layers-attn none leave nothing to do; name some layers")
    with session(options) as s:
        from ..editing import key_statistics, memory_needed
        from ..model.sites import Kind, Site

        model = s.load_model()
        given = {Kind.MLP: mlp, Kind.ATTN: attn}
        chosen = {kind: model.layers_with(kind) if layers is None else layers for kind, layers in given.items()}
        sites = [Site(kind, model.checked(layer)) for kind, layers in chosen.items() for layer in layers]
        need = "needs" if len(sites) == 1 else "need"
        s.screen.say(f"kt: {count(len(sites), 'second moment')} {need} {memory_needed(model, sites) / 2**20:.0f} MiB")
        with s.progress("tokens") as tick:
            moments = key_statistics(
                model, sites, options.corpus, options.max_tokens, options.cache, tick, until=options.until
            )
        s.keep(moments)
        s.screen.tables(*moments.tables())
