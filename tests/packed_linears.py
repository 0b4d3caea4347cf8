"""Linear maps that keep their weight packed, each as a library does, in plain torch: what packed.py must not know."""

from __future__ import annotations

import torch
from families import tiny_module
from torch import nn
from torch.nn.functional import linear


class Base(nn.Module):
    """No `nn.Linear`: sizes and a forward, as hqq and gptqmodel have them."""

    def __init__(self, plain):
        super().__init__()
        self.out_features, self.in_features = plain.weight.shape
        self.bias = plain.bias

    def forward(self, x):
        return linear(x, self.numbers().to(x.dtype), self.bias)


class Bytes(Base):
    """int8 with a scale a row; nothing says how to dequantise it."""

    def __init__(self, plain):
        super().__init__(plain)
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (plain.weight.detach() / scale).round().to(torch.int8))

    def numbers(self):
        return self.codes.float() * self.scale


class Nibbles(Bytes):
    """Two 4-bit numbers a byte, with gptqmodel's method, which gives (d_in, d_out)."""

    def __init__(self, plain):
        super().__init__(plain)
        codes = (plain.weight.detach() / (self.scale * 18)).round().clamp(-8, 7).to(torch.int8) + 8
        self.codes = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)

    def numbers(self):
        codes = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(1)
        return (codes.float() - 8) * self.scale * 18

    def dequantize_weight(self):
        return self.numbers().T


class Float8(nn.Linear):
    """The storage of fp8 checkpoints, run as it is."""

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        scale = plain.weight.detach().abs().amax() / 448
        self.weight = nn.Parameter((plain.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("weight_scale_inv", scale)
        self.bias = plain.bias

    def forward(self, x):
        return linear(x, self.weight.to(x.dtype) * self.weight_scale_inv.to(x.dtype), self.bias)


class RoundedInputs(Bytes):
    """LLM.int8: the inputs are rounded to 8 bits too, so its output is linear to 1e-2 only."""

    def forward(self, x):
        scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        rounded = x + ((x / scale).round() * scale - x).detach()  # a gradient goes straight through
        return super().forward(rounded)


class WrongMethod(Bytes):
    """A method of the right name that gives another weight."""

    def dequantize(self):
        return self.numbers() * 1.01


class Curved(Bytes):
    """No linear map."""

    def forward(self, x):
        return super().forward(x).tanh()


def packed_module(kind, family="llama", among=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"), **changes):
    """A tiny model whose maps of these names are packed."""
    module = tiny_module(family, **changes)
    for path, each in list(module.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in among:
            setattr(module.get_submodule(parent), name, kind(each))
    return module
