"""The tokenizer: byte-level BPE of 512 entries in Qwen's layout, and the chat template that goes with it.

Digits stay single tokens, so that counting is a rule over digits rather than a list to learn by heart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tools.tiny_model.tasks import Example, one_image_example, text_example, two_image_example

VOCAB_SIZE = 512
END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)

# How Qwen2 and its successors cut text before merging: contractions, words, single digits, punctuation, blanks.
_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Every tag trims its blanks, so it renders alike whatever the Jinja environment's trim settings are.
CHAT_TEMPLATE = """\
{%- if tools -%}
    {{- '<|im_start|>system\\nFunctions:\\n' -}}
    {%- for tool in tools -%}
        {{- tool | tojson + '\\n' -}}
    {%- endfor -%}
    {{- 'To call one: <tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- elif message.content -%}
        {%- for part in message.content -%}
            {%- if part.type in ('image', 'image_url') -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type in ('video', 'video_url') -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif part.text is defined -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
        {%- set arguments = call.function.arguments -%}
        {{- '\\n' if message.content or not loop.first else '' -}}
        {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
        {{- arguments if arguments is string else arguments | tojson -}}
        {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def train_tokenizer(*, num_examples: int = 4000, seed: int = 0) -> Tokenizer:
    """Learns the merges from the training data's own words; the same seed gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(num_examples, seed), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))  # after the merges, as Qwen numbers them
    return tokenizer


def _corpus(num_examples: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(num_examples):
        yield from _texts(one_image_example(rng, num_turns=3))
        yield from _texts(two_image_example(rng))
        yield from _texts(text_example(rng))


def _texts(example: Example) -> Iterator[str]:
    yield f"system\n{example.system}"
    for turn in example.turns:
        yield f"user\n{turn.question}"
        yield f"assistant\n{turn.answer}"
