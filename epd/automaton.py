"""Automata of guided outputs, as gateway and workers make them: llguidance's, bounded, over our reading of a tokenizer.

An automaton is bounded in what one step of it may cost and how much memory it may come to. What making one costs is not bounded
by the library, so a gateway rehearses each grammar first (`epd/gateway/rehearsal`): workers meet only those that came through.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from epd.step import Int32Array
from epd.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_MAX_STATES = 50_000  # of one automaton; one to two KB each
_NUM_BYTES = 256
END_OF_BYTES = _NUM_BYTES  # the token of `byte_tokens` that ends an output


class _Tokens:
    """A tokenizer in the shape that llguidance takes.

    By its own reading every added token that is spelled `<like this>` would count as special, so that a guided output could write
    `</think>` or `<tool_call>` letter by letter only, which is not how models have learned to write them.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.tokens = [tokenizer.spelling(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids.values())
        self._of_byte = {token[0]: token_id for token_id, token in enumerate(self.tokens) if len(token) == 1}

    def __call__(self, text: str) -> list[int]:
        """How a model would most likely write the text: to the letter, though tokenizers may write it another way (NFC)."""
        data, token_ids = text.encode(), self._tokenizer.encode(text)
        if b"".join(self.tokens[token_id] for token_id in token_ids) == data:
            return token_ids
        return [self._of_byte[byte] for byte in data]


class _Bytes:
    """One token for each byte, and one for the end."""

    bos_token_id = None
    eos_token_id = END_OF_BYTES
    tokens = (*(bytes([byte]) for byte in range(_NUM_BYTES)), b"<end>")
    special_token_ids = (END_OF_BYTES,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def tokens_of(tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """A checkpoint's tokens; `vocab_size` is that of the logits. Takes seconds for a large vocabulary."""
    from llguidance import LLTokenizer, TokenizerWrapper

    tokens = TokenizerWrapper(_Tokens(tokenizer, vocab_size, eos_token_ids[0]))
    return LLTokenizer(tokens, n_vocab=vocab_size, eos_token=list(eos_token_ids))


def byte_tokens() -> LLTokenizer:
    """Tokens for trying a grammar out: what it costs depends little on the vocabulary."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()))


def automaton(tokens: LLTokenizer, grammar: str) -> LLMatcher:
    """At its beginning; `what_is_wrong` tells whether it can be used."""
    from llguidance import LLMatcher

    return LLMatcher(tokens, grammar, log_level=0, limits=_limits())


def allowed(matcher: LLMatcher, vocab_size: int) -> Int32Array:
    """A bit for each token, [ceil(vocab_size / 32)] int32: whether it may come next."""
    bits: Int32Array = np.zeros(-(-vocab_size // 32), np.int32)
    matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
    return bits


def what_is_wrong(matcher: LLMatcher) -> str:
    """Why nothing more can be had of it; empty while it is well."""
    return matcher.get_error().splitlines()[0] if matcher.is_error() else ""


@cache
def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=_MAX_STATES, verbose_errors=False)
