"""A device with round numbers, and workloads for it."""

from __future__ import annotations

from epd.emulated.profile import CopyCosts, Model, Profile, TextCosts, VisionCosts
from epd.sizing.demand import Steps
from epd.sizing.predict import Model as Sizing
from epd.sizing.workload import Kind, Workload

DEVICE = Profile(
    device="D1",
    provenance="roofline",
    source="made for tests",
    memory_bytes=100_000_000,
    model=Model("M", kv_token_bytes=1000, embedding_row_bytes=100, weight_bytes=1_000_000, vision_weight_bytes=1000),
    text=TextCosts(rows=((1, 0.010), (100, 0.010), (200, 0.020)), pair_s=0.0, context_s=1e-6),
    vision=VisionCosts(patches=((0, 0.0), (1000, 0.1)), pair_s=0.0, preprocess=((0, 0.0), (1000, 0.05))),
    copies=CopyCosts(latency_s=0.0, bytes_per_s=1e9),
)
TEXT = Workload((Kind(text_tokens=1000, output_tokens=51),))
IMAGES = Workload((Kind(text_tokens=100, output_tokens=51, patches=(1000, 1000)),))
MIXED = Workload((Kind(text_tokens=1000, output_tokens=51, weight=3.0), IMAGES.kinds[0]))


def sizing(workload: Workload) -> Sizing:
    return Sizing(DEVICE, workload, Steps(chunk_tokens=500, max_running=100))
