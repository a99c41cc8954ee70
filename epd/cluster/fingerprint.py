"""What the workers of one cluster must agree on, as one number."""

from __future__ import annotations

import hashlib
from pathlib import Path

from epd.config import ServeConfig
from epd.model.config import ModelConfig


def fingerprint(config: ServeConfig, folder: Path, model: ModelConfig) -> int:
    """Of geometry, block size and weights: names, sizes and beginnings of their files."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr((model, config.engine.block_size, config.load_format)).encode())
    if config.load_format != "dummy":
        for path in sorted(folder.glob("*.safetensors")):
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(65536))
    return int.from_bytes(digest.digest(), "little") >> 1
