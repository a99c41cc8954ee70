"""What plans reckon with, against what PyTorch counts while transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from epd.model.shapes import active_share, attention_share, count_numbers, text_shapes
from tests.model.reference import CASES, Model

TEXT_NAMES = [case.name for case in CASES if not case.vision]


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_attention_as_a_share_of_linear_layers(name: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(name)
    theirs = _eager(model).model

    def arithmetic(num_tokens: int) -> int:
        """Of a prompt: b L + a L^2, since eager attention computes every pair, masked or not."""
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            theirs(torch.zeros((1, num_tokens), dtype=torch.long))
        return int(counter.get_total_flops())

    short, long = arithmetic(32), arithmetic(64)
    pair = (long - 2 * short) / (64**2 - 2 * 32**2)
    token = short / 32 - 32 * pair
    assert attention_share(model.config) == pytest.approx(pair / token)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_a_token_takes_part_in_all_weights_but_those_of_experts_that_it_does_not_choose(
    name: str, model_of: Callable[[str], Model]
) -> None:
    """Arithmetic of one token by PyTorch's count, against the numbers of all matrices that any token is multiplied with."""
    model = model_of(name)
    theirs = _eager(model)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        theirs(torch.zeros((1, 1), dtype=torch.long))
    text = model.config.text
    attention = 2 * 2 * text.num_layers * text.num_heads * text.head_dim
    matrices = {shape_name: shape for shape_name, shape in text_shapes(model.config).items() if len(shape) > 1}
    looked_up = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    used = (counter.get_total_flops() - attention) / 2
    assert active_share(model.config) == pytest.approx(used / (count_numbers(matrices) - looked_up))


def _eager(model: Model) -> Any:
    """Of products that are counted."""
    kinds = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(model.folder, **kinds).eval()
