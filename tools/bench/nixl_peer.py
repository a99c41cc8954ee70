"""NIXL as a peer of the handoff: the same blocks, read from another process's memory over UCX. Optional; prints JSON."""

from __future__ import annotations

import json
import time
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.bench.handoff import GEOMETRIES, Geometry, exporting, gather_figures

_ROUNDS = 5
_TIMEOUT_S = 60.0


class Agent:
    """One end, with one registered region."""

    def __init__(self, name: str, memory: npt.NDArray[np.uint8]) -> None:
        import nixl_cu12

        self._memory = memory
        self._agent: Any = nixl_cu12.nixl_agent(name, nixl_cu12.nixl_agent_config(backends=["UCX"]))
        self._agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
        self.metadata: bytes = self._agent.get_agent_metadata()

    def meet(self, metadata: bytes) -> str:
        name = self._agent.add_remote_agent(metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def read(self, remote: str, address: int, src_ids: list[int], dst_ids: list[int]) -> None:
        """Blocks `src_ids` of the remote region at `address` into our blocks `dst_ids`; returns when they are here."""
        size = self._memory.shape[1]
        here = self._agent.get_xfer_descs([(self._memory.ctypes.data + i * size, size, 0) for i in dst_ids], "DRAM")
        there = self._agent.get_xfer_descs([(address + i * size, size, 0) for i in src_ids], "DRAM")
        handle = self._agent.initialize_xfer("READ", here, there, remote)
        state = self._agent.transfer(handle)
        deadline = time.monotonic() + _TIMEOUT_S
        while state != "DONE":
            if state == "ERR" or time.monotonic() > deadline:
                raise RuntimeError(f"a NIXL transfer ended as {state}")
            state = self._agent.check_xfer_state(handle)
        self._agent.release_xfer_handle(handle)


def main() -> None:
    import_module("nixl_cu12")  # before another process is made
    speed = _measure(GEOMETRIES[0], list(range(GEOMETRIES[0].num_blocks)))
    one = _measure(GEOMETRIES[1], [7])
    found = {"speed": GEOMETRIES[0].num_blocks * GEOMETRIES[0].block_bytes / speed / 1e9, "fixed_s": one}
    print("\n" + json.dumps(found))


def _measure(geometry: Geometry, blocks: list[int]) -> float:
    """Seconds for reading these blocks to other places."""
    with exporting(geometry, "--nixl") as other:
        memory = np.zeros((geometry.num_blocks, geometry.block_bytes), np.uint8)
        agent = Agent("reader", memory)
        remote = agent.meet(bytes.fromhex(other["metadata"]))
        places = [geometry.num_blocks - 1 - block for block in blocks]
        rounds = _ROUNDS if len(blocks) > 1 else 101
        seconds = gather_figures(rounds, {"read": lambda: agent.read(remote, other["address"], blocks, places)})["read"]
        if not memory[places[0]].any():
            raise RuntimeError("NIXL said that it was done and nothing came")
        return seconds


if __name__ == "__main__":
    main()
