"""What plans reckon with, against what PyTorch counts while transformers computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from epd.model.shapes import attention_share
from tests.model.reference import CASES, Model

TEXT_NAMES = [case.name for case in CASES if not case.vision]


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_attention_as_a_share_of_linear_layers(name: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(name)
    theirs = AutoModelForCausalLM.from_pretrained(
        model.folder, attn_implementation="eager", experts_implementation="eager"
    ).model.eval()

    def arithmetic(num_tokens: int) -> int:
        """Of a prompt: b L + a L^2, since eager attention computes every pair, masked or not."""
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            theirs(torch.zeros((1, num_tokens), dtype=torch.long))
        return int(counter.get_total_flops())

    short, long = arithmetic(32), arithmetic(64)
    pair = (long - 2 * short) / (64**2 - 2 * 32**2)
    token = short / 32 - 32 * pair
    assert attention_share(model.config) == pytest.approx(pair / token)
