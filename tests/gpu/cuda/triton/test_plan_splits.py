from __future__ import annotations

import pytest

from gpu.cuda.triton.paged_attention import plan_splits, workspace_floats

NUM_SMS = 132
RESIDENT = 2 * NUM_SMS


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8, 16])
def test_programs_fill_whole_waves(num_kv_heads: int) -> None:
    for num_seqs in range(1, 257):
        splits, _ = plan_splits(num_seqs, num_kv_heads, 2048, NUM_SMS)
        programs = num_seqs * num_kv_heads * splits
        waves = -(-programs // RESIDENT)
        assert programs > 0.8 * waves * RESIDENT or splits == 64, (num_seqs, splits)


def test_few_sequences_make_one_wave_of_small_parts() -> None:
    assert plan_splits(1, 8, 2048, NUM_SMS) == (33, 1)
    assert plan_splits(4, 8, 2048, NUM_SMS) == (8, 1)
    assert plan_splits(64, 8, 2048, NUM_SMS) == (2, 4)


def test_short_tables_are_not_cut_below_a_tile() -> None:
    assert plan_splits(1, 8, 3, NUM_SMS)[0] == 3
    assert plan_splits(1, 8, 0, NUM_SMS)[0] == 1
    assert plan_splits(20, 8, 1, NUM_SMS)[0] == 1


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("num_sms", [1, 8, 132])
def test_a_workspace_holds_all_parts_and_for_fewer_sequences(num_sms: int, num_kv_heads: int) -> None:
    num_heads, head_dim = 4 * num_kv_heads, 128
    sizes = [workspace_floats(num_seqs, num_heads, num_kv_heads, head_dim, num_sms) for num_seqs in range(300)]
    assert sizes == sorted(sizes)
    for num_seqs in range(1, 300):
        splits, _ = plan_splits(num_seqs, num_kv_heads, 1 << 20, num_sms)
        assert num_seqs * splits * num_heads * (head_dim + 2) <= sizes[num_seqs]
