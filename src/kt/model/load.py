"""`kt.load`: a name, a folder or a module becomes a `TracedModel`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._util.kinds import shown, takes
from ..errors import KtError, UnknownModel
from .chat import Chat, choose
from .devices import checked_device, read_device_map
from .finding import read_layout
from .folder import check_source, checkpoint_folder, quantisation_of, refuse_quantised, require_sizes
from .gguf import find_gguf, load_gguf, packed_weights
from .hub import load_tokenizer, one_line, require_numbers, require_whole, split_revision
from .model import TracedModel

DEMO = Path(__file__).parents[1] / "demo" / "model"
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}


A_NAME = ((str, os.PathLike, nn.Module), "demo, a Hub id, a folder, or a loaded module")
A_DEVICE = ((str, int, torch.device), "auto, cpu, cuda:0, mps, or a torch.device")
A_DTYPE = ((str, torch.dtype), "auto, float32, bfloat16, float16, or a torch.dtype")
A_MAP = ((str, os.PathLike, Mapping, type(None)), "a file's name, auto, or a mapping from module paths to devices")


@takes(model=A_NAME, dtype=A_DTYPE, device=A_DEVICE, device_map=A_MAP)
def load(
    model: str | Path | nn.Module = "demo",
    dtype: str | torch.dtype = "auto",
    device: str | int | torch.device = "auto",
    device_map: str | Path | Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    attn_implementation: str | None = None,
    remote: bool | str = False,
    layout: Mapping[str, str] | str | Path | None = None,
    chat: Chat | str = "never",
) -> TracedModel:
    """Wrap a causal language model.

    Args:
        model: `demo` (the embedded model), a Hub id (`repo@revision` allowed), a local folder, a GGUF file or a folder
            with one and no other weights, or a loaded module (then pass its `tokenizer`), which keeps its training
            flags and its gradients' flags: kt sets them while it works.
        dtype: `auto` keeps the checkpoint's dtype (the demo model, stored in bf16, computes in float32). The weights
            of a GGUF file are dequantised, by `auto` to float32, as transformers does: a narrower dtype would round
            what the file holds.
        device: `auto` takes CUDA or MPS where there is one.
        device_map: `auto`, `balanced` or `sequential` spread the model over devices, CPU memory and files through
            accelerate; so does a mapping from module paths to devices, or a JSON file of one. `device` is then ignored.
        revision: branch, tag or commit on the Hub, where `model` does not name one.
        trust_remote_code: run the code that a Hub repository ships; off by default.
        tokenizer: of a module that is already loaded; otherwise the checkpoint's own.
        attn_implementation: transformers' choice of attention kernel, such as `eager` or `sdpa`; None leaves it to
            transformers.
        remote: keep the weights at NDIF and send traces there (see ndif.py); `local` is nnsight's simulation of NDIF.
        layout: paths of parts that are not found by structure, or a TOML or JSON file of them (`PARTS` in finding.py):
            `{"blocks": "net.h", "o_proj": "mixer.out"}`; proved by numbers as found ones are.
        chat: how prompts are asked. `never` reads what is typed, as transformers and nnsight do; `always` puts every
            prompt into the tokenizer's chat template, `auto` (the command line's default) only where the model ends its
            turns as the template does. A `Chat` also sets a system prompt, thinking, and whose turn a prompt is.

    Returns:
        The model, with its parts named. It is on its device, in evaluation mode while kt works.

    Raises:
        UnknownModel: nothing of that name, no tokenizer beside it, a checkpoint without all of its model's weights, a
            GGUF file that is broken or of an architecture that transformers does not read, or a structure that kt
            cannot read.
        KtError: an argument that is not one of these, a device that is not here, or a folder of several GGUF files.

    Examples:
        >>> model = kt.load("demo")
        >>> model.n_layers, model.d_model
        (8, 128)
    """
    if tokenizer is not None and not hasattr(tokenizer, "pad_token_id"):
        raise KtError(f"tokenizer is {shown(tokenizer)}; give one of transformers, or None for the checkpoint's own")
    parts = read_layout(layout)
    made = _load(
        model, dtype, device, device_map, revision, trust_remote_code, tokenizer, attn_implementation, remote, parts
    )
    made.chat = choose(made, chat)[0]
    return made


def _load(
    model: str | Path | nn.Module,
    dtype: str | torch.dtype,
    device: str | int | torch.device,
    device_map: str | Path | Mapping[str, Any] | None,
    revision: str | None,
    trust_remote_code: bool,
    tokenizer: Any,
    attn_implementation: str | None,
    remote: bool | str,
    parts: Mapping[str, str] | None,
) -> TracedModel:
    if remote:
        from .ndif import load_remote, simulated

        if (dtype, device, device_map, attn_implementation) != ("auto", "auto", None, None):
            raise KtError(
                "dtype, device, device_map and attn_implementation of a remote model are NDIF's; leave them out"
            )
        if remote == "local":
            real = load(
                model,
                device="cpu",
                revision=revision,
                trust_remote_code=trust_remote_code,
                tokenizer=tokenizer,
                layout=parts,
            )
            return simulated(real, trust_remote_code, parts)
        return load_remote(model, remote, revision, trust_remote_code, tokenizer, parts)
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise UnknownModel("a model passed as a module needs its tokenizer: kt.load(module, tokenizer=tokenizer)")
        return TracedModel(model, tokenizer, name=type(model).__name__, layout=parts)
    name, revision = split_revision(model, revision)
    source = DEMO if name == "demo" else name
    check_source(source, revision, trust_remote_code)
    gguf = find_gguf(source)
    kind = _dtype(dtype, float32=name == "demo" or gguf is not None)
    target, spread = checked_device(device), read_device_map(device_map)
    options: dict[str, Any] = {"dtype": kind, "trust_remote_code": trust_remote_code, "revision": revision}
    if spread is not None:
        options["device_map"] = spread
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    module: Any
    if gguf is not None:
        with no_bars():
            module, tokenizer = load_gguf(gguf, options, tokenizer)
        packed = packed_weights(gguf, module)
    else:
        with one_line(name), no_bars(), warnings.catch_warnings():
            if Path(source).is_dir() and not trust_remote_code:
                require_sizes(Path(source))
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            module, about = _from_pretrained(source, options, target)
        require_whole(name, module, about)
        with one_line(name):
            packed = require_numbers(name, module, checkpoint_folder(source, revision))
    if getattr(module, "hf_device_map", None) is None:
        module = module.to(target)
    if kind is torch.float64 and hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("eager")  # torch multiplies no groups of experts in float64
    tokenizer = tokenizer or load_tokenizer(source, name, revision, trust_remote_code)
    made = TracedModel(module, tokenizer, name=name, revision=revision, layout=parts, borrowed=False)
    made.dequantised = packed
    return made


def _from_pretrained(source: str | Path, options: dict[str, Any], target: torch.device) -> Any:
    """A causal language model, a multimodal one whole where its checkpoint is of one (transformers has some kinds as
    their text part too, without the rest); and what was missing in its files. (Of weights of another shape transformers
    alone says no name.)"""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    about = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    config = AutoConfig.from_pretrained(source, **about)
    refuse_quantised(source, config.to_dict())  # of the Hub's, before its weights are fetched
    options = options | _of_quantised(quantisation_of(config.to_dict()), target, options)
    wrappers: Any = AutoModelForImageTextToText._model_mapping
    whole = getattr(wrappers[type(config)], "__name__", None) if type(config) in wrappers else None
    options = options | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if whole is not None and whole in (getattr(config, "architectures", None) or ()):
        return AutoModelForImageTextToText.from_pretrained(source, **options)
    try:
        return AutoModelForCausalLM.from_pretrained(source, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        try:
            return AutoModelForImageTextToText.from_pretrained(source, **options)
        except ValueError:
            raise ValueError("transformers has no causal language model of its kind") from error


def _of_quantised(kind: str | None, target: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` has to be told of a kind of quantised checkpoint."""
    if kind == "bitsandbytes" and "device_map" not in options:  # its modules do not move once they are packed
        return {"device_map": {"": str(target)}}
    if kind == "compressed-tensors":  # else it unpacks what a first forward reaches, one by one
        from transformers import CompressedTensorsConfig

        return {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    return {}


def _dtype(dtype: str | torch.dtype, float32: bool) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if float32 else "auto"
    if dtype not in DTYPES:
        raise KtError(f"dtype {dtype!r} is unknown; choose auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


@contextmanager
def no_bars() -> Any:
    """Hide transformers' progress bars and reports inside the context: what they have to say, kt says in one line."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled() if hasattr(logging, "is_progress_bar_enabled") else True
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(max(level, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if enabled:
            logging.enable_progress_bar()
