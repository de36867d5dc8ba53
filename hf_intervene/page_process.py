"""Serving the page of `hf-intervene app` (`launch`), its model in a process of its own
(`ModelProcess`).

Until a picture is in the browser, most of the time goes by with imports: torch and the Hugging Face
libraries, Gradio, the browser's own.
The three go on beside each other, and the longest begins first: this module imports nothing heavy,
and starts the process before anything else."""

import multiprocessing
import os
import signal
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any


# Seconds after which Ctrl-C is heard at the latest: one that comes just before a wait begins does
# not end it.
_HEARD = 0.2
TIME_LIMIT = 300.0  # seconds of a call
_ENDED = (
    "the process of the model has ended, perhaps for want of memory: it is started again; try once"
    " more."
)


class ModelProcess:
    """A process that answers calls of a `Page`'s methods, one at a time, once it is told the folder
    (see `page.PageApart`). What the model needs is imported before that. Where it ends, or a call
    takes too long, another one takes its place.

    Args:
        time_limit: seconds that a call may take, loading the model aside.
    """

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        self._lock, self._limit = Lock(), time_limit
        self._folder: Path | None = None
        self._closed = False
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # or neither would see the other's end
        self._loaded = False

    def _start_again(self) -> None:
        self._end()
        if not self._closed:
            self._start()
            self._connection.send(self._folder)

    def open(self, folder: Path) -> None:
        """Of which folder the page is. Waits for nothing.

        Raises:
            ChildProcessError: one sentence: the process has ended.
        """
        self._folder = folder
        with self._lock:
            try:
                self._connection.send(folder)
            except OSError as ended:
                raise ChildProcessError(_ENDED) from ended

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the page returns.

        Raises:
            ChildProcessError: one sentence: the process has ended; the next call has another one.
            TimeoutError: one sentence: the call took too long; likewise.
            Exception: what the method raises.
        """
        with self._lock:
            if not self._loaded and method != "load":
                self._exchange("load", (), None)
            result = self._exchange(method, arguments, None if method == "load" else self._limit)
            self._loaded = True
        return result

    def _exchange(self, method: str, arguments: tuple, limit: float | None) -> Any:
        began = time.monotonic()
        try:
            self._connection.send((method, arguments))
            while not self._connection.poll(_HEARD):
                if limit is not None and time.monotonic() - began > limit:
                    self._start_again()
                    break
            else:
                result, error = self._connection.recv()
                if error is not None:
                    raise error
                return result
        except (EOFError, BrokenPipeError, ConnectionError) as ended:
            self._start_again()
            raise ChildProcessError(_ENDED) from ended
        raise TimeoutError(
            f"this took longer than {limit:.0f} seconds and was ended: ask for fewer images or"
            " steps."
        )

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def close(self) -> None:
        """End the process, in the middle of a call too."""
        self._closed = True
        self._end()


def _answer(connection: Connection) -> None:
    """What a `ModelProcess` does until the other one has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the page
    from .logging import disable_progress_bars
    from .page import Page

    disable_progress_bars()
    answer: tuple[Any, Exception | None]
    try:
        page = Page(connection.recv())
        while True:
            method, arguments = connection.recv()
            try:
                answer = getattr(page, method)(*arguments), None
            except Exception as error:  # raised again where it was asked for
                answer = None, error
            connection.send(answer)
    except (EOFError, BrokenPipeError):
        pass


def launch(
    name: str | os.PathLike,
    host: str | None = None,
    port: int | None = None,
    revision: str | None = None,
    time_limit: float | None = None,
) -> None:
    """Serve the page of a pipeline until Ctrl-C.

    Args:
        name, revision: see `Page`.
        host: address to listen at; `None`: GRADIO_SERVER_NAME, or 127.0.0.1, this machine only.
        port: `None`: GRADIO_SERVER_PORT, or the first free one from 7860 on.
        time_limit: seconds that a call of the model may take; `None`: `TIME_LIMIT`.

    Raises:
        OSError, ValueError, TypeError: one sentence: no such pipeline, the port is taken.
        ImportError: Gradio is not installed.
    """
    with suppress(ValueError):  # not in the main thread: the caller handles signals
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            signal.signal(
                number, signal.default_int_handler
            )  # as Ctrl-C, or the other process would be left behind
    process, blocks = ModelProcess(TIME_LIMIT if time_limit is None else time_limit), None
    try:
        from .app import build, serve
        from .page import PageApart

        page = PageApart(name, process, revision)
        blocks = build(page)
        _, url, _ = serve(blocks, host, port)
        print(f"{page.title}: {url}   (Ctrl-C ends it)", flush=True)
        page.load()
        while True:
            time.sleep(_HEARD)
    except KeyboardInterrupt:
        print("closed.", flush=True)
    finally:
        process.close()  # first: whoever waits for an answer would keep the server from closing
        if blocks is not None:
            blocks.close(verbose=False)
