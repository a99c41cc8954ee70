from __future__ import annotations

from tools.bench import overhead


def test_the_bare_step_runs_on_the_bundled_model() -> None:
    one_s = overhead.bare_step_s(1, context_len=40)
    many_s = overhead.bare_step_s(8, context_len=40)
    assert one_s > 0
    assert many_s > 0
