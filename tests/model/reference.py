"""Random tiny checkpoints made by transformers, prompts for them, and a driver for a TextModelRunner without a scheduler."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from epd.model.config import ModelConfig, load_model_config
from epd.model.positions import mrope_next, mrope_positions
from epd.model.preprocess import image_grid, num_image_tokens
from epd.model.runner import TextModelRunner, VisionModelRunner
from epd.model.weights import Weights, load_text_weights, load_vision_weights
from epd.step import EmbeddingSpan, ImageInput, SampleRequest, SequenceStep, StepPlan
from gpu.cpu import CpuBackend
from gpu.host_pool import HostPool
from gpu.pool import PoolSpec
from protocol.messages import MMItem, RequestId, Sampling, Token

GREEDY = Sampling(temperature=0.0)
IMAGE_TOKEN = 90
TOKENS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
VOCAB = 97


@dataclass(frozen=True)
class Case:
    """One geometry. `vision` empty: a text model."""

    name: str
    text: dict[str, Any]
    vision: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    image_sizes: tuple[tuple[int, int], ...] = ()  # width, height

    @property
    def has_experts(self) -> bool:
        return "num_experts" in self.text


def _text(layers: int, hidden: int, heads: int, kv_heads: int, dim: int, inner: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "intermediate_size": inner,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
        **more,
    }


def _experts(count: int, chosen: int, inner: int, **more: Any) -> dict[str, Any]:
    return {"num_experts": count, "num_experts_per_tok": chosen, "moe_intermediate_size": inner, **more}


def _rope(theta: float, section: list[int]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": section, "mrope_interleaved": True}}


def _vision(
    depth: int,
    hidden: int,
    heads: int,
    inner: int,
    deepstack: list[int],
    *,
    merge: int,
    patch: int,
    table: int,
    temporal: int = 2,
) -> dict[str, Any]:
    return {
        "depth": depth,
        "hidden_size": hidden,
        "num_heads": heads,
        "intermediate_size": inner,
        "deepstack_visual_indexes": deepstack,
        "spatial_merge_size": merge,
        "patch_size": patch,
        "temporal_patch_size": temporal,
        "num_position_embeddings": table,
        "initializer_range": 0.3,
    }


CASES = (
    Case("qwen3-gqa4-tied", _text(3, 32, 8, 2, 16, 48), tied=True),
    Case(
        "qwen3-mha-bias",
        _text(2, 48, 3, 3, 32, 80, attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    ),
    Case("qwen3-mqa-wide", _text(2, 40, 6, 1, 64, 56, rms_norm_eps=1e-5)),
    Case(
        "vl-deepstack2-tied",
        _text(4, 32, 4, 2, 32, 64, **_rope(10000.0, [6, 5, 5])),
        _vision(4, 32, 4, 64, [1, 2], merge=2, patch=8, table=64),
        tied=True,
        image_sizes=((64, 64), (37, 91)),
    ),
    Case(
        "vl-deepstack3-merge3",
        _text(3, 48, 6, 3, 16, 64, attention_bias=True, **_rope(500000.0, [4, 2, 2])),
        _vision(5, 24, 2, 40, [0, 2, 4], merge=3, patch=4, table=25, temporal=1),
        image_sizes=((33, 20), (12, 12), (20, 33)),
    ),
    Case(
        "vl-no-deepstack",
        _text(2, 32, 5, 1, 24, 40, **_rope(5e6, [4, 4, 4])),
        _vision(2, 48, 3, 32, [], merge=1, patch=14, table=49),
        image_sizes=((100, 3), (61, 47), (61, 47)),
    ),
    Case(
        "vl-deepstack-every-layer",
        _text(2, 64, 4, 4, 16, 96, **_rope(10000.0, [3, 3, 2])),
        _vision(3, 32, 2, 48, [0, 1], merge=2, patch=6, table=16),
        image_sizes=((301, 45), (5, 8)),
    ),
    Case("moe-2-of-8", _text(3, 32, 4, 2, 16, 48, **_experts(8, 2, 24, norm_topk_prob=True))),
    Case(
        "moe-every-other-layer",
        _text(4, 48, 6, 2, 16, 80, **_experts(5, 3, 40, norm_topk_prob=False, decoder_sparse_step=2, mlp_only_layers=[3])),
        tied=True,
    ),
    Case(
        "vl-moe-4-of-16",
        _text(3, 32, 4, 2, 32, 64, **_rope(10000.0, [6, 5, 5]), **_experts(16, 4, 16)),
        _vision(3, 32, 4, 64, [1, 2], merge=2, patch=8, table=64),
        tied=True,
        image_sizes=((64, 64), (37, 91)),
    ),
)
CASE_NAMES = [case.name for case in CASES]
VL_NAMES = [case.name for case in CASES if case.vision]
PREPROCESSOR = {
    "size": {"shortest_edge": 256, "longest_edge": 3000},
    "image_mean": [0.5, 0.4, 0.6],
    "image_std": [0.5, 0.25, 0.3],
}


@dataclass(frozen=True)
class Prompt:
    """Token ids with placeholders expanded, and the images they stand for."""

    token_ids: npt.NDArray[np.int32]
    items: tuple[MMItem, ...] = ()
    files: tuple[bytes, ...] = ()


class Model:
    """One case, saved by transformers and loaded by both sides."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.folder = folder
        self.reference = _make_reference(case, folder)
        self.config: ModelConfig = load_model_config(folder)
        self.text_weights: Weights = load_text_weights(self.config, folder)
        self.vision_weights: Weights | None = load_vision_weights(self.config, folder) if case.vision else None

    def prompt(self, seed: int, length: int = 19) -> Prompt:
        """Random text; for a model that sees, the case's images between stretches of it."""
        random = np.random.default_rng(seed)
        tokens: list[int] = random.integers(0, 90, length).tolist()
        items: list[MMItem] = []
        files: list[bytes] = []
        for width, height in self.case.image_sizes:
            data = png(random, width, height)
            assert self.config.image is not None
            grid = image_grid(data, self.config.image)
            tokens.append(TOKENS["vision_start_token_id"])
            items.append(
                MMItem(f"image-{seed}-{len(items)}", len(tokens), num_image_tokens(grid, self.config.image.merge_size), *grid)
            )
            tokens += [IMAGE_TOKEN] * items[-1].num_tokens + [TOKENS["vision_end_token_id"], *random.integers(0, 90, 5).tolist()]
            files.append(data)
        return Prompt(np.array(tokens, np.int32), tuple(items), tuple(files))

    def encode(self, prompt: Prompt) -> tuple[npt.NDArray[np.float32], ...]:
        if not prompt.items:
            return ()
        assert self.vision_weights is not None
        images = tuple(
            ImageInput(item.mm_hash, data, (item.grid_t, item.grid_h, item.grid_w), item.num_tokens)
            for item, data in zip(prompt.items, prompt.files, strict=True)
        )
        return tuple(rows for rows in encode(self, images) if isinstance(rows, np.ndarray))

    def reference_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": torch.from_numpy(prompt.token_ids.astype(np.int64))[None]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if prompt.items:
            pixels = reference_pixels(self.config, prompt.files)
            inputs |= {
                "pixel_values": torch.from_numpy(pixels),
                "image_grid_thw": torch.tensor([(i.grid_t, i.grid_h, i.grid_w) for i in prompt.items]),
                "mm_token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).int(),
            }
        return inputs

    @torch.no_grad()
    def reference_logits(self, prompt: Prompt) -> npt.NDArray[np.float32]:
        """[num_tokens, vocab_size]"""
        return np.asarray(self.reference(**self.reference_inputs(prompt)).logits[0].numpy())

    @torch.no_grad()
    def reference_tokens(self, prompt: Prompt, num_tokens: int) -> list[int]:
        output = self.reference.generate(
            **self.reference_inputs(prompt),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return [int(token) for token in output[0, len(prompt.token_ids) :]]


def reference_pixels(config: ModelConfig, files: Sequence[bytes]) -> npt.NDArray[np.float32]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    assert config.image is not None
    image = config.image
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels},
        patch_size=image.patch_size,
        temporal_patch_size=image.temporal_patch_size,
        merge_size=image.merge_size,
        image_mean=list(image.mean),
        image_std=list(image.std),
    )
    images = [Image.open(io.BytesIO(data)) for data in files]
    return np.asarray(processor(images=images, return_tensors="np")["pixel_values"])


def encode(model: Model, images: Sequence[ImageInput]) -> list[npt.NDArray[np.float32] | Exception]:
    """Rows of each image, read back from the blocks of a pool that held other numbers before, or what is wrong with the image."""
    assert model.vision_weights is not None
    block_rows, width = 8, model.config.embedding_width
    num_blocks = [-(-image.num_tokens // block_rows) for image in images]
    backend = CpuBackend()
    spec = PoolSpec(sum(num_blocks), block_rows * width * 4, "embedding", model.config.embedding_layout())
    pool = backend.allocate_pool(spec)
    pool.blocks[:] = 7
    runner = VisionModelRunner(model.config, model.vision_weights, backend, pool, block_rows)
    free = iter(np.random.default_rng(3).permutation(sum(num_blocks)).tolist())
    ids = [[next(free) for _ in range(count)] for count in num_blocks]
    outcomes = runner.encode_patches([runner.preprocess(image) for image in images], [image.grid for image in images], ids)
    rows: list[npt.NDArray[np.float32] | Exception] = []
    for image, outcome, image_ids in zip(images, outcomes, ids, strict=True):
        if isinstance(outcome, Exception):
            rows.append(outcome)
            continue
        assert outcome == pool.checksum(image_ids)
        written = pool.array(np.float32, (block_rows, width))[image_ids].reshape(-1, width)
        assert not written[image.num_tokens :].any()
        rows.append(written[: image.num_tokens].astype(np.float32))
    runner.close()
    backend.close()
    return rows


class Engine:
    """A TextModelRunner over a pool whose blocks are handed out once, in an order that is not sorted."""

    def __init__(self, model: Model, *, block_size: int = 16, num_blocks: int = 256) -> None:
        self.model = model
        self.block_size = block_size
        self.backend = CpuBackend()
        shape = model.config.kv_block_shape(block_size)
        spec = PoolSpec(num_blocks, int(np.prod(shape)) * 4, "kv", model.config.kv_layout(block_size))
        self.pool: HostPool = self.backend.allocate_pool(spec)
        self.runner = TextModelRunner(model.config, model.text_weights, self.backend, self.pool, block_size)
        self._free: Iterator[int] = iter(np.random.default_rng(7).permutation(num_blocks).tolist())

    def sequence(self, prompt: Prompt, sampling: Sampling = GREEDY, *, num_tokens: int = 8) -> Running:
        return Running(self, prompt, self.model.encode(prompt), sampling, num_tokens)

    def blocks(self, num_tokens: int) -> npt.NDArray[np.int32]:
        return np.array([next(self._free) for _ in range(-(-num_tokens // self.block_size))], np.int32)

    def generate(self, prompt: Prompt, sampling: Sampling = GREEDY, *, num_tokens: int = 8, chunk: int = 10_000) -> list[Token]:
        running = self.sequence(prompt, sampling, num_tokens=num_tokens)
        while not running.done:
            running.take(self.runner.execute(StepPlan((running.step(chunk),))).tokens[0])
        return running.output

    def close(self) -> None:
        self.runner.close()
        self.backend.close()


class Running:
    """One request on its way through an engine."""

    def __init__(
        self, engine: Engine, prompt: Prompt, rows: Sequence[npt.NDArray[np.float32]], sampling: Sampling, num_tokens: int
    ) -> None:
        self.prompt, self.rows, self.sampling, self.num_tokens = prompt, rows, sampling, num_tokens
        self.merge = engine.model.config.vision.merge_size if engine.model.config.vision else 1
        self.positions = mrope_positions(len(prompt.token_ids), prompt.items, self.merge)
        self.block_table = engine.blocks(len(prompt.token_ids) + num_tokens)
        self.computed = 0
        self.output: list[Token] = []
        self._in_step = 0

    @property
    def done(self) -> bool:
        return len(self.output) >= self.num_tokens

    def step(self, chunk: int) -> SequenceStep:
        length = len(self.prompt.token_ids)
        outputs = np.array([token.token_id for token in self.output], np.int32)
        if self.computed >= length:
            token_ids = outputs[self.computed - length : self.computed - length + 1]
            position = mrope_next(self.computed, self.prompt.items, self.merge)
            positions = np.full((3, 1), position, np.int32)
        else:
            token_ids = self.prompt.token_ids[self.computed : self.computed + chunk]
            positions = self.positions[:, self.computed : self.computed + chunk]
        self._in_step = len(token_ids)
        end = self.computed + len(token_ids)
        spans = []
        for item, rows in zip(self.prompt.items, self.rows, strict=True):
            first, last = max(self.computed, item.offset), min(end, item.offset + item.num_tokens)
            if first < last:
                spans.append(EmbeddingSpan(first - self.computed, rows[first - item.offset : last - item.offset]))
        request = SampleRequest(self.sampling, self.prompt.token_ids, outputs) if end >= length else None
        return SequenceStep(RequestId("r"), token_ids, self.computed, positions, self.block_table, tuple(spans), request)

    def take(self, token: Token | None) -> None:
        self.computed += self._in_step
        if token is not None:
            self.output.append(token)


def image_rows(output: Any, num_tokens: Sequence[int]) -> list[Tensor]:
    """Of what `get_image_features` answers, per image [num_tokens, embedding_width].

    Releases of transformers differ in whether the rows of all images are one tensor.
    """
    parts = (output.pooler_output, *output.deepstack_features)
    together = torch.cat([part if isinstance(part, Tensor) else torch.cat(tuple(part)) for part in parts], dim=1)
    return list(together.split(list(num_tokens)))


def half_image_rows(rows: Tensor | Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """One of the parts of such an answer, in bfloat16."""
    return rows.bfloat16() if isinstance(rows, Tensor) else tuple(each.bfloat16() for each in rows)


def png(random: np.random.Generator, width: int, height: int, mode: str = "RGB", format: str = "PNG") -> bytes:
    """A picture with smooth and rough parts."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = random.integers(0, 256, (height // 3 + 1, width // 3 + 1, bands), np.uint8)
    pixels = np.repeat(np.repeat(noise, 3, 0), 3, 1)[:height, :width]
    pixels[: height // 2] = random.integers(0, 256, (height // 2, width, bands), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if bands == 1 else pixels, mode=mode).save(buffer, format)
    return buffer.getvalue()


def _make_reference(case: Case, folder: Path) -> Any:
    torch.manual_seed(sum(map(ord, case.name)))
    if case.vision:
        vision = {**case.vision, "out_hidden_size": case.text["hidden_size"]}
        options = {
            "text_config": {**case.text, "tie_word_embeddings": case.tied},
            "vision_config": vision,
            "tie_word_embeddings": case.tied,
            **TOKENS,
        }
        if case.has_experts:
            model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**options))
        else:
            model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**options))
    elif case.has_experts:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**case.text, tie_word_embeddings=case.tied))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**case.text, tie_word_embeddings=case.tied))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    model.eval().save_pretrained(folder)
    if case.vision:
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return model
