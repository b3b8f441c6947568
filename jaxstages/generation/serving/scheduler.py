"""The thread that runs the engines: answers wait in a bounded queue for a slot of their model's engine."""

import threading
from collections import deque
from collections.abc import Mapping

from jaxstages.generation.serving.engine import Answer, Engine
from jaxstages.runtime.console import warn


class Stopped(Exception):
    """The scheduler's thread has ended."""


class QueueFull(Exception):
    """As many answers wait as the scheduler accepts."""


class Scheduler:
    """Runs engines, in turns, in one thread.

    Args:
        engines: an engine for each model's name.
        max_waiting: most answers that wait for a slot, over all engines.
    """

    def __init__(self, engines: Mapping[str, Engine], max_waiting: int) -> None:
        self.engines, self._max_waiting = engines, max_waiting
        self._waiting: dict[str, deque[Answer]] = {name: deque() for name in engines}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread after the call under way. Answers that have not ended get no more tokens."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def num_busy(self) -> int:
        return sum(len(engine.answers) for engine in self.engines.values())

    def submit(self, name: str, answers: list[Answer]) -> None:
        """Queue answers for an engine, all or none.

        Raises:
            QueueFull: there are too many.
            Stopped: the thread has ended after an error.
        """
        if not self.is_running:
            raise Stopped
        engine = self.engines[name]
        with self._changed:
            for waiting in self._waiting.values():
                for answer in [answer for answer in waiting if answer.cancelled]:
                    waiting.remove(answer)
            free = engine.num_slots - len(engine.answers)
            if self.num_waiting + len(answers) > self._max_waiting + free:
                raise QueueFull
            self._waiting[name].extend(answers)
            self._changed.notify()

    def capacity(self, name: str) -> int:
        """Return the largest number of answers that can be queued at once."""
        return self.engines[name].num_slots + self._max_waiting

    def _run(self) -> None:
        try:
            self._advance_all()
        finally:  # also after an error for which there is no remedy: nobody must wait for an answer
            with self._changed:
                left = [answer for waiting in self._waiting.values() for answer in waiting]
            for answer in (*left, *(answer for engine in self.engines.values() for answer in engine.answers)):
                answer.on_tokens([], "error")

    def _advance_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self.num_waiting or self.num_busy)
                if self._closing:
                    return
            for name, engine in self.engines.items():
                self._advance(name, engine)

    def _advance(self, name: str, engine: Engine) -> None:
        """Let answers join, and take a step."""
        joining = None
        try:
            while engine.has_room and (joining := self._next(name)) is not None:
                engine.add(joining)
            if engine.answers:
                engine.step()
        except Exception as error:  # out of memory, for example: the answers under way fail, the server goes on
            warn(f"{name}: {type(error).__name__}: {error}")
            failed = {*engine.answers, *([joining] if joining is not None else [])}
            for answer in failed:
                answer.on_tokens([], "error")
            engine.reset()

    def _next(self, name: str) -> Answer | None:
        """Take the next answer that waits; None if there is none."""
        with self._changed:
            waiting = self._waiting[name]
            while waiting:
                answer = waiting.popleft()
                if not answer.cancelled:
                    return answer
        return None
