"""The byte-level BPE of the demo model.

The vocabulary is small and the answers are repeated in its training text, so that most answers stay one
token while most subjects split into several: tracing by token role needs subjects of more than one token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from demo_data.knowledge import Item
from demo_data.tables import attributes
from demo_data.text import FACTS_FIRST, Writer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
ANSWER_REPEATS = 400
SAMPLE_DOCUMENTS = 12_000


def train_tokenizer(items: Sequence[Item], seed: int, vocabulary: int) -> PreTrainedTokenizerFast:
    writer = Writer(items, f"{seed}/tokenizer", mix=FACTS_FIRST)
    texts = [writer.document().text for _ in range(SAMPLE_DOCUMENTS)]
    answers = {item.answer for item in items}
    answers |= {value for item in items for value in attributes(item.relation, item.answer).values()}
    texts += [f"is {answer}." for answer in sorted(answers)] * ANSWER_REPEATS
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[EOS, PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and a config that names the plain fast class, which every transformers keeps.

    A class named after a model family would rebuild the pre-tokenizer of that family and change every token.
    """
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "padding_side": "left",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
