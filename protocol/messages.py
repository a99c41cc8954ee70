"""Every message that crosses between actors, in the order in which a request meets them.

A message is a frozen msgspec struct that travels as a msgpack array: the tag first, then the fields in the order written here.
New fields go to the end and carry a default, so that an older peer still reads the message. Bulk bytes (an image, KV blocks)
are never a field: they travel beside the message as out-of-band buffers.

Times that cross a wire are durations (`*_s`, seconds left), never clock readings: two hosts share no clock.
"""

from __future__ import annotations

from typing import NewType

import msgspec

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)


class Part(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A value inside messages."""


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of everything that an actor can be sent."""


# --- values ---------------------------------------------------------------------------------------------------------


class Endpoint(Part, frozen=True):
    """Where a worker listens, and what tells whether it shares this host's memory."""

    worker: WorkerId
    host: str
    port: int
    unix_path: str = ""
    host_id: str = ""  # equal on two workers that can open each other's memory (boot id + pid namespace + user)


class Address(Part, frozen=True):
    """An actor, wherever it lives. Equal for a local and a remote actor."""

    worker: WorkerId
    actor: str


class Sampling(Part, frozen=True):
    """How the next tokens of one request are chosen. Ranges are checked where the request enters."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int = 0  # always set by the gateway; the noise of a token is a function of (seed, position)
    max_tokens: int = 16  # output tokens in total, counted from the end of the client's prompt
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int = -1  # -1: none wanted; 0: of the chosen token only; k: and of the k best
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    guide: str = ""  # a grammar that the output follows, as llguidance spells it; empty: none


class MMItem(Part, frozen=True):
    """One image of a prompt: its placeholder range and what its embedding is called."""

    mm_hash: str
    offset: int  # index of the first placeholder token in the prompt
    num_tokens: int  # grid_t * grid_h * grid_w / merge_size**2
    grid_t: int
    grid_h: int  # in patches
    grid_w: int


class PoolRef(Part, frozen=True):
    """One pool of one worker, and how a process on the same host maps it.

    `generation` is drawn at random when the pool is made: a handle into a pool that has died is refused by it.
    """

    worker: WorkerId
    kind: str  # "kv" | "embedding"
    generation: int
    layout: int  # fingerprint of model geometry, dtype, block size and order; both ends must agree
    num_blocks: int
    block_bytes: int
    memory: str = ""  # "memfd" | "cuda-ipc" | "cuda", which nobody can map
    handle: bytes = b""  # the word of one backend to another of its kind


class EmbeddingRef(Part, frozen=True):
    """A leased embedding in an encode worker's pool: `num_tokens` rows over `block_ids`."""

    worker: WorkerId
    generation: int
    layout: int
    lease_id: int
    mm_hash: str
    num_tokens: int
    block_ids: tuple[int, ...]
    checksums: tuple[int, ...]  # of each whole block, as pools of this kind of memory compute them


class KVRef(Part, frozen=True):
    """Leased, finished KV blocks of one request in a prefill worker's pool."""

    worker: WorkerId
    generation: int
    layout: int
    lease_id: int
    request_id: RequestId
    epoch: int
    first_block: int  # place of block_ids[0] in the request's block table
    block_ids: tuple[int, ...]
    checksums: tuple[int, ...]  # of each block; none within a process, where the block table moves and no byte does


class TokenLogprob(Part, frozen=True):
    token_id: int
    logprob: float


class Token(Part, frozen=True):
    """One output token. `finish_reason` is set on the last one only: "stop" or "length"."""

    token_id: int
    finish_reason: str = ""
    logprob: float = 0.0
    top_logprobs: tuple[TokenLogprob, ...] = ()


class Span(Part, frozen=True):
    """A stretch of a request's time in one stage, for the waterfall: seconds since that stage received the request."""

    name: str
    start_s: float
    end_s: float


# --- encode ---------------------------------------------------------------------------------------------------------


class Encode(Message, frozen=True, tag=1):
    """Ask of an encode worker. Buffer 0: the image file's bytes (PNG, JPEG, ...). Answer: Encoded or Failed."""

    request_id: RequestId
    epoch: int
    item: MMItem
    deadline_s: float


class Encoded(Message, frozen=True, tag=2):
    request_id: RequestId
    ref: EmbeddingRef
    spans: tuple[Span, ...] = ()


class ReleaseLease(Message, frozen=True, tag=4):
    """Tell the owner of a pool that a handle is no longer wanted. Releasing an unknown lease is no error."""

    lease_id: int
    is_corrupt: bool = False  # the bytes did not have their checksum: nobody else must find them in a cache


# --- prefill --------------------------------------------------------------------------------------------------------


class Prefill(Message, frozen=True, tag=10):
    """Ask of a prefill worker, sent before the embeddings are there. Answer: Prefilled or Failed.

    `token_ids` is the prompt followed by whatever was generated before a failure or a preemption, so that the next token
    is output number len(token_ids) - num_prompt_tokens. Placeholder tokens are already expanded.
    """

    request_id: RequestId
    epoch: int
    token_ids: bytes  # int32, little endian
    num_prompt_tokens: int
    items: tuple[MMItem, ...]
    sampling: Sampling
    deadline_s: float
    salt: str = ""  # only requests with the same salt share cached KV


class EmbeddingReady(Message, frozen=True, tag=11):
    """Ask of a prefill worker: fetch the embedding of one of the request's items from there. Answer: EmbeddingTaken or Failed.

    A failure that says the handle is stale makes the gateway have the image encoded again; the prefill waits meanwhile.
    """

    request_id: RequestId
    epoch: int
    item_index: int
    ref: EmbeddingRef
    endpoint: Endpoint


class EmbeddingTaken(Message, frozen=True, tag=13):
    """The prefill worker has its own copy, or did not need one because its prefix cache covers the image."""


class Prefilled(Message, frozen=True, tag=12):
    """The first token. When it has a finish reason there is nothing to decode."""

    request_id: RequestId
    epoch: int
    token: Token
    num_cached_tokens: int
    spans: tuple[Span, ...] = ()


# --- prefill -> decode ----------------------------------------------------------------------------------------------


class PullKV(Message, frozen=True, tag=20):
    """Stream asked by a decode worker: KVChunk for every run of finished blocks, Handoff at the end."""

    request_id: RequestId
    epoch: int
    layout: int
    deadline_s: float


class KVChunk(Message, frozen=True, tag=21):
    ref: KVRef


class Handoff(Message, frozen=True, tag=22):
    """Prefill is done: `num_tokens` tokens have KV, and `token` is the one to feed first."""

    request_id: RequestId
    epoch: int
    num_tokens: int
    token: Token


class DescribePool(Message, frozen=True, tag=23):
    """Ask of a stage actor: which pool are its handles into? Answer: PoolDescribed."""

    kind: str


class PoolDescribed(Message, frozen=True, tag=24):
    pool: PoolRef


class FetchBlocks(Message, frozen=True, tag=25):
    """Ask of a pool's owner for block bytes, where memory cannot be mapped. Answer: BlocksFetched, one buffer a block."""

    kind: str
    generation: int
    lease_id: int
    block_ids: tuple[int, ...]


class BlocksFetched(Message, frozen=True, tag=26):
    num_blocks: int


# --- decode ---------------------------------------------------------------------------------------------------------


class Decode(Message, frozen=True, tag=30):
    """Ask of a decode worker, sent together with Prefill. Tokens come as TokenStep; answer: Finished, Preempted or Failed."""

    request_id: RequestId
    epoch: int
    token_ids: bytes  # int32, little endian; as in Prefill
    num_prompt_tokens: int
    items: tuple[MMItem, ...]
    sampling: Sampling
    deadline_s: float
    prefill: Endpoint
    gateway: Address  # where TokenStep goes
    salt: str = ""  # as in Prefill


class TokenStep(Message, frozen=True, tag=31):
    """Tell a gateway the tokens of one decode step, of all its requests at once: (request_id, epoch, output index, token)."""

    tokens: tuple[tuple[RequestId, int, int, Token], ...]


class Finished(Message, frozen=True, tag=32):
    request_id: RequestId
    epoch: int
    num_output_tokens: int  # of the whole output, earlier attempts included
    spans: tuple[Span, ...] = ()


class Preempted(Message, frozen=True, tag=33):
    """This request gave way: to others in a full pool, to prefill in the same pool, or because its worker leaves.

    It is to be prefilled again with what it has so far, and that counts as nobody's failure.
    """

    request_id: RequestId
    epoch: int
    num_output_tokens: int


# --- any stage ------------------------------------------------------------------------------------------------------


class Abort(Message, frozen=True, tag=40):
    """Tell a stage to forget a request up to `epoch`; unknown requests are no error."""

    request_id: RequestId
    epoch: int


class Failed(Message, frozen=True, tag=41):
    """How an ask or a stream ends badly. `code` is a wire code of epd.errors; `retryable`: another worker may succeed."""

    code: str
    message: str
    retryable: bool = False


# --- membership -----------------------------------------------------------------------------------------------------


class Spread(Part, frozen=True):
    """A histogram since the worker's start: values per bucket of the figure's bounds (epd.distribution), and their sum."""

    figure: str
    counts: tuple[int, ...]
    total: float
    label: str = ""  # what kind of them these are, where a figure has kinds: the rung of a transfer


class StageLoad(Part, frozen=True):
    """What placement looks at, per stage of a worker, and what the gateway's metrics show of it."""

    role: str
    num_waiting: int = 0
    num_running: int = 0
    outstanding_patches: int = 0  # encode
    outstanding_tokens: int = 0  # encode: of the images that wait or are under way; prefill: of the prompts
    num_blocks: int = 0
    num_free_blocks: int = 0  # free or evictable
    num_leases: int = 0
    num_cached_blocks: int = 0
    cache_hits: int = 0
    cache_queries: int = 0
    num_preemptions: int = 0
    is_idle_clean: bool = True  # last check_integrity() at idle passed
    busy_s: float = 0.0  # time spent in steps since start
    num_steps: int = 0
    num_tokens: int = 0  # since start: rows encoded, prompt tokens computed, tokens drawn
    num_evictions: int = 0  # since start: cached blocks that gave way to others
    transfer_failures: tuple[tuple[str, int], ...] = ()  # since start: wire code, how often blocks could not be brought here
    spreads: tuple[Spread, ...] = ()


class LinkLoad(Part, frozen=True):
    """One link of a worker, as /v1/cluster shows it."""

    peer: WorkerId
    rung: str  # "local" | "mapped" | "socket"
    num_transfers: int = 0
    num_bytes: int = 0
    transfer_s: float = 0.0


class ProcessLoad(Part, frozen=True):
    """What a worker's process and its device use. A ratio or size that nobody can tell is -1."""

    cpu_s: float  # of all threads, since start
    rss_bytes: int
    device_name: str = ""  # as its maker calls it; empty: no accelerator
    utilisation: float = -1.0  # share of the last second in which the accelerator ran anything, 0 to 1
    memory_used_bytes: int = -1  # of the accelerator, by everybody
    memory_total_bytes: int = -1
    power_w: float = -1.0
    device_busy_s: float = -1.0  # emulated devices: time that their work has taken, since start
    device_late_s: float = -1.0  # and by how much it ended later than it should have, because the host was too slow
    loop_lag_s: float = -1.0  # recent delay of the event loop, p99
    host_busy: float = -1.0  # share of the host's processor time in use in the last second


class Join(Message, frozen=True, tag=50):
    """Ask of a directory: take me in. Answer: Joined or Failed (wrong model, wrong layout)."""

    endpoint: Endpoint
    roles: tuple[str, ...]
    model: str
    layout: int
    pid: int
    device: str
    max_model_len: int
    block_size: int
    block_format: str = ""  # numbers and checksums of its blocks: workers of one cluster exchange them


class Joined(Message, frozen=True, tag=51):
    """The worker is a member, until it leaves or its link is lost."""


class ReportLoad(Message, frozen=True, tag=52):
    """Tell the directory, a few times a second."""

    worker: WorkerId
    stages: tuple[StageLoad, ...]
    links: tuple[LinkLoad, ...]
    draining: bool = False
    process: ProcessLoad | None = None


class Drain(Message, frozen=True, tag=53):
    """Tell a worker to take nothing new and to leave when it has nothing left."""


class Leave(Message, frozen=True, tag=54):
    """Tell the directory goodbye: nothing of mine is running. From a directory: it does not have the worker, who may join."""

    worker: WorkerId


AnyMessage = (
    Encode | Encoded | ReleaseLease
    | Prefill | EmbeddingReady | EmbeddingTaken | Prefilled
    | PullKV | KVChunk | Handoff | DescribePool | PoolDescribed | FetchBlocks | BlocksFetched
    | Decode | TokenStep | Finished | Preempted
    | Abort | Failed
    | Join | Joined | ReportLoad | Drain | Leave
)  # fmt: skip
