"""Every part, over a driver without a device: which rows come out, what they are held against, and that their sums are right."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from epd.model.config import load_model_config
from epd.model.device.runner import DeviceTextRunner
from gpu.cuda.reference import TorchKernels
from tests.tools.gpu_check.rigs import FOLDER, LIMITS, LOADS, OPENER, ScriptedTimer, open_rig, rows_of
from tools.gpu_check.figures import attention, decode, experts, ipc, limits, linear, loading, prefill, vision
from tools.gpu_check.figures.counts import (
    chunk_attention_flop,
    decode_weight_bytes,
    kv_token_bytes,
    layer_kv_bytes,
    prefill_flop,
    vision_flop,
)
from tools.gpu_check.figures.decode_loop import DecodeLoad, Pace
from tools.gpu_check.figures.timing import HostTimer
from tools.gpu_check.found import Limits, Missing


def test_limits_count_what_is_read_and_written() -> None:
    with open_rig(known=None) as rig:
        rig.timer = ScriptedTimer(1e-3)
        first, *rest = limits.run(rig)
        assert first == rig.limits == Limits(2 * (1 << 20) / 1e-3, (1 << 20) / 1e-3, 2 * 64**3 / 1e-3)
        rows = rows_of(iter(rest))
    assert [(row["value"], row["unit"]) for row in rows.values()] == [
        (2 * (1 << 20) / 1e-3 / 1e9, "GB/s"),
        ((1 << 20) / 1e-3 / 1e9, "GB/s"),
        (2 * 64**3 / 1e-3 / 1e12, "TFLOP/s"),
    ]
    assert list(rows) == ["limit: copy on the device, read + written", "limit: read on the device", "limit: float32 product"]


def test_nothing_is_held_against_limits_of_another_run() -> None:
    with open_rig(known=None) as rig, pytest.raises(ValueError, match="limits were not measured"):
        next(decode.run(rig))


def test_decode_steps_have_their_rows() -> None:
    with open_rig() as rig:
        rows = rows_of(decode.run(rig))
        more = rows_of(decode.launches(rig))
    one, many = "decode step, batch 1, context 64", "decode step, batch 12, context 48"
    assert list(rows) == [
        *("decode: ready to run", "graph capture"),
        *(f"{one}: {each}" for each in ("bytes read", "time", "device idle")),
        *(f"{many}: {each}" for each in ("bytes read", "time", "device idle")),
    ]
    assert (rows[f"{one}: bytes read"]["bar"], rows[f"{many}: bytes read"]["bar"]) == (">=0.75", ">=0.65")
    assert rows[f"{one}: bytes read"]["baseline"] == 2.0
    assert rows["graph capture"]["unit"] == "ms"
    assert 0 <= rows[f"{one}: device idle"]["value"] <= 100
    assert list(more) == [f"{name}: {each}" for name in (one, many) for each in ("kernels", "alone")]
    assert more[f"{one}: kernels"]["value"] > 4  # at least one a layer


def test_shares_of_a_step() -> None:
    """A step of a second on a device that copies 2 GB/s and reads 1 GB/s."""
    pace = Pace(step_s=1.0, device_s=0.9, idle_share=0.1, mean_context=40.0)
    config = load_model_config(FOLDER)
    weights, kv = decode_weight_bytes(config, 4), kv_token_bytes(config.text, 4)
    with open_rig() as rig:
        alone = decode.pace_rows(rig, DecodeLoad(1, 64, 6), pace, LIMITS)
        together = decode.pace_rows(rig, DecodeLoad(12, 48, 6), pace, LIMITS)
    assert alone[0]["value"] == weights / 1e9
    assert alone[0]["ratio"] == pytest.approx(weights / 2e9)
    assert f"{weights / 1e9:.0%} of what the device only reads" in alone[0].get("note", "")
    assert "KV not counted" in alone[0].get("note", "")
    assert together[0]["value"] == pytest.approx((weights + 12 * 40 * kv) / 1e9)
    assert [row["value"] for row in alone[1:]] == [1000.0, pytest.approx(10.0)]


def test_one_row_through_the_products_of_a_layer() -> None:
    text = load_model_config(FOLDER).text
    with open_rig() as rig:
        rig.timer = ScriptedTimer(1e-3)
        rows = rows_of(linear.run(rig))
    assert list(rows) == [f"one row: {each.name}" for each in linear.products(text)]
    for product in linear.products(text):
        row, num_bytes = rows[f"one row: {product.name}"], product.width * product.num_rows * 4
        assert row["value"] == pytest.approx(num_bytes * max(2, (1 << 18) // num_bytes) / 1e-3 / 1e9)
        assert row["ratio"] == 1.0
    layers = text.num_layers * sum(each.width * each.num_rows for each in linear.products(text))
    outside = (text.vocab_size + 1) * text.hidden_size
    norms = text.num_layers * 2 * (text.hidden_size + text.head_dim)
    assert (layers + outside + norms) * 4 == decode_weight_bytes(load_model_config(FOLDER), 4)


def test_a_layer_of_experts() -> None:
    with open_rig() as rig:
        rig.timer = ScriptedTimer(8e-3)  # eight steps
        rows = rows_of(experts.run(rig))
        layer = experts.make_layer(rig, is_turned=True)
    assert list(rows) == [
        f"experts, {stored}, {num_rows} rows"
        for stored in ("as published", "as transformers saves them")
        for num_rows in (1, 5, 150)
    ]
    one = 3 * 16 * 32 * 4  # bytes of an expert
    assert layer.numbers_of_one * 4 == one
    alone, some, many = list(rows.values())[:3]
    assert alone["value"] == pytest.approx(2 * one / 1e-3 / 1e9)
    assert 2 * one / 1e-3 / 1e9 < some["value"] <= 6 * one / 1e-3 / 1e9
    assert many["value"] == pytest.approx(2 * 150 * 2 * one / 4 / 1e-3 / 1e12)
    assert {row["ratio"] for row in rows.values()} == {1.0}
    assert not layer.gate_up.is_contiguous()


def test_a_set_without_fused_layers_says_so() -> None:
    with open_rig() as rig:
        rig.backend.kernels = NotFused()
        (missing,) = linear.run(rig)
    assert isinstance(missing, Missing)


class NotFused(TorchKernels):
    fused = None  # type: ignore[assignment]


def test_decode_graphs_that_were_timed_are_told() -> None:
    with open_rig() as rig:
        make_runner = rig.runner

        def runner() -> DeviceTextRunner:
            made = make_runner()
            made._decode._graphs.timed[2] = {"separate": 4e-3, "fused": 3e-3}
            return made

        rig.runner = runner  # type: ignore[method-assign, assignment]
        row = rows_of(decode.run(rig))["decode graph, batch 2: linear layers fused with what is beside them"]
    assert row["unit"] == "ms"
    assert row["value"] == pytest.approx(3.0)
    assert row["ratio"] == pytest.approx(0.75)
    assert "kept: fused" in row.get("note", "")


def test_a_batch_that_does_not_fit_is_smaller_and_says_so() -> None:
    """4 MiB, of which 1 is kept, hold 96 blocks of 32 KiB: contexts of 8 blocks each."""
    with open_rig(loads=replace(LOADS, decode=((64, 128),)), total_bytes=4 << 20) as rig:
        rows = rows_of(decode.run(rig))
        assert len(rig.kv_blocks()) == 96
    assert any(name.startswith("decode step, batch 12, context 128") for name in rows)


def test_a_context_that_does_not_fit_is_missing() -> None:
    with open_rig(loads=replace(LOADS, decode=((1, 4096),)), total_bytes=4 << 20) as rig:
        *_, found = decode.run(rig)
    assert found == Missing("decode step, batch 1, context 4k", "the pool that fits this device does not hold one such context")


def test_attention_alone_by_every_set() -> None:
    with open_rig() as rig:
        rig.timer = ScriptedTimer(1e-3)
        found = list(attention.run(rig))
        text = rig.config.text
    assert [each for each in found if isinstance(each, Missing)] == [
        Missing("attention alone: triton", "ImportError: no triton here")
    ]
    rows = rows_of(each for each in found if not isinstance(each, Missing))
    paged = [rows[f"paged decode attention, batch 6, context 96: {name}"] for name in ("torch", "numba")]
    assert [row["bar"] for row in paged] == [">=0.7", ""]  # only what serves is held against it
    assert {row["value"] for row in paged} == {6 * 96 * layer_kv_bytes(text, 4) / 1e-3 / 1e9}
    assert "not the chosen set" in paged[1].get("note", "")
    chunk = rows["attention of the last 96 of 96 tokens: gather + SDPA (numba)"]
    assert chunk["value"] == chunk_attention_flop(text, 96, 96) / 1e-3 / 1e12
    assert "attention of the last 96 of 96 tokens: chunk_attention (torch)" in rows


@pytest.mark.parametrize(("num_blocks", "layers"), [(24, 4), (25, 2), (60, 1), (96, 1), (1000, 1)])
def test_a_pool_of_more_blocks_of_fewer_layers(num_blocks: int, layers: int) -> None:
    with open_rig(loads=replace(LOADS, decode=((1, 24 * 16 - 1),), max_model_len=512)) as rig:
        pool = attention._pool_of(rig.kv_blocks(), num_blocks)
        assert pool.shape == (24 * 4 // layers, layers, 2, 2, 16, 32)
        assert pool.data_ptr() == rig.kv_blocks().data_ptr()


def test_prefill_as_the_server_cuts_it_and_whole() -> None:
    with open_rig() as rig:
        rig.server = replace(rig.server, max_chunk_tokens=40)
        rows = rows_of(each for each in prefill.run(rig) if not isinstance(each, Missing))
        flop = prefill_flop(rig.config.text, 96)
        assert [len(plan.sequences[0].token_ids) for plan in prefill._plans(rig, 40)] == [40, 40, 16]
    short = rows.pop("prefill, 5 prompts of 20 tokens in a step")
    assert short["value"] > 0
    assert re.fullmatch(r"[\d.]+ ms; with a launch of attention for each prompt [\d.]+ ms", short.get("note", ""))
    names = ["prefill, 96 tokens, chunks of 40", "prefill, 96 tokens, in one chunk"]
    assert list(rows) == [*names, *(f"{name}, gather + SDPA" for name in names)]
    assert [row["bar"] for row in rows.values()] == [">=0.55", ">=0.55", "", ""]
    for row in rows.values():
        seconds = float(row.get("note", "").partition(" ms")[0]) / 1e3
        assert row["value"] == pytest.approx(flop / seconds / 1e12, rel=0.02)
        assert row["baseline"] == 4.0


def test_the_vision_tower() -> None:
    with open_rig() as rig:
        rows = rows_of(vision.run(rig))
        assert rig.config.vision is not None
        flop = 2 * vision_flop(rig.config.vision, 64)
    row, preprocessing = rows.values()
    assert (row["name"], row["unit"], row["bar"]) == ("vision tower, 2 images of 64 x 64", "TFLOP/s", ">=0.45")
    note = row.get("note", "")
    assert note.startswith("128 patches in ")
    seconds = float(note.removeprefix("128 patches in ").partition(" ms")[0]) / 1e3
    assert row["value"] == pytest.approx(flop / seconds / 1e12, rel=0.02)
    assert preprocessing["unit"] == "ms"


def test_blocks_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole: 2 ms; one block: 0.5 ms. So the seven others took 1.5 ms."""
    scripted = iter([2e-3, 0.5e-3, 1e-3])

    def clock(work: object, *, rounds: int) -> float:
        assert callable(work)
        work()  # and that must bring what was sent
        return next(scripted)

    monkeypatch.setattr(ipc, "median_wall_s", clock)
    with open_rig() as rig:
        rows = list(rows_of(ipc.run(rig, OPENER)).values())
        block_bytes = 16 * kv_token_bytes(rig.config.text, 4)
    assert LOADS.ipc_bytes == 8 * block_bytes
    each_s = 1.5e-3 / 7
    assert [row["bar"] for row in rows] == [">=0.8", "", "<150", ""]
    assert rows[0]["value"] == pytest.approx(2 * block_bytes / each_s / 1e9)
    assert rows[0]["ratio"] == pytest.approx(2 * block_bytes / each_s / 2e9)
    assert rows[1]["value"] == pytest.approx(8 * 2 * block_bytes / 2e-3 / 1e9)
    assert rows[2]["value"] == pytest.approx(1e6 * (0.5e-3 - each_s))
    assert [row["unit"] for row in rows] == ["GB/s", "GB/s", "us", "us"]


def test_an_exporter_that_ends_is_told() -> None:
    with open_rig() as rig, pytest.raises(RuntimeError, match="ended with status 1"):
        next(ipc.run(rig, "tests.tools.gpu_check.rigs:no_such_function"))


def test_loading_beside_reading(tmp_path: Path) -> None:
    with open_rig() as rig:
        file = loading.write_checkpoint(rig, tmp_path)
        tree = json.loads((tmp_path / "config.json").read_text())
        assert tree["text_config"]["num_hidden_layers"] == min(loading.NUM_LAYERS, 4)
        loading.read_all(file)
        rows = rows_of(loading.run(rig, tmp_path))
    assert list(rows) == ["loading weights, cached by the host", "loading weights, not cached"]
    assert all(row["unit"] == "GB/s" and row["ratio"] for row in rows.values())
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []


def test_the_median_is_of_rounds_after_warm_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    times = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr("tools.gpu_check.figures.timing.time.perf_counter", lambda: next(times))
    assert HostTimer().median_s(lambda: calls.append(1), rounds=3, warm_ups=2) == 2.0
    assert len(calls) == 5
