from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from epd.errors import BadCheckpoint, BadRequest
from epd.gateway.speech import Thinking
from epd.gateway.template import ChatTemplate
from tests.support.text import CHAT_TEMPLATE

HI = [{"role": "user", "content": "hi"}]


def rendered(source: str, messages: list[dict[str, Any]] | None = None, **options: object) -> str:
    return ChatTemplate(source).render(HI if messages is None else messages, options)


def test_each_file_may_hold_the_template_and_the_first_wins(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert _render_folder(tmp_path) == "config"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert _render_folder(tmp_path) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert _render_folder(tmp_path) == "jinja"


def test_of_several_named_templates_the_default_one_is_taken(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert _render_folder(tmp_path) == "chat"


def test_named_tokens_come_from_the_tokenizers_config(tmp_path: Path) -> None:
    config = {
        "chat_template": "{{ bos_token }}{{ eos_token }}",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "unk_token": None,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert _render_folder(tmp_path) == "<s></s>"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer_config.json", "[", "cannot be read as JSON"),
        ("tokenizer_config.json", "[]", "list where an object"),
        ("tokenizer_config.json", '{"chat_template": 3}', "must be a text"),
        ("chat_template.jinja", "{% if %}", "is not a template"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        ChatTemplate.from_folder(tmp_path)
    assert name in caught.value.message


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% set x = namespace() %}{{ x.__init__.__globals__['os'] }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox_or_change_what_it_is_given(source: str) -> None:
    with pytest.raises(BadRequest, match="chat template"):
        rendered(source)


def test_a_template_may_refuse_messages() -> None:
    with pytest.raises(BadRequest, match="roles must alternate") as caught:
        rendered("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize("source", ["{{ 1 // 0 }}", "{{ messages + 1 }}", "{{ messages[0].content % 1 }}", "{{ range(10**9) }}"])
def test_whatever_a_template_stumbles_over_is_the_requests_error(source: str) -> None:
    with pytest.raises(BadRequest, match="chat template"):
        rendered(source)


def test_helpers_are_the_usual_ones() -> None:
    assert rendered("{{ {'a': '<ü>'} | tojson }}") == '{"a": "<ü>"}'
    assert rendered("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    assert len(rendered("{{ strftime_now('%Y-%m-%d') }}")) == 10
    assert rendered("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}") == "1"
    assert rendered("a{% generation %}b{% endgeneration %}c") == "abc"
    assert rendered("{% if tools is none and documents is none and add_generation_prompt %}yes{% endif %}") == "yes"
    assert rendered("  {% if true %}\nx\n  {% endif %}\n") == "x\n"


def test_options_are_the_variables_that_the_template_reads() -> None:
    template = ChatTemplate("{{ messages }}{{ bos_token }}{% if enable_thinking %}{% endif %}", named_tokens={"bos_token": "<s>"})
    assert template.options == {"enable_thinking"}
    assert rendered("{{ 'on' if enable_thinking else 'off' }}", enable_thinking=True) == "on"
    assert template.render(HI, {"messages": "other"}) == "[{'role': 'user', 'content': 'hi'}]<s>"


CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}%s{% endfor %}{{ m.content }}{% endfor %}"
TAGGED = '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'


@pytest.mark.parametrize(
    ("source", "has_tools"),
    [
        (CHAT_TEMPLATE, True),
        ("{{ tools | tojson if tools }}" + CALLS.replace("%s", TAGGED), True),
        # Nobody tells the model of functions; calls are left out, are written in another way, or with other arguments; results
        # are left out; calls are refused.
        (CALLS.replace("%s", TAGGED), False),
        ("{{ tools | tojson if tools }}" + CALLS.replace("%s", ""), False),
        ("{{ tools | tojson if tools }}" + CALLS.replace("%s", "<tool_call><function={{ c.function.name }}></tool_call>"), False),
        ("{{ tools | tojson if tools }}" + CALLS.replace("%s", TAGGED.replace("c.function.arguments |", "{} |")), False),
        ("{{ tools | tojson if tools }}" + CALLS.replace("%s", TAGGED).replace("{{ m.content }}", ""), False),
        ("{{ tools | tojson if tools }}{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}", False),
        ("{{ messages[0].content }}", False),
    ],
)
def test_a_template_shows_whether_it_has_tools_that_are_understood(source: str, has_tools: bool) -> None:
    assert ChatTemplate(source).has_tools is has_tools


def test_only_a_template_that_knows_thoughts_makes_a_model_think() -> None:
    assert ChatTemplate("<think>").thinking_after("assistant\n<think>\n") is Thinking.BEGUN
    assert ChatTemplate("hm").thinking_after("assistant\n<think>\n") is Thinking.NONE


def _render_folder(folder: Path) -> str:
    template = ChatTemplate.from_folder(folder)
    assert template is not None
    return template.render(HI)
