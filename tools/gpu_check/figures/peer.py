"""The same through `transformers` on the same device: its model of the same geometry, its static cache, its SDPA attention.

Decode is measured as its `generate` runs it: one compiled call a step (`reduce-overhead`: graphs as well) over a static cache,
after the same call uncompiled. Weights and cache hold random numbers. Imports no backend and no kernels of ours: only counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epd.model.config import ModelConfig, load_model_config
from epd.model.preprocess import smart_resize
from tools.bench.rows import Row, make_row
from tools.gpu_check.figures.counts import decode_weight_bytes, kv_token_bytes, prefill_flop, vision_flop
from tools.gpu_check.figures.decode import KV_COUNTS_FROM, decode_name, short
from tools.gpu_check.figures.rig import Loads
from tools.gpu_check.figures.timing import open_timer
from tools.gpu_check.found import Figures, Limits, Missing

_WARM_UPS = 3
COMPILE_S = 60.0  # so long may it take to compile


@dataclass
class PeerRig:
    """`compile_until`: on time.monotonic, when a compilation has to have begun by; 0 compiles nothing."""

    folder: Path
    device: torch.device
    dtype: torch.dtype
    limits: Limits
    loads: Loads = field(default_factory=Loads)
    compile_until: float = 0.0

    def __post_init__(self) -> None:
        self.config: ModelConfig = load_model_config(self.folder)
        self.timer = open_timer(self.device)
        self.model: Any = _build(self.folder, self.device, self.dtype)


def run(rig: PeerRig) -> Figures:
    """What costs least first; what is compiled, which may take the rest of the time, last."""
    parts: list[tuple[str, Callable[[], Row]]] = [
        (_named(f"prefill, {short(rig.loads.prefill_tokens)} tokens"), lambda: _prefill(rig)),
        (_named("vision tower"), lambda: _vision(rig)),
    ]
    for batch, context in rig.loads.decode:
        name = _named(decode_name(batch, context))
        parts.append((name, partial(_decode, rig, batch, context)))
    for name, part in parts:
        yield _attempt(rig, name, part)
    for batch, context in rig.loads.decode:
        name = _named(decode_name(batch, context), compiled=True)
        if time.monotonic() > rig.compile_until:
            yield Missing(name, "no time was left to compile it")
            continue
        yield _attempt(rig, name, partial(_decode, rig, batch, context, compiled=True))


def _attempt(rig: PeerRig, name: str, part: Callable[[], Row]) -> Row | Missing:
    try:
        with torch.no_grad():
            return part()
    except Exception as error:  # of a peer: the row says why it is empty
        return Missing(name, f"{type(error).__name__}: {str(error)[:300]}")
    finally:
        if rig.device.type == "cuda":
            torch.cuda.empty_cache()


def _named(name: str, *, compiled: bool = False) -> str:
    return f"transformers{', compiled' if compiled else ''}: {name}"


def _build(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Made where it will be, all weights drawn again: what a constructor leaves might be zeros, or worse."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.to(device=device, dtype=dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.02)
    return model


def _decode(rig: PeerRig, batch: int, context: int, *, compiled: bool = False) -> Row:
    text, language, head = rig.config.text, rig.model.model.language_model, rig.model.lm_head
    num_steps = min(rig.loads.decode_steps if compiled else rig.loads.rounds, context // 2)
    cache = _cache(rig, batch, context, num_steps + _WARM_UPS)
    token_ids = torch.ones(batch, 1, dtype=torch.int64, device=rig.device)

    def step(ids: Tensor) -> Tensor:
        hidden = language(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        chosen: Tensor = head(hidden[:, -1]).argmax(-1, keepdim=True)
        return chosen

    call, compile_s = step, 0.0
    if compiled:
        call = torch.compile(step, mode="reduce-overhead", fullgraph=False, dynamic=False)
        started = time.perf_counter()
        call(token_ids)
        rig.timer.synchronize()
        compile_s = time.perf_counter() - started
        if compile_s > COMPILE_S:
            raise RuntimeError(f"compiling took {compile_s:.0f} s, more than {COMPILE_S:.0f}")
    seconds = rig.timer.median_s(lambda: call(token_ids), rounds=num_steps, warm_ups=_WARM_UPS - 1)
    num_bytes = float(decode_weight_bytes(rig.config, rig.dtype.itemsize))
    if batch >= KV_COUNTS_FROM:
        num_bytes += batch * (context - num_steps / 2) * kv_token_bytes(text, rig.dtype.itemsize)
    return make_row(
        _named(f"{decode_name(batch, context)}: bytes read", compiled=compiled),
        num_bytes / seconds / 1e9,
        "GB/s",
        baseline=rig.limits.copy_bytes_per_s / 1e9,
        note=f"{1e3 * seconds:.3f} ms a step, static cache, SDPA"
        + (f"; compiled in {compile_s:.0f} s" if compiled else ", eager"),
    )


def _cache(rig: PeerRig, batch: int, context: int, num_steps: int) -> Any:
    """As full as it is just before the last `num_steps` of a context, of random numbers."""
    from transformers import StaticCache

    text = rig.config.text
    cache = StaticCache(config=rig.model.config.get_text_config(), max_cache_len=context)
    cache.early_initialization(batch, text.num_kv_heads, text.head_dim, rig.dtype, rig.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context - num_steps)
    return cache


def _prefill(rig: PeerRig) -> Row:
    """One forward pass with a cache that grows, logits of the last token only."""
    num_tokens = rig.loads.prefill_tokens
    token_ids = torch.randint(0, rig.config.text.vocab_size, (1, num_tokens), device=rig.device)

    def forward() -> None:
        hidden = rig.model.model.language_model(input_ids=token_ids, use_cache=True).last_hidden_state
        rig.model.lm_head(hidden[:, -1]).argmax(-1)

    seconds = rig.timer.median_s(forward, rounds=3, warm_ups=1)
    return make_row(
        _named(f"prefill, {short(num_tokens)} tokens, in one chunk"),
        prefill_flop(rig.config.text, num_tokens) / seconds / 1e12,
        "TFLOP/s",
        baseline=rig.limits.flop_per_s / 1e12,
        note=f"{1e3 * seconds:.1f} ms, eager, SDPA",
    )


def _vision(rig: PeerRig) -> Row:
    vision, image = rig.config.vision, rig.config.image
    if vision is None or image is None:
        raise ValueError("this model has no vision tower")
    width, height = rig.loads.image_size
    rows, columns = smart_resize(
        height,
        width,
        factor=image.patch_size * image.merge_size,
        min_pixels=image.min_pixels,
        max_pixels=image.max_pixels,
    )
    grid = (1, rows // image.patch_size, columns // image.patch_size)
    count, num_patches = rig.loads.num_images, grid[1] * grid[2]
    pixels = torch.randn(count * num_patches, vision.patch_width, device=rig.device).to(rig.dtype)
    grids = torch.tensor([grid] * count, device=rig.device)
    seconds = rig.timer.median_s(lambda: rig.model.model.visual(pixels, grid_thw=grids), rounds=3, warm_ups=1)
    return make_row(
        _named(f"vision tower, {count} images of {width} x {height}"),
        count * vision_flop(vision, num_patches) / seconds / 1e12,
        "TFLOP/s",
        baseline=rig.limits.flop_per_s / 1e12,
        note=f"{1e3 * seconds:.1f} ms from numbers on the device to rows on it, eager, SDPA",
    )
