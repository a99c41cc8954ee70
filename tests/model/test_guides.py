"""Guided outputs against what they are to be: parsed, matched and compared by others than the library that guides them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from epd.errors import BadConfig, GuideTooComplex
from epd.gateway.guide import Guide, after_thoughts, grammar_of
from epd.gateway.speech import Speech, Thinking
from epd.gateway.tools import Tool, Tools, written
from epd.model import guides
from epd.model.config import load_model_config
from epd.model.guides import Guides, GuideVocabulary, restricted
from epd.model.sampler import sample
from epd.options import BUNDLED_MODEL
from epd.step import SampleRequest, SequenceStep
from epd.tokenizer import Tokenizer
from protocol.messages import RequestId, Sampling
from tests.support.text import model_config, tokenizer, write_folder

MODEL = load_model_config(BUNDLED_MODEL)
VOCABULARY = GuideVocabulary(MODEL, BUNDLED_MODEL)
TOKENIZER = Tokenizer.from_folder(BUNDLED_MODEL)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NOTHING = np.zeros(0, np.int32)


def _sequence(name: str, sampling: Sampling, output: Sequence[int]) -> SequenceStep:
    request = SampleRequest(sampling, NOTHING, np.array(output, np.int32))
    return SequenceStep(RequestId(name), NOTHING, 0, np.zeros((3, 0), np.int32), NOTHING, sample=request)


def _output(
    guide: Guide | None,
    tools: Tools | None = None,
    *,
    seed: int,
    temperature: float = 1.0,
    ways: Sequence[Guides] | None = None,
    most: int = 400,
) -> list[int]:
    """Of a model that has no idea: noise for logits. `ways`: the runners that draw its tokens in turns."""
    ways = ways or [Guides(VOCABULARY)]
    sampling = Sampling(temperature=temperature, seed=seed, guide=grammar_of(guide, tools))
    output: list[int] = []
    for number in range(most):
        logits = np.random.default_rng((seed, number)).standard_normal((1, MODEL.text.vocab_size), np.float32) * 4
        requests = restricted(ways[number % len(ways)], [_sequence("r", sampling, output)])
        (token,) = sample(logits, requests)
        if token.token_id in MODEL.eos_token_ids:
            return output
        output.append(token.token_id)
    pytest.fail(f"no end after {most} tokens: {TOKENIZER.decode(output)!r}")


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0]))
def test_a_schema_is_followed_by_a_model_that_has_no_idea(seed: int, temperature: float) -> None:
    said = TOKENIZER.decode(_output(Guide("schema", json.dumps(PERSON), "f"), seed=seed, temperature=temperature))
    person = json.loads(said)
    assert list(person) == ["name", "age"]
    assert len(person["name"]) <= 8
    assert isinstance(person["age"], int)
    assert 0 <= person["age"] <= 150
    assert "\n" not in said


@given(st.integers(0, 10**6), st.sampled_from([r"[a-f]{2,5}(-[0-9]+){1,2}x", r"(ja|nein), [0-9]{4}", "é{3}.?"]))
def test_a_regular_expression_is_followed(seed: int, pattern: str) -> None:
    assert re.fullmatch(pattern, TOKENIZER.decode(_output(Guide("regex", pattern, "f"), seed=seed)))


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9), min_size=1, max_size=5))
@example(["\U0002f800", "e\u0301"])  # tokenizers write these another way
def test_one_of_the_choices_is_said(choices: list[str]) -> None:
    output = _output(Guide("choice", json.dumps(choices), "f"), seed=3)
    assert b"".join(map(TOKENIZER.token_bytes, output)).decode() in choices


WEATHER = Tool("weather", json.dumps(PERSON), True, {}, "tools[0].function")
ANYTHING = Tool("anything", '{"type": "object"}', False, {}, "tools[1].function")
ANSWER = Guide("regex", "[a-c]{3}", "f")
CITY = {"name": "Ada", "age": 3}


def _tools(*, must_call: bool = False, is_parallel: bool = True, only: Tool | None = None) -> Tools:
    return Tools((WEATHER, ANYTHING), (only,) if only else (WEATHER, ANYTHING), must_call, is_parallel)


def _can_say(grammar: str, text: str) -> bool:
    """Whether it may be the whole output."""
    runner = Guides(VOCABULARY)
    output = TOKENIZER.encode(text)
    for end in range(len(output) + 1):
        try:
            (request,) = restricted(runner, [_sequence("r", Sampling(guide=grammar), output[:end])])
        except GuideTooComplex:
            return False
        assert request.allowed is not None
        bits = np.unpackbits(request.allowed.view(np.uint8), bitorder="little")
        if not bits[output[end] if end < len(output) else MODEL.eos_token_ids[0]]:
            return False
    return True


FIRST, SECOND = written("weather", CITY), written("anything", {"x": [1]})
WRONG = written("weather", {"nam": "Ada"})


@pytest.mark.parametrize(
    ("tools", "answer", "can", "cannot"),
    [
        (_tools(), None, ["", "a <b", FIRST, f"so\n{FIRST}\n{SECOND}\nthere"], [WRONG, f"a {WRONG}", "<tool_call>now"]),
        (_tools(is_parallel=False), None, ["", "a <b", f"so\n{SECOND}"], [WRONG, f"{FIRST}\n{SECOND}", f"{FIRST}\n"]),
        (_tools(must_call=True), None, [FIRST, f"{SECOND}\n{FIRST}"], ["", "a", f"so\n{FIRST}", f"{FIRST}\n", WRONG]),
        (_tools(must_call=True, is_parallel=False, only=ANYTHING), ANSWER, [SECOND], ["", "abc", FIRST, f"{SECOND}\n{SECOND}"]),
        (_tools(), ANSWER, ["abc", FIRST, f"{SECOND}\n{FIRST}"], ["", "abd", f"abc{FIRST}", WRONG]),
    ],
)
def test_calls_are_made_as_asked(tools: Tools, answer: Guide | None, can: list[str], cannot: list[str]) -> None:
    grammar = grammar_of(answer, tools)
    assert {text: _can_say(grammar, text) for text in (*can, *cannot)} == {
        **dict.fromkeys(can, True),
        **dict.fromkeys(cannot, False),
    }


@pytest.mark.parametrize(
    ("thinking", "can", "cannot"),
    [
        (Thinking.NONE, [FIRST], [f"hm</think>\n\n{FIRST}", f"<think>hm</think>\n\n{FIRST}"]),
        (Thinking.BEGUN, [f"a <b>\n</think>\n\n{FIRST}"], [FIRST, f"hm</think>{FIRST}", f"hm</think>\n\n{WRONG}"]),
        (Thinking.POSSIBLE, [FIRST, f"<think>\nhm\n</think>\n\n{FIRST}"], [f"hm</think>\n\n{FIRST}", "<think>hm", WRONG]),
    ],
)
def test_a_model_thinks_freely_before_it_does_as_asked(thinking: Thinking, can: list[str], cannot: list[str]) -> None:
    grammar = after_thoughts(grammar_of(None, _tools(must_call=True)), thinking)
    assert {text: _can_say(grammar, text) for text in (*can, *cannot)} == {
        **dict.fromkeys(can, True),
        **dict.fromkeys(cannot, False),
    }


@given(st.integers(0, 10**6))
def test_a_model_that_has_no_idea_calls_functions_that_are_there(seed: int) -> None:
    tools = _tools(must_call=True, is_parallel=False, only=WEATHER)
    said = Speech(thinking=Thinking.NONE, can_call=True).feed(TOKENIZER.decode(_output(None, tools, seed=seed)), is_last=True)
    assert said.calls[0].name == "weather"
    assert set(json.loads("".join(part.arguments for part in said.calls))) == {"name", "age"}
    assert said.content == ""


def test_tags_are_written_as_the_tokens_that_models_know(tmp_path: Path) -> None:
    """Not letter by letter, though they look like special tokens."""
    vocabulary = GuideVocabulary(model_config(), write_folder(tmp_path))
    grammar = after_thoughts(grammar_of(None, _tools(must_call=True)), Thinking.BEGUN)
    for before, tag in (("hm", "</think>"), ("hm</think>\n\n", "<tool_call>"), (f"hm</think>\n\n{FIRST}"[:-12], "</tool_call>")):
        output = tokenizer().encode(before)
        (request,) = restricted(Guides(vocabulary), [_sequence("r", Sampling(guide=grammar), output)])
        assert request.allowed is not None
        (token_id,) = tokenizer().encode(tag)
        assert request.allowed[token_id // 32] >> (token_id % 32) & 1, tag


def test_every_token_may_be_drawn_elsewhere() -> None:
    """By a runner that has not seen the request yet, by two in turns, by one that has forgotten it."""
    guide = Guide("schema", json.dumps(PERSON), "f")
    at_one = _output(guide, seed=11)
    assert _output(guide, seed=11, ways=[Guides(VOCABULARY) for _ in range(400)]) == at_one
    assert _output(guide, seed=11, ways=[Guides(VOCABULARY), Guides(VOCABULARY)]) == at_one


def test_only_some_are_remembered_and_those_forgotten_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guides, "_NUM_SPARE", 1)
    monkeypatch.setattr(guides, "_MAX_GRAMMARS", 2)
    runner = Guides(VOCABULARY)
    output = TOKENIZER.encode("abc")
    for _ in range(2):
        for number in range(5):
            sampling = Sampling(guide=grammar_of(Guide("regex", f"abc{number}+", "f")))
            (request,) = restricted(runner, [_sequence(f"r{number}", sampling, output)])
            assert _names(request) == {str(number)}
    assert len(runner._guided) == len(runner._ready) == 2


def test_all_that_are_in_a_step_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many: else each step would go through all of their outputs again."""
    monkeypatch.setattr(guides, "_NUM_SPARE", 0)
    runner = Guides(VOCABULARY)
    sampling = Sampling(guide=grammar_of(Guide("regex", "a+", "f")))
    for length in range(3):
        restricted(runner, [_sequence(f"r{number}", sampling, TOKENIZER.encode("a") * length) for number in range(100)])
    assert len(runner._guided) == 100


@pytest.mark.parametrize("pattern", [r"(([a-z]+ ?){1,20}\.? ?){1,30}", r"(\w+ ?){5,200}", r"(([0-9]{1,3},? ?){1,30}){1,30}"])
def test_an_output_can_be_gone_through_again_wherever_it_was_drawn(pattern: str) -> None:
    """With the library's bounds for a step, which an output gone through without masks would run into."""
    sampling = Sampling(seed=1, guide=grammar_of(Guide("regex", pattern, "f")))
    runner = Guides(VOCABULARY)
    output: list[int] = []
    for number in range(80):
        logits = np.random.default_rng((5, number)).standard_normal((1, MODEL.text.vocab_size), np.float32) * 4
        logits[0, list(MODEL.eos_token_ids)] = -100.0
        requests = restricted(runner, [_sequence("r", sampling, output)])
        if number % 16 == 15:
            (again,) = restricted(Guides(VOCABULARY), [_sequence("r", sampling, output)])
            assert _names(again) == _names(requests[0])
        (token,) = sample(logits, requests)
        if token.token_id in MODEL.eos_token_ids:
            break
        output.append(token.token_id)
    assert len(output) > 20


def test_a_request_that_begins_anew_is_not_taken_for_the_one_before() -> None:
    """The same name with another output, or another grammar."""
    runner = Guides(VOCABULARY)
    for pattern, output, names in (
        ("ab|cd", "a", {"b"}),
        ("ab|cd", "c", {"d"}),
        ("ab|cd", "", {"a", "c", "ab"}),
        ("cx", "c", {"x"}),
    ):
        sampling = Sampling(guide=grammar_of(Guide("regex", pattern, "f")))
        (request,) = restricted(runner, [_sequence("r", sampling, TOKENIZER.encode(output))])
        assert _names(request) == names & {TOKENIZER.decode([i]) for i in range(TOKENIZER.vocab_size)}


def test_a_grammar_that_grows_too_large_on_the_way_is_an_error() -> None:
    """Its automaton is bounded; before that, it has done what it says."""
    with pytest.raises(GuideTooComplex, match="too many"):
        _output(Guide("regex", "(((a{900,999}){900,999}){900,999}){900,999}", "f"), seed=1)


def test_an_output_that_cannot_be_is_an_error() -> None:
    sampling = Sampling(guide=grammar_of(Guide("regex", "abc", "f")))
    with pytest.raises(GuideTooComplex, match="cannot be made to look"):
        restricted(Guides(VOCABULARY), [_sequence("r", sampling, TOKENIZER.encode("abx"))])


def test_the_guide_comes_last_and_log_probabilities_are_the_models_own() -> None:
    """A bias for what is not allowed changes nothing; what is told is what the model thought."""
    (x,) = TOKENIZER.encode("x")
    sampling = Sampling(temperature=0.0, guide=grammar_of(Guide("regex", "[ab]", "f")), logit_bias=((x, 100.0),), num_logprobs=1)
    logits = np.zeros((1, MODEL.text.vocab_size), np.float32)
    logits[0, x] = 5.0
    (token,) = sample(logits, restricted(Guides(VOCABULARY), [_sequence("r", sampling, [])]))
    assert TOKENIZER.decode([token.token_id]) in ("a", "b")
    assert [each.token_id for each in token.top_logprobs] == [x]
    assert token.logprob == pytest.approx(-5.0 - np.log(1 + (MODEL.text.vocab_size - 1) * np.exp(-5.0)), abs=1e-3)


def test_who_is_not_guided_is_not_touched() -> None:
    sequence = _sequence("r", Sampling(), [])
    assert restricted(Guides(VOCABULARY), [sequence]) == restricted(None, [sequence]) == [sequence.sample]


def test_without_a_tokenizer_nothing_can_be_guided(tmp_path: Path) -> None:
    guided = _sequence("r", Sampling(guide=grammar_of(Guide("regex", "a", "f"))), [])
    with pytest.raises(BadConfig, match=r"tokenizer\.json"):
        restricted(Guides(GuideVocabulary(MODEL, tmp_path)), [guided])
    with pytest.raises(ValueError, match="no guides"):
        restricted(None, [guided])


def test_a_model_may_have_more_logits_than_its_tokenizer_has_tokens() -> None:
    """As Qwen's have: what has no token is never allowed."""
    wide = replace(MODEL, text=replace(MODEL.text, vocab_size=MODEL.text.vocab_size + 45))
    (request,) = restricted(
        Guides(GuideVocabulary(wide, BUNDLED_MODEL)), [_sequence("r", Sampling(guide=grammar_of(Guide("regex", ".*", "f"))), [])]
    )
    assert request.allowed is not None
    bits = np.unpackbits(request.allowed.view(np.uint8), bitorder="little", count=wide.text.vocab_size)
    assert bits.any()
    assert not bits[TOKENIZER.vocab_size :].any()


def _names(request: SampleRequest) -> set[str]:
    """What may come next."""
    assert request.allowed is not None
    bits = np.unpackbits(request.allowed.view(np.uint8), bitorder="little", count=MODEL.text.vocab_size)
    return {TOKENIZER.decode([int(i)]) for i in np.flatnonzero(bits)}
