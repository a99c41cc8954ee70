"""Asks a served model held-out questions and counts exact answers: `python -m tools.evaluate --url URL`.

The questions are about scenes and number pairs that the bundled model was never trained on, drawn here, so the right answers
are known. `--reference` asks transformers instead of a server. Exits with 1 if a task falls below the threshold.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from tools.tiny_model.scenes import Scene, draw
from tools.tiny_model.tasks import TASKS, held_out_example

Message = dict[str, Any]

_LONGEST_ANSWER = 400  # tokens; counting from 0 to 120 takes 374
_SIZES = (64, 64, 64, 128, 256)  # pixels per side; the larger ones are resized by the server
_JPEG_SHARE = 0.2
_SHOWN_MISTAKES = 20
_BUNDLED = Path(__file__).resolve().parents[1] / "epd" / "assets" / "tiny-vl"


@dataclass(frozen=True, slots=True)
class Question:
    """One request's messages and the only right answer."""

    task: str
    messages: list[Message]
    expected: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for a question, or why nothing did."""

    question: Question
    text: str
    error: str | None = None

    @property
    def right(self) -> bool:
        return self.error is None and self.text == self.question.expected


@dataclass(frozen=True, slots=True)
class Score:
    """Exact answers of one task."""

    asked: int
    right: int
    accuracy: float


def main() -> None:
    args = _parse()
    questions = held_out_questions(args.per_task, args.seed)
    if args.reference:
        answers = ask_reference(args.reference, questions)
    else:
        answers = asyncio.run(ask_endpoint(args.url, args.model, questions, args.concurrency, args.timeout))
    scores = score(answers)
    print(table(scores, args.threshold))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report(args.reference or args.url, scores, answers), indent=2) + "\n")
    sys.exit(any(s.accuracy < args.threshold for s in scores.values()))


def held_out_questions(per_task: int, seed: int) -> list[Question]:
    """`per_task` questions of each task; the same ones for the same seed."""
    questions = []
    for task in TASKS:
        rng = random.Random(f"evaluate/{seed}/{task}")
        for _ in range(per_task):
            example = held_out_example(rng, task)
            (turn,) = example.turns
            content: list[Message] = [
                {"type": "image_url", "image_url": {"url": _data_url(rng, scene)}} for scene in example.scenes
            ]
            content.append({"type": "text", "text": turn.question})
            message = {"role": "user", "content": content if example.scenes else turn.question}
            questions.append(Question(task, [message], turn.answer))
    return questions


async def ask_endpoint(
    url: str, model: str | None, questions: Sequence[Question], concurrency: int, timeout_s: float
) -> list[Answer]:
    """Greedy chat completions from an OpenAI-compatible endpoint, at most `concurrency` at a time."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        name = model or await _first_model(session, url)

        async def ask(question: Question) -> Answer:
            body = {
                "model": name,
                "messages": question.messages,
                "temperature": 0,
                "max_tokens": _LONGEST_ANSWER,
            }
            try:
                async with session.post(f"{url.rstrip('/')}/chat/completions", json=body) as response:
                    if response.status != 200:
                        return Answer(question, "", f"HTTP {response.status}: {(await response.text())[:200]}")
                    reply = await response.json()
            except (aiohttp.ClientError, TimeoutError) as error:
                return Answer(question, "", f"{type(error).__name__}: {error}")
            return Answer(question, reply["choices"][0]["message"]["content"])

        return await _bounded(ask, questions, concurrency)


def ask_reference(folder: Path, questions: Sequence[Question]) -> list[Answer]:
    """Greedy answers from transformers' own implementation of the checkpoint in `folder`."""
    # Here, so that asking a server needs neither torch nor transformers.
    from tools.tiny_model.reference import Reference

    reference = Reference(folder)
    bar = tqdm(questions, unit="prompt")
    return [Answer(q, reference.answer(q.messages, max_tokens=_LONGEST_ANSWER)) for q in bar]


def score(answers: Sequence[Answer]) -> dict[str, Score]:
    """Exact matches by task, in the tasks' order."""
    scores = {}
    for task in TASKS:
        of_task = [a for a in answers if a.question.task == task]
        if of_task:
            right = sum(a.right for a in of_task)
            scores[task] = Score(len(of_task), right, right / len(of_task))
    return scores


def table(scores: dict[str, Score], threshold: float) -> str:
    """A line for each task and one for all."""
    lines = [f"{'task':<10}{'asked':>7}{'right':>7}{'exact':>9}"]
    for task, s in scores.items():
        verdict = "" if s.accuracy >= threshold else f"  below {threshold:.0%}"
        lines.append(f"{task:<10}{s.asked:>7}{s.right:>7}{s.accuracy:>9.1%}{verdict}")
    asked, right = sum(s.asked for s in scores.values()), sum(s.right for s in scores.values())
    lines.append(f"{'all':<10}{asked:>7}{right:>7}{right / max(asked, 1):>9.1%}")
    return "\n".join(lines)


def report(target: object, scores: dict[str, Score], answers: Sequence[Answer]) -> dict[str, Any]:
    """What `--json` writes: scores by task and some of the mistakes."""
    wrong = [a for a in answers if not a.right]
    return {
        "target": str(target),
        "tasks": {task: asdict(s) for task, s in scores.items()},
        "mistakes": [
            {
                "task": a.question.task,
                "question": _text_of(a.question.messages[-1]),
                "expected": a.question.expected,
                "got": a.text,
                "error": a.error,
            }
            for a in wrong[:_SHOWN_MISTAKES]
        ],
    }


async def _bounded(ask: Callable[[Question], Awaitable[Answer]], questions: Sequence[Question], concurrency: int) -> list[Answer]:
    """All answers, in the questions' order."""
    slots = asyncio.Semaphore(concurrency)
    bar = tqdm(total=len(questions), unit="prompt")

    async def one(question: Question) -> Answer:
        async with slots:
            answer = await ask(question)
        bar.update()
        return answer

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(question)) for question in questions]
    bar.close()
    return [task.result() for task in tasks]


async def _first_model(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(f"{url.rstrip('/')}/models") as response:
        response.raise_for_status()
        return str((await response.json())["data"][0]["id"])


def _data_url(rng: random.Random, scene: Scene) -> str:
    side = rng.choice(_SIZES)
    packed = io.BytesIO()
    kind = "jpeg" if rng.random() < _JPEG_SHARE else "png"
    draw(scene, side, side).save(packed, kind, **({"quality": 90} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(packed.getvalue()).decode()}"


def _text_of(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else str(content[-1]["text"])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="an OpenAI-compatible endpoint")
    parser.add_argument("--model", help="model name; the first one served if left out")
    parser.add_argument("--reference", type=Path, nargs="?", const=_BUNDLED, metavar="FOLDER", help="ask transformers instead")
    parser.add_argument("--per-task", type=int, default=100, help="held-out questions per task")
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a request may take")
    parser.add_argument("--threshold", type=float, default=0.95, help="least share of exact answers per task")
    parser.add_argument("--json", type=Path, help="write scores and mistakes here")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
