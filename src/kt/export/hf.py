"""An edit merged into its model, as a Hugging Face folder like the model's own.

The folder holds the files of `save_pretrained` (weights in as many files as the source's, config, generation config,
tokenizer), and in `kt/` the edit, the edited weights' original bytes, and their fingerprints (see undo.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .._util.data import read_json, save_arrays, write_json
from .._util.kinds import takes
from ..editing.edit import AN_EDIT
from ..errors import KtError, UnknownModel, WorkFailed, said_by
from ..facts.fact import fill
from ..model.devices import content
from ..model.finding import is_linear
from ..model.folder import checkpoint_folder, inside
from ..model.load import no_bars
from ..model.memory import require_memory
from ..model.model import A_MODEL
from ..model.packed import is_packed, is_plain, kind_of
from ..report import Shown, Table
from ..runs.folder import FILES
from ..runs.provenance import versions
from .shards import (
    Shards,
    Source,
    refuse_full,
    refuse_taken,
    reversible,
    saved_names,
    shard_size,
    size_of,
    source_of,
    whole_folder,
)

if TYPE_CHECKING:
    from ..editing import Edit
    from ..model.model import TracedModel


OWN = "kt"
"""The subfolder of kt's files in an exported folder.

They are not beside the weights, since servers that load all `*.safetensors` of a folder without an index would load the
original bytes as weights, and silently undo the edit.
"""

EDIT = FILES["edit"]
UNDO = "undo.safetensors"
ABOUT = "export.json"

MOST_PROMPTS = 64  # prompts of the check
ROWS = 16  # prompts in one forward
SHOWN, NEW_TOKENS = 5, 8  # prompts that are continued, and tokens of a continuation


@dataclass(frozen=True)
class Exported(Shown):
    """An exported folder and its checks.

    `max_error` is the largest difference of a logit between the written model, loaded again, and the edited model;
    `relative_error` is this over the edit's largest change; None means not checked. `weights` has a row per edited
    weight, `about` further facts about this format.
    """

    path: Path
    format: str
    dtype: str
    max_error: float | None = None
    relative_error: float | None = None
    prompts: int = 0
    weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    kind = "export"

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What else is to be told of this format."""
        return self.about

    def tables(self) -> Sequence[Table]:
        """Of a merged folder what it says once loaded again, of an adapter how near it comes to the edit."""
        if self.format == "hf":
            rows = [[row["prompt"], row["continuation"]] for row in self.about["generated"]]
            return [Table(["prompt", "continuation"], rows, "the folder, loaded again, says")] if rows else []
        if self.format == "edit":
            return []
        columns = ["weight", "rank", "rank that is exact", "missing, of the update's norm"]
        rows = [[name, row["rank"], row["needed"], row["error"]] for name, row in self.weights.items()]
        return [Table(columns, rows, f"adapter in {self.dtype}")]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        fields = {name: value for name, value in vars(self).items() if name != "about"}
        return fields | {"path": str(self.path), **self.about}


def keep_about(folder: Path, name: str, revision: str | None, edit: Edit, **about: Any) -> None:
    """Write `kt/export.json`, which names edit and model, without any path of this machine."""
    origin = {
        "kind": "export",
        "edit": edit.digest,
        "model": public_name(name),
        "revision": revision,
        "versions": versions(),
    }
    (folder / OWN).mkdir(exist_ok=True)
    write_json(folder / OWN / ABOUT, origin | about)


@takes(edit=AN_EDIT)
def carries(folder: str | Path, edit: Edit) -> bool:
    """Whether a folder is a finished export of this edit."""
    about = Path(folder) / OWN / ABOUT
    return about.is_file() and read_json(about).get("edit") == edit.digest


def public_name(name: str) -> str:
    """A model's name for exported files: the Hub id, or the last part of a local path."""
    local = Path(name).is_absolute() or name.startswith(".") or Path(name).exists()
    return Path(name).resolve().name if local else name


class Reloaded(NamedTuple):
    """Results of the reloaded folder: the error of its logits, and its continuations of the first prompts."""

    max_error: float
    generated: tuple[dict[str, str], ...]


def prompts_of(edit: Edit) -> list[str]:
    """The first 64 requests' prompts; one word for an edit without requests."""
    texts = [fill(str(r["prompt"]), str(r["subject"])) for r in edit.requests[:MOST_PROMPTS]]
    return texts or ["The"]


@torch.no_grad()
def next_logits(
    model: TracedModel,
    prompts: Sequence[str],
    forward: Callable[..., Any] | None = None,
    reader: TracedModel | None = None,
) -> Float[Tensor, "prompt vocab"]:
    """The logits after each prompt, from a plain forward without nnsight; float32, on the CPU.

    Args:
        model: that is asked.
        prompts: what it is asked.
        forward: of another module, that takes the model's inputs [default: the model's own].
        reader: the model whose tokens the prompts are, in its chat template where it has one [default: `model`].
    """
    forward, reader = forward or model.module, reader or model
    batches = [reader.encode(prompts[start : start + ROWS]) for start in range(0, len(prompts), ROWS)]
    with model.at_rest(), model.one_forward():
        return torch.cat([forward(**model.inputs(batch)).logits[:, -1].float().cpu() for batch in batches])


def check_files(model: TracedModel, folder: Path, names: Sequence[str]) -> None:
    """Compare the weights in the files with the model's, byte by byte, with one weight at a time in memory.

    Raises:
        WorkFailed: a weight differs, or one of `names` is not in the files.
    """
    shards, state = Shards.open(folder, saved_names(model.module)), model.module.state_dict()
    absent = [name for name in names if shards.file_of(name) is None]
    if absent:
        raise WorkFailed(f"{folder}: {absent[0]} was saved under another name; this model cannot be exported as hf")
    for name in shards.files:
        if name in state and not same_bytes(shards.read(name), content(model.module, name, state[name])):
            raise WorkFailed(f"{folder}: {name} was written with other bytes than the model has; export again")
    for name in names:
        if name not in state and not model.packing([name]) and not same_bytes(shards.read(name), model.read_only(name)):
            raise WorkFailed(f"{folder}: {name} was written with other bytes than the model has; export again")


def check_tokenizer(model: TracedModel, folder: Path, texts: Sequence[str]) -> None:
    """Check that `AutoTokenizer` loads a tokenizer that gives the model's ids of `texts`.

    For some model types it creates a fixed class whatever was saved, and not every tokenizer survives that.

    Raises:
        WorkFailed: the tokenizer does not load, or gives other ids.
    """
    from transformers import AutoTokenizer

    try:
        again = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = said_by(error, 200)
        raise WorkFailed(f"{folder}: the tokenizer does not load again ({reason})") from error
    for text in texts:
        expected, ids = list(model.tokenizer(text)["input_ids"]), list(again(text)["input_ids"])
        if expected != ids:
            raise WorkFailed(
                f"{folder}: the tokenizer does not come back as it was: AutoTokenizer makes a {type(again).__name__} "
                f"that reads {text!r} as {ids[:6]}..., not {expected[:6]}...; save the model's own tokenizer "
                "files there"
            )


def check_reload(model: TracedModel, folder: Path, prompts: Sequence[str]) -> Reloaded:
    """Load the folder as other programs do; compare all weights and the prompts' logits with the model's, bit by bit.

    Raises:
        NotEnoughMemory: no room for the second copy.
        WorkFailed: the folder does not load, or is another model.
    """
    reloaded = _load_again(model, folder)
    if reloaded.fingerprint() != model.fingerprint():
        raise WorkFailed(f"{folder}: loaded again, it has other weights than the edited model; export again")
    _align_like(reloaded, model)
    expected, logits = next_logits(model, prompts), next_logits(reloaded, prompts, reader=model)
    if not torch.equal(expected, logits):
        gap = float((expected - logits).abs().max())
        raise WorkFailed(
            f"{folder}: loaded again, its logits differ from the edited model's by up to {gap:.2g}, though every "
            "weight is the same: the model in memory has settings or buffers that no file holds; cast it with --dtype, "
            "not after loading"
        )
    shown = list(prompts[:SHOWN])
    continuations = reloaded.generate(shown, NEW_TOKENS)
    return Reloaded(0.0, tuple({"prompt": p, "continuation": c} for p, c in zip(shown, continuations, strict=True)))


def _align_like(model: TracedModel, like: TracedModel) -> None:
    """Give every weight of `model` the memory alignment that it has in `like`; the values stay the same.

    A matrix product on the CPU takes another order of additions for weights that do not start at a multiple of 64
    bytes. Weights read from a safetensors file start anywhere, so equal weights gave logits 2e-7 apart.
    """
    wanted = dict(like.module.named_parameters())
    for name, weight in model.module.named_parameters():
        if weight.device.type == "cpu" and name in wanted and is_plain(weight) and weight.is_contiguous():
            size = weight.numel() * weight.element_size()
            memory = torch.empty(size + 64, dtype=torch.uint8)
            start = (wanted[name].data_ptr() - memory.data_ptr()) % 64
            weight.data = memory[start : start + size].view(weight.dtype).view(weight.shape).copy_(weight.data)


def _load_again(model: TracedModel, folder: Path) -> TracedModel:
    from ..model.load import load

    if model.device.type == "cpu":
        size = size_of(model.module.state_dict())
        require_memory(size, "loading the exported folder again, to compare it,", "leave the check out (--no-check)")
    config = model.module.config
    try:
        return load(
            str(folder),
            dtype=model.dtype,
            device=str(model.device),
            device_map=getattr(model.module, "hf_device_map", None),
            attn_implementation=getattr(config, "_attn_implementation", None),
            layout=model.given_layout,
        )
    except UnknownModel as error:
        raise WorkFailed(
            f"the exported folder does not load again: {error}; --format peft writes the edit alone"
        ) from error


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Bytes, since NaN is not equal to itself, and 0 is equal to -0.
    flat = [t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)


@takes(model=A_MODEL, edit=AN_EDIT)
def to_hf(
    model: TracedModel,
    edit: Edit,
    folder: str | Path,
    check: bool = True,
    undo: bool = True,
    force: bool = False,
) -> Exported:
    """Write the edited model as a Hugging Face folder, atomically; the model is unchanged on return.

    The weights have the dtype of the loaded model, which may differ from its files'. All written weights are compared
    with the model's, byte by byte, and the tokenizer's ids of the requests' texts.

    Args:
        check: also load the folder again and compare all weights and the logits after the requests' prompts bit by
            bit; this needs the model's memory a second time.
        undo: keep the edited weights' original bytes in the folder, for `revert_folder`; not of a quantised model's,
            whose way back is the model it was merged from.
        force: also on weights other than those for which the edit was solved.

    Raises:
        KtError: the edit was solved for other weights.
        NotWritable: the folder is not empty, or the disk is full or read-only.
        NotEnoughMemory: no room for the check's second copy of the model.
        WorkFailed: the written folder is not the edited model.
    """
    edit.require_updates("a merged folder")
    refuse_unsaved(model)
    refuse_taken(folder)
    refuse_full(folder, size_of(model.module.state_dict()))
    source = source_of(model)
    before = {name: model.fingerprint([name]) for name in edit.names}
    packed, stored = model.packing(edit.names), saved_names(model.module)
    names = {name: stored[name] for name in edit.names if name in stored}
    undo = undo and not packed
    prompts = prompts_of(edit)
    with whole_folder(folder) as temporary:
        (temporary / OWN).mkdir()
        edit.save(temporary / OWN / EDIT)
        if undo:  # the original bytes, in the module's own layout and dtype
            copies = {name: model.own(name).detach().cpu().contiguous() for name in edit.names}
            copies = {name: copy.clone() if "[" in name else copy for name, copy in copies.items()}
            save_arrays(temporary / OWN / UNDO, copies, {"kind": "undo", "edit": edit.digest})
        with edit.applied(model, force=force):
            with left_plain(model, packed):
                save_model(model, temporary, source)
            check_files(model, temporary, edit.names)
            targets = [str((r.get("target_new") or {}).get("str", "")) for r in edit.requests[: len(prompts)]]
            check_tokenizer(model, temporary, [*prompts, *filter(None, targets)])
            reloaded = check_reload(model, temporary, prompts) if check else None
            after = {name: model.fingerprint([name]) for name in edit.names}
        about = {
            "shards": len(set(Shards.open(temporary).files.values())),
            "source_shards": source.number if source else None,
            "undo": undo,
            **({"packed": packed} if packed else {}),
            **({"names": names} if names else {}),
        }
        keep_about(
            temporary,
            model.name,
            model.revision,
            edit,
            format="hf",
            fingerprints=before,
            fingerprints_after=after,
            **about,
        )
    return Exported(
        path=Path(folder),
        format="hf",
        dtype=str(model.dtype).removeprefix("torch."),
        max_error=reloaded.max_error if reloaded else None,
        relative_error=reloaded.max_error if reloaded else None,
        prompts=len(prompts) if reloaded else 0,
        weights={name: {"before": before[name], "after": after[name]} for name in edit.names},
        about=about | {"generated": list(reloaded.generated) if reloaded else []},
    )


SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert")
"""Names that the quantisation configs of transformers have for the list of modules that stay plain."""


def refuse_unsaved(model: TracedModel) -> None:
    """Refuse, before any work, a quantised model that transformers cannot save with some maps plain.

    Raises:
        KtError: it is one, with what to do.
    """
    packed = next(((name, each) for name, each in model.module.named_modules() if is_packed(each)), None)
    if packed is None:
        return
    about = getattr(model.module.config, "quantization_config", None)
    quantiser = getattr(model.module, "hf_quantizer", None)
    if any(hasattr(about, each) for each in SKIPPED) and quantiser is not None and quantiser.is_serializable():
        return
    why = "transformers saves no model of this kind with some of its weights plain"
    if about is None:
        why = "its config has no quantization_config that says so"
    raise KtError(
        f"{packed[0]} is packed ({kind_of(packed[1])}), and {why}; load the checkpoint that it was made from and "
        "merge the edit that is solved there, or apply this edit's file with kt"
    )


@contextmanager
def left_plain(model: TracedModel, names: Iterable[str]) -> Iterator[None]:
    """Inside the block transformers can save a quantised model with these weights plain: they are on its config's list
    of maps that stay so."""
    module = model.module
    linear = {path: each for path, each in module.named_modules() if is_linear(each)}
    plain = [path for path, each in linear.items() if not is_packed(each)]  # by default the head is one
    if len(plain) == len(linear):
        yield
        return
    about = module.config.quantization_config
    field = next(each for each in SKIPPED if hasattr(about, each))
    before = getattr(about, field)
    paths = [name.removesuffix(".weight") for name in names]
    setattr(about, field, sorted({*paths, *(plain if before is None else before)}) if paths else before)
    try:
        with reversible(module):
            yield
    finally:
        setattr(about, field, before)


PROCESSOR = ("*processor_config.json", "chat_template.json")
"""Files of a multimodal model's folder that neither model nor tokenizer writes: how its processor reads images."""


def carry_over(model: TracedModel, folder: Path) -> None:
    """Copy the processor's files from the folder that the model was loaded from."""
    source = checkpoint_folder(str(getattr(model.module.config, "_name_or_path", "") or model.name), model.revision)
    if source is None:
        return
    for path in sorted(path for each in PROCESSOR for path in source.glob(each)):
        if path.is_file() and inside(path, source) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def save_model(model: TracedModel, folder: Path, source: Source | None) -> None:
    """`save_pretrained`, in as many files as the source's, or in files of transformers' size if that is unknown."""
    size: dict[str, Any] = {} if source is None else {"max_shard_size": shard_size(model.module, source)}
    try:
        with no_bars():
            model.module.save_pretrained(folder, **size)
        model.tokenizer.save_pretrained(folder)
        carry_over(model, folder)
    except ValueError as error:
        # save_pretrained refuses a generation config that contradicts itself.
        raise WorkFailed(
            f"transformers does not save this model: {said_by(error)}; mend the "
            "model's generation_config, or export with --format peft"
        ) from error
