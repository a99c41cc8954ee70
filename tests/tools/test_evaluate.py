"""The evaluation: it asks an endpoint what it should, counts exact answers only and says which task fell short."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from tools import evaluate
from tools.evaluate import Answer, Question, ask_endpoint, held_out_questions, report, score, table
from tools.tiny_model.tasks import TASKS


class Endpoint:
    """Answers from a table of right answers, except that it fails or errs where told to."""

    def __init__(self, questions: list[Question]) -> None:
        self.known = {json.dumps(q.messages): q.expected for q in questions}
        self.requests: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0
        self.fail_from = len(questions)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=10_000_000)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._complete)
        return app

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0.001)
        self.in_flight -= 1
        if len(self.requests) > self.fail_from:
            return web.json_response({"error": {"message": "full"}}, status=429)
        text = self.known[json.dumps(body["messages"])]
        return web.json_response({"choices": [{"message": {"content": text}}]})


@pytest.fixture
def questions() -> list[Question]:
    return held_out_questions(4, seed=9)


@pytest.fixture
def endpoint(questions: list[Question]) -> Endpoint:
    return Endpoint(questions)


@pytest_asyncio.fixture
async def url(endpoint: Endpoint) -> AsyncIterator[str]:
    async with TestServer(endpoint.app()) as server:
        yield str(server.make_url("/v1"))


async def test_right_answers_score_full(endpoint: Endpoint, url: str, questions: list[Question]) -> None:
    answers = await ask_endpoint(url, None, questions, concurrency=3, timeout_s=10)
    assert [answer.question for answer in answers] == questions
    assert {task: s.accuracy for task, s in score(answers).items()} == dict.fromkeys(TASKS, 1.0)
    assert endpoint.most_in_flight <= 3
    assert {(r["model"], r["temperature"]) for r in endpoint.requests} == {("tiny", 0)}


async def test_refused_requests_count_as_wrong(endpoint: Endpoint, url: str, questions: list[Question]) -> None:
    endpoint.fail_from = 15
    answers = await ask_endpoint(url, "tiny", questions, concurrency=1, timeout_s=10)
    assert sum(answer.right for answer in answers) == 15
    assert "HTTP 429" in str(answers[-1].error)
    assert score(answers)["count"].right == 0


async def test_an_endpoint_that_is_gone_is_an_error_per_question(questions: list[Question]) -> None:
    answers = await ask_endpoint("http://127.0.0.1:9/v1", "tiny", questions[:2], concurrency=1, timeout_s=5)
    assert all(answer.error for answer in answers)


def test_only_exact_answers_are_right(questions: list[Question]) -> None:
    question = questions[0]
    assert Answer(question, question.expected).right
    assert not Answer(question, question.expected + " ").right
    assert not Answer(question, question.expected, error="late").right


def test_questions_are_the_same_for_the_same_seed(questions: list[Question]) -> None:
    assert held_out_questions(4, seed=9) == questions
    assert held_out_questions(4, seed=8) != questions
    assert [question.task for question in questions] == [task for task in TASKS for _ in range(4)]


def test_the_table_names_the_task_that_falls_short(questions: list[Question]) -> None:
    answers = [Answer(q, q.expected if q.task != "pair" else "no idea") for q in questions]
    lines = table(score(answers), 0.95).splitlines()
    assert [line.split()[0] for line in lines if "below" in line] == ["pair"]
    assert lines[-1].split() == ["all", "20", "16", "80.0%"]


def test_the_report_keeps_mistakes_without_images(questions: list[Question]) -> None:
    answers = [Answer(q, "no idea") for q in questions]
    written = json.dumps(report("here", score(answers), answers))
    assert "no idea" in written
    assert "base64" not in written


@pytest.mark.parametrize(("said", "code"), [("right", 0), ("wrong", 1)])
def test_the_exit_code_tells_whether_the_threshold_was_met(
    said: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def ask(_: object, questions: list[Question]) -> list[Answer]:
        return [Answer(q, q.expected if said == "right" else "no idea") for q in questions]

    monkeypatch.setattr(evaluate, "ask_reference", ask)
    out = tmp_path / "deep" / "scores.json"
    monkeypatch.setattr("sys.argv", ["evaluate", "--reference", "--per-task", "2", "--json", str(out)])
    with pytest.raises(SystemExit) as exit_:
        evaluate.main()
    assert exit_.value.code == code
    assert json.loads(out.read_text())["tasks"]["caption"]["asked"] == 2
