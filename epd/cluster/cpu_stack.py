"""Stages on the CPU: host memory, threads as streams, compiled kernels."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from epd.cluster.sizes import EMBEDDING_BLOCK_ROWS, DeviceMemory, Sizes, decide
from epd.cluster.stack import Report
from epd.config import ServeConfig
from epd.errors import InternalError
from epd.model.config import ModelConfig
from epd.model.guides import Guides, GuideVocabulary
from epd.model.runner import TextModelRunner, VisionModelRunner
from epd.model.text import TextModel
from epd.model.vision import VisionModel
from epd.model.weights import load_text_weights, load_vision_weights
from gpu.cpu import CpuBackend
from gpu.kernels.compiler import warm_up
from gpu.pool import Pool
from gpu.stream import Stream
from gpu.utilisation import Meter, open_meter


class CpuStack:
    steps_in_flight = 1  # one thread does both halves of a step

    def __init__(self, config: ServeConfig, folder: Path, model: ModelConfig) -> None:
        self.backend = CpuBackend()
        self.embedding_width = model.embedding_width
        self._config = config
        self._folder = folder
        self._model = model
        self._text: TextModel | None = None
        self._vision: VisionModel | None = None
        self._vocabulary: GuideVocabulary | None = None

    def decide(self, roles: Collection[str]) -> Sizes:
        memory = DeviceMemory.of_host(self.backend.memory_budget())
        return decide(self._model, self._config.engine, memory=memory, roles=roles)

    def load(self, roles: Collection[str], report: Report) -> None:
        config, model = self._config, self._model
        if "encode" in roles and model.vision is not None:
            report("loading the vision tower")
            self._vision = VisionModel(model.vision, load_vision_weights(model, self._folder, config.load_format))
        if {"prefill", "decode"} & set(roles):
            report("loading the language model")
            self._text = TextModel(model, load_text_weights(model, self._folder, config.load_format))
            self._vocabulary = GuideVocabulary(model, self._folder)

    def stage_stream(self, stage: str) -> Stream:
        return self.backend.open_stream(stage)

    def vision_runner(self, embeddings: Pool, stream: Stream, report: Report) -> VisionModelRunner:
        if self._vision is None:
            raise InternalError("the vision tower has not been loaded")
        return VisionModelRunner(
            self._model, self._vision, self.backend, embeddings, EMBEDDING_BLOCK_ROWS, self._config.num_threads
        )

    def text_runner(self, kv: Pool, stage: str, stream: Stream, report: Report) -> TextModelRunner:
        if self._text is None or self._vocabulary is None:
            raise InternalError("the language model has not been loaded")
        warm_up(lambda name, done, total: report(f"compiling kernels: {name} ({done + 1} of {total})") if name else None)
        return TextModelRunner(
            self._model,
            self._text,
            self.backend,
            kv,
            self._config.engine.block_size,
            self._config.num_threads,
            Guides(self._vocabulary),
        )

    def open_meter(self) -> Meter:
        return open_meter("cpu")

    def close(self) -> None:
        self.backend.close()
