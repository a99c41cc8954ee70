"""The reference: what transformers answers to OpenAI-style messages with the same checkpoint folder, greedily."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil

from tools.tiny_model.tokenizer import IMAGE_PAD


class Reference:
    """One checkpoint folder, loaded into transformers on the CPU."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._images = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, messages: list[dict[str, Any]], *, max_tokens: int) -> str:
        """The text after the prompt, without special tokens. Images are data URLs in the messages."""
        inputs = self.inputs(messages)
        with torch.no_grad():
            tokens = self._model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        said = tokens[0, inputs["input_ids"].shape[1] :]
        return str(self._tokenizer.decode(said, skip_special_tokens=True))

    def inputs(self, messages: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """What the model takes: each image placeholder repeated once for every merged patch of its image."""
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pictures = [picture for message in messages for picture in _pictures(message)]
        pixels = self._images(pictures, return_tensors="pt") if pictures else {}
        before, *rest = text.split(IMAGE_PAD)
        for grid, piece in zip(pixels["image_grid_thw"] if pictures else (), rest, strict=True):
            before += IMAGE_PAD * int(grid.prod() // self._images.merge_size**2) + piece
        inputs = self._tokenizer(before, return_tensors="pt", add_special_tokens=False)
        ids = inputs["input_ids"]
        is_image = (ids == self._model.config.image_token_id).int()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": is_image, **pixels}


def _pictures(message: dict[str, Any]) -> list[Image.Image]:
    if isinstance(message["content"], str):
        return []
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
