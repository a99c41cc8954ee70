"""What a CUDA pool looks like from outside: the bytes of its handle, and the page behind its blocks that says what they are."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from gpu.cuda.driver import IPC_HANDLE_BYTES
from gpu.cuda.processes import ProcessId
from gpu.errors import CannotMap

MEMORY = "cuda-ipc"
UNSHARED = "cuda"  # of a pool that CUDA lets nobody else open: the handle says in words why
PAGE_BYTES = 4096
LABEL_BYTES = 40
NO_LABEL = bytes(LABEL_BYTES)
_LABEL = struct.Struct("<8sQQQQ")  # magic, generation, layout, num_blocks, block_bytes
_MAGIC = b"epd pool"
_HANDLE = struct.Struct(f"<16s16sqQQ{IPC_HANDLE_BYTES}s{IPC_HANDLE_BYTES}s")


@dataclass(frozen=True, slots=True)
class Handle:
    """Of a whole pool: whose it is, where it lies, and CUDA's words for its memory and its event."""

    boot_id: bytes  # 16
    device: bytes  # uuid, 16
    process: ProcessId
    size: int  # bytes of the allocation
    memory: bytes  # IPC_HANDLE_BYTES
    event: bytes  # IPC_HANDLE_BYTES

    def pack(self) -> bytes:
        process = self.process
        return _HANDLE.pack(self.boot_id, self.device, process.pid, process.started, self.size, self.memory, self.event)

    @classmethod
    def unpack(cls, packed: bytes) -> Handle:
        """Raises CannotMap for what is none."""
        if len(packed) != _HANDLE.size:
            raise CannotMap(f"{len(packed)} bytes are no handle of a CUDA pool")
        boot_id, device, pid, started, size, memory, event = _HANDLE.unpack(packed)
        return cls(boot_id, device, ProcessId(pid, started), size, memory, event)


def label(generation: int, layout: int, num_blocks: int, block_bytes: int) -> bytes:
    """The first LABEL_BYTES of a pool's last page. The rest of the page, and what is between it and the blocks, is zero."""
    return _LABEL.pack(_MAGIC, generation, layout, num_blocks, block_bytes)


def memory_size(num_blocks: int, block_bytes: int) -> int:
    """The blocks, rounded up to whole pages, and the page with the label."""
    return (-(-num_blocks * block_bytes // PAGE_BYTES) + 1) * PAGE_BYTES
