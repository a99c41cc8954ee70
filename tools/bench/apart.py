"""Runs a benchmark in a fresh process, so that none inherits another's threads, caches or memory."""

from __future__ import annotations

import importlib
import multiprocessing
import traceback
from multiprocessing.connection import Connection

from tools.bench.rows import Row


def run_apart(module: str) -> tuple[list[Row], str]:
    """Rows of `module.run()`, which answers them as a list or under "rows"; and what went wrong, "" if nothing did."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_here, args=(module, sender), name=module)
    process.start()
    sender.close()
    rows: list[Row]
    try:
        rows, error = receiver.recv()
    except EOFError:
        process.join()
        rows, error = [], f"{module} died with status {process.exitcode}"
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        process.join()
        receiver.close()
    return rows, error


def _run_here(module: str, answer: Connection) -> None:
    try:
        result = importlib.import_module(module).run()
        answer.send((list(result["rows"] if isinstance(result, dict) else result), ""))
    except Exception:  # goes into the report; the other benchmarks run
        answer.send(([], traceback.format_exc()))
