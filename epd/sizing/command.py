"""`epd plan`: from its options to its answer."""

from __future__ import annotations

import json

from epd.config import PlanConfig
from epd.emulated.profile import load_profile
from epd.errors import BadConfig
from epd.model.config import ImageConfig, load_model_config
from epd.sizing.demand import Steps
from epd.sizing.plan import Targets, plan_devices, plan_rate
from epd.sizing.predict import Model
from epd.sizing.render import as_json, text
from epd.sizing.workload import parse_workload

QWEN3_VL = ImageConfig(
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=65_536,
    max_pixels=16_777_216,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    resample=3,
    rescale_factor=1 / 255,
)
"""How images become patches where no model is named: as for the model that the shipped GPU profiles are of."""


def answer(config: PlanConfig) -> str:
    """What is printed.

    Raises:
        BadConfig: there is no such profile or model, the workload makes no sense, or nothing keeps the targets.
    """
    profile = load_profile(config.profile)
    image: ImageConfig | None = load_model_config(config.model).image if config.model else QWEN3_VL
    if image is None:
        raise BadConfig(f"--model {config.model} takes no images")
    workload = parse_workload(config.workload, image)
    model = Model(profile, workload, Steps(config.chunk_tokens, config.max_running))
    targets = Targets(config.ttft_s, config.itl_s)
    plan = plan_devices(model, targets, config.devices) if config.devices else plan_rate(model, targets, config.rate)
    if config.is_json:
        return json.dumps(as_json(plan, targets, profile, config.workload), indent=2, allow_nan=False)
    return text(plan, targets, profile, config.workload)
