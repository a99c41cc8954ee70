"""KV blocks from another process's pool on the same device, as decode pulls them: scattered, proven, through a stream."""

from __future__ import annotations

import numpy as np

from gpu.pool import PoolSpec
from tools.bench.rows import make_row
from tools.gpu_check.figures.counts import kv_token_bytes
from tools.gpu_check.figures.exporter import exporting
from tools.gpu_check.figures.rig import Rig
from tools.gpu_check.figures.timing import median_wall_s
from tools.gpu_check.found import Figures

OPENER = "tools.gpu_check.figures.exporter:open_first"
_FIXED_ROUNDS = 101


def run(rig: Rig, opener: str = OPENER) -> Figures:
    limits = rig.known_limits()
    rig.give_back()  # pools are not made of what torch keeps
    block_bytes = rig.block_size * kv_token_bytes(rig.config.text, rig.dtype.itemsize)
    count = max(2, -(-rig.loads.ipc_bytes // block_bytes))
    layout = rig.config.kv_layout(rig.block_size, rig.backend.block_format)
    random = np.random.default_rng(0)
    src_ids, dst_ids = random.permutation(count).tolist(), random.permutation(count).tolist()
    with exporting(opener, count, block_bytes, layout) as other:
        src = rig.backend.map_pool(other.export)
        dst = rig.backend.allocate_pool(PoolSpec(count, block_bytes, "kv", layout))
        sums = [other.checksums[i] for i in src_ids]
        stream = rig.stream("transfer")

        def copy(num_blocks: int) -> None:
            taken = slice(0, num_blocks)
            wrong = stream.submit(dst.copy_from, src, src_ids[taken], dst_ids[taken], sums[taken]).result()
            if wrong != -1:
                raise RuntimeError(f"block {wrong} of {num_blocks} came over with another checksum")

        whole_s = median_wall_s(lambda: copy(count), rounds=2 * rig.loads.rounds)
        one_s = median_wall_s(lambda: copy(1), rounds=_FIXED_ROUNDS)
        map_s = median_wall_s(lambda: rig.backend.map_pool(other.export).close(), rounds=5)
        src.close()
        dst.close()
    each_s = max(0.0, whole_s - one_s) / (count - 1)
    moved = 2 * block_bytes  # read and written
    baseline = limits.copy_bytes_per_s / 1e9
    name = f"KV over IPC, {count} blocks of {block_bytes / 2**20:.2f} MiB"
    note = f"{1e3 * whole_s:.3f} ms by the caller's clock, checksums of all blocks compared; bytes read + written"
    yield make_row(
        f"{name}: per block",
        moved / max(each_s, 1e-12) / 1e9,
        "GB/s",
        baseline=baseline,
        bar=">=0.8",
        note="the fixed cost taken out",
    )
    yield make_row(f"{name}: all of it", count * moved / whole_s / 1e9, "GB/s", baseline=baseline, note=note)
    yield make_row(
        "KV over IPC: fixed cost",
        1e6 * max(0.0, one_s - each_s),
        "us",
        bar="<150",
        note="one block through a stream, less its bytes",
    )
    yield make_row("KV over IPC: a pool mapped again", 1e6 * map_s, "us", note="the first time costs more")
