"""The runner that prefill and decode drive on a device: a step plan in, tokens out when the device has come so far.

Owns the order of a step: the host's arrays, one copy, the launches (or one graph), sampling, the copy of what was drawn.
`execute` returns when all that has been given to the device and waits for none of it, so that the next step can be planned and
launched while this one runs. Knows which row drew each request's token in the step before, which is all that such a plan leaves
open.

What two batches have in common is said in `epd.model.device.text`: the same tokens as far as the dtype tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from epd.errors import BadConfig
from epd.model.batch import Batch, Chunk, make_batch
from epd.model.device.decode_steps import DecodeSteps
from epd.model.device.graphs import GraphOptions
from epd.model.device.inputs import Layout, Staging
from epd.model.device.sampler import Logprobs, is_greedy, sample
from epd.model.device.text import DeviceTextModel, Inputs
from epd.model.device.work_queue import Mark, WorkQueue, open_queue
from epd.model.guides import Guides, restricted
from epd.step import PENDING, EmbeddingSpan, SampleRequest, StepOutput, StepPlan
from gpu.cuda.kernels import Chunks
from gpu.deferred import Deferred
from protocol.messages import RequestId, Sampling, Token, TokenLogprob

FloatArray = npt.NDArray[np.float32]


class DeviceTextRunner:
    """Runs the steps of prefill or decode over the KV pool of its stage. All calls come from the stage's stream, in order."""

    def __init__(
        self,
        model: DeviceTextModel,
        kv_pool: Tensor,
        *,
        max_sequences: int,
        max_model_len: int,
        max_tokens: int = 1,
        graphs: GraphOptions | None = None,
        queue: WorkQueue | None = None,
        guides: Guides | None = None,
    ) -> None:
        """`kv_pool`: the pool's blocks as [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim] of the model's dtype.

        `max_sequences` in one step, no more are taken; `max_model_len` tokens in one context; `max_tokens` in one step of chunks,
        which `prepare` sees to: more are taken, with memory that has to be found then. Without `guides`, steps with a guided
        request fail. Several runners may share a model. Raises BadConfig for a pool of other blocks.
        """
        text = model.config
        block_size = kv_pool.shape[4]
        block_shape = (text.num_layers, 2, text.num_kv_heads, block_size, text.head_dim)
        if kv_pool.shape[1:] != block_shape or kv_pool.dtype != model.dtype:
            raise BadConfig(f"the KV pool's blocks, {list(kv_pool.shape[1:])} of {kv_pool.dtype}, are not those of this model")
        self.model = model
        self._kv = kv_pool
        self._block_size = block_size
        self._max_sequences = max_sequences
        self._max_tokens = min(max_tokens, len(kv_pool) * block_size)
        self._guides = guides
        self._queue = queue or open_queue(model.device)
        self._staging = Staging(self._queue)
        self._buffers = model.buffers()
        self._drawn = torch.zeros(max_sequences, dtype=torch.int64, device=model.device)
        self._row_of: dict[RequestId, int] = {}  # in _drawn, of what the last step drew
        self._decode = DecodeSteps(
            model,
            kv_pool,
            self._drawn,
            self._queue,
            graphs or GraphOptions(),
            max_sequences=max_sequences,
            max_model_len=max_model_len,
        )
        self._queue.synchronize()  # what was made here may have been made on another stream than steps run on

    def prepare(self) -> None:
        """Make all that a first step would have to wait for: kernels, graphs, memory, code. On the stage's stream; blocks."""
        self.model.kernels.warm_up(self.model.geometry(self._block_size), self.model.device)
        self._rehearse()
        self._decode.capture_first()
        self._queue.synchronize()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Deferred[StepOutput]:
        """Raises ValueError for a plan that makes no sense (see make_batch), or whose PENDING token the last step did not draw.

        Nothing has been drawn then, as far as the next step is concerned.
        """
        started = self._queue.mark()
        row_of, self._row_of = self._row_of, {}
        batch = make_batch(plan, self._block_size)
        has_pending = _point_at_drawn(plan, batch, row_of)
        logits = self._forward(batch, has_pending)
        requests = restricted(self._guides, [plan.sequences[i] for i in batch.sampled])  # while the device computes
        drawn, logprobs = self._drawn[: len(requests)], None
        if not is_greedy(requests):
            logprobs = sample(logits, requests, drawn, self._staging)
        self._row_of = {plan.sequences[i].request_id: row for row, i in enumerate(batch.sampled)}
        return _Outcome(self._queue, started, len(plan.sequences), batch.sampled, requests, drawn, logprobs)

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> FloatArray:
        """What `execute` would sample from, [num_sampled, vocab_size], for evaluation and tests. Waits for the device."""
        batch = make_batch(plan, self._block_size)
        return np.asarray(self._launch(batch, has_pending=False).cpu().numpy())

    @property
    def captured(self) -> frozenset[int]:
        """Batch sizes that decode steps have graphs for."""
        return self._decode.captured

    @property
    def timed(self) -> Mapping[int, Mapping[str, float]]:
        """Of those, the ones that could be done in several ways: seconds of each. The fastest is taken."""
        return self._decode.timed

    def close(self) -> None:
        """Let go of the pool's memory, the graphs and the buffers, once the device is done with them."""
        self._queue.synchronize()
        del self._decode, self._buffers, self._staging, self._kv, self._drawn

    def _forward(self, batch: Batch, has_pending: bool) -> Tensor:
        """Logits of the sampled rows, and the likeliest token of each in `_drawn`."""
        num_sampled = len(batch.sampled)
        if num_sampled > self._max_sequences:
            raise ValueError(f"a step of {num_sampled} sequences, where {self._max_sequences} were to be the most")
        bucket = self._decode.bucket_of(batch)
        if bucket is not None:
            return self._decode.launch(bucket, batch, self._staging)
        logits = self._launch(batch, has_pending=has_pending)
        if num_sampled:
            torch.argmax(logits, dim=1, out=self._drawn[:num_sampled])
        return logits

    def _launch(self, batch: Batch, *, has_pending: bool) -> Tensor:
        """Kernel by kernel."""
        rows = [(row, self._embedding(span)) for row, span in batch.embeddings]
        all_sampled = len(batch.sampled_rows) == batch.num_tokens and bool((np.diff(batch.sampled_rows) == 1).all())
        arrays: dict[str, npt.NDArray[np.int64] | npt.NDArray[np.int32]] = {
            "token_ids": batch.token_ids,
            "positions": batch.positions,
            "slots": batch.slots,
            "block_tables": batch.block_tables,
            "context_lens": batch.context_lens,
            "sampled_rows": batch.sampled_rows,
        }
        if batch.chunks:
            arrays["chunk_spans"], arrays["chunk_tables"] = _chunk_arrays(batch.chunks)
        layout = Layout({name: (_TORCH_DTYPES[array.dtype.type], array.shape) for name, array in arrays.items()})
        staged = self._staging.begin(layout)
        for name, array in arrays.items():
            staged[name][...] = array
        sent = self._staging.send(staged)
        inputs = Inputs(
            token_ids=sent["token_ids"],
            positions=sent["positions"],
            slots=sent["slots"],
            block_tables=sent["block_tables"],
            context_lens=sent["context_lens"],
            chunks=_chunks(batch.chunks, sent) if batch.chunks else None,
            embeddings=tuple(rows),
            sampled_rows=None if all_sampled else sent["sampled_rows"],
            has_pending=has_pending,
        )
        self._buffers.reserve_workspace(batch.num_single)
        return self.model.forward(inputs, self._drawn, self._kv, self._buffers)

    @torch.inference_mode()
    def _rehearse(self) -> None:
        """A step of padding alone, as large as they get, and sampling of every kind."""
        num_tokens = self._max_tokens
        padding = Batch(
            token_ids=np.zeros(num_tokens, np.int64),
            positions=np.zeros((3, num_tokens), np.int32),
            slots=np.full(num_tokens, -1, np.int64),
            num_single=0,
            block_tables=np.zeros((0, 0), np.int32),
            context_lens=np.zeros(0, np.int32),
            chunks=(Chunk(0, num_tokens, num_tokens, np.zeros(-(-num_tokens // self._block_size), np.int32)),),
            embeddings=(),
            sampled=(0,),
            sampled_rows=np.array([num_tokens - 1], np.int64),
        )
        logits, nothing = self._launch(padding, has_pending=True), np.zeros(1, np.int32)
        anything = np.full(-(-logits.shape[1] // 32), -1, np.int32)  # as a guide allows it
        for sampling in _SAMPLED_IN_REHEARSAL:
            logits.zero_()  # of what is in memory that nobody wrote to, anything may have come
            sample(logits, [SampleRequest(sampling, nothing, nothing, anything)], self._drawn[:1], self._staging)

    def _embedding(self, span: EmbeddingSpan) -> Tensor:
        """Rows on the device, where they are already unless they were encoded elsewhere."""
        rows = span.rows if isinstance(span.rows, Tensor) else torch.from_numpy(np.ascontiguousarray(span.rows))
        if rows.device == self.model.device:
            return rows.to(self.model.dtype)
        return self._staging.upload(rows, self.model.dtype)


class _Outcome(Deferred[StepOutput]):
    """What a step drew, on its way to the host."""

    def __init__(
        self,
        queue: WorkQueue,
        started: Mark,
        num_sequences: int,
        sampled: Sequence[int],
        requests: Sequence[SampleRequest],
        drawn: Tensor,
        logprobs: Logprobs | None,
    ) -> None:
        self._num_sequences, self._sampled, self._requests = num_sequences, sampled, requests
        self._drawn = _fetch(queue, drawn)
        self._logprobs = logprobs and tuple(_fetch(queue, each) for each in (logprobs.chosen, logprobs.best_ids, logprobs.best))
        self._logprob_rows = logprobs.rows if logprobs else ()
        self._started, self._finished = started, queue.mark()

    def value(self) -> StepOutput:
        self._finished.wait()
        drawn = [Token(token_id) for token_id in self._drawn.tolist()]
        if self._logprobs:
            numbers = zip(self._logprob_rows, *(each.tolist() for each in self._logprobs), strict=True)
            for row, chosen, best_ids, best in numbers:
                drawn[row] = _with_logprobs(drawn[row].token_id, self._requests[row].sampling, chosen, best_ids, best)
        tokens: list[Token | None] = [None] * self._num_sequences
        for i, token in zip(self._sampled, drawn, strict=True):
            tokens[i] = token
        return StepOutput(tuple(tokens), self._finished.seconds_since(self._started))


_SAMPLED_IN_REHEARSAL = (
    Sampling(temperature=0.0),
    Sampling(top_k=20, top_p=0.9, min_p=0.1),
    Sampling(top_p=0.9, num_logprobs=1, repetition_penalty=1.1),
)
_TORCH_DTYPES = {np.int64: torch.int64, np.int32: torch.int32}


def _point_at_drawn(plan: StepPlan, batch: Batch, row_of: dict[RequestId, int]) -> bool:
    """Put -1 - row for each PENDING token, where `row` is that of its request in the step before. Whether there were any."""
    pending = np.flatnonzero(batch.token_ids == PENDING)
    if not len(pending):
        return False
    singles = [sequence for sequence in plan.sequences if len(sequence.token_ids) == 1]
    for row in pending.tolist():
        if row >= len(singles) or singles[row].request_id not in row_of:
            named = f"request {singles[row].request_id}" if row < len(singles) else "a chunk"
            raise ValueError(f"{named} is to go on with a token that the last step did not draw")
        batch.token_ids[row] = -1 - row_of[singles[row].request_id]
    return True


def _chunk_arrays(chunks: Sequence[Chunk]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """`spans` and `block_tables` of `gpu.cuda.kernels.Chunks`."""
    first = chunks[0].start
    spans = np.array([(chunk.start - first, chunk.end - chunk.start, chunk.context_len) for chunk in chunks], np.int32)
    tables = np.zeros((len(chunks), max(len(chunk.block_table) for chunk in chunks)), np.int32)
    for row, chunk in zip(tables, chunks, strict=True):
        row[: len(chunk.block_table)] = chunk.block_table
    return np.ascontiguousarray(spans.T), tables


def _chunks(chunks: Sequence[Chunk], sent: Mapping[str, Tensor]) -> Chunks:
    lens = tuple(chunk.end - chunk.start for chunk in chunks)
    return Chunks(lens, tuple(chunk.context_len for chunk in chunks), sent["chunk_spans"], sent["chunk_tables"])


def _fetch(queue: WorkQueue, values: Tensor) -> Tensor:
    """Host memory of its own, which the values reach before the next mark passes."""
    host = queue.host_memory(values.numel() * values.dtype.itemsize).view(values.dtype).view(values.shape)
    queue.copy(values, host)
    return host


def _with_logprobs(token_id: int, sampling: Sampling, chosen: float, best_ids: list[int], best: list[float]) -> Token:
    pairs = zip(best_ids[: sampling.num_logprobs], best[: sampling.num_logprobs], strict=True)
    return Token(token_id, logprob=chosen, top_logprobs=tuple(TokenLogprob(i, value) for i, value in pairs))
