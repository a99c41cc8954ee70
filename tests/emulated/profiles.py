"""A profile with round numbers."""

from __future__ import annotations

from epd.emulated.profile import CopyCosts, Model, Profile, TextCosts, VisionCosts

PROFILE = Profile(
    device="D1",
    provenance="roofline",
    source="made for tests",
    memory_bytes=1 << 30,
    model=Model("M", kv_token_bytes=1000, embedding_row_bytes=100, weight_bytes=1 << 20, vision_weight_bytes=1 << 18),
    text=TextCosts(rows=((1, 0.010), (100, 0.010), (200, 0.020)), pair_s=1e-6, context_s=1e-5),
    vision=VisionCosts(patches=((1, 0.001), (1000, 0.1)), pair_s=0.0, preprocess=((1, 0.0), (1000, 0.0))),
    copies=CopyCosts(latency_s=0.0, bytes_per_s=1e12),
)
