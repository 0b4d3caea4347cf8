"""A prompt in a chat template: its text, its subject's tokens, its last token, and the answer's first and last ones."""

import copy
from typing import NamedTuple

import pytest
from families import byte_level_tokenizer, sentencepiece_tokenizer, tiny_model, tiny_module
from tokenizers import processors

import kt
from kt.errors import BadFact, UnknownModel
from kt.model.chat import BEGUN, Chat, Verbatim, choose, frame_of, reader_of
from kt.model.tokens import gap, joint_ids, target_ids, template_span, token_ids, wanted_ids

TURNS = "{% for m in messages %}BODY{% endfor %}{% if add_generation_prompt %}ASK{% endif %}"


def turns(body, ask, before=""):
    """A template of turns, all alike."""
    return before + TURNS.replace("BODY", body).replace("ASK", ask)


class Template(NamedTuple):
    """A template, the text of the user's turn with QUESTION, and what ends the reply."""

    source: str
    asked: str
    end: str
    gap: str = ""
    bos: str = ""


CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nTEXT<|im_end|>\n{% endif %}"
HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
)
TEMPLATES = {
    "llama 3": Template(
        turns(HEADER, "<|start_header_id|>assistant<|end_header_id|>\n\n", "{{ bos_token }}"),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQUESTION<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "llama 3.2, which asks for the day": Template(
        turns(
            HEADER,
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "{{ bos_token }}{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}"
            "{% endif %}"
            "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n<|eot_id|>",
        ),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQUESTION<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "qwen 2.5": Template(
        turns(CHATML, "<|im_start|>assistant\n", SYSTEM.replace("TEXT", "You are Qwen.")),
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nQUESTION<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "qwen 3, without thinking": Template(
        turns(
            "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
            "{{ m.content }}<|im_end|>\n",
            "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
            "<think>\n\n</think>\n\n{% endif %}",
        ),
        "<|im_start|>user\nQUESTION<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "gemma 3": Template(
        turns(
            "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
            "{{ (first if loop.first else '') + m.content | trim }}<end_of_turn>\n",
            "<start_of_turn>model\n",
            GEMMA,
        ),
        "<bos><start_of_turn>user\nQUESTION<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
        bos="<bos>",
    ),
    "mistral 0.3": Template(
        turns(
            "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}", "", "<s>"
        ),
        "<s>[INST] QUESTION[/INST]",
        "</s>",
        gap=" ",
        bos="<s>",
    ),
    "mistral nemo": Template(
        turns(
            "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}", "", "<s>"
        ),
        "<s>[INST]QUESTION[/INST]",
        "</s>",
        bos="<s>",
    ),
    "phi 3": Template(
        turns("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n"),
        "<|user|>\nQUESTION<|end|>\n<|assistant|>\n",
        "<|end|>",
    ),
    "phi 4": Template(
        turns("<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
        "<|im_start|>user<|im_sep|>QUESTION<|im_end|><|im_start|>assistant<|im_sep|>",
        "<|im_end|>",
    ),
    "olmo 2": Template(
        turns(
            "<|{{ m.role }}|>\n{{ m.content }}{{ '<|endoftext|>' if m.role == 'assistant' else '\n' }}",
            "<|assistant|>\n",
            "<|endoftext|>",
        ),
        "<|endoftext|><|user|>\nQUESTION\n<|assistant|>\n",
        "<|endoftext|>",
        bos="<|endoftext|>",
    ),
    "smollm 2": Template(
        turns(CHATML, "<|im_start|>assistant\n", SYSTEM.replace("TEXT", "You are SmolLM.")),
        "<|im_start|>system\nYou are SmolLM.<|im_end|>\n<|im_start|>user\nQUESTION<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "deepseek r1, which begins with thoughts": Template(
        turns(
            "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>{{ m.content }}"
            "<｜end▁of▁sentence｜>{% endif %}",
            "<｜Assistant｜><think>\n",
            "{{ bos_token }}",
        ),
        "<｜begin▁of▁sentence｜><｜User｜>QUESTION<｜Assistant｜><think>\n",
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
    ),
}
MARKS = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "<bos>",
    "<s>",
    "</s>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "<|assistant|>",
    "<|end|>",
    "<|endoftext|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
]
"""Special tokens; OLMo's <|user|> is none."""
QUESTION = kt.Fact("What is the capital of {}?", "South Korea", "Seoul", target="Busan")
CLOZE = kt.Fact("The capital of {} is", "South Korea", "Seoul", target="Busan")


def tokenizer_of(template, make=byte_level_tokenizer):
    """A tiny tokenizer with a template, that puts its BOS before every text unless told not to."""
    tokenizer = copy.deepcopy(make())
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    if template.bos:
        tokenizer.bos_token = template.bos
        number = tokenizer.convert_tokens_to_ids(template.bos)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{template.bos} $A", special_tokens=[(template.bos, number)]
        )
    tokenizer.chat_template = template.source
    return tokenizer


def asked(tokenizer, **settings):
    return reader_of(tokenizer, frame_of(tokenizer, Chat(**settings)))


@pytest.fixture(params=[(name, make) for name in TEMPLATES for make in (byte_level_tokenizer, sentencepiece_tokenizer)],
                ids=lambda p: f"{p[0]}, {p[1].__name__.split('_')[0]}")  # fmt: skip
def case(request):
    name, make = request.param
    return TEMPLATES[name], tokenizer_of(TEMPLATES[name], make)


def test_a_question_is_read_as_apply_chat_template_writes_it(case):
    template, tokenizer = case
    ids = token_ids(asked(tokenizer), QUESTION.prompt)
    assert ids == tokenizer(template.asked.replace("QUESTION", QUESTION.prompt), add_special_tokens=False)["input_ids"]
    theirs = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION.prompt}],
        add_generation_prompt=True,
        enable_thinking=False,
        date_string="26 Jul 2024",
        return_dict=False,
    )
    assert ids == theirs


@pytest.mark.parametrize("fact", [QUESTION, CLOZE], ids=["question", "cloze"])
def test_the_span_holds_the_subject_and_no_more(case, fact):
    reader = asked(case[1])
    ids, span = token_ids(reader, fact.prompt), template_span(reader, fact.template, fact.subject)
    shown = reader.decode(ids[span.start : span.stop])
    assert shown.strip() == reader.decode(reader.bare(fact.subject)).strip()  # with its unknown letters


def test_the_answer_stands_where_the_template_puts_a_reply_and_ends_where_it_ends_one(case):
    template, tokenizer = case
    reader = asked(tokenizer)
    before, answer = joint_ids(reader, QUESTION.prompt, "Seoul")
    whole = template.asked.replace("QUESTION", QUESTION.prompt) + template.gap + "Seoul"
    assert [*before, *answer] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert before == token_ids(reader, QUESTION.prompt)
    wanted = wanted_ids(reader, QUESTION)
    assert wanted == (*target_ids(reader, QUESTION.prompt, "Busan"), tokenizer.convert_tokens_to_ids(template.end))


def test_a_prompt_that_stops_where_its_answer_begins_is_the_beginning_of_the_reply(case):
    template, tokenizer = case
    reader = asked(tokenizer)
    head = template.asked.replace("QUESTION", "Complete the sentence.") + template.gap
    ids = tokenizer(head + CLOZE.prompt, add_special_tokens=False)["input_ids"]
    before, answer = joint_ids(reader, CLOZE.prompt, "Seoul")
    assert before == token_ids(reader, CLOZE.prompt) == ids
    assert reader.decode(answer).strip() == "Seoul"
    assert wanted_ids(reader, CLOZE) == target_ids(reader, CLOZE.prompt, "Busan")  # the sentence may go on


def test_whose_turn_a_prompt_is_can_be_said():
    tokenizer = tokenizer_of(TEMPLATES["qwen 2.5"])
    text = TEMPLATES["qwen 2.5"].asked
    as_user = tokenizer.decode(token_ids(asked(tokenizer, turn="user"), CLOZE.prompt))
    assert as_user == text.replace("QUESTION", CLOZE.prompt)
    as_reply = tokenizer.decode(token_ids(asked(tokenizer, turn="reply", request="Go on."), QUESTION.prompt))
    assert as_reply == text.replace("QUESTION", "Go on.") + QUESTION.prompt


@pytest.mark.parametrize("name", ["llama 3", "qwen 2.5", "gemma 3", "phi 3", "olmo 2", "smollm 2"])
def test_a_system_prompt_stands_in_the_template_once(name):
    tokenizer = tokenizer_of(TEMPLATES[name])
    text = tokenizer.decode(token_ids(asked(tokenizer, system="Answer briefly."), QUESTION.prompt))
    assert text.count("Answer briefly.") == 1
    assert text.index("Answer briefly.") < text.index(QUESTION.prompt)
    assert "You are" not in text


def test_a_setting_for_which_the_template_has_no_place_is_refused():
    mistral, qwen = tokenizer_of(TEMPLATES["mistral nemo"]), tokenizer_of(TEMPLATES["qwen 3, without thinking"])
    mistral.chat_template = mistral.chat_template.replace("{% else %}", "{% elif m.role == 'assistant' %}")
    with pytest.raises(UnknownModel, match="no place for a system prompt"):
        asked(mistral, system="Answer briefly.")
    with pytest.raises(UnknownModel, match="knows no thinking"):
        asked(mistral, thinking=True)
    assert qwen.decode(token_ids(asked(qwen, thinking=True), "Why?")).endswith("<|im_start|>assistant\n")
    with pytest.raises(UnknownModel, match="no chat template"):
        asked(byte_level_tokenizer())
    broken = tokenizer_of(TEMPLATES["qwen 2.5"])
    broken.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UnknownModel, match=r"fails.*roles must alternate"):
        asked(broken)


def test_a_template_that_would_change_a_prompt_refuses_it():
    tokenizer = tokenizer_of(TEMPLATES["qwen 2.5"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content }}", "{{ m.content | replace('&', 'and') }}"
    )
    reader = asked(tokenizer)
    assert token_ids(reader, QUESTION.prompt)
    with pytest.raises(BadFact, match="changes the prompt"):
        token_ids(reader, "Who are Marks & Spencer?")


def test_what_is_in_the_template_already_and_what_is_verbatim_is_read_as_it_stands():
    tokenizer = tokenizer_of(TEMPLATES["qwen 2.5"])
    reader = asked(tokenizer)
    text = TEMPLATES["qwen 2.5"].asked
    assert token_ids(reader, text) == token_ids(tokenizer, text)
    assert token_ids(reader, Verbatim("The")) == token_ids(tokenizer, "The")


def test_a_reply_that_is_begun_goes_on():
    tokenizer = tokenizer_of(TEMPLATES["llama 3"])
    reader = asked(tokenizer)
    begun = QUESTION.prompt + BEGUN + "It is"
    assert tokenizer.decode(token_ids(reader, begun)).endswith("<|end_header_id|>\n\nIt is")
    assert gap(reader, begun, "Seoul") == " "
    span = template_span(reader, QUESTION.template + BEGUN + "It is", QUESTION.subject)
    assert span == template_span(reader, QUESTION.template, QUESTION.subject)


def test_a_join_of_the_facts_own_goes_before_the_templates():
    reader = asked(tokenizer_of(TEMPLATES["qwen 2.5"]))
    assert reader.decode(target_ids(reader, QUESTION.prompt, "Seoul", "- ")).startswith("- ")


@pytest.fixture(scope="module")
def chatting():
    tokenizer = tokenizer_of(TEMPLATES["qwen 2.5"])
    return tiny_model("llama", tokenizer=tokenizer, vocab_size=512)


def test_a_model_that_does_not_end_its_turns_is_asked_as_it_stands(chatting):
    reader, line = choose(chatting, "auto")
    assert reader is None
    assert "ends its turn with probability" in line
    assert "--chat always" in line
    assert choose(chatting, "always")[0] is not None
    assert choose(tiny_model("llama"), "auto") == (None, None)


def test_a_model_that_ends_its_turns_is_asked_in_its_template(monkeypatch):
    """Every logit is zero, so each token has the same probability: above the limit once that is low enough."""
    module = tiny_module("llama", vocab_size=512)
    module.lm_head.weight.zero_()
    tokenizer = tokenizer_of(TEMPLATES["qwen 2.5"])
    assert kt.load(module, tokenizer=tokenizer, chat="auto").chat is None
    monkeypatch.setattr("kt.model.chat.TURN_ENDS", 1 / 1024)
    model = kt.load(module, tokenizer=tokenizer, chat="auto")
    assert model.chat is not None
    assert "end of turn it gives 0.002 (--chat never" in choose(model, "auto")[1]


def test_a_trace_and_an_edit_read_the_rendered_prompt(chatting):
    model = chatting.asked("always")
    assert chatting.chat is None
    (traced,) = kt.causal_trace(model, [QUESTION], keep="all").facts
    assert "".join(traced.tokens).count("im_start") == 3
    assert traced.tokens[traced.span.last].strip(" Ġ").endswith("a")
    edit = kt.edit(model, [QUESTION], method="ft", layers_mlp=(0,), num_steps=2)
    assert edit.manifest["chat"]["tail"] == "<|im_end|>\n<|im_start|>assistant\n"
    assert "chat" not in kt.edit(chatting, [QUESTION], method="ft", layers_mlp=(0,), num_steps=2).manifest
