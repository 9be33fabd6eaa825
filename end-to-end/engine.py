"""Many callers, one sequence at a time: requests wait in a queue, and one thread answers them in their order."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from answering import Answer
from decdec.errors import UserError

_log = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full."""


@dataclass(frozen=True)
class _Ended:
    """The last event of a job; ``error`` is what went wrong, None if the answer is whole."""

    error: Exception | None = None


class Job:
    """One request on its way. Made and read in an event loop, answered by the engine's thread."""

    def __init__(self, begin: Callable[[], Answer]):
        self._begin = begin
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue = asyncio.Queue()
        self._cancelled = threading.Event()
        self.answer: Answer | None = None  # once its turn has come

    def cancel(self) -> None:
        """Nobody waits for the rest: the thread leaves it at the next token."""
        self._cancelled.set()

    async def pieces(self) -> AsyncIterator[str]:
        """The answer's text as it comes; raises what the engine's thread met."""
        while not isinstance(event := await self._events.get(), _Ended):
            yield event
        if event.error is not None:
            raise event.error

    def run(self) -> None:
        """Answer it, in the engine's thread. Nothing that goes wrong here may end the thread."""
        error = None
        if not self._cancelled.is_set():
            try:
                self.answer = self._begin()
                for piece in self.answer:
                    if self._cancelled.is_set():
                        break
                    if piece:
                        self._tell(piece)
            except Exception as raised:  # told to the one who asked; the next request may well succeed
                if not isinstance(raised, UserError):
                    _log.exception("a request failed")
                error = raised
        self._tell(_Ended(error))

    def _tell(self, event: "str | _Ended") -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class Engine:
    """The queue and its thread. ``limit`` requests may wait; more are refused with :class:`Busy`."""

    def __init__(self, limit: int):
        self._jobs: queue.Queue[Job] = queue.Queue(limit)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, begin: Callable[[], Answer]) -> Job:
        """Queue a request; ``begin`` is called when its turn comes."""
        job = Job(begin)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Busy(f"{self._jobs.maxsize} requests are waiting; try again later") from None
        return job

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _work(self) -> None:
        while True:
            self._jobs.get().run()
