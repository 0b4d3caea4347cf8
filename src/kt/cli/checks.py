"""What is refused before a model loads: names, values, files, layers, the browser. Only `unfit` and
`planned`, the last of these, import torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._util.data import read_json, read_table, tensor_header
from .._util.files import check_writable, where_it_leads
from .._util.online import unreachable
from .._util.text import visible
from ..errors import KtError, UnknownModel, UnknownSite, need
from ..facts.corpus import Corpus
from ..model.folder import check_weights, refuse_adapter, refuse_quantised
from ..model.gguf import check_whole, find_gguf
from . import parse
from .command import BadOption, as_flag

if TYPE_CHECKING:
    from ..editing.config import Config

DTYPES = ("auto", "float32", "fp32", "bfloat16", "bf16", "float16", "fp16", "float64")
DEVICE = re.compile(r"(auto|cpu|cuda|mps|xpu|hpu|npu|meta)(:\d+)?")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names of the number of layers in a model's config."""


class Idle(NamedTuple):
    """Options that a command does not use where `used` does not hold; `why` is then said."""

    commands: str
    names: str
    used: Callable[[Any], bool]
    why: str


def by_hand(options: Any) -> bool:
    """Whether the fact is typed."""
    return getattr(options, "prompt", None) is not None


FLAGS = ("alpha", "layers_mlp", "layers_attn")
"""Settings of methods that have a flag of their own. Other flags only share the name of one (`--batch-size`)."""
OF_A_MODEL = "model dtype device device_map trust_remote_code"
"""How a model is loaded."""

IDLE = (
    Idle("", "facts limit format zsre_target known_to", lambda o: not by_hand(o), "for facts from a file only"),
    Idle("case cov", "seed", lambda o: False, "nothing is drawn by chance; leave it out"),
    Idle("heatmap", "top check", lambda o: o.method == "atp", "for estimates only; add --method atp"),
    Idle("heatmap alpha", "noise samples", lambda o: o.corrupt == "noise", "for --corrupt noise only"),
    Idle("eval probe abilities", "force", lambda o: o.edit is not None, "for an edit only; give --edit"),
    Idle("case", "force", lambda o: bool(o.edits), "for edits only; give --edits"),
    Idle("probe", "statistic", lambda o: o.edit is None, "with --edit the tables show means"),
    Idle("eval", "no_control", lambda o: o.edit is not None, "for an edit only; give --edit"),
    Idle("eval", "max_new_tokens", lambda o: "wild" in o.protocol, "for free answers; add wild to --protocol"),
    Idle("apply-edit", "no_generate", lambda o: o.evaluate != "none", "nothing is scored; add --evaluate end"),
    Idle("apply-edit", "no_check", lambda o: o.merge_to is not None, "for a merged folder only; give --merge-to"),
    Idle("apply-edit", "html png svg", lambda o: o.mode == "sequential", "it shows steps; add --mode sequential"),
    Idle(
        "apply-edit",
        "keep_history",
        lambda o: o.mode == "sequential" or o.history is not None,
        "for steps only; add --mode sequential",
    ),
    Idle("apply-edit", "resume", lambda o: not o.dry_run, "--dry-run keeps no run to go on with"),
    Idle("apply-edit", "alpha_facts", lambda o: o.alpha in (None, "auto"), "nothing is traced; leave --alpha out"),
    Idle("apply-edit sweep", "corpus max_tokens", lambda o: o.statistics is None, "--statistics has the moments"),
    Idle("layers", "corpus max_tokens", lambda o: o.statistics is None, "--statistics has the moments"),
    Idle("sweep", "module", lambda o: o.kind == "layers", "for kt sweep layers only"),
    Idle("sweep", "region", lambda o: o.kind == "clamp", "for kt sweep clamp only"),
    Idle("sweep", "no_trace", lambda o: o.kind == "alpha", "for kt sweep alpha only"),
    Idle("sweep", "alpha", lambda o: o.kind != "alpha", "alpha is what is swept; --grid names its values"),
    Idle("export", "dry_run public overwrite", lambda o: o.push is not None, "for --push only"),
    Idle(
        "export",
        f"{OF_A_MODEL} layout force no_check",
        lambda o: o.format != "edit",
        "--format edit copies the file alone",
    ),
    Idle(
        "export",
        f"{OF_A_MODEL} layout format force no_check no_undo max_rank max_error adapter_dtype",
        lambda o: o.push is None or o.edit is None or not o.edit.is_dir(),
        "an exported folder is pushed as it is",
    ),
    Idle("presets", "method variant", lambda o: o.action == "show", "for kt presets show only"),
    Idle(
        "run",
        f"{OF_A_MODEL} smoke facts limit seed statistics corpus only sets resume batch_size out overwrite html png svg",
        lambda o: o.recipe != "ls",
        "kt run ls only lists recipes; name one",
    ),
    Idle("edits", "force", lambda o: o.action == "stack", "for kt edits stack only"),
    Idle(
        "",
        "system thinking chat_turn",
        lambda o: getattr(o, "chat", None) != "never",
        "for prompts in a chat template only; leave out --chat never",
    ),
    Idle("edits", "dtype device device_map layout trust_remote_code", lambda o: bool(o.model), "for a model; give -m"),
)
"""By command (none: every one that has the options)."""


def idle(options: Any) -> None:
    """Refuse an option that the command would not use."""
    usual = {field.name: field.default for field in fields(options)}
    for commands, names, used, why in IDLE:
        given = [n for n in names.split() if n in usual and getattr(options, n) != usual[n]]
        if given and options.command in (commands.split() or [options.command]) and not used(options):
            raise BadOption(f"{as_flag(given[0])} has no use here: {why}")


def typed(options: Any) -> None:
    """Everything that is known of the options alone."""
    idle(options)
    dtype, device = getattr(options, "dtype", "auto"), getattr(options, "device", "auto")
    if dtype not in DTYPES:
        raise KtError(f"dtype {dtype!r} is unknown; choose {', '.join(DTYPES)}{parse.meant(dtype, DTYPES)}")
    if not DEVICE.fullmatch(device):
        hint = (
            "; did you mean cuda:" + device + "?" if device.isdigit() else parse.meant(device, ("cuda", "cpu", "mps"))
        )
        raise KtError(f"device {device!r} is unknown; choose auto, cpu, cuda:0 or mps{hint}")
    if device.startswith("cuda") and cpu_only():
        raise KtError(
            f"device {device!r} was asked for, but this PyTorch is the one without CUDA; use --device cpu or auto"
        )
    if hasattr(options, "chat"):
        parse.chat(options)
    if (file := getattr(options, "statistics", None)) is not None:
        second_moments(Path(file))
    if isinstance(sets := getattr(options, "sets", None), str | Path) and str(sets) != "demo":
        read_json(sets)
    if isinstance(cache := getattr(options, "cache", None), Path):
        check_writable(cache / "cov")
    for name in ("pool", "exclude", "alpha_facts", "nas_facts"):
        facts = getattr(options, name, None)
        if facts not in (None, "demo", "lre") and not facts.startswith("hf:") and not Path(facts).exists():
            raise BadOption(f"{as_flag(name)} {facts}: no such file; give a file of facts")
    if (layout := getattr(options, "layout", None)) is not None:
        read_table(layout)
    if str(getattr(options, "device_map", "")).endswith(".json"):
        read_json(options.device_map)
    url = getattr(options, "judge_url", None)
    if url is not None and not url.startswith(("http://", "https://")):
        raise BadOption(f"--judge-url {url!r} is no http or https address; write it as http://host:8000/v1")
    for flag in ("corpus", "heldout"):
        if (text := getattr(options, flag, None)) is not None:
            Corpus.open(text, getattr(options, "model", "")).check()
    if isinstance(edit := getattr(options, "edit", None), Path):
        edit_files(edit)
    if hasattr(options, "method") and hasattr(options, "statistics"):
        solving(options)
    for kind in ("png", "svg"):
        if getattr(options, kind, None) is not None:
            browser(f"--{kind}")


def solving(options: Any) -> None:
    """Method, preset, and settings of an edit: their names, and that the method has a use for them."""
    from ..editing.methods import METHODS, all_settings, plain_name, unused

    methods = methods_of(options)
    if "lora" in methods:
        need("peft", "method lora")
    writes, named = [method for method in methods if METHODS[method].writes_attention], ", ".join(methods)
    probed = any("layers_high" in METHODS[method].settings() for method in methods)
    for name in ("alpha",) if probed else ("alpha", "alpha_facts"):
        if not writes and getattr(options, name, None) not in (None, "0", "0.0"):
            raise BadOption(f"{as_flag(name)} has no use here: {named} leaves attention alone; use intattn")
    if not any("v_lr" in METHODS[method].settings() for method in methods):
        for name in ("statistics", "corpus", "max_tokens"):
            if getattr(options, name) not in (None, "auto"):
                raise BadOption(f"{as_flag(name)} has no use here: {named} takes no second moments; leave it out")
    settings = parse.settings(getattr(options, "set", None))
    for name in settings:
        option = plain_name(name)
        if hasattr(options, option) and (option in FLAGS or option not in all_settings()):
            raise BadOption(f"--set {name}: it has a flag of its own; write {as_flag(option)} VALUE")
    if why := unused(settings, methods):
        raise BadOption(f"--set {why}")
    for name in ("editor", "demonstrations", "warmup"):
        file = settings.get(name)
        if isinstance(file, str) and not (file in ("demo", "lre") or file.startswith("hf:") or Path(file).exists()):
            raise BadOption(f"--set {name}={visible(file)}: no such file; check the path")
    flags = [name for name in ("layers_mlp", "layers_attn") if getattr(options, name, None) is not None]
    if why := unused(flags, methods):
        raise BadOption(f"--{why.replace('_', '-', 1)}")
    for config in configurations(options):
        config.refuse_old_names()
        if "editor" in config.settings() and not getattr(config, "editor", None):
            raise BadOption(
                f"{config.name} needs an editor trained for this model: give --set editor=FILE, which kt train-editor "
                "makes"
            )


def methods_of(options: Any) -> tuple[str, ...]:
    """The methods that are typed, or the command's own."""
    from ..editing.methods import METHODS

    usual = "jeep" if getattr(options, "kind", "") == "clamp" else "intattn"
    return parse.names(options.method or usual, tuple(METHODS), "--method")


def configurations(options: Any, *points: Mapping[str, Any]) -> Iterator[Config]:
    """The configurations that are typed: one a method, or one a point of a sweep. What the model's own preset gives is
    not in them, for it has to be found first."""
    from ..editing.methods import METHODS, used_by
    from ..editing.presets import configured, named

    preset = getattr(options, "preset", None) and named(options.preset)
    variant = options.variant if preset else None
    if not points:
        given = parse.solve_settings(options)
        alpha = parse.alpha(getattr(options, "alpha", None))
        shares = {name: alpha if METHODS[name].writes_attention else None for name in methods_of(options)}
        points = tuple({"method": name, "alpha": shares[name], **used_by(name, given)} for name in shares)
    for point in points:
        yield configured(preset, variant=variant, **{n: v for n, v in point.items() if n not in ("preset", "variant")})


def unfit(options: Any, **given: tuple[str, Any]) -> None:
    """What the method has no place for, whichever the model is. Where something is given, this imports torch.

    Args:
        given: by flag, an argument of `EditSession` and its value.
    """
    asked = {flag: {name: value} for flag, (name, value) in given.items() if value}
    if not asked:
        return
    from ..editing.session_options import SessionOptions

    for config in configurations(options):
        for name, option in asked.items():
            try:
                SessionOptions(**option).refuse_unfit(config)
            except KtError as error:
                raise BadOption(f"{as_flag(name)}: {error}") from None


def planned(options: Any, *points: Mapping[str, Any]) -> None:
    """What a method's plan refuses, just before the model loads: plans import torch."""
    for config in configurations(options, *points):
        config.outline()


def browser(flag: str) -> None:
    """Chromium, that draws PNG and SVG."""
    from choreographer.browsers.chromium import Chromium

    path = os.environ.get("BROWSER_PATH") or Chromium.find_browser(skip_local=False)
    if not path or not Path(path).is_file():
        raise BadOption(f"{flag} needs a browser and none was found: install Chromium, or write --html instead")


def cpu_only() -> bool:
    """Whether the installed PyTorch was built without CUDA and ROCm, by its own file and without importing it."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else Path()
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return all(re.search(rf"^{kind}\b.*= None$", text, re.MULTILINE) for kind in ("cuda", "hip"))


def edit_files(*paths: Path) -> None:
    """That edits are there and are edits, before what opens them is imported."""
    from ..editing.file_kind import refuse_other

    for path in paths:
        if path.is_dir():
            raise BadOption(f"{path} is a folder; name the edit in it: {path / 'edit.safetensors'}")
        if not path.exists():
            raise BadOption(f"{path}: no such file; kt apply-edit writes edits, kt edits ls finds them")
        refuse_other(path)


def second_moments(file: Path) -> None:
    """That a file holds square matrices, as far as its header tells."""
    if not file.is_file():
        is_there = "it is a folder; name a file in it" if file.is_dir() else "no such file"
        raise BadOption(f"--statistics {file}: {is_there}; kt cov writes one")
    header = tensor_header(file)
    shapes = {name: about["shape"] for name, about in header.items() if name != "__metadata__"}
    wrong = next((name for name, shape in shapes.items() if len(shape) != 2 or shape[0] != shape[1]), None)
    if wrong is not None or not shapes:
        what = "nothing" if wrong is None else f"{wrong} of shape {'x'.join(map(str, shapes[wrong]))}"
        raise BadOption(f"--statistics {file}: holds {what}, no square matrix a module; kt cov writes one")


def new_folder(path: Path, flag: str) -> None:
    """Refuse a folder to be written that is taken."""
    where_it_leads(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadOption(f"{flag} {path} exists and is not empty; name a new folder")
    check_writable(path / "config.json")


def model(options: Any) -> None:
    """That the model is there or can be fetched, and has the layers that the options name.

    Raises:
        UnknownModel: no such folder, or a Hub id that is not cached while the Hub does not answer.
        UnknownSite: a layer that its config does not have.
    """
    if getattr(options, "remote", False):
        return
    name, _, revision = options.model.partition("@") if not Path(options.model).exists() else (options.model, "", "")
    config = config_file(name, revision or None)
    if config is not None:
        held_layers(options, name, config)


def config_file(name: str, revision: str | None) -> Path | None:
    """The config.json of a model; None for a GGUF file, or where it is still to be fetched."""
    folder = Path(__file__).parents[1] / "demo" / "model" if name == "demo" else Path(name)
    if folder.is_dir():
        refuse_adapter(folder)
        if (folder / "config.json").is_file():
            check_weights(folder)
            return folder / "config.json"
        if not (folder / "adapter_config.json").exists() and not any(folder.glob("*.gguf")):
            raise UnknownModel(
                f"cannot load folder {name!r}: it holds no config.json; name one that save_pretrained wrote"
            )
        if (file := find_gguf(folder)) is not None:
            check_whole(file)
        return None
    if folder.is_file():
        if find_gguf(folder) is None:
            raise UnknownModel(
                f"cannot load model {name!r}: a file that is no GGUF; name the folder that save_pretrained wrote"
            )
        check_whole(folder)
    if folder.exists():
        return None
    if name.startswith((".", "~", "/", "\\")) or name.endswith(("/", "\\")) or not HUB_ID.fullmatch(name):
        hub = re.fullmatch(r"https?://huggingface\.co/(.+?)(/tree/.*)?/?", name)
        hint = f"; did you mean {hub[1]}?" if hub else ", which is OWNER/NAME"
        raise UnknownModel(f"cannot load model {name!r}: no such folder here, and it is no Hub id{hint}")
    return cached_config(name, revision)


def cached_config(name: str, revision: str | None) -> Path | None:
    """The cached config of a Hub id; None where the Hub has to be asked, and answers."""
    why = unreachable()
    if why is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub would try for a minute
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(file, str):
        return Path(file)
    if why is not None:
        id = "" if "/" in name else " (most Hub ids are OWNER/NAME)"
        raise UnknownModel(
            f"cannot load model {name!r}: no such folder here, it is not in the Hub's cache{id}, and {why}; connect, "
            "or download it elsewhere and give the folder"
        )
    return None


def held_layers(options: Any, name: str, file: Path) -> None:
    """Refuse layers that are beyond the depth in the config."""
    config = read_json(file)
    refuse_quantised(name, config)
    config = config.get("text_config") or config
    depth = next((config[key] for key in DEPTH if isinstance(config.get(key), int)), None)
    if depth is None:
        return
    asked = [
        parse.layers(text, as_flag(option)) or ()
        for option in ("layers_mlp", "layers_attn", "layers")
        if isinstance(text := getattr(options, option, None), str)
    ]
    settings = parse.settings(getattr(options, "set", None))
    asked += [value or () for key, value in settings.items() if key.startswith("layers_")]
    beyond = sorted(layer for layers in asked for layer in layers if layer >= depth)
    if beyond:
        raise UnknownSite(f"{name} has layers 0 to {depth - 1}, not {beyond[0]}; choose among these")
