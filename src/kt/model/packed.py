"""Linear maps that a library keeps packed (quantised): read as they stand, plain only while an edit writes them.

A packed map is known by structure: it says its `in_features` and `out_features`, and its weight is no plain matrix of
floats of that shape. Its forward is the library's. Where a weight is written, that map alone is dequantised and a plain
linear map takes its place; taking the edit back puts the same packed module back.

The library's own dequantisation is taken where it has one, else the map's outputs of the unit vectors. Either way
numbers prove it: W x + b must be what the map gives, within its own rounding. That rounding is what is missing for it
to be additive, f(x + y) = f(x) + f(y) - f(0), on the same vectors: 1e-7 where a float32 product follows, 1e-2 where the
inputs are rounded to 8 bits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import KtError, UnknownModel
from .inside import move_hooks

PLAIN = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes of weights that are read and written as they are."""

_VECTORS = 8
_SLACK, _MOST = 2.0, 0.05
"""What W x + b may miss, in units of the map's own rounding (the libraries tried: 0.2 to 0.6), and the most that may
count as rounding."""

_proved: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""By map, the first way of dequantising it that its numbers prove."""


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a linear map whose weight is not a plain matrix (d_out, d_in) of floats."""
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(module, Conv1D) or not all(type(size) is int for size in sizes):
        return False
    weight = module._parameters.get("weight")
    if not isinstance(weight, Tensor) or not is_plain(weight):
        return True
    return weight.dtype not in PLAIN and type(module) is not nn.Linear  # a Linear of integers computes nothing


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is torch's own, not a library's that stands for packed numbers."""
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def kind_of(module: nn.Module) -> str:
    """Which library keeps a packed map's weight, and how: "bitsandbytes, Int8Params"."""
    weight = module._parameters.get("weight")
    keeper = type(module) if weight is None or is_plain(weight) else type(weight)
    return f"{keeper.__module__.partition('.')[0]}, {keeper.__name__}"


def stored(module: nn.Module) -> dict[str, Tensor]:
    """A packed map's tensors by their names in it, as its state has them; its bias is no part of its weight."""
    return {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor) and key != "bias"}


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a library's tensor stands for; a plain one is its own only part."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()  # type: ignore[attr-defined]
    if not names:
        yield tensor
    for name in names:
        yield from parts(getattr(tensor, name))


def keep_as_stored(root: nn.Module) -> None:
    """Have bitsandbytes run 4-bit weights as they are stored: on some CPUs it repacks them at the first forward, with
    scales rounded to bfloat16, and `state_dict` does not give back what they were. What it says of 8-bit inputs at
    every forward is left out.

    Raises:
        UnknownModel: it has repacked one already.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for name, module in root.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise UnknownModel(
                    f"{name} was repacked by bitsandbytes in a forward before, and lost digits; load the model again "
                    "and give it to kt before it runs"
                )
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@torch.no_grad()
def dequantised(module: nn.Module, dtype: torch.dtype, name: str) -> Float[Tensor, "d_out d_in"]:
    """A packed map's weight as plain numbers of `dtype`, the dtype of the states that it reads.

    Raises:
        KtError: its outputs are not those of any weight that can be found, beyond rounding; with both figures.
    """
    shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    worst = None
    for way, weight in enumerate(_weights(module, shape, dtype)):
        if module in _proved:
            if way < _proved[module]:
                continue
            return weight.to(dtype)
        missing, rounding = _misfit(module, weight, dtype)
        if missing <= _SLACK * rounding and rounding <= _MOST:
            _proved[module] = way
            return weight.to(dtype)
        worst = missing, rounding
    assert worst is not None, "the outputs of the unit vectors are always one way"
    raise KtError(
        f"{name} is packed ({kind_of(module)}), and its dequantised weight does not give its output: W·key + b misses "
        f"{worst[0]:.1%} of it (rounding: {worst[1]:.1g}); load the checkpoint that it was made from, and edit that"
    )


def _weights(module: nn.Module, shape: tuple[int, int], dtype: torch.dtype) -> Iterator[Tensor]:
    """The library's own dequantised weight, by each way that libraries have, then the outputs of the unit vectors."""
    weight: Any = getattr(module, "weight", None)
    ways: list[Any] = [getattr(module, name, None) for name in ("dequantize", "dequantize_weight")]
    if isinstance(weight, Tensor):
        own = getattr(type(weight), "dequantize", Tensor.dequantize)
        ways.append(weight.dequantize if own is not Tensor.dequantize else None)
        if type(weight).__module__.startswith("bitsandbytes."):
            from transformers.integrations.bitsandbytes import dequantize_bnb_weight

            ways.append(lambda: dequantize_bnb_weight(weight, getattr(module, "state", None)))  # type: ignore[arg-type]
    for way in filter(callable, ways):
        found = way()
        if isinstance(found, Tensor) and found.dim() == 2 and found.is_floating_point():
            for each in {False, shape[0] == shape[1]} if tuple(found.shape) == shape else {True}:
                seen = found.T if each else found  # gptqmodel gives (d_in, d_out)
                if tuple(seen.shape) == shape:
                    yield seen
    unit = torch.eye(shape[1], dtype=dtype, device=_device(module))
    yield (module(unit) - module(torch.zeros_like(unit[:1]))).T


def _misfit(module: nn.Module, weight: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Of the map's outputs, the share that W x + b misses, and the share that its own rounding is."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, _VECTORS, weight.shape[1], generator=generator).to(weight.device, dtype) * 2
    of_x, of_y, of_both, of_none = (module(each).double() for each in (x, y, x + y, torch.zeros_like(x)))
    product = x.double() @ weight.double().T + of_none
    size = float(of_x.norm()) + 1e-300
    rounding = float((of_both - of_x - of_y + of_none).norm()) / size
    return float((product - of_x).norm()) / size, max(rounding, torch.finfo(dtype).eps)


def _device(module: nn.Module) -> torch.device:
    held = next((tensor for tensor in [*module.parameters(), *module.buffers()]), None)
    return torch.device("cpu") if held is None else held.device


def plain_map(module: nn.Module, dtype: torch.dtype, name: str) -> nn.Linear:
    """A plain linear map with a packed one's dequantised weight, and its bias."""
    weight = dequantised(module, dtype, name)
    bias: Any = getattr(module, "bias", None)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=dtype)
    made.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=False)
    if bias is not None:
        made.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    return made


def put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in another's place. Hooks stay on, and traces of every handle on `root` follow."""
    from nnsight.intervention.source import STATE

    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent)
    old = owner.get_submodule(name)
    if old is module:
        return
    module.training = old.training
    for kept in (*HOOKS, "_hf_hook"):
        if kept in vars(old):
            vars(module)[kept] = vars(old)[kept]
    setattr(owner, name, module)
    routes = vars(old)[STATE].routes if STATE in vars(old) else ()
    for reference, *_ in list(routes):
        interleaver = reference()
        envoy = None if interleaver is None else interleaver.envoys.get(id(old))
        if envoy is not None:
            envoy._update(module)
    move_hooks(old, module)


HOOKS = [
    *(f"_forward{kind}_hooks{more}" for kind in ("", "_pre") for more in ("", "_with_kwargs")),
    *("_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks"),
]
