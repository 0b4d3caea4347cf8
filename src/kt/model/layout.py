"""Find a decoder's parts by their shapes and roles, not by the name of its family.

What is looked for: a list of `num_hidden_layers` blocks; in every block one module that takes an attention mask and,
inside it, the last linear map onto the residual stream (W_o); outside it, the last linear map onto the residual
stream (down_proj). `validate` then runs two tokens through the model and checks that what was found is what it is
taken for.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnknownModel
from .sites import Kind


@dataclass(frozen=True)
class Layout:
    """Where the parts are (module paths), and how a block combines them."""

    blocks: str
    attn: str
    mlp: str
    w_attn: str
    w_mlp: str
    embed: str
    norm: str | None
    unembed: str
    n_layers: int
    d_model: int
    transposed: bool = False  # Conv1D keeps its weight as (d_in, d_out)
    parallel: bool = False  # attention and MLP read the same input (GPT-J, NeoX, Phi)
    has_post_norm: bool = False  # a norm stands between a module's value and the residual stream
    tuple_output: bool = False

    def path(self, kind: Kind, layer: int) -> str:
        """Module path of W_o or down_proj, or of the whole block."""
        inner = {Kind.ATTN: "." + self.w_attn, Kind.MLP: "." + self.w_mlp, Kind.RESID: ""}[Kind(kind)]
        return f"{self.blocks}.{layer}{inner}"

    def describe(self) -> str:
        """One line that names what was found."""
        order = "parallel attention and MLP" if self.parallel else "attention, then MLP"
        norm = ", a norm after each" if self.has_post_norm else ""
        return (
            f"{self.n_layers} blocks at {self.blocks} ({order}{norm}), W_o = {self.w_attn}, "
            f"down_proj = {self.w_mlp}, d_model {self.d_model}"
        )


def find_layout(module: nn.Module) -> Layout:
    """Locate blocks, W_o, down_proj, embedding, final norm and unembedding.

    Raises:
        UnknownModel: a part is missing; the message lists what was looked for.
    """
    config = module.config.get_text_config()  # type: ignore[union-attr,operator]
    n_layers, d_model = int(config.num_hidden_layers), int(config.hidden_size)
    names = {id(m): name for name, m in module.named_modules()}
    blocks_name, blocks = _blocks(module, n_layers)
    block = blocks[0]
    attn = _attention(block) or _missing(module, "a block's attention: a child whose forward takes attention_mask")
    w_attn = _last_linear(attn[1], d_model) or _missing(module, "W_o: a linear map onto d_model inside the attention")
    outside = [(n, m) for n, m in _linears(block) if not n.startswith(attn[0] + ".")]
    onto = [(n, m) for n, m in outside if linear_shape(m)[0] == d_model]
    if not onto or any(part.isdigit() for part in onto[-1][0].split(".")):
        _missing(
            module,
            "down_proj: one linear map onto d_model outside the attention (mixtures of experts have many)",
        )
    w_mlp_name, w_mlp = onto[-1]
    embed, head = module.get_input_embeddings(), module.get_output_embeddings()  # type: ignore[operator]
    if embed is None or head is None:
        _missing(module, "token embedding and unembedding (get_input_embeddings, get_output_embeddings)")
    layout = Layout(
        blocks=blocks_name,
        attn=attn[0],
        mlp=w_mlp_name.rpartition(".")[0] or w_mlp_name,
        w_attn=f"{attn[0]}.{w_attn[0]}",
        w_mlp=w_mlp_name,
        embed=names[id(embed)],
        norm=_final_norm(module, blocks_name, d_model),
        unembed=names[id(head)],
        n_layers=n_layers,
        d_model=d_model,
        transposed=isinstance(w_mlp, Conv1D),
    )
    _same_in_every_block(module, blocks, layout)
    return layout


def validate(model: Any) -> Layout:
    """Check by running: W · key + b is each module's whole output; see how the block combines the two.

    `model` is a TracedModel under construction. Returns the layout with `parallel`, `has_post_norm` and `tuple_output`.
    """
    import torch

    layout: Layout = model.layout
    ids = torch.tensor([[1, 2]], device=model.device) % model.vocab_size
    block, attn, mlp = model.block(0), model.envoy(f"{layout.blocks}.0.{layout.attn}"), None
    if layout.mlp != layout.w_mlp:
        mlp = model.envoy(f"{layout.blocks}.0.{layout.mlp}")
    w_attn, w_mlp = model.projection(Kind.ATTN, 0), model.projection(Kind.MLP, 0)
    with torch.no_grad():
        with model.root.trace(input_ids=ids, use_cache=False, backend=model.backend()) as tracer:
            seen: Any = {"in": block.input}
            seen["a"] = w_attn.output
            seen["attn"] = attn.output
            seen["m_key"] = w_mlp.input
            seen["m"] = w_mlp.output
            if mlp is not None:
                seen["mlp"] = mlp.output
            seen["out"] = block.output
            seen.save()
            tracer.stop()
        with model.root.trace(input_ids=ids, use_cache=False, backend=model.backend()) as tracer:
            w_attn.output[:] = 0
            key_cut: Any = w_mlp.input.save()
            tracer.stop()
    out = unwrap_tuple(seen["out"])
    if not torch.equal(unwrap_tuple(seen["attn"]), seen["a"]):
        _missing(model.module, f"an attention whose output is that of {layout.w_attn}")
    if mlp is not None and not torch.equal(unwrap_tuple(seen["mlp"]), seen["m"].view_as(unwrap_tuple(seen["mlp"]))):
        _missing(model.module, f"an MLP whose output is that of {layout.w_mlp}")
    total = seen["in"] + seen["a"] + seen["m"].view_as(out)
    scale = float(out.float().abs().max()) + 1e-6
    return replace(
        layout,
        parallel=torch.equal(seen["m_key"], key_cut),
        has_post_norm=not bool((total - out).float().abs().max() <= 2e-2 * scale),
        tuple_output=isinstance(seen["out"], tuple),
    )


def unwrap_tuple(output: Any) -> Any:
    """A module's tensor, whether it returns one or a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) from the module's type, never from a shape match."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def _blocks(module: nn.Module, n_layers: int) -> tuple[str, nn.ModuleList]:
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) == n_layers and _attention(child[0]):
            return name, child
    return _missing(module, f"a list of {n_layers} blocks (config.num_hidden_layers) with an attention each")


def _attention(block: nn.Module) -> tuple[str, nn.Module] | None:
    for name, child in block.named_modules():
        if name and "attention_mask" in inspect.signature(child.forward).parameters and _linears(child):
            inner = [n for n, m in child.named_modules() if n and "attention_mask" in _parameters(m)]
            return (name, child) if not inner else (f"{name}.{inner[-1]}", child.get_submodule(inner[-1]))
    return None


def _parameters(module: nn.Module) -> Any:
    return inspect.signature(module.forward).parameters


def _linears(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)]


def _last_linear(module: nn.Module, d_out: int) -> tuple[str, nn.Module] | None:
    onto = [(n, m) for n, m in _linears(module) if linear_shape(m)[0] == d_out]
    return onto[-1] if onto else None


def _final_norm(module: nn.Module, blocks: str, d_model: int) -> str | None:
    parent = blocks.rpartition(".")[0]
    names = []
    for name, child in module.get_submodule(parent).named_children():
        weight = getattr(child, "weight", None)
        if weight is not None and tuple(weight.shape) == (d_model,):
            names.append(f"{parent}.{name}" if parent else name)
    return names[-1] if names else None


def _same_in_every_block(module: nn.Module, blocks: nn.ModuleList, layout: Layout) -> None:
    for index, block in enumerate(blocks):
        present = {n for n, _ in _linears(block)}
        for part in (layout.w_attn, layout.w_mlp):
            if part not in present:
                _missing(module, f"{part} in block {index} (blocks of different kinds are not supported)")


def _missing(module: nn.Module, what: str) -> Any:
    raise UnknownModel(
        f"{type(module).__name__} is not a decoder that kt can read: did not find {what}. Looked for: a list of "
        "num_hidden_layers blocks; per block an attention with an output projection onto d_model and an MLP with "
        "a down projection onto d_model; token embedding and unembedding"
    )
