"""IKE: which demonstrations stand before a fact, of which kinds, in which order; those that do not fit are left out."""

import json

import pytest
from editing_help import REQUESTS
from families import tiny_model

import kt
from kt.editing.context_edit import demonstrations
from kt.errors import KtError

pytestmark = pytest.mark.filterwarnings("ignore:.*(give the target first|less likely|perplexity)")
RECORDS = [
    {"prompt": "The mother tongue of {} is", "subject": name, "target_new": "Danish", "target_true": "French",
     "paraphrases": [f"{name} grew up with"], "neighbourhood": [{"prompt": "Voltaire speaks", "answer": "French"}]}
    for name in ("Danielle Darrieux", "Ann", "Bob", "Eve")
]  # fmt: skip


def pool(tmp_path, records):
    (tmp_path / "pool.json").write_text(json.dumps(records))
    return {"demonstrations": str(tmp_path / "pool.json")}


def test_the_nearest_demonstrations_stand_last_of_the_kinds_in_turn_and_none_is_about_a_request(tmp_path):
    far = RECORDS[1] | {"prompt": "{} lives in", "subject": "Zoe", "paraphrases": ["Zoe is from"]}
    model = tiny_model("llama", max_position_embeddings=4096)
    edit = kt.edit(model, REQUESTS, "ike", shots=4, kinds="paper", **pool(tmp_path, [far, *RECORDS]))
    lines = [line.removeprefix("Prompt: ") for line in edit.effect.contexts[0].split("\n") if line.startswith("Prompt")]
    # Nearest first they are Eve (copy), Bob (update), Ann (retain) and Zoe (update).
    assert lines == ["Zoe is from Danish", "Voltaire speaks French", "Bob grew up with Danish",
                     "The mother tongue of Eve is Danish"]  # fmt: skip
    assert edit.effect.contexts[0].endswith("New Fact: The mother tongue of Danielle Darrieux Italy\n")
    assert "New Fact: The mother tongue of Danielle" not in edit.effect.contexts[1]


def test_demonstrations_that_a_model_has_no_room_for_are_left_out_the_farthest_first(tmp_path):
    small = tiny_model("llama", max_position_embeddings=256)
    full, cut = (
        kt.edit(model, REQUESTS[:1], "ike", shots=3, **pool(tmp_path, RECORDS)).effect.contexts[0]
        for model in (tiny_model("llama", max_position_embeddings=4096), small)
    )
    assert len(cut) < len(full) and full.endswith(cut)


def test_a_pool_about_the_requests_alone_is_one_line_and_the_shipped_one_is_whole(tmp_path):
    with pytest.raises(KtError, match=r"no demonstrations in .* about other subjects"):
        kt.edit(tiny_model("llama"), REQUESTS, "ike", **pool(tmp_path, RECORDS[:1]))
    shipped = demonstrations("auto", "any model")
    assert len(shipped) == 16 and all(f.answer and f.foil and f.paraphrases and f.neighbours for f in shipped)
    assert len({f.subject for f in shipped}) == 16
    with pytest.raises(KtError, match="kinds"):
        kt.edit(tiny_model("llama"), REQUESTS, "ike", kinds="mine")
