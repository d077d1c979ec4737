"""The files of a living sandbox at one moment, kept: :meth:`Sandbox.snapshot`, to go back to, or to begin
others with."""

import contextlib
import errno as E
import itertools
import os
import select
import socket
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, Self

from sandboxcore import _native
from sandboxcore._native import LayersOrder
from sandboxcore.binds import LiveBinds
from sandboxcore.errors import SandboxBusy, SandboxError, SpecError
from sandboxcore.lifecycle import new_id
from sandboxcore.link import ANSWER_PATIENCE, Link
from sandboxcore.spawner import Spawner, get_spawner
from sandboxcore.spec import SandboxSpec

_BUSY = {"launcher": "a command runs", "mount": "a file is open for writing"}


class Layer:
    """What was written up to some moment, and is never written to again. It is in memory; the spawner keeps
    it as long as this object lives, and so does every sandbox that has it."""

    _numbers = itertools.count(1)

    def __init__(self, keeper: Spawner, weight: int = 1) -> None:
        """``weight``: how many layers it was made of."""
        self.keeper, self.number, self.weight = keeper, next(self._numbers), weight

    def keep(self, fd: int) -> None:
        """``fd``: as init lends it; closed here. Raises NativeFailure: it lasts as long as its sandbox."""
        try:
            self.keeper.shelve(self.number, fd)
        finally:
            os.close(fd)
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

    def begin(self, keeper: Spawner) -> list[int]:
        """The sandbox starts: with what, by the numbers on the keeper's shelf. Raises SandboxError."""
        if any(layer.keeper is not keeper for layer in self.base):
            raise SandboxError(
                "what the sandbox begins with is gone: its spawner has died, or is another process's"
            )
        self.stack: tuple[Layer, ...] = ()
        self._numbers: weakref.WeakKeyDictionary[Layer, int] = weakref.WeakKeyDictionary()
        self._dead: deque[int] = deque()  # numbers of those that nobody has any more
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
        return list(itertools.islice(self._dead, _native.constant("MAX_LAYERS") - 1))

    def _dropped(self, numbers: list[int]) -> None:
        for _ in numbers:
            self._dead.popleft()

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
        self._number: int | None = layers.take()
        self._drop = layers.droppable()
        with contextlib.ExitStack() as undo:
            undo.callback(self.__exit__)
            if link.pause is not None:
                link.pause.begin()
            self.answer = link.ask_layers(LayersOrder((), self._number, drop=self._drop, copy=True))
            undo.pop_all()

    def take(self, keeper: Spawner) -> Layer:
        """Wait for it, and take it. Raises NativeFailure, TimeoutError, OSError."""
        assert self._number is not None
        fd = self._link.hear_layer(self.answer, self.PATIENCE)
        layer = Layer(keeper)
        self._layers.copied(layer, self._number, self._drop)
        self._number = None
        layer.keep(fd)
        return layer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._link.pause is not None:
            self._link.pause.end()
        if self._number is not None:
            self._layers.failed(self._number)
        if hasattr(self, "answer"):
            self.answer.close()


class Snapshot:
    """The files of a sandbox at one moment: everything written to its root (``writable=True``) and to its
    overlays, not what is in ``/tmp`` and ``/dev/shm``, nor processes.

    It lasts, in memory, until it is closed and no sandbox made from it is left; at most as long as this
    process. What it holds counts against ``limits.disk`` of the sandbox in which it was written, and of no
    other.

    id, name, created_at (seconds since the epoch), sandbox (the id of the one it was taken of), spec, copied
    (False: it took the same time however much there was; True: a copy was made while commands stood still).
    """

    def __init__(
        self, name: str | None, sandbox: str, spec: SandboxSpec, layers: tuple[Layer, ...], *, copied: bool
    ) -> None:
        self.id = new_id("snp")
        self.name = name or self.id
        self.sandbox, self.spec = sandbox, spec
        self.created_at = time.time()
        self.copied = copied
        self._layers: tuple[Layer, ...] | None = layers

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The topmost first. Raises :class:`SandboxError` when it is closed."""
        if self._layers is None:
            raise SandboxError(f"snapshot {self.name}: closed")
        return self._layers

    def close(self) -> None:
        """Let go of it. Sandboxes made from it live on. Idempotent."""
        self._layers = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Snapshot {self.name} of {self.sandbox}>"


class Snapshots(LiveBinds):
    """The part of :class:`Sandbox` that has to do with its files at earlier moments."""

    id: str
    _layers: Layers

    def snapshot(self, name: str | None = None, *, copy: bool | None = None) -> Snapshot:
        """Keep everything as it is now, and go on.

        It takes the same time however much there is, unless a command runs or a file is open for writing:
        then everything stands still while what was written since the last snapshot is copied;
        ``Snapshot.copied`` says so. What this process has open for writing goes on, and is copied as it is.
        ``copy=False``: raise :class:`SandboxBusy` instead; ``True``: a copy in any case.

        Only of a sandbox whose spec has ``writable=True`` or overlays; else :class:`SpecError`. Raises
        :class:`SandboxBusy` where something does not stand still within 2 s, or where there are 64 layers.
        """
        with self._lock, self._quiet("snapshot"):
            if self._sealed(copy):
                return self._snapshot(name, None)
            with Copy(self._layers, self._link_now()) as made:
                return self._snapshot(name, made.take(get_spawner(self._plan)))

    def _sealed(self, copy: bool | None) -> bool:
        """Whether there is no need for a copy any more."""
        try:
            if not copy:
                self._layers.seal(self._link_now(), get_spawner(self._plan))
        except _native.NativeFailure as failure:
            if copy is False or failure.errno != E.EBUSY:
                raise
            return False
        return not copy

    def _snapshot(self, name: str | None, copied: Layer | None) -> Snapshot:
        layers = self._layers.stack if copied is None else (copied, *self._layers.stack)
        return Snapshot(name, self.id, self.spec, layers, copied=copied is not None)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, of this sandbox or of another one with the same overlays. What was written
        since is lost, if no other snapshot has it. Takes the same time however much there is. What was bound
        while it runs (:meth:`bind`) stays.

        Raises :class:`SandboxBusy` while a command runs, :class:`SpecError` for one that does not fit.
        """
        with self._lock, self._quiet("restore"):
            if _shape(snapshot.spec) != _shape(self.spec):
                raise SpecError(f"snapshot {snapshot.name}: of a sandbox with other overlays or layers")
            self._layers.change(self._link_now(), snapshot.layers)

    def discard(self) -> None:
        """Go back to the last snapshot of it, or to the beginning. Raises :class:`SandboxBusy`."""
        with self._lock, self._quiet("discard"):
            self._layers.change(self._link_now(), self._layers.stack)

    @contextlib.contextmanager
    def _quiet(self, wanted: str) -> Iterator[None]:
        """What init refuses while something happens in the sandbox. Raises SandboxBusy."""
        self._ready(wanted)
        if not self._plan.overlays:
            raise SpecError(f"{wanted}: nothing of sandbox {self.name} is kept; writable=True, or an overlay")
        self._file_server.close(wait=ANSWER_PATIENCE)
        try:
            yield
        except _native.NativeFailure as failure:
            if failure.errno != E.EBUSY:
                raise self._rendered(None, failure) from None
            why = _BUSY.get(failure.stage, "another snapshot is taken")
            raise SandboxBusy(f"sandbox {self.name}: {wanted}: {why}") from None


def _shape(spec: SandboxSpec) -> tuple[Any, ...]:
    """What has to be the same for a snapshot to fit."""
    overlays = [(mount.target, mount.source) for mount in spec.all_mounts() if mount.kind == "overlay"]
    return spec.writable, spec.rootfs if spec.writable else None, sorted(overlays), spec.ids()
