"""Who is told what a living sandbox does: :class:`Observed`; and a command that they were told of:
:class:`Watch`."""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar, cast

from sandboxcore._native import Streams
from sandboxcore.errors import SandboxError, SandboxGone, SetupError
from sandboxcore.events import LOGGER, EventKind, current_trace, tracing
from sandboxcore.lifecycle import new_id
from sandboxcore.result import Cause, ExecResult

Observer = Callable[[str, Mapping[str, Any]], object]


class Observers(list[Observer]):
    """Those of one sandbox. They do not know it, so that nobody is kept alive by who watches a command."""

    def tell(self, kind: EventKind, data: Mapping[str, Any]) -> None:
        """Tell everybody. Whoever raises is logged, and disturbs nobody."""
        view = MappingProxyType(data)
        for observer in tuple(self):
            try:
                observer(kind, view)
            except Exception:
                LOGGER.exception("an observer failed with %s", kind.value)


_changing = threading.RLock()  # for a moment; a finaliser may come in the midst of it


class Observed:
    """The part of a sandbox that says what happens to it."""

    _observers: "Observers | tuple[()]" = ()  # shared by all that nobody observes: costs them nothing
    _watches: "dict[str, Watch] | None" = None  # of detached commands whose end is not known yet

    def observe(self, callback: Observer) -> Callable[[], None]:
        """Be told what this handle does with the sandbox, and finds out about it: ``callback(kind, data)``,
        with an :class:`EventKind` and what there is to say. Returns a function that ends that, idempotent.

        States (``sandbox.started`` ...), commands (``command.started`` with argv, then exactly one
        ``command.ended`` with the same ``command``), files (``file.written`` ... with paths and sizes),
        limits, binds, snapshots. Never an environment, input, output, or what is in a file. What another
        process or handle does is not told. ``data["trace_id"]`` is that of :meth:`trace`.

        It is called in the thread that works, often with the sandbox's lock held: it must be quick and wait
        for nobody else who uses the sandbox. One that raises is logged and disturbs nothing.
        """
        with _changing:
            if not isinstance(self._observers, Observers):
                self._observers = Observers()
            observers = self._observers
        entry = _Entry(callback)
        observers.append(entry)

        def stop() -> None:
            with contextlib.suppress(ValueError):
                observers.remove(entry)

        return stop

    def trace(self, trace_id: str) -> AbstractContextManager[None]:
        """A context in which everything that observers are told has this id: of this thread or task, and of
        tasks started within, whatever sandbox they use. A command keeps that of its start."""
        return tracing(trace_id)

    def _note(self, kind: EventKind, **data: Any) -> None:
        """Tell the observers."""
        if isinstance(observers := self._observers, Observers) and observers:
            if (trace := current_trace()) is not None:
                data["trace_id"] = trace
            observers.tell(kind, data)

    def _watched(self, args: Sequence[Any], streams: Streams | None = None, **about: Any) -> "Unwatched":
        """A command that is about to start. ``streams``: those whose bytes its result counts."""
        if isinstance(observers := self._observers, Observers) and observers:
            return Watch(observers, args, () if streams is None else streams.counted, about)
        return UNWATCHED

    def _watch_of(self, command_id: str) -> "Unwatched":
        """That of a detached command."""
        return (self._watches or {}).get(command_id, UNWATCHED)

    def _keep_watch(self, command_id: str, watch: "Unwatched") -> None:
        """Until the end of a detached command is known."""
        if isinstance(watch, Watch):
            with _changing:  # another one each time, for whoever reads it
                known = (self._watches or {}).items()
                self._watches = {key: one for key, one in known if not one.over} | {command_id: watch}

    def _settle(self, result_of: Callable[[str], ExecResult | None]) -> None:
        """The sandbox has ended, and so every detached command has: find out how."""
        with _changing:
            watches, self._watches = self._watches, None
        for command_id, watch in (watches or {}).items():
            if not watch.over:
                try:
                    result = result_of(command_id)
                except Exception:  # its journal is gone, too
                    result = None
                if result is None:
                    watch.let_go("gone")
                else:
                    watch.ended(result)


class _Entry:
    """One subscription; two of the same callback are two."""

    def __init__(self, callback: Observer) -> None:
        self._callback = callback

    def __call__(self, kind: str, data: Mapping[str, Any]) -> object:
        return self._callback(kind, data)


class Unwatched:
    """A command of which nobody was told: does nothing. What :class:`Watch` does otherwise."""

    over = True

    def ended(self, result: ExecResult) -> None:
        """It has ended like this."""

    def failed(self, error: BaseException) -> None:
        """It did not start, or nobody will know how it ended."""

    def let_go(self, why: str = "closed") -> None:
        """Its handle was closed; by that it is killed, if it still runs. Or its sandbox is gone."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Whoever leaves by an exception has failed. Else it runs on."""
        if error is not None:
            self.failed(error)


UNWATCHED = Unwatched()


class Watch(Unwatched):
    """A command that observers were told of. They are told its end, once, whoever learns it first."""

    def __init__(
        self, observers: Observers, args: Sequence[Any], counted: tuple[int, ...], about: dict[str, Any]
    ) -> None:
        self._observers, self._counted = observers, counted
        self._once = [None]  # taken by who tells the end: list.pop is atomic
        self._began = time.monotonic()
        trace = current_trace()
        traced = {} if trace is None else {"trace_id": trace}
        self._about = {"command": about.pop("command", None) or new_id("cmd"), "detached": False, **traced}
        self._about |= about
        observers.tell(EventKind.COMMAND_STARTED, {**self._about, "args": [os.fsdecode(arg) for arg in args]})

    @property
    def over(self) -> bool:  # type: ignore[override]
        """Whether the end was told."""
        return not self._once

    def ended(self, result: ExecResult) -> None:
        totals = {1: ("stdout_total", result.stdout_total), 2: ("stderr_total", result.stderr_total)}
        self._end(
            cause=result.cause.value,
            returncode=result.returncode,
            signal=-result.returncode if result.returncode < 0 else None,
            duration=result.duration or time.monotonic() - self._began,  # 0: nobody saw how long
            truncated=result.truncated,
            **dict(totals[number] for number in self._counted),
        )

    def failed(self, error: BaseException) -> None:
        text = {"detail": str(error)} if isinstance(error, SandboxError) else {}
        self._unknown(_cause(error), type(error).__name__, **text)

    def let_go(self, why: str = "closed") -> None:
        self._unknown(Cause.KILLED, why)

    def _unknown(self, cause: Cause | None, error: str, **more: Any) -> None:
        duration = time.monotonic() - self._began
        told = None if cause is None else cause.value
        self._end(cause=told, returncode=None, signal=None, duration=duration, error=error, **more)

    def _end(self, **data: Any) -> None:
        try:
            self._once.pop()
        except IndexError:
            return
        self._observers.tell(EventKind.COMMAND_ENDED, {**self._about, **data})


def _cause(error: BaseException) -> Cause | None:
    """None where nobody knows: the command may have ended well, and what it wrote could not be decoded."""
    if isinstance(error, SandboxGone):
        return Cause.KILLED
    if isinstance(error, SetupError | TimeoutError):  # it did not start, or not in time
        return Cause.SETUP
    return None if isinstance(error, Exception) else Cause.KILLED  # cancelled, or interrupted


# --- file operations ------------------------------------------------------------------------------------


class Operated:
    """What makes the steps of file operations, of which observers are told."""

    observed: Observed | None = None

    def resolve(self, path: Any) -> str:
        """The absolute path inside."""
        raise NotImplementedError


Operation = TypeVar("Operation", bound=Callable[..., Generator[Any, Any, Any]])


def noted(kind: EventKind, *names: str, **more: Any) -> Callable[[Operation], Operation]:
    """For a method that makes the steps of an operation: observers are told when it has succeeded or failed.
    ``names``: those of its first arguments, where ``path`` and ``to`` are inside, ``host`` is not; an empty
    one is of what nobody is told."""

    def decorate(operation: Operation) -> Operation:
        @functools.wraps(operation)
        def steps(self: Operated, *args: Any, **options: Any) -> Generator[Any, Any, Any]:
            plain = operation(self, *args, **options)
            if self.observed is None or not self.observed._observers:
                return plain
            given = dict(zip(names, args, strict=False))
            return _told(self.observed, kind, plain, {**_readable(self, given), **more})

        return cast(Operation, steps)

    return decorate


def _readable(operated: Operated, given: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in given.items() if name}
    with contextlib.suppress(Exception):  # what is wrong with them the operation says itself
        for name, value in given.items():
            if name in ("path", "to"):
                found[name] = operated.resolve(value)
            elif name == "host":
                found[name] = os.path.abspath(os.fsdecode(value))
            elif name == "target":
                found[name] = os.fsdecode(value)
    return found


def _told(
    observed: Observed, kind: EventKind, steps: Generator[Any, Any, Any], about: dict[str, Any]
) -> Generator[Any, Any, Any]:
    try:
        value = yield from steps
    except GeneratorExit:
        observed._note(kind, **about, error="interrupted")
        raise
    except Exception as error:
        observed._note(kind, **about, error=type(error).__name__)
        raise
    if isinstance(value, bytes | int):
        about["bytes"] = len(value) if isinstance(value, bytes) else value
    observed._note(kind, **about)
    return value
