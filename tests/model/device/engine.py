"""A DeviceTextRunner beside the CPU's, over a pool of its own, and where it is to run: here, or on the GPU there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from epd.model.device.graphs import GraphOptions
from epd.model.device.layers import TensorSource
from epd.model.device.runner import DeviceTextRunner
from epd.model.device.text import DeviceTextModel
from epd.model.device.work_queue import WorkQueue
from epd.model.positions import mrope_next
from epd.step import PENDING, SampleRequest, SequenceStep, StepOutput, StepPlan
from gpu.cuda.kernels import Kernels
from gpu.deferred import Deferred
from protocol.messages import RequestId, Sampling, Token
from tests.model.reference import GREEDY, Engine, Model, Prompt, Running

MAX_MODEL_LEN = 512
NO_GRAPHS = GraphOptions(max_batch=0)


@dataclass(frozen=True)
class Target:
    """Where and in what the model runs."""

    device: torch.device
    dtype: torch.dtype
    kernels: Kernels


class DeviceEngine(Engine):
    """`device_runner` has blocks of the numbers that the CPU's runner has, in other memory."""

    def __init__(
        self,
        model: Model,
        target: Target,
        *,
        block_size: int = 16,
        num_blocks: int = 256,
        max_sequences: int = 32,
        max_tokens: int = 1,
        graphs: GraphOptions | None = None,
        weights: TensorSource | None = None,
        queue: WorkQueue | None = None,
    ) -> None:
        super().__init__(model, block_size=block_size, num_blocks=num_blocks)
        # What is not written must not matter, so it is not a number.
        self.kv = torch.full((num_blocks, *model.config.kv_block_shape(block_size)), float("nan"), dtype=target.dtype)
        self.kv = self.kv.to(target.device)
        self.device_model = DeviceTextModel(
            model.config, weights or model.text_weights, target.kernels, target.device, target.dtype
        )
        self.device_runner = DeviceTextRunner(
            self.device_model,
            self.kv,
            max_sequences=max_sequences,
            max_model_len=MAX_MODEL_LEN,
            max_tokens=max_tokens,
            graphs=graphs,
            queue=queue,
        )

    def execute(self, steps: Sequence[SequenceStep]) -> tuple[Token | None, ...]:
        return self.device_runner.execute(StepPlan(tuple(steps))).value().tokens

    def generate(self, prompt: Prompt, sampling: Sampling = GREEDY, *, num_tokens: int = 8, chunk: int = 10_000) -> list[Token]:
        running = self.sequence(prompt, sampling, num_tokens=num_tokens)
        while not running.done:
            running.take(self.execute([running.step(chunk)])[0])
        return running.output

    def close(self) -> None:
        self.device_runner.close()
        super().close()


class Overlapped:
    """Requests that run with a step planned and launched before the tokens of the one before are known."""

    def __init__(self, engine: DeviceEngine, running: Sequence[Running]) -> None:
        self._engine = engine
        self._running = running

    def run(self) -> None:
        """Prompts whole, then steps until all are done; tokens past a request's last are drawn and thrown away."""
        active = list(range(len(self._running)))
        in_flight = [(active, self._launch([self._named(i, self._running[i].step(10_000)) for i in active]))]
        computed = [len(each.prompt.token_ids) for each in self._running]
        while in_flight:
            following = [i for i in active if not self._running[i].done]
            if following:
                steps = [self._step(i, computed[i]) for i in following]
                in_flight.append((following, self._launch(steps)))
                for i in following:
                    computed[i] += 1
            members, outcome = in_flight.pop(0)
            outputs = outcome.value()
            for i, token in zip(members, outputs.tokens, strict=True):
                if not self._running[i].done:
                    self._running[i].take(token)
            active = following

    def _launch(self, steps: Sequence[SequenceStep]) -> Deferred[StepOutput]:
        return self._engine.device_runner.execute(StepPlan(tuple(steps)))

    def _named(self, i: int, step: SequenceStep) -> SequenceStep:
        return replace(step, request_id=RequestId(f"r{i}"))

    def _step(self, i: int, computed: int) -> SequenceStep:
        running = self._running[i]
        known = [token.token_id for token in running.output]
        output = np.array([*known, PENDING], np.int32)
        position = mrope_next(computed, running.prompt.items, running.merge)
        return SequenceStep(
            RequestId(f"r{i}"),
            np.array([PENDING], np.int32),
            computed,
            np.full((3, 1), position, np.int32),
            running.block_table,
            (),
            SampleRequest(running.sampling, running.prompt.token_ids, output),
        )


class CastWeights:
    """Another model's tensors in another dtype."""

    def __init__(self, weights: TensorSource, dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype

    def tensor(self, name: str) -> Tensor:
        return self._weights.tensor(name).to(self._dtype)

    def joined(self, names: Sequence[str]) -> Tensor | None:
        return None
