"""The tokenizer: text comes back as it was, digits stand alone, and the template writes what training saw."""

from __future__ import annotations

from functools import cache

import jinja2
import pytest
from tokenizers import Tokenizer

from tools.tiny_model.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, VOCAB_SIZE, train_tokenizer

TEXTS = [
    "What is at the top left?",
    "a red circle at the top left and a blue square at the bottom right.",
    "Count from 7 to 119. 7 8 9 10",
    "  two  blanks\n\nand lines\t",
    "naïve café 日本語 🙂",
    "don't",
]


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(num_examples=300)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_single_tokens() -> None:
    assert tokenizer().encode("119 7").tokens == ["1", "1", "9", "Ġ", "7"]


def test_special_tokens_are_one_token_each_at_the_end_of_the_vocabulary() -> None:
    ids = [tokenizer().encode(token).ids for token in SPECIAL_TOKENS]
    assert ids == [[number] for number in range(VOCAB_SIZE - len(SPECIAL_TOKENS), VOCAB_SIZE)]
    assert tokenizer().get_vocab_size() == VOCAB_SIZE


def test_training_is_deterministic() -> None:
    assert tokenizer().to_str() == train_tokenizer(num_examples=300).to_str()


@pytest.mark.parametrize("trim", [False, True])
def test_the_template_handles_strings_and_parts_in_any_environment(trim: bool) -> None:
    template = jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim).from_string(CHAT_TEMPLATE)
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:"}},
                {"type": "image"},
                {"type": "text", "text": "What is it?"},
            ],
        },
        {"role": "assistant", "content": None},
    ]
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert template.render(messages=messages, add_generation_prompt=True) == (
        "<|im_start|>system\nAnswer briefly.<|im_end|>\n"
        f"<|im_start|>user\n{picture}{picture}What is it?<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
