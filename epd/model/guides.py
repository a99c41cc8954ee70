"""Guided decoding: which tokens may come next so that an output follows a grammar.

Grammars and their automata are llguidance's. Where a request's automaton stands is a function of its grammar and its output so
far: when a request has moved here, was preempted, or a step failed, it is brought there by the tokens that it lacks, or begun
anew. So a guided request goes on anywhere with the same tokens, like any other.

Knows a checkpoint's tokenizer. Does not know logits: what may come next is handed to the sampler with each request.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from epd.errors import BadConfig
from epd.model.config import ModelConfig
from epd.step import Int32Array, SampleRequest, SequenceStep
from epd.tokenizer import Tokenizer
from protocol.messages import RequestId

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MAKING_S = 30.0  # at most; two for a vocabulary of 150,000
_MAX_REQUESTS = 1024  # whose automata are kept; one that was forgotten is begun anew
_MAX_GRAMMARS = 64  # that are kept ready to begin with


class GuideVocabulary:
    """A checkpoint's tokens as grammars see them. Made in the background, since a large vocabulary takes a while; shared."""

    def __init__(self, model: ModelConfig, folder: Path) -> None:
        self.vocab_size = model.text.vocab_size  # of the logits, which may be more than the tokenizer has tokens
        self._folder = folder
        self._eos_token_ids = list(model.eos_token_ids)
        self._tokens: LLTokenizer | None = None
        self._wrong = ""
        self._thread = threading.Thread(target=self._read, name="guide vocabulary", daemon=True)
        self._thread.start()

    def tokens(self) -> LLTokenizer:
        """Waits until it has been made. Raises BadConfig where that failed."""
        self._thread.join(_MAKING_S)
        if self._tokens is None:
            raise BadConfig(f"outputs cannot be guided: {self._wrong or f'the tokenizer of {self._folder} is still being read'}")
        return self._tokens

    def _read(self) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper

            tokens = TokenizerWrapper(_Tokens(Tokenizer.from_folder(self._folder), self.vocab_size, self._eos_token_ids[0]))
            self._tokens = LLTokenizer(tokens, n_vocab=self.vocab_size, eos_token=self._eos_token_ids)
        except Exception as error:  # told to whoever wants to guide; nobody else needs it
            self._wrong = str(error)


class _Tokens:
    """Our reading of a tokenizer, in the shape that llguidance takes.

    Its own would have every added token that is spelled `<like this>` count as special, so that a guided output could write
    `</think>` or `<tool_call>` letter by letter only, which is not how models have learned to write them.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.tokens = [tokenizer.spelling(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids.values())

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


@dataclass(slots=True)
class _Guided:
    """How far a request's automaton has come."""

    guide: str
    matcher: LLMatcher
    output: list[int] = field(default_factory=list)


class Guides:
    """Of one runner, called on its stream."""

    def __init__(self, vocabulary: GuideVocabulary) -> None:
        self._vocabulary = vocabulary
        self._guided: OrderedDict[RequestId, _Guided] = OrderedDict()  # least recently used first
        self._ready: OrderedDict[str, LLMatcher] = OrderedDict()  # by grammar, at its beginning

    def restrict(self, sequence: SequenceStep, request: SampleRequest) -> SampleRequest:
        """The request with what may come next, if it is guided.

        Raises:
            ValueError: its output so far does not follow its grammar, or the grammar is more than the automaton can take.
        """
        guide = request.sampling.guide
        if not guide:
            return request
        matcher = self._at(sequence.request_id, guide, request.output_token_ids.tolist())
        allowed: Int32Array = np.zeros(-(-self._vocabulary.vocab_size // 32), np.int32)
        matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)
        _check(matcher)
        return replace(request, allowed=allowed)

    def _at(self, request_id: RequestId, guide: str, output: list[int]) -> LLMatcher:
        """The request's automaton, after its output."""
        guided = self._guided.pop(request_id, None)
        if guided is None or guided.guide != guide or output[: len(guided.output)] != guided.output:
            guided = _Guided(guide, self._beginning(guide))
        more = output[len(guided.output) :]
        if more:
            guided.matcher.consume_tokens(more)
            _check(guided.matcher)
        guided.output = output
        self._guided[request_id] = guided
        if len(self._guided) > _MAX_REQUESTS:
            self._guided.popitem(last=False)
        return guided.matcher

    def _beginning(self, guide: str) -> LLMatcher:
        from llguidance import LLMatcher

        if guide not in self._ready:
            matcher = LLMatcher(self._vocabulary.tokens(), guide, log_level=0)
            _check(matcher)
            self._ready[guide] = matcher
            if len(self._ready) > _MAX_GRAMMARS:
                self._ready.popitem(last=False)
        self._ready.move_to_end(guide)
        return self._ready[guide].deep_copy()


def restricted(guides: Guides | None, sequences: Sequence[SequenceStep]) -> list[SampleRequest]:
    """What to sample for these sequences, each of which has something to. Raises ValueError as `Guides.restrict`."""
    requests: list[SampleRequest] = []
    for sequence in sequences:
        request = sequence.sample
        assert request is not None
        if request.sampling.guide and guides is None:
            raise ValueError("this device follows no guides")
        requests.append(request if guides is None else guides.restrict(sequence, request))
    return requests


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise ValueError(f"the output cannot be guided any further: {matcher.get_error().splitlines()[0]}")
