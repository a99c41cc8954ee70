"""Stages on a CUDA device: bfloat16 weights and KV, one stream each, decode before prefill before encode where they meet."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from epd.cluster.sizes import EMBEDDING_BLOCK_ROWS, DeviceMemory, Sizes, decide
from epd.cluster.stack import Report
from epd.config import ServeConfig
from epd.errors import InternalError
from epd.model.config import ModelConfig
from epd.model.device.graphs import GraphOptions
from epd.model.device.runner import DeviceTextRunner
from epd.model.device.text import DeviceTextModel
from epd.model.device.vision import DeviceVisionModel
from epd.model.device.vision_runner import DeviceVisionRunner
from epd.model.guides import Guides, GuideVocabulary
from epd.model.weights import Placement, load_text_weights, load_vision_weights
from gpu.cuda.backend import CudaBackend
from gpu.cuda.pool import CudaPool
from gpu.pool import Pool
from gpu.stream import Stream
from gpu.utilisation import Meter, open_meter

_PRIORITIES = {"decode": 0, "prefill": 10, "encode": 19}  # as streams take them: 0 is served first


class CudaStack:
    """`backend` is this object's from now on."""

    steps_in_flight = 2

    def __init__(self, config: ServeConfig, folder: Path, model: ModelConfig, backend: CudaBackend) -> None:
        self.backend = backend
        self.embedding_width = model.embedding_width
        self._config = config
        self._folder = folder
        self._model = model
        self._placement = Placement(backend.torch_device, "float32" if backend.dtype == "float32" else "bfloat16")
        self._sizes: Sizes | None = None
        self._text: DeviceTextModel | None = None
        self._vision: DeviceVisionModel | None = None
        self._vocabulary: GuideVocabulary | None = None

    def decide(self, roles: Collection[str]) -> Sizes:
        memory = DeviceMemory(
            total_bytes=self.backend.driver.info.total_bytes,
            free_bytes=self.backend.memory_budget(),
            fraction=self._config.memory_fraction,
            dtype_bytes=self._placement.torch_dtype.itemsize,
            is_host=False,
        )
        self._sizes = decide(self._model, self._config.engine, memory=memory, roles=roles)
        return self._sizes

    def load(self, roles: Collection[str], report: Report) -> None:
        self.backend.driver.use()
        config, model, placement = self._config, self._model, self._placement
        device, dtype = self.backend.driver.torch_device, placement.torch_dtype
        report(f"{self.backend.driver.info.name}, {self.backend.kernels.name} kernels, {self.backend.dtype}")
        if "encode" in roles and model.vision is not None and model.image is not None:
            report("loading the vision tower")
            weights = load_vision_weights(model, self._folder, config.load_format, placement=placement)
            self._vision = DeviceVisionModel(model.vision, model.image, weights, device, dtype)
        if {"prefill", "decode"} & set(roles):
            report("loading the language model")
            weights = load_text_weights(model, self._folder, config.load_format, placement=placement)
            self._text = DeviceTextModel(model, weights, self.backend.kernels, device, dtype)
            self._vocabulary = GuideVocabulary(model, self._folder)

    def stage_stream(self, stage: str) -> Stream:
        return self.backend.open_stream(stage, priority=_PRIORITIES[stage])

    def vision_runner(self, embeddings: Pool, stream: Stream, report: Report) -> DeviceVisionRunner:
        if self._vision is None or self._model.image is None:
            raise InternalError("the vision tower has not been loaded")
        pool = _own(embeddings)
        rows = pool.array(self._placement.torch_dtype, (EMBEDDING_BLOCK_ROWS, self.embedding_width))
        runner = DeviceVisionRunner(self._vision, self._model.image, rows, pool.checksum)
        report("choosing the vision tower's attention")
        stream.submit(runner.prepare).result()
        return runner

    def text_runner(self, kv: Pool, stage: str, stream: Stream, report: Report) -> DeviceTextRunner:
        if self._text is None or self._sizes is None or self._vocabulary is None:
            raise InternalError("the language model has not been loaded")
        engine = self._config.engine
        runner = DeviceTextRunner(
            self._text,
            _own(kv).array(self._placement.torch_dtype, self._model.kv_block_shape(engine.block_size)),
            max_sequences=engine.max_running,
            max_model_len=self._sizes.max_model_len,
            max_tokens=engine.token_budget if stage == "prefill" else 1,
            # A prompt's step is seldom of single tokens, and graphs hold memory for the largest.
            graphs=GraphOptions() if stage == "decode" else GraphOptions(max_batch=0),
            guides=Guides(self._vocabulary),
        )
        report(f"compiling kernels and capturing graphs of {stage}")
        stream.submit(runner.prepare).result()
        return runner

    def open_meter(self) -> Meter:
        return open_meter(self._config.device)

    def close(self) -> None:
        self.backend.close()


def _own(pool: Pool) -> CudaPool:
    if not isinstance(pool, CudaPool):
        raise InternalError(f"a {type(pool).__name__} is not on a CUDA device")
    return pool
