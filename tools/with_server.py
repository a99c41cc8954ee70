"""python -m tools.with_server [--model M] [--epd OPTIONS] -- COMMAND ...: runs a command against a server of its own.

Starts all stages in one process on a free port, runs the command with `{url}` replaced by the API's base, and stops the server.
The exit status is the command's.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from collections.abc import Sequence

from tools.servers import ServerFailed, epd_command, free_port, running_server


def main(argv: Sequence[str] | None = None) -> int:
    """Answers the command's exit status, or 1 if the server did not come up."""
    parser = argparse.ArgumentParser(prog="python -m tools.with_server", description=__doc__)
    parser.add_argument("--model", default="", help="checkpoint folder or hub id (default: the bundled model)")
    parser.add_argument("--epd", default="", metavar="OPTIONS", help="more options of `epd serve`, as one word")
    parser.add_argument("command", nargs="+", help="after --, with {url} where the API's base belongs")
    args = parser.parse_args(argv)
    options = [*(["--model", args.model] if args.model else []), *shlex.split(args.epd)]
    try:
        return asyncio.run(_run(args.command, options))
    except ServerFailed as error:
        print(f"with_server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


async def _run(command: Sequence[str], options: Sequence[str]) -> int:
    port = free_port()
    async with running_server(epd_command(port, *options), ready_url=f"http://127.0.0.1:{port}/ready", environment={}):
        words = [word.replace("{url}", f"http://127.0.0.1:{port}/v1") for word in command]
        process = await asyncio.create_subprocess_exec(*words)
        return await process.wait()


if __name__ == "__main__":
    sys.exit(main())
