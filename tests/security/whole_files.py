"""A whole file of every kind that kt reads, as its commands write them: what broken files are made from."""

from __future__ import annotations

import shutil
from pathlib import Path

from hostile import MODEL, run_everything

MADE = ("heatmap", "alpha", "edit", "steps", "eval", "probe", "residual", "case", "sweep")
PLAIN = [
    {
        "prompt": "The mother tongue of {} is",
        "subject": subject,
        "answer": answer,
        "foil": foil,
        "target": foil,
        "relation": "tongue",
        "paraphrases": ["{} speaks"],
        "neighbourhood": [{"prompt": "Rome speaks", "answer": "Italian"}],
    }
    for subject, answer, foil in (("Marie Curie", "Polish", "French"), ("Megan Rapinoe", "English", "Italian"))
]
"""Facts for whole files that are small."""


def make_runs(folder: Path) -> Path:
    """A whole file of every kind, as the commands write them; those that no quick command writes are put together."""
    made = run_everything(folder, PLAIN, "memit", seed=1, only=MADE)
    failed = [ran for ran in made.ran if ran.code]
    assert not failed, failed
    _add_stack(folder)
    _add_abilities(folder)
    _add_effects(folder)
    _add_editor(folder)
    _add_journal(folder)
    return folder


def _add_stack(folder: Path) -> None:
    from kt._util.data import write_json
    from kt.editing import Edit

    entry = {"file": "edit.safetensors", "digest": Edit.load(folder / "edit" / "edit.safetensors").digest}
    write_json(folder / "stack.json", {"kind": "edit-stack", "model": "tiny", "edits": [entry | {"forced": False}]})


def _add_abilities(folder: Path) -> None:
    from kt.capability.run import Abilities, Ability
    from kt.stats import Interval

    row = Ability("arc", "acc,none", True, Interval(0.5, 0.4, 0.6, 9), Interval(0.4, 0.3, 0.5, 9), None)
    run = {"n-samples": {"arc": {"original": 9, "effective": 9}}, "n-shot": {"arc": 0}, "results": {}}
    found = Abilities("tiny", (row,), {"before": run, "after": run}, {}, {"seed": 0}, {"lm_eval": "0.4"})
    shutil.copytree(folder / "case", folder / "abilities")
    (folder / "abilities" / "case.json").unlink()
    found.save(folder / "abilities" / "abilities.json")


def _add_effects(folder: Path) -> None:
    """Edits that leave the weights alone, as their methods make them."""
    import warnings

    import kt

    model = kt.load(folder / MODEL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, method in (("adapter", "grace"), ("context", "ice")):
            options = {"v_num_grad_steps": 2} if method == "grace" else {}
            kt.edit(model, PLAIN, method=method, **options).save(folder / f"{kind}.safetensors")


def _add_editor(folder: Path) -> None:
    import torch

    from kt.editing.hyper.editor import Editor, new_networks
    from kt.editing.ultraedit import Running

    score = {"mean": 0.5, "ci95": [0.25, 0.75], "n": 4}
    check = {"step": 0, "loss": 1.5, "held_out_loss": 1.25, "success": score, "paraphrase": score, "locality": score}
    told = {"method": "malmen", "model": "tiny", "revision": None, "dtype": "float32", "fingerprint": "0" * 64}
    told |= {"sites": ["mlp.0", "mlp.1"], "shapes": ["3x4", "3x4"], "settings": {"rank": 2, "layers": 1}}
    told |= {"n_train": 16, "n_held_out": 4, "best_step": 0, "history": [check]}
    told["subjects"] = {"train": ["ana"], "held_out": ["bo"], "test": []}
    networks, running = new_networks("malmen", told["shapes"], 2, 1), Running.of(torch.arange(14.0).reshape(2, 7))
    Editor(networks, {"3x4": running}, told).save(folder / "editor.safetensors")


def _add_journal(folder: Path) -> None:
    import numpy as np
    import torch

    from kt.runs.journal import Journal

    journal = Journal.begin(folder / "journal", {"seed": 0}, resume=False)
    held = {"a": torch.ones(2, 3), "b": [np.arange(4), (0.5, None, "text")], "c": {"d": True, "e": float("nan")}}
    journal.take("one", lambda: held)
    journal.release()
