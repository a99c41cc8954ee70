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

from epd.automaton import allowed, automaton, tokens_of, what_is_wrong
from epd.errors import BadConfig, GuideTooComplex
from epd.model.config import ModelConfig
from epd.step import Int32Array, SampleRequest, SequenceStep
from epd.tokenizer import Tokenizer
from protocol.messages import RequestId

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MAKING_S = 30.0  # at most; two for a vocabulary of 150,000
# Automata that are kept for requests which are not in this step: one that sits a step out, or was preempted, may be in the next.
_NUM_SPARE = 64
_MAX_GRAMMARS = 16  # that are kept ready to begin with


class GuideVocabulary:
    """A checkpoint's tokens as grammars see them. Made in the background, since a large vocabulary takes a while; shared."""

    def __init__(self, model: ModelConfig, folder: Path) -> None:
        self.vocab_size = model.text.vocab_size  # of the logits, which may be more than the tokenizer has tokens
        self._folder = folder
        self._eos_token_ids = model.eos_token_ids
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
            tokenizer = Tokenizer.from_folder(self._folder)
            self._tokens = tokens_of(tokenizer, vocab_size=self.vocab_size, eos_token_ids=self._eos_token_ids)
        except Exception as error:  # told to whoever wants to guide; nobody else needs it
            self._wrong = str(error)


@dataclass(slots=True)
class _Guided:
    """How far a request's automaton has come."""

    guide: str
    matcher: LLMatcher
    output: list[int] = field(default_factory=list)
    is_masked: bool = False  # what may come next has been asked for


class Guides:
    """Of one runner, called on its stream."""

    def __init__(self, vocabulary: GuideVocabulary) -> None:
        self._vocabulary = vocabulary
        self._guided: OrderedDict[RequestId, _Guided] = OrderedDict()  # least recently used first
        self._ready: OrderedDict[str, LLMatcher] = OrderedDict()  # by grammar, at its beginning

    def restrict(self, sequence: SequenceStep, request: SampleRequest) -> SampleRequest:
        """The request with what may come next, if it is guided.

        Raises:
            GuideTooComplex: its output so far does not follow its grammar, or the grammar is more than the automaton can take.
        """
        guide = request.sampling.guide
        if not guide:
            return request
        guided = self._at(sequence.request_id, guide, request.output_token_ids.tolist())
        return replace(request, allowed=self._mask(guided))

    def forget(self, num_kept: int) -> None:
        """Keep the automata of so many requests, the last that were asked for, and some to spare."""
        while len(self._guided) > num_kept + _NUM_SPARE:
            self._guided.popitem(last=False)

    def _at(self, request_id: RequestId, guide: str, output: list[int]) -> _Guided:
        """The request's automaton, after its output.

        An output that is gone through again is gone through as it was drawn, with a mask before each token: the library's bounds
        are those of a step, and a mask is what begins one.
        """
        guided = self._guided.pop(request_id, None)
        if guided is None or guided.guide != guide or output[: len(guided.output)] != guided.output:
            guided = _Guided(guide, self._beginning(guide))
        for token_id in output[len(guided.output) :]:
            if not guided.is_masked:
                self._mask(guided)
            guided.matcher.consume_token(token_id)
            guided.is_masked = False
            _check(guided.matcher)
        guided.output = output
        self._guided[request_id] = guided
        return guided

    def _mask(self, guided: _Guided) -> Int32Array:
        bits = allowed(guided.matcher, self._vocabulary.vocab_size)
        guided.is_masked = True
        _check(guided.matcher)
        return bits

    def _beginning(self, guide: str) -> LLMatcher:
        if guide not in self._ready:
            matcher = automaton(self._vocabulary.tokens(), guide)
            _check(matcher)
            self._ready[guide] = matcher
            if len(self._ready) > _MAX_GRAMMARS:
                self._ready.popitem(last=False)
        self._ready.move_to_end(guide)
        return self._ready[guide].deep_copy()


def restricted(guides: Guides | None, sequences: Sequence[SequenceStep]) -> list[SampleRequest]:
    """What to sample for these sequences, each of which has something to.

    Raises:
        GuideTooComplex: as `Guides.restrict`.
        ValueError: there is a guide, and no `guides`.
    """
    requests: list[SampleRequest] = []
    for sequence in sequences:
        request = sequence.sample
        assert request is not None
        if request.sampling.guide and guides is None:
            raise ValueError("this device follows no guides")
        requests.append(request if guides is None else guides.restrict(sequence, request))
    if guides is not None:
        guides.forget(len(sequences))
    return requests


def _check(matcher: LLMatcher) -> None:
    if reason := what_is_wrong(matcher):
        raise GuideTooComplex(f"the output cannot be made to look as asked any further: {reason}")
