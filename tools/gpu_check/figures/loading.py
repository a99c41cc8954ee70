"""Weights from a checkpoint onto the device, beside reading the same file into host memory as fast as this machine does."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from epd.model.config import load_model_config
from epd.model.shapes import text_shapes, vision_shapes
from epd.model.weights import load_text_weights
from tools.bench.rows import make_row
from tools.gpu_check.figures.rig import Rig
from tools.gpu_check.found import Figures, Missing

_READERS = 4  # as many as load weights
_PIECE_BYTES = 16 << 20
_SLOW_WRITE_S = 12.0  # a disk so slow that reading it cold would take the other parts' time
NUM_LAYERS = 4


def run(rig: Rig, parent: Path | None = None) -> Figures:
    """`parent`: where the checkpoint is written, and deleted after; the system's folder for temporary files if not given."""
    rig.give_back()
    with tempfile.TemporaryDirectory(prefix="epd-gpu-check-", dir=parent) as folder:
        started = time.perf_counter()
        file = write_checkpoint(rig, Path(folder))
        size, written_s = file.stat().st_size, time.perf_counter() - started
        config = load_model_config(folder)
        num_bytes = 0

        def load() -> None:
            nonlocal num_bytes
            weights = load_text_weights(config, folder, placement=rig.placement)
            num_bytes = weights.num_bytes
            rig.timer.synchronize()
            del weights
            rig.give_back()

        for state, prepare in (("cached by the host", _warm), ("not cached", _cold)):
            if prepare is _cold and written_s > _SLOW_WRITE_S:
                yield Missing(
                    "weights, not cached", f"writing {size / 1e9:.1f} GB took {written_s:.0f} s: reading would take as long"
                )
                break
            read_s = _best_s(partial(prepare, file), lambda: read_all(file))
            loaded_s = _best_s(partial(prepare, file), load)
            yield make_row(
                f"loading weights, {state}",
                num_bytes / loaded_s / 1e9,
                "GB/s",
                baseline=size / read_s / 1e9,
                note=f"{num_bytes / 1e9:.2f} GB to the device in {loaded_s:.2f} s; baseline: {_READERS} threads read the file",
            )


def write_checkpoint(rig: Rig, folder: Path) -> Path:
    """A folder as the rig's, of fewer layers and with one table for embedding and output: random weights in the rig's dtype."""
    from safetensors.torch import save_file

    for each in rig.folder.iterdir():
        if each.is_file() and each.suffix != ".safetensors" and each.name != "config.json":
            shutil.copy(each, folder)
    tree = json.loads((rig.folder / "config.json").read_text())
    text = tree.get("text_config", tree)
    text["num_hidden_layers"] = min(NUM_LAYERS, text["num_hidden_layers"])
    tree["tie_word_embeddings"] = text["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(tree))
    config = load_model_config(folder)
    shapes = text_shapes(config) | (vision_shapes(config.vision) if config.vision else {})
    tensors = {name: torch.randn(shape, device=rig.device).to(rig.dtype).cpu() for name, shape in shapes.items()}
    file = folder / "model.safetensors"
    save_file(tensors, file)
    rig.give_back()
    return file


def read_all(file: Path) -> None:
    """Into memory that is used again, by several threads."""
    size = file.stat().st_size
    descriptor = os.open(file, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(_READERS) as pool:
            share = -(-size // _READERS)
            list(pool.map(lambda number: _read(descriptor, number * share, min((number + 1) * share, size)), range(_READERS)))
    finally:
        os.close(descriptor)


def _read(descriptor: int, at: int, end: int) -> None:
    memory = memoryview(bytearray(min(_PIECE_BYTES, max(end - at, 1))))
    while at < end:
        got = os.preadv(descriptor, [memory[: end - at]], at)
        if not got:
            raise OSError("the file has been cut off")
        at += got


def _best_s(prepare: Callable[[], None], work: Callable[[], None]) -> float:
    durations = []
    for _ in range(2):
        prepare()
        started = time.perf_counter()
        work()
        durations.append(time.perf_counter() - started)
    return min(durations)


def _warm(file: Path) -> None:
    read_all(file)


def _cold(file: Path) -> None:
    """Written out and forgotten by the host, as far as it does what it is asked."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
