"""The bundled checkpoint: transformers loads it, and it answers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from tools.evaluate import ask_reference, held_out_questions, score
from tools.tiny_model.export import BUNDLED, hub_config
from tools.tiny_model.reference import Reference
from tools.tiny_model.tasks import TASKS
from tools.tiny_model.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, train_tokenizer
from tools.tiny_model.train import bundled_config


@cache
def reference() -> Reference:
    return Reference(BUNDLED)


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 12e6


def test_tensors_are_named_as_published_checkpoints_name_them() -> None:
    with safe_open(BUNDLED / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert {str(weights.get_tensor(name).dtype) for name in names} == {"torch.float32"}
    assert "model.language_model.embed_tokens.weight" in names
    assert "model.visual.deepstack_merger_list.1.linear_fc2.weight" in names
    assert all(name.startswith(("model.language_model.", "model.visual.")) for name in names)


def test_the_config_says_what_training_built() -> None:
    tokenizer = train_tokenizer(num_examples=100)  # the special tokens' ids do not depend on the merges
    assert json.loads((BUNDLED / "config.json").read_text()) == json.loads(json.dumps(hub_config(bundled_config(tokenizer))))
    text = AutoConfig.from_pretrained(BUNDLED).text_config
    assert text.rope_parameters["mrope_section"] == [6, 5, 5]
    assert text.rope_parameters["rope_theta"] == 10000.0


def test_the_tokenizer_loads_with_its_template_and_end() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(505, 512))
    assert (
        tokenizer("a red circle\nat 17", add_special_tokens=False)["input_ids"]
        == tokenizer.backend_tokenizer.encode("a red circle\nat 17").ids
    )


def test_it_counts_and_talks() -> None:
    def answer(text: str) -> str:
        return reference().answer([{"role": "user", "content": text}], max_tokens=60)

    assert answer("Count from 7 to 15.") == "7 8 9 10 11 12 13 14 15"
    assert answer("Hello").startswith("Hello!")


@pytest.mark.parametrize("task", [task for task in TASKS if task != "count"])  # long answers take long
def test_it_sees(task: str) -> None:
    questions = [question for question in held_out_questions(10, seed=2) if question.task == task]
    assert score(ask_reference(BUNDLED, questions))[task].right >= 8


def test_the_model_card_tells_the_measured_accuracy() -> None:
    card = Path(BUNDLED / "README.md").read_text()
    assert all(f"| {task} |" in card for task in TASKS)
