"""What the overlays of a living sandbox consist of: layers, that are sealed, folded, copied and dropped."""

import contextlib
import itertools
import os
import select
import socket
import weakref
from collections.abc import Callable, Iterator
from typing import Self

from sandboxcore import _native
from sandboxcore._native import LayersOrder
from sandboxcore.errors import SandboxError
from sandboxcore.link import Link
from sandboxcore.packing import PIPE_SIZE, BrokenStream, Item, Writer, read_layer
from sandboxcore.spawner import Spawner


class Layer:
    """What was written up to some moment, and is never written to again. It is in memory; the spawner keeps
    it as long as this object lives, and so does every sandbox that has it."""

    _numbers = itertools.count(1)

    def __init__(self, keeper: Spawner, weight: int = 1) -> None:
        """``weight``: how many layers it was made of. ``digest``: of the archive in which it was saved."""
        self.keeper, self.number, self.weight = keeper, next(self._numbers), weight
        self.digest: str | None = None

    def items(self, *, content: bool) -> Iterator[Item]:
        """What is in it. Raises SandboxError where that cannot be had."""
        try:
            yield from read_layer(self.keeper, self.number, content=content)
        except (_native.NativeFailure, BrokenStream) as failure:
            why = "has its spawner died, or is it another process's?"
            raise SandboxError(f"what the snapshot has cannot be read; {why} {failure}") from failure

    def keep(self, fd: int) -> None:
        """``fd``: as init lends it; closed here. Raises NativeFailure: it lasts as long as its sandbox."""
        try:
            self.keeper.shelve(self.number, fd)
        finally:
            os.close(fd)
        self._kept()

    @classmethod
    def made(cls, keeper: Spawner, room: int, write: Callable[[Writer], None]) -> Self:
        """One that a function writes. ``room``: in bytes, what it may take. Raises NativeFailure, and what
        the function does."""
        layer = cls(keeper)
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        with open(theirs, "wb", buffering=PIPE_SIZE) as file:
            try:
                answer = keeper.stream("UNPACK", layer.number, ours, (room >> 20) + 1)
            finally:
                os.close(ours)
            layer._kept()
            with answer:
                try:
                    write(Writer(file))
                    file.close()
                except BrokenPipeError:  # the answer says why
                    with contextlib.suppress(BrokenPipeError):
                        file.close()
                keeper.concluded(answer)
        return layer

    def _kept(self) -> None:
        forget = weakref.finalize(self, self.keeper.unshelve, self.number)
        forget.atexit = False  # the spawner ends with us


class Layers:
    """What the overlays of one sandbox consist of now, on top of what its spec names.

    Each has a number there, as what is written to (``upper``) has, that nothing else there ever had.

    Deep stacks are folded meanwhile: eight layers of the same weight become one, so that a thousand snapshots
    make a stack of some thirty, and everything is copied three times at most. The layers stay as long as some
    snapshot has them.
    """

    RADIX, TOP = 8, 4  # so many are folded at once; of the topmost ones none

    def __init__(self, base: tuple[Layer, ...] = ()) -> None:
        """``base``: what it begins with, the topmost first."""
        self.base = base

    def kept_by_another(self, keeper: Spawner) -> bool:
        """Whether what it begins with is not on this keeper's shelf, so that it cannot begin there."""
        return any(layer.keeper is not keeper for layer in self.base)

    def begin(self, keeper: Spawner) -> list[int]:
        """The sandbox starts: with what, by the numbers on the keeper's shelf. Raises SandboxError."""
        if self.kept_by_another(keeper):
            raise SandboxError(
                "what the sandbox begins with is gone: its spawner has died, or is another process's"
            )
        self.stack: tuple[Layer, ...] = ()
        self._numbers: weakref.WeakKeyDictionary[Layer, int] = weakref.WeakKeyDictionary()
        self._dead: list[int] = []  # numbers of those that nobody has any more; finalisers add to it
        self._next = 1
        self._fold: Fold | None = None
        self._rest = 0  # seals for which nothing is folded, after a failure
        self._go_on(self.base, {layer: self.take() for layer in self.base}, 0)
        self._live: tuple[Layer, ...] = self.stack  # what it really has, and nobody may remove
        return [layer.number for layer in self.base]

    def seal(self, link: Link, keeper: Spawner) -> None:
        """What was written until now becomes a layer. Raises what :meth:`Link.change_layers` does,
        SandboxError where there are too many layers."""
        most = _native.constant("MAX_LAYERS")
        self._end_fold(Fold.PATIENCE if len(self.stack) > most - self.RADIX else 0)
        if len(self.stack) + 1 > most:
            raise SandboxError(f"snapshot: more than {most} layers, and they cannot be folded: limits.disk")
        upper, drop = self.take(), self.droppable()
        numbers = [(self.upper, -1), *((self._numbers[layer], -1) for layer in self.stack)]
        fd = link.change_layers(LayersOrder(numbers, upper, seal=True, drop=drop))
        layer = Layer(keeper)
        self._dropped(drop)
        self._go_on((layer, *self.stack), {layer: self.upper}, upper)
        self._live = self.stack
        layer.keep(fd)
        self._begin_fold(link, keeper)

    def change(self, link: Link, stack: tuple[Layer, ...]) -> None:
        """What was written until now goes; on with others. Raises what :meth:`Link.change_layers` does."""
        fresh = {layer: self.take() for layer in stack if layer not in self._numbers}
        upper, drop = self.take(), self.droppable()
        with contextlib.ExitStack() as borrowed:
            numbers = []
            for layer in stack:
                fd = layer.keeper.borrow(layer.number) if layer in fresh else -1
                if fd >= 0:
                    borrowed.callback(os.close, fd)
                numbers.append((fresh.get(layer) or self._numbers[layer], fd))
            link.change_layers(LayersOrder(numbers, upper, drop=[self.upper, *drop]))
        self._dropped(drop)
        self._go_on(stack, fresh, upper)
        self._live = self.stack

    def end(self) -> None:
        """The sandbox has ended."""
        if fold := getattr(self, "_fold", None):
            fold.answer.close()
            self._fold = None

    def _begin_fold(self, link: Link, keeper: Spawner) -> None:
        self._rest = max(0, self._rest - 1)
        if self._fold is None and not self._rest and (run := self._run()):
            number = self.take()
            numbers = [(self._numbers[layer], -1) for layer in run]
            with contextlib.suppress(OSError):
                self._fold = Fold(
                    link.ask_layers(LayersOrder(numbers, number, copy=True)), number, run, keeper
                )

    def _run(self) -> tuple[Layer, ...]:
        """The first layers that are to be folded."""
        for start in range(self.TOP, len(self.stack) - self.RADIX + 1):
            run = self.stack[start : start + self.RADIX]
            if len({layer.weight for layer in run}) == 1:
                return run
        return ()

    def _end_fold(self, patience: float) -> None:
        """Take what was folded, if it is done. It is used from the next change on."""
        fold = self._fold
        if fold is None or not fold.done(patience):
            return
        self._fold = None
        try:
            with fold.answer:
                layer = fold.take()
        except (_native.NativeFailure, OSError):  # there is no room for it, say
            self.failed(fold.number)
            self._rest = 2 * self.RADIX
            return
        self._go_on(self.stack, {layer: fold.number}, self.upper)
        starts = [i for i in range(len(self.stack)) if self.stack[i : i + len(fold.run)] == fold.run]
        for start in starts:  # none after a restore, perhaps
            self.stack = (*self.stack[:start], layer, *self.stack[start + len(fold.run) :])

    def copied(self, layer: Layer, number: int, dropped: list[int]) -> None:
        """It has one more, which it does not use: a copy of what is written to."""
        self._dropped(dropped)
        self._go_on(self.stack, {layer: number}, self.upper)

    def failed(self, number: int) -> None:
        """Nothing has come of what was to get this number; perhaps a part of it is there."""
        self._dead.append(number)

    def take(self) -> int:
        """The next number."""
        self._next += 1
        return self._next - 1

    def droppable(self) -> list[int]:
        """Numbers of what may be removed the next time."""
        most = _native.constant("MAX_LAYERS") - 1
        return self._dead[:most]

    def _dropped(self, numbers: list[int]) -> None:
        del self._dead[: len(numbers)]

    def _go_on(self, stack: tuple[Layer, ...], fresh: dict[Layer, int], upper: int) -> None:
        for layer, number in fresh.items():
            self._numbers[layer] = number
            weakref.finalize(layer, self._dead.append, number).atexit = False
        self.stack, self.upper = stack, upper


class Fold:
    """Layers that become one, meanwhile."""

    PATIENCE = 60.0  # seconds, where there may be no more layers

    def __init__(self, answer: socket.socket, number: int, run: tuple[Layer, ...], keeper: Spawner) -> None:
        self.answer, self.number, self.run, self.keeper = answer, number, run, keeper

    def done(self, patience: float) -> bool:
        """Whether there is an answer, after so many seconds at most."""
        poller = select.poll()
        poller.register(self.answer, select.POLLIN)
        return bool(poller.poll(patience * 1000))

    def take(self) -> Layer:
        """The layer. Raises NativeFailure, OSError."""
        fd = Link.hear_layer(self.answer, 0)
        layer = Layer(self.keeper, sum(part.weight for part in self.run))
        layer.keep(fd)
        return layer


class Copy:
    """A copy of what was written, while it is made: everything stands still, and no limit of time counts."""

    PATIENCE = 600.0  # seconds

    def __init__(self, layers: Layers, link: Link) -> None:
        """Ask for it. The answer comes on ``answer``. Raises OSError."""
        self._layers, self._link = layers, link
        self.number = layers.take()
        self._taken = False
        self._drop = layers.droppable()
        with contextlib.ExitStack() as undo:
            undo.callback(self.__exit__)
            if link.pause is not None:
                link.pause.begin()
            self.answer = link.ask_layers(LayersOrder((), self.number, drop=self._drop, copy=True))
            undo.pop_all()

    def take(self, keeper: Spawner) -> Layer:
        """Wait for it, and take it. Raises NativeFailure, TimeoutError, OSError."""
        fd = self._link.hear_layer(self.answer, self.PATIENCE)
        layer = Layer(keeper)
        self._layers.copied(layer, self.number, self._drop)
        self._taken = True
        layer.keep(fd)
        return layer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._link.pause is not None:
            self._link.pause.end()
        if not self._taken:
            self._layers.failed(self.number)
        if hasattr(self, "answer"):
            self.answer.close()
