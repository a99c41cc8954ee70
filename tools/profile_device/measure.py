"""A profile out of a device: its own runners over its own pools, step by step.

Every step is timed from its way onto the stream to its result. The cost of attention is told from that of the rest by steps
that differ in context alone. What the profile then says about steps that it was not made from is its error, which is reported.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from epd.cluster.build import StageParts
from epd.cluster.sizes import EMBEDDING_BLOCK_ROWS
from epd.emulated.cost import text_s, text_work
from epd.emulated.profile import CopyCosts, Curve, Model, Profile, TextCosts, VisionCosts
from epd.model.preprocess import image_grid, num_image_tokens
from epd.model.shapes import active_share, count_numbers, text_shapes, vision_shapes
from epd.step import ImageInput, SampleRequest, SequenceStep, StepPlan
from gpu.stream import Stream
from protocol.messages import RequestId, Sampling

_ROUNDS = 7
_DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CHUNK_ROWS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_SIDES = (64, 128, 256, 512, 1024, 1536)
_NOTHING = np.empty(0, np.int32)

Step = tuple[tuple[int, int], ...]  # (new tokens, tokens before) of each sequence


@dataclass(frozen=True, slots=True)
class Fit:
    """A profile, and by how much it is off for steps that it was not made from (name, predicted seconds, measured seconds)."""

    profile: Profile
    checks: tuple[tuple[str, float, float], ...]

    @property
    def worst(self) -> float:
        return max(abs(predicted / measured - 1) for _, predicted, measured in self.checks)


def measure(parts: StageParts, *, device: str, source: str) -> Fit:
    """Profile what `parts` has loaded; all three roles, in one process."""
    stream = parts.stack.backend.open_stream("profile")
    text = _Text(parts, stream)
    costs = text.costs()
    vision = _vision(parts, stream)
    dtype_bytes = parts.sizes.embedding_block_bytes // (EMBEDDING_BLOCK_ROWS * parts.stack.embedding_width)
    config = parts.model
    assert config.vision is not None
    profile = Profile(
        device=device,
        provenance="measured",
        source=source,
        memory_bytes=parts.stack.backend.memory_budget(),
        model=Model(
            name=parts.config.served_model_name or Path(parts.config.model).name,
            kv_token_bytes=parts.sizes.kv_block_bytes // parts.config.engine.block_size,
            embedding_row_bytes=config.embedding_width * dtype_bytes,
            weight_bytes=count_numbers(text_shapes(config)) * dtype_bytes,
            vision_weight_bytes=count_numbers(vision_shapes(config.vision)) * dtype_bytes,
            active_share=active_share(config),
        ),
        text=costs,
        vision=vision,
        copies=_copies(parts, stream),
    )
    checks = [(name, text_s(profile, text_work(step)), text.seconds(step)) for name, step in text.unseen_steps()]
    return Fit(profile, tuple(checks))


class _Text:
    """Times steps of the language model."""

    def __init__(self, parts: StageParts, stream: Stream) -> None:
        self._runner = parts.text_runners["prefill"]
        self._stream = stream
        self._block_size = parts.config.engine.block_size
        self._num_slots = parts.sizes.num_kv_blocks * self._block_size
        self._longest = min(parts.sizes.max_model_len, self._num_slots // 2)
        self._max_rows = min(parts.config.engine.token_budget, self._longest)
        self._max_running = parts.config.engine.max_running

    def costs(self) -> TextCosts:
        deep = self._longest // 2
        few = [n for n in _DECODE_ROWS if n <= self._max_running and n * 16 <= self._num_slots]
        many = [n for n in _CHUNK_ROWS if n <= self._max_rows]
        progress = tqdm(total=len(few) + len(many) + 4, desc="steps of the language model", unit="step")

        def seconds(step: Step) -> float:
            taken = self.seconds(step)
            progress.update()
            return taken

        width = min(4, max(1, self._num_slots // (2 * deep)))
        shallow_s, deep_s = seconds(((1, 0),) * width), seconds(((1, deep),) * width)
        context_s = max(0.0, (deep_s - shallow_s) / (width * deep))
        chunk = max(2, min(many[-1] // 2, self._longest - deep))
        first_s, later_s = seconds(((chunk, 0),)), seconds(((chunk, deep),))
        pair_s = max(0.0, (later_s - first_s) / (chunk * deep))
        points = {n: max(1e-9, seconds(((1, 15),) * n) - context_s * 16 * n) for n in few}
        for n in many:
            if n > few[-1]:
                points[n] = max(1e-9, seconds(((n, 0),)) - pair_s * n * (n + 1) / 2)
        progress.close()
        return TextCosts(rows=_rising(points), pair_s=pair_s, context_s=context_s)

    def unseen_steps(self) -> list[tuple[str, Step]]:
        quarter = self._longest // 4
        batch = max(1, min(6, self._num_slots // (2 * quarter)))
        chunk = max(2, min(self._max_rows * 3 // 8, self._longest - quarter))
        return [
            (f"decode, {batch} x {quarter} tokens of context", ((1, quarter),) * batch),
            (f"a chunk of {chunk} after {quarter}", ((chunk, quarter),)),
            (f"a chunk of {chunk} beside {batch} x {quarter}", ((chunk, 0), *((1, quarter),) * batch)),
        ]

    def seconds(self, step: Step) -> float:
        plan = self._plan(step)
        return _median(lambda: self._stream.submit(self._runner.execute, plan).result())

    def _plan(self, step: Step) -> StepPlan:
        """Sequences over blocks of their own, where there are enough; what is in them does not matter."""
        num_blocks = self._num_slots // self._block_size
        sequences = []
        for index, (num_new, before) in enumerate(step):
            needed = -(-(before + num_new) // self._block_size)
            table = (np.arange(needed, dtype=np.int32) + index * needed) % num_blocks
            positions = np.broadcast_to(np.arange(before, before + num_new, dtype=np.int32), (3, num_new))
            sequences.append(
                SequenceStep(
                    request_id=RequestId(f"profile-{index}"),
                    token_ids=np.ones(num_new, np.int32),
                    num_computed_tokens=before,
                    positions=np.ascontiguousarray(positions),
                    block_table=table,
                    sample=SampleRequest(Sampling(temperature=0.0), _NOTHING, _NOTHING),
                )
            )
        return StepPlan(tuple(sequences))


def _vision(parts: StageParts, stream: Stream) -> VisionCosts:
    """Square images of several sizes, alone; the cost of pairs from one image against several of the same patches."""
    runner, config = parts.vision_runner, parts.model.image
    assert runner is not None
    assert config is not None

    def image(side: int) -> ImageInput:
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(side).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(buffer, "JPEG")
        grid = image_grid(buffer.getvalue(), config)
        return ImageInput(str(side), buffer.getvalue(), grid, num_image_tokens(grid, config.merge_size))

    room = parts.sizes.num_embedding_blocks * EMBEDDING_BLOCK_ROWS
    images: dict[tuple[int, int, int], ImageInput] = {}
    for each in map(image, _SIDES):
        if each.num_tokens <= room:
            images.setdefault(each.grid, each)  # the smallest file of those that are brought to one size
    made: dict[int, float] = {}
    taken: dict[int, float] = {}

    def encode_times(count: int, each: ImageInput) -> float:
        patches, grids = [runner.preprocess(each)] * count, [each.grid] * count
        blocks = -(-each.num_tokens // EMBEDDING_BLOCK_ROWS)
        ids = [list(range(blocks))] * count
        return _median(lambda: stream.submit(runner.encode_patches, patches, grids, ids).result())

    for each in tqdm(list(images.values()), desc="images", unit="image"):
        count = each.grid[0] * each.grid[1] * each.grid[2]
        made[count] = _median(partial(runner.preprocess, each))
        taken[count] = encode_times(1, each)
    small, large = min(images.values(), key=_num_patches), max(images.values(), key=_num_patches)
    times = max(1, min(_num_patches(large) // _num_patches(small), 64))
    many_s = encode_times(times, small) if len(images) > 1 else taken[_num_patches(large)]
    pairs = _num_patches(large) ** 2 - times * _num_patches(small) ** 2
    pair_s = max(0.0, (taken[_num_patches(large)] - many_s) / pairs) if pairs > 0 else 0.0
    points = {count: max(1e-9, seconds - pair_s * count * count) for count, seconds in taken.items()}
    if len(points) == 1:  # a model that brings every image to one size
        points[times * _num_patches(small) * 4] = encode_times(4, small)
        made[_num_patches(small) * 4] = 4 * made[_num_patches(small)]
    return VisionCosts(patches=_rising(points), pair_s=pair_s, preprocess=_rising(made))


def _copies(parts: StageParts, stream: Stream) -> CopyCosts:
    """Within the KV pool: from its first half to its second."""
    pool = parts.kv_memory
    assert pool is not None
    half = min(pool.num_blocks // 2, max(2, (256 << 20) // pool.block_bytes))
    sums = stream.submit(pool.checksum, range(half)).result()

    def seconds(count: int) -> float:
        def copy() -> int:
            return stream.submit(pool.copy_from, pool, range(count), range(half, half + count), sums[:count]).result()

        return _median(copy)

    one, all_of_them = seconds(1), seconds(half)
    return CopyCosts(latency_s=one, bytes_per_s=(half - 1) * pool.block_bytes / max(1e-9, all_of_them - one))


def _median(work: Callable[[], object]) -> float:
    work()
    durations = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        durations.append(time.perf_counter() - started)
    return statistics.median(durations)


def _rising(points: dict[int, float]) -> Curve:
    """Noise must not make more work cheaper."""
    curve: list[tuple[float, float]] = []
    for amount in sorted(points):
        curve.append((float(amount), max(points[amount], curve[-1][1] if curve else 0.0)))
    return tuple(curve)


def _num_patches(image: ImageInput) -> int:
    return image.grid[0] * image.grid[1] * image.grid[2]
