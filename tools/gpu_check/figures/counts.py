"""How many bytes a step has to read and how much arithmetic it has to do, from shapes alone. Pure; a product of n terms is 2 n.

What is counted is what the result needs, not what is done for it: so no shortcut or detour of the code moves a limit.
"""

from __future__ import annotations

from epd.model.config import ModelConfig, TextConfig, VisionConfig
from epd.model.shapes import count_numbers, text_shapes


def decode_weight_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """What one decode step reads of the language model's weights: all but the embedding table, of which it reads a row a request.

    A table that is also the output layer is read as that.
    """
    text = config.text
    table = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    return (count_numbers(text_shapes(config)) - table) * dtype_bytes


def kv_token_bytes(text: TextConfig, dtype_bytes: int) -> int:
    """Keys and values of one token in all layers."""
    return text.num_layers * layer_kv_bytes(text, dtype_bytes)


def layer_kv_bytes(text: TextConfig, dtype_bytes: int) -> int:
    return 2 * text.num_kv_heads * text.head_dim * dtype_bytes


def prefill_flop(text: TextConfig, num_tokens: int) -> float:
    """A whole prompt, and its next token's logits.

    The last layer is asked for the keys and values of all tokens, and for the output of the last token only.
    """
    hidden, queries, keys = text.hidden_size, text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    others = 2 * (hidden * queries + queries * hidden + 3 * hidden * text.intermediate_size)
    keys_values = 2 * hidden * 2 * keys
    whole = (text.num_layers - 1) * (num_tokens * (others + keys_values) + chunk_attention_flop(text, num_tokens, num_tokens))
    last = num_tokens * keys_values + others + chunk_attention_flop(text, 1, num_tokens)
    return whole + last + 2 * hidden * text.vocab_size


def chunk_attention_flop(text: TextConfig, num_tokens: int, context_len: int) -> float:
    """One layer's causal attention of the last `num_tokens` of `context_len`: two products a pair of tokens."""
    before = context_len - num_tokens
    pairs = num_tokens * before + num_tokens * (num_tokens + 1) / 2
    return 4 * pairs * text.num_heads * text.head_dim


def vision_flop(vision: VisionConfig, num_patches: int) -> float:
    """One image. Every patch attends to every other; mergers see one row for `merge_size` squared patches."""
    width, joined = vision.hidden_size, vision.hidden_size * vision.merge_size**2
    block = 2 * (4 * width * width + 2 * width * vision.intermediate_size)
    attention = 4 * num_patches * width
    merger = 2 * (joined * joined + joined * vision.out_hidden_size) / vision.merge_size**2
    per_patch = 2 * vision.patch_width * width + vision.depth * (block + attention) + _num_mergers(vision) * merger
    return num_patches * per_patch


def _num_mergers(vision: VisionConfig) -> int:
    return 1 + len(vision.deepstack_layers)
