"""A small checkpoint's text side, made on the spot: tokenizer, chat template, model configuration."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

from PIL import Image
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from epd.gateway.prompt import Prompter
from epd.gateway.template import ChatTemplate
from epd.model.config import ImageConfig, ModelConfig, TextConfig, VisionConfig
from epd.tokenizer import Tokenizer

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ORDINARY = ("<think>", "</think>", "<tool_call>", "</tool_call>")
LANGUAGES = (
    "The quick brown fox jumps over the lazy dog, doesn't it? 1234567890",
    "Zażółć gęślą jaźń. Größe, Straße, Äpfel; ça va où l'été naïf",
    "Съешь же ещё этих мягких французских булок, да выпей чаю",
    "今日は良い天気ですね。桜の花が咲いています。",
    "人工智能模型能够看到图片并描述它们的内容。",
    "الذكاء الاصطناعي يغير العالم بسرعة كبيرة",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 🤷‍♂️ 🧑🏿‍🚀 😀😃",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": x ** 2}  # <b>ok</b> <| |> </think>",
)

# In the manner of the Qwen family: a default for `system`, images as placeholders, a switch, trimming, several content kinds,
# tools.
CHAT_TEMPLATE = """\
{%- set count = namespace(images=0) %}
{%- if tools %}
    {{- '<|im_start|>system\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{% endfor %}
    {{- '\\n</tools>\\nCall: <tool_call>\\n{"name": <name>, "arguments": <arguments>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' and not tools %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + ('user\\n<tool_response>' if message.role == 'tool' else message.role) + '\\n' }}
    {%- if message.content is string %}
        {{- message.content if message.role != 'assistant' else message.content.split('</think>')[-1] | trim }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' and message.role in ('user', 'tool') %}
                {%- set count.images = count.images + 1 %}
                {%- if number_images is defined and number_images %}{{- 'Picture ' ~ count.images ~ ': ' }}{% endif %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n' if message.content or not loop.first }}
        {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '\\n</tool_response>' if message.role == 'tool' }}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

IMAGE = ImageConfig(
    patch_size=8,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=256,
    max_pixels=65536,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    resample=3,
    rescale_factor=1 / 255,
)


@cache
def raw_tokenizer() -> RawTokenizer:
    """Byte-level BPE of some 500 entries in Qwen's layout, with ordinary added tokens."""
    tokenizer = RawTokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(LANGUAGES * 2, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in ORDINARY])
    return tokenizer


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(raw_tokenizer())


@cache
def template() -> ChatTemplate:
    return ChatTemplate(CHAT_TEMPLATE, named_tokens={"eos_token": "<|im_end|>"})


def model_config(*, takes_images: bool = True) -> ModelConfig:
    ids = tokenizer().special_ids
    text = TextConfig(
        vocab_size=raw_tokenizer().get_vocab_size() + 8,  # padded, as real checkpoints are
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        mrope_section=(4, 2, 2) if takes_images else None,
        attention_bias=False,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    eos = (ids["<|im_end|>"], ids["<|endoftext|>"])
    if not takes_images:
        return ModelConfig("Qwen3ForCausalLM", text, None, None, eos)
    vision = VisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        in_channels=3,
        patch_size=8,
        temporal_patch_size=2,
        merge_size=2,
        out_hidden_size=32,
        num_position_embeddings=64,
        deepstack_layers=(1,),
    )
    return ModelConfig(
        "Qwen3VLForConditionalGeneration",
        text,
        vision,
        IMAGE,
        eos,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def prompter(*, takes_images: bool = True, max_model_len: int = 4096) -> Prompter:
    return Prompter(
        tokenizer=tokenizer(),
        template=template(),
        config=model_config(takes_images=takes_images),
        max_model_len=lambda: max_model_len,
    )


def write_folder(folder: Path) -> Path:
    """The text files of the checkpoint, as transformers reads them too."""
    raw_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>", "__type": "AddedToken"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def png(width: int = 64, height: int = 64, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()
