"""Prove by running two tokens that the parts found are what they are taken for, and give linear maps their roles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import KtError, UnknownModel
from .devices import execution_device
from .finding import in_a_list, maps_onto, not_found, with_maps
from .layout import ATTENTION, SECOND_ATTN, W_ATTN, W_MLP, Layout, Parts, linear_shape, own_names, unwrap_tuple
from .mixture import settle_mixture
from .sites import Kind


def last_called(model: Any) -> Layout:
    """The layout with W_o and down_proj that a forward calls last: a gate may be registered behind them.

    Args:
        model: A TracedModel under construction, its layout found by structure.

    Raises:
        UnknownModel: another block has no such maps.
    """
    layout: Layout = model.layout
    for layer, parts in layout.kinds.items():
        block = model.module.get_submodule(f"{layout.blocks}.{layer}")
        onto = {path: module for path, module in maps_onto(block, layout.d_model) if not in_a_list(block, path)}
        order = call_order(model, onto, block)
        second = parts.seconds.get(SECOND_ATTN, "").rpartition(".")[0]
        inside = [path for path in order if parts.attn and path.startswith(parts.attn + ".")]
        beside = [path for path in order if second and path.startswith(second + ".")]
        outside = [path for path in order if path not in inside and path not in beside]
        found = {W_ATTN: inside, SECOND_ATTN: beside, W_MLP: [] if parts.mixture is not None else outside}
        ends = {role: (found.get(role) or [path])[-1] for role, path in parts.ends.items()}
        if ends != parts.ends:
            w_mlp = ends.get(W_MLP, "")
            mlp = parts.mlp if w_mlp == parts.w_mlp else w_mlp.rpartition(".")[0] or w_mlp
            layout = layout.with_kind(parts, with_maps(block, replace(parts, mlp=mlp, linears=ends)))
    return layout


def validate(model: Any) -> Layout:
    """Check by running two tokens that W · key + b is each module's whole output, and see how a block is built.

    Args:
        model: A TracedModel under construction.

    Returns:
        The layout with `parallel`, `direct`, `tuple_output` and the roles of all linear maps set. `has_post_norm` is a
        first guess from `direct`, which `explained.settle` replaces.

    Raises:
        UnknownModel: a module's output is not that of the linear map found.
    """
    layout: Layout = model.layout
    for parts in layout.kinds.values():
        if parts.mixture is not None and model.remote:
            raise UnknownModel(
                f"{type(model.module).__name__} has {parts.mixture.describe()}: a mixture of experts is read on a "
                "model that runs here; load its weights on this machine"
            )
        if parts.mixture is not None:
            layers = [n for n in range(layout.n_layers) if layout.at(n) == parts]
            mixture = settle_mixture(model, parts.mixture, layers, ordinary_tokens(model))
            layout = layout.with_kind(parts, replace(parts, mixture=mixture))
            model.layout = layout
    if not model.remote:
        _validate_padding(model)
    found = {layer: _validate_kind(model, layer, parts) for layer, parts in layout.kinds.items()}
    for layer, each in found.items():
        layout = layout.with_kind(layout.at(layer), each.parts)
    first = found[0]
    direct = all(each.direct for each in found.values())
    return replace(
        layout, parallel=first.parallel, direct=direct, has_post_norm=not direct, tuple_output=first.tuple_output
    )


MASKED_FROM = (5, 17)
"""The version of transformers that keeps padding out of linear attention and convolutions; 5.13 does not."""


def _validate_padding(model: Any) -> None:
    """Check that a row's numbers do not depend on the padding beside it, where a mixer keeps a state.

    Raises:
        UnknownModel: they do.
    """
    if set(model.layout.mixers) <= {ATTENTION, ""}:
        return
    ids = ordinary_tokens(model)
    padded = torch.nn.functional.pad(ids, (3, 0))
    masks = [torch.ones_like(ids), torch.nn.functional.pad(torch.ones_like(ids), (3, 0))]
    with torch.no_grad():
        rows = [
            model.module(input_ids=row, attention_mask=mask, use_cache=False).logits[:, -1].double()
            for row, mask in zip((ids, padded), masks, strict=True)
        ]
    allowed = max(1e-4, 4 * torch.finfo(model.dtype).eps) * float(rows[0].abs().max())
    if bool(torch.stack(rows).isfinite().all()) and float((rows[1] - rows[0]).abs().max()) > allowed:
        import transformers

        remedy = "docs/reliability.md lists the kinds of models that can be"
        if tuple(map(int, transformers.__version__.split(".")[:2])) < MASKED_FROM:
            needed = ".".join(map(str, MASKED_FROM))
            remedy = f"transformers {needed} keeps padding out of most such layers, this is {transformers.__version__}"
        raise UnknownModel(
            f"{type(model.module).__name__} is not a decoder that kt can read: the numbers of a prompt change with the "
            f"padding beside it, and prompts of several lengths are read together; {remedy}"
        )


class _Kind(NamedTuple):
    """What two tokens tell of a kind of block."""

    parts: Parts
    parallel: bool
    direct: bool
    tuple_output: bool


def _validate_kind(model: Any, layer: int, parts: Parts) -> _Kind:
    """`validate` for the kind of the block at a layer."""
    layout: Layout = model.layout
    here = f"{layout.blocks}.{layer}"
    ids = torch.tensor([[1, 2]], device=model.device) % model.vocab_size
    block = model.block(layer)
    attn, mlp = (model.envoy(f"{here}.{path}") if path else None for path in (parts.attn, parts.mlp))
    if parts.mlp == parts.w_mlp:
        mlp = None
    module = model.module.get_submodule(here)
    order = call_order(model, {path: module.get_submodule(path) for path in parts.ends.values()}, module)
    rank = {path: number for number, path in enumerate(order)}
    roles = sorted(parts.ends, key=lambda role: rank.get(parts.ends[role], len(rank)))
    sites = {role: model.projection(role, layer) for role in roles}
    w_attn, w_mlp = sites.get(W_ATTN), sites.get(W_MLP)
    with torch.no_grad():
        with model.root.trace(input_ids=ids, use_cache=False, backend=model.backend()) as tracer:
            seen: Any = {"in": block.input.clone()}  # clones, since a forward may add to its own tensors (Falcon)
            for role, site in sites.items():
                if role == W_MLP:
                    seen["m_key"] = site.input.clone()
                seen[role] = site.output.clone()
                if role == W_ATTN and attn is not None:
                    seen["attn"] = unwrap_tuple(attn.output).clone()
            if mlp is not None:
                seen["mlp"] = unwrap_tuple(mlp.output).clone()
            seen["out"] = block.output
            seen.save()
            tracer.stop()
        parallel = False
        if w_attn is not None and w_mlp is not None:
            with model.root.trace(input_ids=ids, use_cache=False, backend=model.backend()) as tracer:
                w_attn.output[:] = 0
                key_cut: Any = w_mlp.input.save()
                tracer.stop()
            parallel = torch.equal(seen["m_key"], key_cut)
    out = unwrap_tuple(seen["out"])
    stream = (*ids.shape, layout.d_model)
    for name, tensor in (("gets", seen["in"]), ("gives", out)):
        if tuple(tensor.shape) != stream:
            not_found(model.module, None, f"one residual stream: a block {name} {tuple(tensor.shape)}, not {stream}")
    values = {role: seen[role] for role in sites}
    if not all(value.isfinite().all() for value in values.values()):
        raise UnknownModel(
            f"{type(model.module).__name__} gives numbers that are not finite (NaN or infinity) in {here} "
            "for two tokens: its weights are broken, or its dtype is too narrow; load it in float32, or fetch it again"
        )
    zero = torch.zeros_like(out)
    fits = all(value.numel() == out.numel() for value in values.values())
    added = {role: value.view_as(out) for role, value in values.items()} if fits else {}
    middle = seen["in"] + added.get(W_ATTN, zero)  # BLOOM and MPT add the stream inside their modules
    if w_attn is not None and not same(seen["attn"], values[W_ATTN]) and not same(seen["attn"], middle):
        not_found(model.module, "attn", f"an attention whose output is that of {parts.w_attn}")
    if mlp is not None and w_mlp is not None and not same(seen["mlp"], values[W_MLP]):
        if not fits or not same(seen["mlp"], middle + added[W_MLP]):
            not_found(model.module, "mlp", f"an MLP whose output is that of {parts.w_mlp}")
        parts = replace(parts, mlp=parts.w_mlp)
    total = seen["in"] + sum(added.values(), start=zero)
    scale = float(out.float().abs().max()) + 1e-6
    direct = bool((total - out).float().abs().max() <= 2e-2 * scale)
    parts = replace(parts, linears=_roles(model, layer, parts))
    return _Kind(parts, parallel, direct, isinstance(seen["out"], tuple))


def validate_ends(model: Any) -> None:
    """Check by running two tokens what stands before the first block and behind the last.

    The embedding takes the tokens, and no other module brings them to the first block; a multiplier, positions or a
    norm may follow it. The final norm takes the last block's output, up to a multiplier, and changes it; the head's
    input follows from its output alone, and the logits from the head's. Nothing is said of numbers that are not finite.

    Args:
        model: A TracedModel under construction, its weights here.

    Raises:
        UnknownModel: a part is not what the layout takes it for; the message names it.
    """
    layout: Layout = model.layout
    first, last = f"{layout.blocks}.0", f"{layout.blocks}.{layout.n_layers - 1}"
    # Rows 1 to 3 read other tokens than row 0, and get its output of one part: what follows from that part is row 0's.
    parts = {"first": (first, None), "last": (last, None), "embed": (layout.embed, 1), "head": (layout.unembed, 2)}
    parts |= {"norm": (layout.norm, 3)} if layout.norm else {}
    ids = ordinary_tokens(model)
    ids = torch.cat([ids, *[ids.flip(1)] * 3])
    gets, gives = (dict.fromkeys(parts, torch.zeros(0)) for _ in range(2))

    def note(part: str, row: int | None) -> Any:
        def hook(_module: nn.Module, inputs: Any, arguments: Mapping[str, Any], output: Any) -> None:
            whole = unwrap_tuple(output)
            gets[part] = next(iter([*inputs, *arguments.values()])).to("cpu", copy=True)
            gives[part] = whole.to("cpu", copy=True)
            if row is not None and row < len(whole):  # GPT-2's positions are one row
                whole[row] = whole[0]

        return hook

    handles = [
        model.module.get_submodule(path).register_forward_hook(note(part, row), with_kwargs=True)
        for part, (path, row) in parts.items()
    ]
    try:
        with torch.no_grad():
            logits = model.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.cpu()
    finally:
        for handle in handles:
            handle.remove()
    if not (gives["last"].isfinite().all() and logits.isfinite().all()):
        return
    if not same(gets["embed"], ids.cpu()) or not _close(gets["first"][1], gets["first"][0]):
        what = f"a token embedding that takes the tokens and alone brings them to {first}, as {layout.embed} does not"
        not_found(model.module, "embed", what)
    if gives["head"].shape != logits.shape or not _close(logits[2], logits[0]):
        what = f"an unembedding whose output alone gives the logits, as that of {layout.unembed} does not"
        not_found(model.module, "head", what)
    if layout.norm is None:
        return
    is_norm = _proportional(gets["norm"], gives["last"]) and not same(gives["norm"], gets["norm"])
    if not is_norm or not _close(gets["head"][3], gets["head"][0]):
        what = f"a final norm between {last} and {layout.unembed}, as {layout.norm} is not"
        not_found(model.module, "norm", what)


def ordinary_tokens(model: Any) -> Int[Tensor, "1 2"]:
    """Two tokens from the middle of the vocabulary. The first ones are often special, and their states so long that the
    rounding of bfloat16 exceeds what half of SmolLM2's blocks change in them.
    """
    n_tokens = min(model.vocab_size, len(model.embedding.weight))
    return torch.tensor([[n_tokens // 3, n_tokens // 2]], device=model.device)


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding, in bfloat16 too."""
    largest = other.double().abs().max()
    return one.shape == other.shape and bool((one.double() - other.double()).abs().max() <= 2e-2 * largest)


def _proportional(one: Tensor, other: Tensor) -> bool:
    """The same numbers up to one factor, and rounding."""
    if one.shape != other.shape:
        return False
    factor = (one.double() * other.double()).sum() / other.double().square().sum()
    return _close(one.double(), factor * other.double())


@contextmanager
def understood(module: nn.Module) -> Iterator[None]:
    """Say in one line that a model's own forward of two tokens fails.

    Raises:
        UnknownModel: it does.
    """
    try:
        yield
    except KtError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")[:200]
        wide = any(weight.dtype is torch.float64 and weight.dim() == 3 for weight in module.parameters())
        hint = "; in float64 call its set_experts_implementation('eager') first" if wide else ""
        raise UnknownModel(
            f"{type(module).__name__} is not a decoder that kt can read: a forward of two tokens fails "
            f"({type(error).__name__}: {reason}){hint}"
        ) from error


def same(one: Tensor, other: Tensor) -> bool:
    """The same numbers, whatever the shapes: OPT's MLP works on flattened rows."""
    return one.numel() == other.numel() and torch.equal(one, other.view_as(one))


def _roles(model: Any, layer: int, parts: Parts) -> dict[str, str]:
    """Roles of a kind of block's linear maps, by what each does to the key of W_o or down_proj.

    One forward of two tokens, with a row for each map. In its row the map's output at the first token, where attention
    sees that token alone, is multiplied by -8 (exact in floating point):

        v_proj     the first key of W_o becomes -8 times itself: attention is linear in v
        k_proj     the first key stays, the second changes: its query weighs the two tokens anew
        q_proj     both keys stay: with one token to see there is nothing to weigh
        up_proj    the first key of down_proj becomes -8 times itself: the product is linear in up
        gate_proj  the other of two maps of the same width: its activation is not linear

    A single map before down_proj is `up_proj`. Fused maps are wider than the key. Unless every map of a part (W_o and
    down_proj apart) has a role of its own by these rules, all keep the names of their modules.
    """
    paths = _forward_order(model, layer, parts)
    own = [path for path in paths if _keeps_its_name(parts, path)]
    others = [path for path in paths if path not in own]
    named = _roles_of(model, layer, parts, others) if others else {}
    roles = {path: role for role, path in (named | own_names(parts, own)).items()}
    paths += [parts.w_mlp] if parts.mixture is not None and parts.w_mlp not in paths else []
    return {roles[path]: path for path in paths if path in roles}


def _keeps_its_name(parts: Parts, path: str) -> bool:
    """Whether a map's role is not asked for: those of mixtures of experts, second parts, and mixers other than
    attention."""
    if path in parts.seconds.values():
        return True
    if parts.mixture is not None and (path == parts.mlp or path.startswith(f"{parts.mlp}.")):
        return True
    return parts.mixer != ATTENTION and bool(parts.attn) and path.startswith(f"{parts.attn}.")


def _roles_of(model: Any, layer: int, parts: Parts, paths: list[str]) -> dict[str, str]:
    layout: Layout = model.layout
    ends = {parts.w_attn: Kind.ATTN, parts.w_mlp: Kind.MLP}
    points = [(model.envoy(f"{layout.blocks}.{layer}.{path}"), path in ends, row) for row, path in enumerate(paths, 1)]
    ids = torch.tensor([[1, 2]], device=model.device) % model.vocab_size
    rows = len(paths) + 1
    with torch.no_grad():
        trace = model.root.trace(input_ids=ids.repeat(rows, 1), use_cache=False, backend=model.backend())
        with trace as tracer:
            keys: Any = []
            for envoy, is_end, row in points:
                if is_end:
                    keys.append(envoy.input.reshape(rows, 2, -1).clone())
                else:
                    envoy.output.view(rows, 2, -1)[row, 0] *= -8
            keys.save()
            tracer.stop()
    own, roles = own_names(parts, paths), dict[str, str]()
    block = model.module.get_submodule(f"{layout.blocks}.{layer}")
    for end, key in zip(filter(ends.__contains__, paths), keys, strict=True):
        part = {path: role for role, path in own.items() if role.startswith(f"{ends[end]}.")}
        effects = {
            path: _Effect.of(key[0], key[row])
            for row, path in enumerate(paths, 1)
            if path in part and path != end and linear_shape(block.get_submodule(path))[0] <= key.shape[-1]
        }
        found = _attention_roles(effects) if ends[end] is Kind.ATTN else _mlp_roles(effects)
        clear = len(set(found.values())) == len(part) - 1
        roles |= part | ({path: f"{ends[end]}.{role}" for path, role in found.items()} if clear else {})
    return {roles[path]: path for path in paths if path in roles}


class _Effect(NamedTuple):
    """Effect on the keys of two tokens of a change of a map at the first: which keys moved, and if the first one became
    -8 times itself."""

    first: bool
    second: bool
    scaled: bool

    @classmethod
    def of(cls, before: Float[Tensor, "2 d_key"], after: Float[Tensor, "2 d_key"]) -> _Effect:
        tolerance = max(4 * torch.finfo(before.dtype).eps, 1e-4) * before.double().abs().amax(1)
        first, second = ((after.double() - before.double()).abs().amax(1) > tolerance).tolist()
        scaled = (after[0].double() + 8 * before[0].double()).abs().max() <= 8 * tolerance[0]
        return cls(first, second, bool(scaled))


def _attention_roles(effects: Mapping[str, _Effect]) -> dict[str, str]:
    by_effect = {(True, True): "v_proj", (False, True): "k_proj", (False, False): "q_proj"}
    found = {path: by_effect.get((e.first, e.second)) for path, e in effects.items() if e.scaled or not e.first}
    return {path: role for path, role in found.items() if role}


def _mlp_roles(effects: Mapping[str, _Effect]) -> dict[str, str]:
    if len(effects) == 1:
        return dict.fromkeys(effects, "up_proj")
    if len(effects) == 2 and sum(e.scaled for e in effects.values()) == 1:
        return {path: "up_proj" if e.scaled else "gate_proj" for path, e in effects.items()}
    return {}


class _Stop(Exception):
    """Ends a forward pass after the first block."""


def _forward_order(model: Any, layer: int, parts: Parts) -> list[str]:
    """Paths of the linear maps in the order in which a block runs them; left out are those that do not see every token
    once (unused ones, experts)."""
    block = model.module.get_submodule(f"{model.layout.blocks}.{layer}")
    modules = {path: block.get_submodule(path) for path in parts.linears.values()}
    return call_order(model, modules, block)


def call_order(model: Any, modules: Mapping[str, nn.Module], last: nn.Module) -> list[str]:
    """Names of the modules that see each of two tokens once, in the order of a plain forward that ends at `last`.

    A structure without weights runs on the meta device. Where its mask cannot be made there, all names stay as given.
    """
    device = execution_device(model.embedding)
    ids = torch.ones((1, 2), dtype=torch.long, device=device)
    on_meta = device.type == "meta"
    whole: dict[str, Any] = {"attention_mask": torch.zeros((1, 1, 2, 2), device=device)}
    placed = whole | {"position_ids": torch.arange(2, device=device)[None]}  # OPT counts them from a mask of two axes
    ways: list[dict[str, Any]] = [{"attention_mask": torch.ones_like(ids)}]
    for given in [whole, {"attention_mask": None}, placed] if on_meta else ways:
        seen: list[tuple[str, int]] = []

        def note(name: str, seen: list[tuple[str, int]] = seen) -> Any:
            return lambda _module, _inputs, output: seen.append((name, unwrap_tuple(output).shape[:-1].numel()))

        def stop(*_: Any) -> None:
            raise _Stop

        handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
        handles.append(last.register_forward_hook(stop))
        try:
            with torch.no_grad():
                model.module(input_ids=ids, use_cache=False, **given)
        except _Stop:
            calls = Counter(name for name, _ in seen)
            return [name for name, tokens in seen if tokens == ids.numel() and calls[name] == 1]
        except (RuntimeError, ValueError, TypeError):
            if not on_meta:
                raise
        finally:
            for handle in handles:
                handle.remove()
    return list(modules)
