"""Work in a process of its own: its peak memory is nobody else's, and what kills it kills nothing else."""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any


class Died(RuntimeError):
    """The process raised (the message is its traceback), ended by itself, or ran out of time."""


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` returns in a fresh process.

    Raises:
        Died: it returned nothing.
    """
    (result,) = stream(_once, function, args)
    return result


def _once(function: Callable[..., Any], args: tuple[Any, ...]) -> Iterator[Any]:
    yield function(*args)


def stream(work: Callable[..., Iterator[Any]], *args: Any, seconds: float | None = None) -> Iterator[Any]:
    """What the generator function `work(*args)` yields in a fresh process, as it comes.

    Args:
        seconds: the process is ended when so many have passed.

    Raises:
        Died: it did not come to its end; what it had yielded before has been yielded here.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(send, work, args))
    process.start()
    send.close()  # so that the end of the process is the end of the pipe
    end = None if seconds is None else time.monotonic() + seconds
    try:
        while receive.poll(None if end is None else max(0.0, end - time.monotonic())):
            kind, value = receive.recv()
            if kind == "done":
                process.join()
                return
            if kind == "raised":
                raise Died(value)
            yield value
        raise Died(f"stopped after {seconds:.0f} s")
    except EOFError:
        process.join()
        raise Died(f"the process ended with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _run(send: Connection, work: Callable[..., Iterator[Any]], args: tuple[Any, ...]) -> None:
    try:
        for value in work(*args):
            send.send(("row", value))
    except Exception:  # whatever it was: the parent raises it
        send.send(("raised", traceback.format_exc()))
    else:
        send.send(("done", None))
