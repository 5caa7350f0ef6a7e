#!/usr/bin/env python3
"""Load test of the server: many requests at once, whether each gets its own answer, and whether memory stays flat.

    python -m benchmarks.serve_load                                # 200 at once, then 1000 in all, on lance-nano

Reads   lance_nano/checkpoint, or --model_path
Writes  nothing; the last line on stdout is the result as JSON
Needs   requirements-serve.txt, httpx, and minutes; everything goes over the loopback

A server is started, and `--at_once` clients send a request each at the same time: pictures of as many seeds, and every
fourth a question. The same requests are then sent one after the other: an answer that was lost or mixed up differs. At
last requests go on until there were `--total`, eight at a time, while the server's resident memory is read.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from lance_quant.cli import script
from lance_quant.errors import InputError, require_whole

ROOT = Path(__file__).parent.parent


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--model_path", type=Path, help="what serve.py serves; default: lance-nano")
    parser.add_argument("--at_once", type=int, default=200, help="requests that are sent at the same time")
    parser.add_argument("--total", type=int, default=1000, help="requests while memory is watched")
    return parser.parse_args(argv)


@contextlib.contextmanager
def serving(model: Path | None, waiting: int) -> Iterator[tuple[str, int]]:
    """Address and process of a server; it is ended with the block."""
    named = [] if model is None else ["--model_path", str(model)]
    command = [sys.executable, "serve.py", "--no_page", "--port", "0", "--waiting", str(waiting), *named]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"at (http://\S+)/v1", line):
                yield found[1], process.pid
                return
        raise InputError("serve.py ended before it listened: run it alone to see why")
    finally:
        process.terminate()
        process.wait(60)


def request_of(number: int) -> tuple[str, dict[str, Any]]:
    """Route and body of a request: a picture of its own seed, or a question about a colour of its own."""
    if number % 4:
        return "/v1/images/generations", {"prompt": "a red circle", "size": "112x112", "seed": number,
                                          "num_inference_steps": 2}
    out = io.BytesIO()
    Image.new("RGB", (112, 112), (number % 256, 90, 255 - number % 256)).save(out, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What colour is it?"}]
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}], "max_tokens": 4}


def answer_of(body: dict[str, Any]) -> str:
    """What a request was for."""
    return str(body["data"][0]["b64_json"] if "data" in body else body["choices"][0]["message"]["content"])


async def _send(client: Any, address: str, number: int) -> str:
    route, body = request_of(number)
    answer = await client.post(address + route, json=body, timeout=3600)
    answer.raise_for_status()
    return answer_of(answer.json())


async def all_at_once(address: str, numbers: range, clients: int) -> list[str]:
    """Answers to these requests, of which so many are out at a time."""
    import httpx

    limit = asyncio.Semaphore(clients)
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=clients)) as client:
        async def one(number: int) -> str:
            async with limit:
                return await _send(client, address, number)

        return list(await asyncio.gather(*map(one, numbers)))


def resident(process: int) -> int | None:
    """Bytes of a process in memory; None where the system has no /proc."""
    status = Path(f"/proc/{process}/status")
    if not status.is_file():
        return None
    return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) * 1024  # type: ignore[index] # Linux has the line


def main(argv: list[str] | None = None) -> None:
    """Run the test and print what was found."""
    args = parse_args(argv)
    require_whole("--at_once", args.at_once, 1, 10_000)
    require_whole("--total", args.total, 1, 1_000_000)
    with serving(args.model_path, args.at_once) as (address, process):
        started = time.monotonic()
        together = asyncio.run(all_at_once(address, range(args.at_once), args.at_once))
        seconds = time.monotonic() - started
        alone = asyncio.run(all_at_once(address, range(args.at_once), 1))
        wrong = sum(first != second for first, second in zip(together, alone, strict=True))
        memory, done = [resident(process)], 2 * args.at_once
        while done < args.total + 2 * args.at_once:
            more = min(100, args.total + 2 * args.at_once - done)
            asyncio.run(all_at_once(address, range(done, done + more), 8))
            done += more
            memory.append(resident(process))
    print(f"{args.at_once} at once: {seconds:.1f} s, lost 0, mixed up {wrong}")  # a lost one has raised
    shown = [round(size / 1e6) for size in memory if size is not None]
    print(f"resident memory in MB, every 100 of {args.total} requests: {shown}")
    print(json.dumps({"at_once": args.at_once, "seconds": seconds, "mixed_up": wrong, "resident_bytes": memory}))


if __name__ == "__main__":
    script.run(main)
