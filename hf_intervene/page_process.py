"""Serving the page of `hf-intervene app` (`launch`), its model in a process of its own (`ModelProcess`).

Until a picture is in the browser, most of the time goes by with imports: torch and the Hugging Face libraries, Gradio, the browser's own.
The three go on beside each other, and the longest begins first: this module imports nothing heavy, and starts the process before anything
else.
"""

import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

from . import _no_collection


# Seconds after which Ctrl-C is heard at the latest: one that comes just before a wait begins does not end it.
_HEARD = 0.2


class ModelProcess:
    """A process that answers calls of a `Page`'s methods, one at a time, once it is told the folder (see `page.PageApart`). What the model
    needs is imported before that."""

    def __init__(self) -> None:
        context, self._lock = multiprocessing.get_context("spawn"), Lock()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # or neither would see the other's end

    def open(self, folder: Path) -> None:
        """Of which folder the page is. Waits for nothing.

        Raises:
            ChildProcessError: one sentence: the process has ended.
        """
        with self._lock, _ended_in_a_sentence():
            self._connection.send(folder)

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the page returns.

        Raises:
            ChildProcessError: one sentence: the process has ended.
            Exception: what the method raises.
        """
        with self._lock, _ended_in_a_sentence():
            self._connection.send((method, arguments))
            while not self._connection.poll(_HEARD):
                pass
            result, error = self._connection.recv()
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()
        self._connection.close()


@contextmanager
def _ended_in_a_sentence() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as ended:
        raise ChildProcessError(
            "the process of the model has ended, perhaps for want of memory: start the page again."
        ) from ended


def _answer(connection: Connection) -> None:
    """What a `ModelProcess` does until the other one has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the page
    with _no_collection():
        from . import pipeline  # noqa: F401  # before it is asked for
        from .logging import disable_progress_bars
        from .page import Page

    gc.freeze()  # nor among them later: half a second until the first picture
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


def launch(name: str | os.PathLike, host: str | None = None, port: int | None = None, revision: str | None = None) -> None:
    """Serve the page of a pipeline until Ctrl-C.

    Args:
        name, revision: see `Page`.
        host: address to listen at; `None`: GRADIO_SERVER_NAME, or 127.0.0.1, this machine only.
        port: `None`: GRADIO_SERVER_PORT, or the first free one from 7860 on.

    Raises:
        OSError, ValueError, TypeError: one sentence: no such pipeline, the port is taken.
        ImportError: Gradio is not installed.
    """
    process = ModelProcess()
    try:
        with _no_collection():
            from .app import build, serve
            from .page import PageApart

        page = PageApart(name, process, revision)
        blocks = build(page)
        _, url, _ = serve(blocks, host, port)
        print(f"{page.title}: {url}   (Ctrl-C ends it)", flush=True)
        page.load()
        blocks.block_thread()
    except KeyboardInterrupt:  # while something is imported or loaded; after that Gradio says good-bye
        print("closed.")
    finally:
        process.close()
