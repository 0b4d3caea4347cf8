"""An edit as a LoRA adapter for peft: the base model stays unchanged, and the edit can be loaded and unloaded.

Every edited projection has factors B A of its own rank and alpha = rank, so peft's scale alpha / rank is exactly 1. The
config's `r` and `lora_alpha` are the largest rank, so a reader without `rank_pattern` and `alpha_pattern` also
multiplies by 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import hypot
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .._util.data import read_json, to_json
from .._util.files import atomic_write
from .._util.kinds import takes
from .._util.text import some_of
from ..editing.adapter import take_out
from ..editing.edit import AN_EDIT
from ..errors import KtError, WorkFailed, need
from ..model.devices import require_none
from ..model.finding import is_linear
from ..model.model import A_MODEL
from ..model.update import Dense, LowRank, Update
from .hf import Exported, keep_about, next_logits, prompts_of, public_name
from .shards import refuse_taken, whole_folder

if TYPE_CHECKING:
    from ..editing import Edit
    from ..model.model import TracedModel


class Factors(NamedTuple):
    """ΔW ≈ B A. `needed` is the exact rank, `error` is ‖BA - ΔW‖ with the rounded factors, and `norm` ‖ΔW‖."""

    b: Float[Tensor, "d_out rank"]
    a: Float[Tensor, "rank d_in"]
    needed: int
    error: float
    norm: float


class Triplets(NamedTuple):
    """Singular vectors and values, float64, without values below the rounding of float32."""

    left: Float[Tensor, "d_out rank"]
    values: Float[Tensor, " rank"]
    right: Float[Tensor, "rank d_in"]


def factors(update: Update, max_rank: int | None = None, dtype: torch.dtype = torch.float32) -> Factors:
    """The two factors of a LoRA adapter, ΔW ≈ B A, B (d_out, rank), A (rank, d_in) (Hu et al. 2021, 4.1).

    The rank is the needed one, at most `max_rank`. A low-rank update that needs all its columns keeps its factors,
    which is exact in float32. All other factors are the largest singular triplets, the best approximation of that
    rank (Eckart and Young 1936).
    """
    svd = triplets(update)
    needed = len(svd.values)
    rank = needed if max_rank is None else min(needed, max_rank)
    if isinstance(update, LowRank) and rank == update.rank:
        b, a = update.left, update.right
    else:
        # Each factor gets the square root of the singular values, so both lose equally by rounding to 16 bits.
        root = svd.values[:rank].sqrt()
        b, a = svd.left[:, :rank] * root, root[:, None] * svd.right[:rank]
    b, a = b.to("cpu", dtype).contiguous(), a.to("cpu", dtype).contiguous()
    return Factors(b, a, needed, _distance(b, a, update), update.norm())


def triplets(update: Update) -> Triplets:
    """The update's singular value decomposition, cut at its numerical rank in float32.

    For a product L R it follows from two thin QR decompositions, L = Q1 S1 and Rᵀ = Q2 S2, and the SVD of the small
    S1 S2ᵀ.
    """
    if isinstance(update, Dense):
        left, values, right = torch.linalg.svd(update.matrix.double(), full_matrices=False)
    else:
        left, small_left = torch.linalg.qr(update.left.double())
        right, small_right = torch.linalg.qr(update.right.double().T)
        inner_left, values, inner_right = torch.linalg.svd(small_left @ small_right.T, full_matrices=False)
        left, right = left @ inner_left, inner_right @ right.T
    noise = max(update.shape) * torch.finfo(torch.float32).eps
    kept = int((values > values[:1] * noise).sum())
    return Triplets(left[:, :kept], values[:kept], right[:kept])


def _distance(b: Float[Tensor, "d_out rank"], a: Float[Tensor, "rank d_in"], update: Update) -> float:
    """‖BA - ΔW‖, without making a low-rank ΔW dense."""
    b, a = b.double(), a.double()
    if isinstance(update, Dense):
        return float((b @ a - update.matrix.double()).norm())
    if b.shape == update.left.shape and torch.equal(b, update.left.double()) and torch.equal(a, update.right.double()):
        return 0.0
    return LowRank(torch.cat([b, -update.left.double()], 1), torch.cat([a, update.right.double()], 0)).norm()


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FAR = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.5, torch.bfloat16: 0.5}
"""The largest allowed error of the logits, relative to the edit's change of them, by the base model's dtype. In 16 bits
a merged weight is rounded and an adapter is not, so the two differ by rounding, and only gross errors are detected."""


class Gap(NamedTuple):
    """The largest error of the adapter's logits, absolute and relative to the edit's largest change of them."""

    absolute: float
    relative: float


@takes(model=A_MODEL, edit=AN_EDIT)
def to_peft(
    model: TracedModel,
    edit: Edit,
    folder: str | Path,
    max_rank: int | None = None,
    max_error: float = 1e-3,
    dtype: torch.dtype = torch.float32,
    check: bool = True,
    force: bool = False,
) -> Exported:
    """Write the edit as an adapter folder, atomically; the model is unchanged on return.

    Args:
        max_rank: most columns of a factor; updates that need more are cut to their largest singular values.
        max_error: largest allowed ‖BA - ΔW‖ / ‖ΔW‖ (Frobenius, over all weights together), including rounding to
            `dtype`.
        dtype: of the factors in the file; peft computes with 16-bit factors in float32.
        check: load the adapter with peft onto the model and compare its logits after the requests' prompts.
        force: also for weights other than those for which the edit was solved.

    Raises:
        KtError: peft is not installed, the edit was solved for other weights, or it changes weights that no adapter can
            hold (a bias, a norm, an embedding).
        NotWritable: the folder is not empty, or the disk is full or read-only.
        WorkFailed: the adapter's error exceeds `max_error`, or its logits are not the edit's.
    """
    edit.require_updates("a PEFT adapter")
    need("peft", "an export for peft")
    if check:
        require_none(model.module, "the check of an adapter by peft (--no-check leaves it out)")
    refuse_taken(folder)
    projections = _projections(model, edit)
    with edit.applied(model, force=force):
        prompts = prompts_of(edit)
        edited_logits = next_logits(model, prompts) if check else None
    parts = {path: factors(edit.updates[f"{path}.weight"], max_rank, dtype) for path in projections}
    parts = {path: part for path, part in parts.items() if part.norm > 0}
    error = hypot(*(part.error for part in parts.values())) / hypot(*(part.norm for part in parts.values()))
    if error > max_error:
        raise WorkFailed(_too_far(parts, error, max_error, dtype))
    with whole_folder(folder) as temporary:
        write_adapter(model, temporary, parts, any(isinstance(projections[p], Conv1D) for p in parts))
        gap = None if edited_logits is None else _gap(model, temporary, prompts, edited_logits)
        if gap is not None and gap.relative > max(FAR[model.dtype], 20 * error):
            raise WorkFailed(
                f"peft, with this adapter, gives other logits than the edit: off by up to {gap.absolute:.2g}, "
                f"{gap.relative:.1%} of what the edit changes; export with --format hf instead"
            )
        about = {"weight_error": error, "rank": max(p.b.shape[1] for p in parts.values())}
        known = edit.manifest.get("fingerprints", {})
        keep_about(temporary, model.name, model.revision, edit, format="peft", fingerprints=known, **about)
    return Exported(
        path=Path(folder),
        format="peft",
        dtype=str(dtype).removeprefix("torch."),
        max_error=gap.absolute if gap else None,
        relative_error=gap.relative if gap else None,
        prompts=len(prompts) if gap else 0,
        weights={
            f"{path}.weight": {"rank": part.b.shape[1], "needed": part.needed, "error": part.error / part.norm}
            for path, part in parts.items()
        },
        about=about | {"base_model": public_name(model.name)},
    )


def patterns(ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks by module for peft's `rank_pattern`, whose keys are regular expressions: each matches its path only.

    peft allows any text before a pattern, and an unescaped dot matches any character.
    """
    return {f"^{re.escape(path)}": rank for path, rank in ranks.items()}


def _projections(model: TracedModel, edit: Edit) -> dict[str, nn.Module]:
    """The linear maps that the edit changes, by path.

    Raises:
        KtError: it changes other parameters too.
    """
    linear: dict[str, nn.Module] = {}
    other = []
    for name in edit.names:
        path, _, kind = name.rpartition(".")
        model.own(name)  # refuses a weight that the model does not have
        owner = model.module.get_submodule(path)
        if kind == "weight" and is_linear(owner):
            linear[path] = owner
        else:
            other.append(name)
    if other:
        shown = some_of(other, rest=", ...")
        raise KtError(
            f"the edit also changes {shown} ({len(other)} in all), and an adapter holds linear maps' weights only; "
            "export with --format hf"
        )
    return linear


def write_adapter(model: TracedModel, folder: Path, parts: Mapping[str, Factors], conv: bool) -> None:
    """Write the adapter's two files with peft's config class and peft's names of the factors."""
    from peft import LoraConfig, TaskType
    from safetensors.torch import save_file

    ranks = {path: part.b.shape[1] for path, part in parts.items()}
    top = max(ranks.values())
    LoraConfig(
        r=top,
        lora_alpha=top,
        rank_pattern=patterns(ranks),
        alpha_pattern=patterns(ranks),
        target_modules=list(ranks),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=conv,
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
        base_model_name_or_path=public_name(model.name),
        revision=model.revision,
    ).save_pretrained(str(folder))
    # peft writes the modules as a set, in an order that changes between runs.
    config = read_json(folder / CONFIG)
    atomic_write(folder / CONFIG, to_json(config | {"target_modules": sorted(ranks)}))
    tensors: dict[str, torch.Tensor] = {}
    for path, part in parts.items():
        stem = f"base_model.model.{path}"
        tensors |= {f"{stem}.lora_A.weight": part.a, f"{stem}.lora_B.weight": part.b}
    atomic_write(folder / WEIGHTS, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def _gap(model: TracedModel, folder: Path, prompts: list[str], edited: Float[Tensor, "prompt vocab"]) -> Gap:
    """Compare the logits under the adapter, loaded by peft, with the edited model's."""
    base = next_logits(model, prompts)
    with with_adapter(model, folder) as module:
        adapted = next_logits(model, prompts, module)
    change = float((edited - base).abs().max())
    # A lower bound, so that an edit that hardly changes these logits is not compared with rounding errors.
    scale = max(change, 1e-3 * float(base.abs().max()))
    absolute = float((adapted - edited).abs().max())
    return Gap(absolute, absolute / scale if scale else 0.0)


@contextmanager
def with_adapter(model: TracedModel, folder: Path) -> Iterator[Any]:
    """The model inside peft's wrapper; its module tree is restored on exit, also after an exception.

    It works in place, since a copy of the model would need twice the memory.
    """
    from peft import PeftModel

    require_none(model.module, "peft")  # peft would rename offloaded weights inside their files
    targets = read_json(folder / CONFIG)["target_modules"]
    before = {path: model.module.get_submodule(path) for path in targets}
    with model.at_rest():
        try:
            yield PeftModel.from_pretrained(model.module, str(folder)).eval()
        finally:
            take_out(model.module, before)


def _too_far(parts: Mapping[str, Factors], error: float, limit: float, dtype: torch.dtype) -> str:
    path, worst = max(parts.items(), key=lambda item: item[1].error)
    rank, name = worst.b.shape[1], str(dtype).removeprefix("torch.")
    cut = rank < worst.needed
    cause = f"rank {rank} of the {worst.needed} that it needs" if cut else f"its factors are in {name}"
    remedy = "raise --max-rank" if cut else "take --adapter-dtype float32"
    return (
        f"the adapter would miss the edit by {error:.2g} of its norm, more than the {limit:.2g} allowed (most at "
        f"{path}: {cause}); {remedy} or raise --max-error, or export with --format hf"
    )
