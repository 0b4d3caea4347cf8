"""Chat templates of a dozen families, in their published form, and tiny tokenizers that have them."""

import copy
from typing import NamedTuple

from families import byte_level_tokenizer
from tokenizers import processors

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
