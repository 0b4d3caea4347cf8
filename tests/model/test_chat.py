"""A prompt in a chat template: its text, its subject's tokens, its last token, and the answer's first and last ones."""

import pytest
from chat_templates import TEMPLATES, tokenizer_of
from families import byte_level_tokenizer, sentencepiece_tokenizer, tiny_model, tiny_module

import kt
from kt.errors import BadFact, UnknownModel
from kt.model.chat import BEGUN, Chat, Verbatim, choose, frame_of, in_turn, reader_of
from kt.model.identity import identity
from kt.model.tokens import gap, head_of, joint_ids, target_ids, template_span, token_ids, wanted_ids

QUESTION = kt.Fact("What is the capital of {}?", "South Korea", "Seoul", target="Busan")
CLOZE = kt.Fact("The capital of {} is", "South Korea", "Seoul", target="Busan")


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


@pytest.mark.parametrize(("prompt", "in_reply"), [
    ("What is the capital of France?", False),
    ("what season does Bart die in the show", False),
    ("Name the capital of France.", False),
    ("法国的首都是哪里？", False),
    ('He asked "why?"', False),
    ("The capital of France:\n", False),
    ("The capital of France is", True),
    ("What the French call their capital is", True),
    ("Where is Paris? It is in", True),
    ("Q: Where is Paris? A:", True),
    ("Which of them was named", True),
])  # fmt: skip
def test_a_prompt_that_is_whole_is_the_users_turn(prompt, in_reply):
    assert asked(tokenizer_of(TEMPLATES["qwen 2.5"])).in_reply(prompt) is in_reply


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
    assert "ends no text at '<|im_end|>'" in line
    assert "--chat always" in line
    assert choose(chatting, "always")[0] is not None
    assert choose(tiny_model("llama"), "auto") == (None, None)


def test_a_model_that_ends_its_turns_is_asked_in_its_template(monkeypatch):
    """Every logit is zero, so each token has the same probability: above the limit once that is low enough."""
    module = tiny_module("llama", vocab_size=512)
    module.lm_head.weight.zero_()
    module.generation_config.eos_token_id = [0, tokenizer_of(TEMPLATES["qwen 2.5"]).convert_tokens_to_ids("<|im_end|>")]
    tokenizer = tokenizer_of(TEMPLATES["qwen 2.5"])
    model = kt.load(module, tokenizer=tokenizer, chat="auto")
    assert model.chat is None
    assert "ends its turn with probability 0.002" in choose(model, "auto")[1]
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


def test_a_map_leaves_out_what_stands_far_before_the_subject(chatting):
    model = chatting.asked(Chat(system="Answer with one word, please."))
    trace = kt.causal_trace(model, [QUESTION], kinds=("mlp",), keep="all")
    (fact,) = trace.facts
    figure = trace.heatmap("mlp")
    assert len(figure.data[0].z) == len(fact.tokens) - fact.span.start + 4
    shown = figure.to_json().replace("<br>", " ")
    assert f"{fact.span.start - 4} tokens far before the subject left out" in shown


def test_the_same_rendering_is_the_same_model_however_it_was_chosen(monkeypatch, chatting):
    monkeypatch.setattr("kt.model.chat.TURN_ENDS", 0.0)
    monkeypatch.setattr("kt.model.chat.stops_at", lambda model: frozenset(range(512)))
    found, always = chatting.asked("auto"), chatting.asked("always")
    assert found.chat.frame.chat.mode == "auto" and always.chat.frame.chat.mode == "always"
    assert identity(found) == identity(always) != identity(chatting)


def test_a_template_that_closes_no_reply_is_called_that():
    tokenizer = tokenizer_of(TEMPLATES["qwen 2.5"])
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    _, line = choose(tiny_model("llama", tokenizer=tokenizer, vocab_size=512), "auto")
    assert "its chat template closes no reply (--chat always" in line


ASKS = kt.Fact("Which city is the capital of {}", "South Korea", "Seoul", target="Busan")


@pytest.mark.parametrize("text", ["The river is long. {}", "Fact: Rome is old.\nPrompt: {}", "So, {}"])
@pytest.mark.parametrize("fact", [QUESTION, ASKS, CLOZE], ids=["question", "no mark", "cloze"])
def test_a_text_before_a_prompt_stands_in_the_prompts_turn(case, fact, text):
    template, tokenizer = case
    reader = asked(tokenizer)
    place = template.asked.replace("QUESTION", "Complete the sentence.") + template.gap + "{}"
    around = place if fact is CLOZE else template.asked.replace("QUESTION", "{}")
    said = in_turn(reader, text.replace("{}", fact.template), fact.prompt)
    whole = around.replace("{}", text.replace("{}", fact.prompt))
    ids = token_ids(reader, said.replace("{}", fact.subject))
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    span = template_span(reader, said, fact.subject)
    assert reader.decode(ids[span.start : span.stop]).strip() == reader.decode(reader.bare(fact.subject)).strip()
    before, answer = joint_ids(reader, said.replace("{}", fact.subject), "Busan")
    assert before == ids
    between = (" " if fact is CLOZE else template.gap) + "Busan"
    assert [*before, *answer] == tokenizer(whole + between, add_special_tokens=False)["input_ids"]


def test_another_subject_leaves_a_prompt_in_its_turn():
    tokenizer = tokenizer_of(TEMPLATES["qwen 2.5"])
    reader = asked(tokenizer)
    assert not reader.in_reply("Who plays guitar") and reader.in_reply("Queen plays guitar")
    ids = token_ids(reader, in_turn(reader, "Who plays guitar", "Queen plays guitar"))
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\nWho plays guitar")


def test_a_text_of_a_prompt_that_is_read_as_it_stands_is_too():
    tokenizer = tokenizer_of(TEMPLATES["qwen 2.5"])
    reader = asked(tokenizer)
    for prompt in (TEMPLATES["qwen 2.5"].asked, Verbatim("Which city is it")):
        text = f"It is old. {prompt}"
        assert token_ids(reader, in_turn(reader, text, prompt)) == token_ids(tokenizer, text)
        assert in_turn(tokenizer, text, prompt) is text


def test_an_answer_that_ends_a_sentence_goes_on_with_the_reply(case):
    template, tokenizer = case
    reader = asked(tokenizer)
    head = template.asked.replace("QUESTION", "Complete the sentence.") + template.gap
    before, answer = joint_ids(reader, CLOZE.prompt, "Seoul, D.C.")
    whole = tokenizer(f"{head}{CLOZE.prompt} Seoul, D.C.", add_special_tokens=False)["input_ids"]
    assert [*before, *answer] == whole
    assert token_ids(reader, head_of(reader, CLOZE.prompt, "x") + "Seoul, D.C.") == whole
