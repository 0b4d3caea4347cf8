"""Mistakes of people who know transformers, lm-eval or nnsight: exit code 2 and one line that says what to write."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kt.editing.edit import Edit
from kt.model.update import Dense

BY_HAND = '--prompt "The mother tongue of {} is" --subject "Marie Curie"'
EDIT = f"apply-edit {BY_HAND} --target French"
RECORD = {"prompt": "The mother tongue of {} is", "subject": "Marie Curie", "answer": "Polish"}

MISTAKES = {
    # commands, options and values by the names that other tools and papers have
    "edit": "did you mean apply-edit?",
    "apply_edit": "did you mean apply-edit?",
    "trace": "did you mean heatmap?",
    "causal-trace": "did you mean heatmap?",
    "evaluate": "did you mean eval?",
    "ls model": "did you mean models?",
    "edits list": "did you mean ls?",
    "export --out x": "--out; did you mean --to?",
    "export --edit x": "write it without one: kt export EDIT",
    "revert --output x": "did you mean --to?",
    "explore --to x": "did you mean --out?",
    f"heatmap {BY_HAND} --figure x.png": "did you mean --png or --svg or --html?",
    f"{EDIT} --dataset x": "did you mean --facts or --edits?",
    "sweep alpha --values 0,1": "did you mean --grid?",
    "explore --html x": "kt heatmap, kt alpha, kt layers, ... have it",
    f"{EDIT} --layers 1": "--layers; did you mean --layers-mlp or --layers-attn?",
    f"{EDIT} --layer 1": "--layer; did you mean --layers-mlp",
    f"heatmap {BY_HAND} --layers 1": "no option --layers; kt probe has it",
    f"heatmap {BY_HAND} --batch_size 8": "did you mean --batch-size?",
    "heatmap FOLDER": "takes no such word: FOLDER; -m names a model",
    "heatmap --prompt": "requires an argument. (see kt heatmap --help)",
    f"heatmap {BY_HAND} --device gpu": "did you mean cuda?",
    f"heatmap {BY_HAND} --device 0": "did you mean cuda:0?",
    f"heatmap {BY_HAND} --dtype half": "did you mean float16?",
    f"heatmap {BY_HAND} --dtype torch.bfloat16": "did you mean bfloat16?",
    f"heatmap {BY_HAND} --metric probability": "did you mean prob?",
    f"heatmap {BY_HAND} --kind attention": "did you mean attn?",
    f"{EDIT} --method finetune": "did you mean ft?",
    f"{EDIT} --method ROME": "did you mean rome?",
    f"{EDIT} --preset gpt2": "did you mean gpt2-xl?",
    f"{EDIT} --preset meta-llama/Llama-2-7b": "did you mean llama-2-7b?",
    "sweep lambda": "did you mean alpha?",
    "heatmap --config typo.toml": "did you mean limit?",
    "export e.safetensors --to x --format lora": "did you mean peft?",
    # numbers and ranges as they are written elsewhere
    f"{EDIT} --layers-mlp 1:2": "write 4-8",
    f"{EDIT} --layers-mlp [1,2]": "write 4-8",
    f"{EDIT} --layers-mlp all": "write 4-8",
    f"{EDIT} --alpha 30%": "between 0 (MLP only) and 1",
    f"{EDIT} --set v_lr:1": "write name=value",
    f"{EDIT} --set v_lr=abc": "v_lr 'abc' is no float",
    f"{EDIT} --set alpha=0.3": "--alpha",
    f"{EDIT} --set layers_mlp=1": "--layers-mlp",
    f"{EDIT} --set spread=evn": "did you mean even?",
    f"{EDIT} --method ft --set modules=all": "or name linear maps, as mlp.up_proj",
    f"{EDIT} --method ft --set num_steps=-5": "num_steps -5 must be at least 1",
    f"{EDIT} --method ft --set learning_rate=1": "unknown hyper-parameter",
    f"{EDIT} --method ft --lr 3": "a setting of methods; write --set lr=VALUE",
    f"{EDIT} --v_num_grad_steps 3": "write --set v_num_grad_steps=VALUE",
    f"{EDIT} --keep-history": "for steps only; add --mode sequential",
    # what a method cannot take, said before the model is looked for
    f"{EDIT} -m ./none --method ft --norm-guard --mode sequential": "--norm-guard: norm_guard rescales the values",
    f"{EDIT} -m ./none --method ft --nas": "--nas: norm_guard rescales the values",
    f"{EDIT} -m ./none --method rome --keep-history --mode sequential": "--keep-history: rome has no place for",
    f"{EDIT} -m ./none --method ice --update-guard rect": "--update-guard: update_guard rect restrains",
    f"{EDIT} -m ./none --method unke --update-guard simie": "--update-guard: simie needs linear maps",
    f"{EDIT} -m ./none --preset qwen2.5-7b --alpha-facts demo": "--alpha-facts: alpha_facts are traced",
    f"{EDIT} -m ./none --method memit --alpha 0.3": "memit leaves attention alone",
    f"{EDIT} -m ./none --method memit --layers-attn 1": "--layers-attn: memit does not use it",
    f"{EDIT} -m ./none --method memit --layers-mlp none": "layers_mlp is empty",
    f"{EDIT} -m ./none --method jeep --set region=low,layers_high=3": "layers_high has no use with region=low",
    "sweep modules -m ./none --method memit": "memit writes no attention",
    "sweep edits -m ./none --grid 1,1": "names 1 twice",
    "sweep clamp -m ./none --method ft": "clamp_norm_factor: ft does not use it",
    "sweep clamp -m ./none --set region=low": "--region says whose clamp is swept",
    "layers -m ./none --method ice": "ice writes no layer",
    "layers -m ./none --method mend": "the layers that its editor was trained for",
    "train-editor -m ./none --layers-mlp none": "an editor has to write a layer",
    "cov -m ./none --layers-mlp none --layers-attn none": "leave nothing to do",
    # one thing given twice
    f"{EDIT} --set v_lr=0.1,v_lr=0.5": "--set gives v_lr twice, 0.1 and 0.5; give it once",
    f"{EDIT} --set v_lr=0.1 --set v_lr=0.5": "--set gives v_lr twice, 0.1 and 0.5; give it once",
    f"{EDIT} --set v_lr=x --set kl_factor=1": "v_lr 'x' is no float",
    f"{EDIT} --layers-mlp 3 --set layers=4": "--set layers: it has a flag of its own; write --layers-mlp",
    "train-editor --set steps=3 --set steps=4": "--set gives steps twice, 3 and 4",
    "sweep layers --alpha 2": "--alpha '2'",
    "heatmap -f facts.jsonl --limit all": "give a number from 1",
    "heatmap -f facts.jsonl --limit 100-200": "has no record 100",
    # one file in the place of another
    "eval -f e.safetensors": "an edit is given by --edit",
    "eval -f facts.jsonl --edit facts.jsonl": "is JSON or text, expected edit",
    "eval -f facts.jsonl --edit MODEL": "is a folder; name the edit in it",
    "eval -f facts.jsonl --edit MODEL/model.safetensors": "tensors of another program, expected edit",
    "case -f facts.jsonl --edits facts.jsonl": "expected edit",
    f"{EDIT} --method memit --statistics facts.jsonl": "not a whole safetensors file",
    f"{EDIT} --method memit --statistics cut.safetensors": "not a whole safetensors file",
    f"{EDIT} --method memit --statistics MODEL": "it is a folder",
    "layers --statistics e.safetensors": "holds dense/model.norm.weight of shape 32",
    "cov --corpus e.safetensors": "is no text",
    "cov --corpus empty.jsonl": "holds no text",
    "cov --corpus pointer.txt": "a Git LFS pointer",
    "cov --cache facts.jsonl": "a part of the path is a file",
    "eval -f facts.jsonl --protocol ppl --heldout empty.jsonl": "holds no text",
    "probe -f facts.jsonl --sets e.safetensors": "not a text file",
    "eval -f facts.jsonl --edit cut.safetensors": "not a whole safetensors file",
    "eval -f facts.jsonl --layout none.toml": "cannot read none.toml",
    "eval -f facts.jsonl --device-map none.json": "cannot read none.json",
    "train-editor --exclude none.jsonl": "--exclude none.jsonl: no such file",
    f"{EDIT} --alpha-facts none.jsonl": "--alpha-facts none.jsonl: no such file",
    f"{EDIT} --mode sequential --nas --nas-facts none.jsonl": "--nas-facts none.jsonl: no such file",
    "train-editor --set step=3": "did you mean steps?",
    "train-editor --set steps=0": "steps must be at least 1",
    "train-editor --set min_edits=9,edits=3": "min_edits 9 is more than edits 3",
    "train-editor --modules all": "or name linear maps, as mlp.up_proj",
    "edits show facts.jsonl": "expected edit",
    "edits ls nope": "no such file or folder",
    "revert MODEL --edit facts.jsonl": "expected edit",
    "revert peft": "holds no model.safetensors",
    f"{EDIT} --history facts.jsonl": "expected edit",
    "export e.safetensors --to MODEL": "exists and is not empty",
    "cov --layers-mlp 0 --corpus wikipedia": "no corpus 'wikipedia'",
    "abilities --preset mmlu": "choose gsm8k-two-shot, or give --tasks",
    "report MODEL": "not a run folder of kt",
    "run table-1": "no recipe 'table-1'",
    # models
    f"heatmap -m tokenizer {BY_HAND}": "holds no config.json",
    f"heatmap -m peft {BY_HAND}": "is a PEFT adapter for",
    f"heatmap -m MODEL/model.safetensors {BY_HAND}": "name the folder that save_pretrained wrote",
    f"heatmap -m Qwen2.5-7B {BY_HAND}": "most Hub ids are OWNER/NAME",
    f"heatmap -m https://huggingface.co/gpt2 {BY_HAND}": "did you mean gpt2?",
    f"heatmap -m cut.gguf {BY_HAND}": "ends or breaks within its header",
    f"heatmap -m pointer {BY_HAND}": "a Git LFS pointer",
    "export e.safetensors --to x -m tokenizer": "holds no config.json",
    # facts
    "heatmap -f other.csv": "'question', 'gold' fit no known format",
    "heatmap -f apart.jsonl": "mark its place in the prompt with {}",
    "heatmap -f bare.jsonl": "'subject' is missing",
    "heatmap -f empty.jsonl": "holds no facts",
    "heatmap -f counterfact": "facts are read from",
    "heatmap -f facts.jsonl --format csv": "unknown format 'csv'",
    "apply-edit -f equal.jsonl": "the same as the old answer",
    f"apply-edit {BY_HAND}": "the target is empty; give target_new (or --target)",
    'heatmap --prompt "The capital of [subject] is" --subject Italy': "mark its place in the prompt with {}",
}


@pytest.fixture
def words(kt, model_folder):
    """The files of a newcomer in the current folder, and a typed line as the words of the shell."""
    bare = {name: value for name, value in RECORD.items() if name != "subject"}
    apart, equal = RECORD | {"prompt": "Her mother tongue is"}, RECORD | {"target": "Polish"}
    records = {"facts": RECORD, "bare": bare, "apart": apart, "equal": equal}
    for name, record in records.items():
        Path(f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    Path("empty.jsonl").touch()
    Path("pointer.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    Path("other.csv").write_text("question,gold\nWho is she?,Marie\n")
    Path("typo.toml").write_text("limt = 3\n")
    for folder in ("tokenizer", "peft"):
        Path(folder).mkdir()
    Path("tokenizer/tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    Path("peft/adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}')
    Edit({"model.norm.weight": Dense(torch.ones(32))}, {}).save("e.safetensors")
    Path("cut.gguf").write_bytes(b"GGUF\3\0\0\0\5")
    Path("pointer").mkdir()
    Path("pointer/config.json").write_text("{}")
    Path("pointer/model.safetensors").write_bytes(Path("pointer.txt").read_bytes())
    Path("cut.safetensors").write_bytes(Path("e.safetensors").read_bytes()[:-20])
    return lambda typed: shlex.split(typed.replace("MODEL", str(model_folder)))


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(refused, failing, words, typed):
    failing(AssertionError("a model loads"))
    assert MISTAKES[typed] in refused(*words(typed))


ALONE = [f"heatmap {BY_HAND} --dtype half", "eval -f facts.jsonl --edit facts.jsonl", f"{EDIT} --set v_lr=abc"]
ALONE += [f"heatmap -m cut.gguf {BY_HAND}", "train-editor --set step=3"]


def test_a_mistake_costs_no_import_of_torch(words):
    """Each in a process of its own, as it is typed; a busy machine has seconds more."""
    for typed in ALONE:
        code = "import sys; from kt.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
        began = time.monotonic()
        ran = subprocess.run([sys.executable, "-c", code, *words(typed)], capture_output=True, text=True, check=False)
        assert ran.stdout == "2 False\n" and ran.stderr.startswith("kt: error: ") and ran.stderr.count("\n") == 1
        assert time.monotonic() - began < 20
