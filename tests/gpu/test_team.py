from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from gpu.team import Team


@pytest.fixture(params=[1, 2, 3])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    made = Team(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("num_parts", [0, 1, 2, 50])
def test_every_part_runs_once(team: Team, num_parts: int) -> None:
    for _ in range(3):
        done = team.run(lambda a, b: (a, b), [(i, -i) for i in range(num_parts)])
        assert sorted(done) == [(i, -i) for i in range(num_parts)]


def test_all_threads_take_part(team: Team) -> None:
    together = threading.Barrier(team.num_threads, timeout=30)

    def meet(_part: int) -> int:
        together.wait()  # broken unless as many parts run at once
        return threading.get_ident()

    threads = team.run(meet, [(i,) for i in range(team.num_threads)])
    assert len(set(threads)) == team.num_threads
    assert threading.get_ident() in threads


def test_an_error_of_any_part_is_raised_when_no_part_runs_any_more(team: Team) -> None:
    running: list[int] = []

    def work(part: int) -> None:
        running.append(part)
        try:
            if part == 3:
                raise KeyError("three")
        finally:
            running.remove(part)

    with pytest.raises(KeyError, match="three"):
        team.run(work, [(i,) for i in range(20)])
    assert running == []
    assert sorted(team.run(int, [("1",), ("2",)])) == [1, 2]


def test_an_error_of_a_helper_is_raised_by_the_caller(team: Team) -> None:
    caller, together = threading.get_ident(), threading.Barrier(team.num_threads, timeout=30)

    def work(_part: int) -> None:
        together.wait()
        if threading.get_ident() != caller or team.num_threads == 1:
            raise KeyError("helper")

    with pytest.raises(KeyError, match="helper"):
        team.run(work, [(i,) for i in range(team.num_threads)])


def test_a_team_of_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="not 0 threads"):
        Team(0)
