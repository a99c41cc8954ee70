"""Decode steps from graphs: rows of one token each that all draw, padded to a bucket, over memory that never moves.

Owns that memory. A row of padding stores nothing and attends to nothing. Block tables come as wide as the longest one of the
batch, so that the copy is no larger than it needs to be, and are put into a table that is wide enough for any; what is beyond a
row's own blocks there is left over from steps before, and not read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from epd.model.batch import Batch
from epd.model.device.buffers import Buffers
from epd.model.device.graphs import GraphOptions, Graphs, Work
from epd.model.device.inputs import Layout, Shape, Staging
from epd.model.device.text import DeviceTextModel, Inputs
from epd.model.device.work_queue import WorkQueue

# What a row of padding has in the arrays of a step.
_PADDING = {"token_ids": 0, "positions": 0, "slots": -1, "context_lens": 0}


class DecodeSteps:
    """Those of one runner, for its own stream."""

    def __init__(
        self,
        model: DeviceTextModel,
        kv_pool: Tensor,
        drawn: Tensor,
        queue: WorkQueue,
        options: GraphOptions,
        *,
        max_sequences: int,
        max_model_len: int,
    ) -> None:
        """`drawn`, int64 [max_sequences]: where each step puts its likeliest tokens, and finds those of the step before."""
        self._model, self._kv, self._drawn, self._queue = model, kv_pool, drawn, queue
        self._options = options
        self._graphs = Graphs(queue, self._ways_of, options, max_sequences)
        largest, width = max(self._graphs.buckets, default=0), -(-max_model_len // kv_pool.shape[4])
        self._memory = torch.zeros(_layout(largest, (largest, width)).num_bytes, dtype=torch.uint8, device=model.device)
        self._block_tables = torch.zeros(largest, width, dtype=torch.int32, device=model.device)
        self._buffers = model.buffers(largest) if largest else None

    @property
    def captured(self) -> frozenset[int]:
        """Batch sizes that there are graphs for by now."""
        return self._graphs.captured

    @property
    def timed(self) -> Mapping[int, Mapping[str, float]]:
        """Seconds of a step of padding in each way to do it, by batch size, where there was a choice."""
        return self._graphs.timed

    def bucket_of(self, batch: Batch) -> int | None:
        """How many rows a batch is padded to, or None where it is to be launched kernel by kernel."""
        if len(batch.sampled) != batch.num_tokens or batch.chunks or batch.embeddings:
            return None
        if batch.block_tables.shape[1] > self._block_tables.shape[1]:
            return None
        return self._graphs.bucket_of(batch.num_tokens)

    def launch(self, bucket: int, batch: Batch, staging: Staging) -> Tensor:
        """Logits of the batch's rows, valid until the next launch; the likeliest token of each goes to `drawn`."""
        if bucket not in self._graphs.captured:
            self._capture(bucket)  # before the inputs come: it writes to where they go
        num_rows, width = batch.block_tables.shape
        staged = staging.begin(_layout(bucket, (num_rows, width)))
        for name, padding in _PADDING.items():
            array = staged[name]
            array[..., :num_rows] = getattr(batch, name)
            array[..., num_rows:] = padding
        staged["block_tables"][...] = batch.block_tables
        sent = staging.send(staged, self._memory)
        self._queue.copy(sent["block_tables"], self._block_tables[:num_rows, :width])
        self._graphs.replay(bucket)
        return self._buffers_of(bucket).logits(num_rows)

    @torch.inference_mode()
    def capture_first(self) -> None:
        """The graphs that are wanted at start."""
        for bucket in self._graphs.at_start:
            self._capture(bucket)

    def _capture(self, bucket: int) -> None:
        """The run that goes before a capture is one of padding alone, and what the last step drew outlasts it."""
        arrays = _layout(bucket).tensors(self._memory)
        for name, padding in _PADDING.items():
            arrays[name].fill_(padding)
        drawn = self._drawn.clone()
        self._graphs.capture(bucket)
        self._drawn.copy_(drawn)

    def _ways_of(self, bucket: int) -> dict[str, Work]:
        arrays = _layout(bucket).tensors(self._memory)
        inputs = Inputs(
            token_ids=arrays["token_ids"],
            positions=arrays["positions"],
            slots=arrays["slots"],
            block_tables=self._block_tables[:bucket],
            context_lens=arrays["context_lens"],
        )
        drawn, buffers, model = self._drawn[:bucket], self._buffers_of(bucket), self._model

        def separate() -> None:
            torch.argmax(model.forward(inputs, self._drawn, self._kv, buffers), dim=1, out=drawn)

        def fused() -> None:
            torch.argmax(model.forward_fused(inputs, self._drawn, self._kv, buffers), dim=1, out=drawn)

        wanted = self._options.linear
        if bucket > model.max_fused_rows or wanted == "separate" or (wanted == "fastest" and self._queue.device.type == "cpu"):
            return {"separate": separate}
        return {"fused": fused} if wanted == "fused" else {"separate": separate, "fused": fused}

    def _buffers_of(self, bucket: int) -> Buffers:
        if self._buffers is None:
            raise ValueError(f"there are no graphs, not for {bucket} rows either")
        return self._buffers


def _layout(batch: int, tables: Shape = (0, 0)) -> Layout:
    """Of a step's arrays. Those before the block tables lie at the same places whatever these are."""
    return Layout(
        {
            "token_ids": (torch.int64, (batch,)),
            "positions": (torch.int32, (3, batch)),
            "slots": (torch.int64, (batch,)),
            "context_lens": (torch.int32, (batch,)),
            "block_tables": (torch.int32, tables),
        }
    )
