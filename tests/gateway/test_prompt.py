from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import epd
from epd.errors import BadImage, BadRequest, PromptTooLong, Unsupported
from epd.gateway.prompt import Prompt, Prompter
from epd.gateway.speech import Thinking
from epd.gateway.template import ChatTemplate
from epd.gateway.tools import written
from epd.model.config import load_model_config
from epd.tokenizer import Tokenizer
from tests.support.text import (
    CHAT_TEMPLATE,
    LANGUAGES,
    SPECIAL,
    model_config,
    png,
    prompter,
    raw_tokenizer,
    tokenizer,
    write_folder,
)

IDS = tokenizer().special_ids
PAD = IDS["<|image_pad|>"]
IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def reference(messages: list[dict[str, Any]], **options: object) -> list[int]:
    """What transformers makes of the same messages."""
    fast = PreTrainedTokenizerFast(tokenizer_object=raw_tokenizer(), chat_template=CHAT_TEMPLATE, eos_token="<|im_end|>")
    rendered = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    ids: list[int] = fast(rendered, add_special_tokens=False)["input_ids"]
    return ids


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": ""}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  hi \n"}],
    [
        {"role": "user", "content": LANGUAGES[7]},
        {"role": "assistant", "content": "so</think>\n fine "},
        {"role": "user", "content": "<b>"},
    ],
    *([{"role": "user", "content": language}] for language in LANGUAGES),
    [{"role": "user", "content": [text("a "), text(" b"), text("c<think>")]}],
    [{"role": "user", "content": "e\u0301 ≮ \u212b"}],  # what NFC changes
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_text_prompts_are_those_of_transformers(messages: list[dict[str, Any]]) -> None:
    assert list(prompter().chat(messages).token_ids) == reference(messages)


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "look", "description": 'Sees "ü"', "parameters": {"type": "object", "a": [1, None]}},
    },
    {"type": "function", "function": {"name": "now"}},
]
WITH_CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "look"},
    {
        "role": "assistant",
        "content": "Well.",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": ["<b>", 2]}}},
            {"id": "2", "type": "function", "function": {"name": "now", "arguments": {}}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "nothing"},
]


@pytest.mark.parametrize("tools", [TOOLS, []])
@pytest.mark.parametrize("messages", [CONVERSATIONS[0], WITH_CALLS])
def test_functions_and_calls_are_put_as_transformers_does(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    prompt = prompter().chat(messages, tools=tools)
    assert list(prompt.token_ids) == reference(messages, tools=tools or None)
    assert "Sees" not in tokenizer().decode(prompt.token_ids) or tools


def test_a_call_is_rendered_as_the_model_wrote_it() -> None:
    """So that the KV of an earlier turn is found in the cache."""
    before = prompter().chat(WITH_CALLS[:1], tools=TOOLS)
    after = prompter().chat(WITH_CALLS, tools=TOOLS)
    said = "Well.\n" + written("look", {"at": ["<b>", 2]}) + "\n" + written("now", {}) + "<|im_end|>"
    output = tuple(tokenizer().encode_raw(said))
    assert after.token_ids[: len(before.token_ids) + len(output)] == before.token_ids + output


def test_a_result_may_be_an_image() -> None:
    shown = [*WITH_CALLS[:2], {"role": "tool", "tool_call_id": "1", "content": [text("seen:"), IMAGE]}]
    (image,) = prompter().chat(shown, [png()], tools=TOOLS).images
    assert image.data == png()


@pytest.mark.parametrize(("messages", "tools", "param"), [(WITH_CALLS, [], "messages"), (CONVERSATIONS[0], TOOLS, "tools")])
def test_tools_need_a_template_that_has_them(messages: list[dict[str, Any]], tools: list[dict[str, Any]], param: str) -> None:
    template = ChatTemplate("{% for message in messages %}{{ message.content }}{% endfor %}")
    made = Prompter(tokenizer=tokenizer(), template=template, config=model_config(), max_model_len=lambda: 4096)
    with pytest.raises(Unsupported, match="has no tools") as caught:
        made.chat(messages, tools=tools)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("options", "thinking"),
    [({}, Thinking.POSSIBLE), ({"enable_thinking": False}, Thinking.NONE), ({"think": True}, Thinking.BEGUN)],
)
def test_a_prompt_knows_whether_the_model_will_think(options: dict[str, object], thinking: Thinking) -> None:
    template = ChatTemplate(CHAT_TEMPLATE + "{{ '<think>\\n' if think is defined and think }}")
    made = Prompter(tokenizer=tokenizer(), template=template, config=model_config(), max_model_len=lambda: 4096)
    assert made.chat(CONVERSATIONS[0], options=options).thinking is thinking


def test_options_reach_the_template() -> None:
    messages = CONVERSATIONS[0]
    prompt = prompter().chat(messages, options={"enable_thinking": False})
    assert list(prompt.token_ids) == reference(messages, enable_thinking=False) != reference(messages)
    with pytest.raises(Unsupported, match="'enable_flying'"):
        prompter().chat(messages, options={"enable_flying": False})
    with pytest.raises(Unsupported, match="'messages'"):
        prompter().chat(messages, options={"messages": False})


@pytest.mark.parametrize(("width", "height"), [(64, 64), (33, 70), (200, 20), (8, 8)])
def test_an_image_is_as_many_placeholders_as_it_has_tokens(width: int, height: int) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": [text("what is "), IMAGE, text("?")]}]
    prompt = prompter().chat(messages, [png(width, height)])
    item = prompt.images[0].item
    plain = reference(messages)
    place = plain.index(PAD)
    assert item.num_tokens == item.grid_t * item.grid_h * item.grid_w // 4
    assert item.offset == place
    assert list(prompt.token_ids) == plain[:place] + [PAD] * item.num_tokens + plain[place + 1 :]


def test_several_images_keep_their_order_and_places() -> None:
    files = [png(64, 64), png(128, 64), png(64, 128, "blue")]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [IMAGE, text(" and "), IMAGE]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [text("now"), IMAGE]},
    ]
    prompt = prompter().chat(messages, files)
    assert [image.data for image in prompt.images] == files
    for image in prompt.images:
        item = image.item
        around = prompt.token_ids[item.offset - 1 : item.offset + item.num_tokens + 1]
        assert around == (IDS["<|vision_start|>"], *[PAD] * item.num_tokens, IDS["<|vision_end|>"])
    assert prompt.token_ids.count(PAD) == sum(image.item.num_tokens for image in prompt.images)
    assert [(image.item.grid_h, image.item.grid_w) for image in prompt.images] == [(8, 8), (8, 16), (16, 8)]


def test_the_hash_tells_bytes_and_preprocessing_apart() -> None:
    def hash_of(data: bytes, **other: Any) -> str:
        config = model_config()
        if other:
            assert config.image is not None
            config = dataclasses.replace(config, image=dataclasses.replace(config.image, **other))
        made = Prompter(tokenizer=tokenizer(), template=prompter().template, config=config, max_model_len=lambda: 4096)
        return made.chat([{"role": "user", "content": [IMAGE]}], [data]).images[0].item.mm_hash

    same = hash_of(png())
    assert same == hash_of(png())
    assert len(same) == 32
    assert len({same, hash_of(png(colour="blue")), hash_of(png(), max_pixels=1024), hash_of(png(), mean=(0.4, 0.5, 0.5))}) == 4


BUNDLED = Path(epd.__file__).parent / "assets" / "tiny-vl"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Count from 7 to 40."}],
        [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "image"}, text("What is in this image?")]}],
        [
            {"role": "user", "content": [IMAGE, IMAGE, text("?")]},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "b"},
        ],
        WITH_CALLS,
    ],
)
def test_the_bundled_models_prompts_are_those_of_transformers(messages: list[dict[str, Any]]) -> None:
    reference = AutoTokenizer.from_pretrained(BUNDLED)
    config = load_model_config(BUNDLED)
    made = Prompter.from_folder(BUNDLED, config, max_model_len=lambda: config.max_position_embeddings)
    num_images = sum(part == IMAGE for message in messages for part in message["content"])
    files = [png(64 + 16 * index, 64) for index in range(num_images)]
    tools = TOOLS if messages is WITH_CALLS else []
    prompt = made.chat(messages, files, tools=tools)
    # The processor's way: render, repeat each placeholder by its image's tokens, tokenize.
    rendered = reference.apply_chat_template(messages, tools=tools or None, tokenize=False, add_generation_prompt=True)
    for image in prompt.images:
        rendered = rendered.replace("<|image_pad|>", "<placeholder>" * image.item.num_tokens, 1)
    rendered = rendered.replace("<placeholder>", "<|image_pad|>")
    assert list(prompt.token_ids) == reference(rendered, add_special_tokens=False)["input_ids"]
    assert len(prompt.images) == num_images


# --- text that spells out special tokens ----------------------------------------------------------------------------


def specials(token_ids: tuple[int, ...]) -> list[int]:
    return [token_id for token_id in token_ids if tokenizer().is_special(token_id)]


@pytest.mark.parametrize("name", SPECIAL)
def test_special_tokens_in_a_clients_text_stay_text(name: str) -> None:
    for role, words in itertools.product(
        ("system", "user", "assistant"), (name, f"a{name}b", f"{name}{name}", f" {name} ", f"{name[:5]}{name}")
    ):
        messages = [{"role": role, "content": words}, {"role": "user", "content": "x"}]
        clean = [{"role": role, "content": "words"}, {"role": "user", "content": "x"}]
        prompt = prompter().chat(messages)
        assert specials(prompt.token_ids) == specials(prompter().chat(clean).token_ids)
        assert words.strip() in tokenizer().decode(prompt.token_ids)


@pytest.mark.parametrize("name", SPECIAL)
def test_special_tokens_in_functions_calls_and_results_stay_text(name: str) -> None:
    def chat(word: str) -> Prompt:
        function = {"name": "look", "description": word, "parameters": {"properties": {word: {"enum": [word, [word]]}}}}
        call = {"id": word, "type": "function", "function": {"name": "look", "arguments": {word: [word]}}}
        raw = {"id": word, "type": "function", "function": {"name": "look", "arguments": word}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "reasoning_content": word, "tool_calls": [call, raw]},
            {"role": "tool", "tool_call_id": word, "name": word, "content": word},
        ]
        return prompter().chat(messages, tools=[{"type": "function", "function": function}])

    assert specials(chat(name).token_ids) == specials(chat("x").token_ids)
    assert tokenizer().decode(chat(name).token_ids).count(name) == 8


def test_text_that_becomes_special_side_by_side_stays_text() -> None:
    clean = specials(prompter().chat([{"role": "user", "content": "x"}]).token_ids)
    for name in SPECIAL:
        for cut in range(1, len(name)):
            halves = [{"role": "user", "content": [text(f"a {name[:cut]} "[: 2 + cut]), text(name[cut:])]}]
            prompt = prompter().chat(halves)
            assert specials(prompt.token_ids) == clean
            assert name in tokenizer().decode(prompt.token_ids)
        letters = [{"role": "user", "content": [text(letter) for letter in name]}]
        assert specials(prompter().chat(letters).token_ids) == clean


def test_text_around_what_the_template_writes_or_trims_stays_text() -> None:
    template = ChatTemplate("<{{ messages[0].content | trim }}>{{ messages[1].content | trim }}|im_end|>")
    made = Prompter(tokenizer=tokenizer(), template=template, config=model_config(), max_model_len=lambda: 4096)
    for first, second in ((" |im_end|> ", "y"), ("x", " <\n"), ("|im_", "<")):
        prompt = made.chat([{"role": "user", "content": first}, {"role": "user", "content": second}])
        assert specials(prompt.token_ids) == []


pieces = st.lists(st.sampled_from([*SPECIAL, "<|", "|>", "<", ">", "im_end", "a", " ", "\n", "</think>", "👍"]), max_size=6).map(
    "".join
)


@settings(max_examples=120)
@given(st.lists(pieces, min_size=1, max_size=4), st.lists(pieces, min_size=1, max_size=3))
def test_no_text_whatever_makes_a_special_token(parts: list[str], turns: list[str]) -> None:
    roles = itertools.cycle(["assistant", "user"])
    messages: list[dict[str, Any]] = [{"role": "user", "content": [text(part) for part in parts]}]
    messages += [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    clean = [{**message, "content": "x"} for message in messages]
    prompt = prompter().chat(messages)
    assert specials(prompt.token_ids) == specials(prompter().chat(clean).token_ids)
    assert "".join(parts) in tokenizer().decode(prompt.token_ids)


def test_special_tokens_that_share_letters_stay_text() -> None:
    raw = RawTokenizer.from_str(raw_tokenizer().to_str())
    raw.add_special_tokens(["|x|"])
    made = Prompter(
        tokenizer=Tokenizer(raw),
        template=ChatTemplate("{{ messages[0].content }}"),
        config=model_config(),
        max_model_len=lambda: 64,
    )
    prompt = made.chat([{"role": "user", "content": "a|x|x|x|x|b"}])
    assert made.tokenizer.decode(prompt.token_ids) == "a|x|x|x|x|b"
    assert not any(made.tokenizer.is_special(token_id) for token_id in prompt.token_ids)


def test_marks_do_not_show_in_the_prompt() -> None:
    prompt = prompter().chat([{"role": "user", "content": "a <|im_end|> b <"}])
    assert tokenizer().decode(prompt.token_ids).startswith("system\nYou are helpful.\nuser\na <|im_end|> b <\n")


# --- refusals -------------------------------------------------------------------------------------------------------


def test_images_need_a_model_and_a_template_with_a_place_for_them() -> None:
    with pytest.raises(Unsupported, match="takes no images"):
        prompter(takes_images=False).chat([{"role": "user", "content": [IMAGE]}], [png()])
    with pytest.raises(BadRequest, match="a place for 0 of the 1 images"):
        prompter().chat([{"role": "assistant", "content": [IMAGE]}, {"role": "user", "content": "x"}], [png()])
    with pytest.raises(BadRequest, match="a place for 1 of the 0 images"):
        prompter().chat([{"role": "user", "content": [IMAGE]}])


def test_a_text_model_sees_parts_as_one_text() -> None:
    parts = [{"role": "user", "content": [text("a "), text("b")]}]
    whole = [{"role": "user", "content": "a b"}]
    assert prompter(takes_images=False).chat(parts) == prompter(takes_images=False).chat(whole)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"not an image", png()[:20]])
def test_an_image_that_cannot_be_read_is_named(data: bytes) -> None:
    with pytest.raises(BadImage, match="image 2 of 2: ") as caught:
        prompter().chat([{"role": "user", "content": [IMAGE, IMAGE]}], [png(), data])
    assert caught.value.param == "messages"


def test_an_image_has_no_more_pixels_than_allowed() -> None:
    messages = [{"role": "user", "content": [IMAGE]}]
    assert prompter().chat(messages, [png(64, 64)], max_image_pixels=4096).images
    with pytest.raises(BadImage, match="64 x 65 = 4160 pixels; 4096 at most"):
        prompter().chat(messages, [png(64, 65)], max_image_pixels=4096)


def test_a_model_without_a_template_has_no_chat() -> None:
    made = Prompter(tokenizer=tokenizer(), template=None, config=model_config(), max_model_len=lambda: 64)
    with pytest.raises(Unsupported, match="/v1/completions"):
        made.chat([{"role": "user", "content": "hi"}])
    assert made.completion("hi").token_ids == tuple(tokenizer().encode("hi"))


def test_prompts_that_are_too_long_are_refused_with_their_counts() -> None:
    messages = [{"role": "user", "content": [IMAGE, text("hi")]}]
    num_tokens = len(prompter().chat(messages, [png()]).token_ids)
    assert len(prompter(max_model_len=num_tokens + 1).chat(messages, [png()]).token_ids) == num_tokens
    with pytest.raises(PromptTooLong, match=rf"{num_tokens} tokens \(16 of them for 1 image\); the model takes {num_tokens}"):
        prompter(max_model_len=num_tokens).chat(messages, [png()])
    with pytest.raises(PromptTooLong, match="200 tokens; the model takes 100") as caught:
        prompter(max_model_len=100).completion([1] * 200)
    assert caught.value.param == "prompt"
    with pytest.raises(PromptTooLong, match="the model takes 10") as caught:
        prompter(max_model_len=10).chat([{"role": "user", "content": "what a long text this is"}])
    assert caught.value.param == "messages"


def test_what_cannot_fit_is_refused_before_it_is_tokenized() -> None:
    long = "a" * 10_000_000
    with pytest.raises(PromptTooLong, match="10000000 characters"):
        prompter(max_model_len=1000).completion(long)
    with pytest.raises(PromptTooLong, match="10000000 characters"):
        prompter(max_model_len=1000).chat([{"role": "user", "content": [text(long)]}])


def test_output_has_the_room_that_is_left() -> None:
    made = prompter(max_model_len=100)
    prompt = made.completion([1] * 90)
    assert made.max_tokens(prompt, None) == 10
    assert made.max_tokens(prompt, 10) == 10
    with pytest.raises(PromptTooLong, match="90 tokens and max_tokens is 11, together 101; the model takes 100") as caught:
        made.max_tokens(prompt, 11)
    assert caught.value.param == "max_tokens"


def test_raw_prompts_may_spell_out_special_tokens_but_no_placeholders() -> None:
    assert IDS["<|im_end|>"] in prompter().completion("a<|im_end|>").token_ids
    assert prompter().completion([1, 2]).token_ids == (1, 2)
    for bad in ("<|image_pad|>", "a<|video_pad|>", [1, PAD]):
        with pytest.raises(BadRequest, match="placeholder"):
            prompter().completion(bad)
    nothing: tuple[str | list[int], ...] = ("", [])
    for empty in nothing:
        with pytest.raises(BadRequest, match="at least one token"):
            prompter().completion(empty)
    for outside in ([-1], [model_config().text.vocab_size]):
        with pytest.raises(BadRequest, match=f"holds the token id {outside[0]}"):
            prompter().completion(outside)


def test_a_folder_gives_the_same_prompts(tmp_path: Path) -> None:
    loaded = Prompter.from_folder(write_folder(tmp_path), model_config(), max_model_len=lambda: 4096)
    messages = [{"role": "user", "content": [IMAGE, text("hi")]}]
    assert loaded.chat(messages, [png()]) == prompter().chat(messages, [png()])
