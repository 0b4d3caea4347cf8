"""Parts that are not found by structure are named by the caller, and proved by numbers as found ones are."""

import json

import pytest
import torch
from families import byte_level_tokenizer, tiny_module
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import kt
from kt.errors import BadFile, KtError, UnknownModel
from kt.model.finding import read_layout
from kt.model.sites import Kind, Site


class OddConfig(PretrainedConfig):
    model_type = "odd"


class Mix(nn.Module):
    """A causal mixer that takes no attention mask, so that it is not found."""

    def __init__(self):
        super().__init__()
        self.read, self.write = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.write(self.read(x).cumsum(1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.up, self.down = Mix(), nn.Linear(16, 32), nn.Linear(32, 16)
        self.aside = nn.Linear(16, 16)  # onto d_model, in the forward's side path, and last of the block

    def forward(self, x):
        x = x + self.mix(x)
        return x + self.down(torch.tanh(self.up(x + 0 * self.aside(x))))


class Odd(PreTrainedModel, GenerationMixin):
    config_class = OddConfig

    def __init__(self):
        super().__init__(OddConfig(num_hidden_layers=2, hidden_size=16, vocab_size=384))
        self.words = nn.Embedding(384, 16)
        self.stack = nn.ModuleList([Block(), Block()])
        self.final, self.out = nn.LayerNorm(16), nn.Linear(16, 384)

    def forward(self, input_ids, attention_mask=None, use_cache=None, **_):
        x = self.words(input_ids)
        for block in self.stack:
            x = block(x)
        return CausalLMOutput(logits=self.out(self.final(x)))


PARTS = {
    "blocks": "stack",
    "o_proj": "mix.write",
    "down_proj": "down",
    "norm": "final",
    "embed": "words",
    "head": "out",
}


def odd(layout):
    torch.manual_seed(0)
    return kt.load(Odd().eval(), tokenizer=byte_level_tokenizer(), layout=layout)


def test_a_model_whose_parts_are_named_is_traced_and_written():
    model = odd(PARTS)
    assert model.layout.parts() == PARTS | {"attn": "mix", "mlp": "down"}
    fact = kt.Fact("The {} is in", "Space Needle", answer="Paris", foil="Rome")
    assert kt.causal_trace(model, [fact], samples=1, keep="all").n_facts == 1
    before = model.fingerprint()
    site = Site(Kind.ATTN, 1)
    with model.restored([site]):
        model.write(site, torch.ones(16, 24))
        assert model.fingerprint() != before
    assert model.fingerprint() == before


@pytest.mark.parametrize("part", ["embed", "head", "o_proj"])
def test_the_error_of_a_part_that_is_not_found_names_it(part):
    with pytest.raises(UnknownModel, match=rf'layout={{"({part}|attn)": "path"}}.*--layout FILE'):
        odd({name: path for name, path in PARTS.items() if name != part})


def test_a_part_that_is_named_wrongly_is_found_out():
    with pytest.raises(UnknownModel, match=r"in 2 of 2 blocks mix.write and aside do not make the whole change"):
        odd(PARTS | {"down_proj": "aside"})
    with pytest.raises(UnknownModel, match=r"no module in a block; did you mean mix.write"):
        odd(PARTS | {"o_proj": "mix.wirte"})
    with pytest.raises(UnknownModel, match=r"is Linear; name the list"):
        odd(PARTS | {"blocks": "out"})


def test_parts_come_from_a_mapping_or_a_file(tmp_path):
    toml, as_json = tmp_path / "layout.toml", tmp_path / "layout.json"
    toml.write_text("".join(f'{name} = "{path}"\n' for name, path in PARTS.items()))
    as_json.write_text(json.dumps(PARTS))
    assert read_layout(toml) == read_layout(str(as_json)) == read_layout(PARTS) == PARTS
    assert odd(toml).layout == odd(PARTS).layout
    (tmp_path / "bad.toml").write_text("o_proj = [")
    for bad, error, words in (
        ({"o_prj": "x"}, KtError, "did you mean o_proj"),
        ({}, KtError, "names no part"),
        ({"norm": 3}, KtError, "norm must be a module's path"),
        (3, KtError, "layout is 3; give the parts' paths as a mapping"),
        (tmp_path / "nowhere.toml", BadFile, "cannot read"),
        (tmp_path / "bad.toml", BadFile, "not TOML"),
    ):
        with pytest.raises(error, match=words) as caught:
            read_layout(bad)
        assert "\n" not in str(caught.value)


def test_a_named_part_of_a_known_model_changes_nothing():
    plain = kt.load(tiny_module("llama"), tokenizer=byte_level_tokenizer())
    named = kt.load(tiny_module("llama"), tokenizer=byte_level_tokenizer(), layout=plain.layout.parts())
    assert named.layout == plain.layout


WRONG = {
    "another map of the attention": ({"o_proj": "self_attn.q_proj"}, "self_attn.q_proj"),
    "another map of the MLP": ({"down_proj": "mlp.up_proj"}, "mlp.up_proj"),
    "a map for the attention": ({"attn": "self_attn.q_proj"}, "self_attn.q_proj"),
    "no module for the attention": ({"attn": "forward"}, "'forward' is no module in a block"),
    "no module for the MLP": ({"mlp": "ffn"}, "'ffn' is no module in a block"),
    "no module for the norm": ({"norm": "model.layers.__class__"}, "is no module in the model"),
    "a block's norm for the final one": ({"norm": "model.layers.2.post_attention_layernorm"}, "a final norm between"),
    "the first block for the final norm": ({"norm": "model.layers.0"}, "a final norm between"),
    "the head for the final norm": ({"norm": "lm_head"}, "a final norm between"),
    "a map for the embedding": ({"embed": "model.layers.0.mlp.up_proj"}, "a token embedding that takes the tokens"),
    "a norm for the embedding": ({"embed": "model.norm"}, "embed = 'model.norm' is LlamaRMSNorm; name a module"),
    "the embedding for the head": ({"head": "model.embed_tokens"}, "an unembedding whose output alone"),
    "a map for the head": ({"head": "model.layers.2.mlp.down_proj"}, "an unembedding whose output alone"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_part_that_is_named_wrongly_is_refused_and_not_replaced_by_the_right_one(what):
    layout, message = WRONG[what]
    with pytest.raises(UnknownModel, match=message):
        kt.load(tiny_module("llama"), tokenizer=byte_level_tokenizer(), layout=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "layout"),
    [("gpt2", {"embed": "transformer.wpe"}), ("gpt2", {"norm": "transformer.drop"}), ("gemma2", {"embed": "lm_head"})],
)
def test_positions_a_dropout_or_a_tied_head_do_not_pass_for_embedding_and_norm(family, layout, dtype):
    module = tiny_module(family).to(dtype)
    (part,) = layout
    with pytest.raises(UnknownModel, match=rf'as {layout[part]} (is|does) not.*layout={{"{part}": "path"}}'):
        kt.load(module, tokenizer=byte_level_tokenizer(), layout=layout)
