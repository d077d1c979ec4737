"""Directories and files of the host that come and go while a sandbox runs: :meth:`Sandbox.bind`,
:meth:`Sandbox.unbind`."""

import contextlib
import errno as E
import os
import select
import socket
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from sandboxcore import _native
from sandboxcore.capabilities import SandboxCapabilities
from sandboxcore.errors import SandboxBusy, SandboxError, SetupError, SpecError
from sandboxcore.events import EventKind
from sandboxcore.files import Files, FileServer
from sandboxcore.host import HostFeatures
from sandboxcore.link import ANSWER_PATIENCE, Link
from sandboxcore.process import ATTEMPTS, help_spawner, reach_spawner, render
from sandboxcore.request import Request
from sandboxcore.resources import Resources
from sandboxcore.spawner import PATIENCE, Spawner
from sandboxcore.spec import Mount, StrPath, check_source, clean_path, path_text
from sandboxcore.tree import Mount as TreeMount
from sandboxcore.tree import below, granted, owner_maps

if TYPE_CHECKING:
    from sandboxcore.sandbox import Sandbox

# For the fault walk: the number of the spawner's call that fails, and how. That of init's is request.FAULT.
FAULT = (0, 0)

Wait = tuple[socket.socket, float]  # until there is an answer, so many seconds at most
Steps = Generator[Wait, None, None]

_FIRST = _native.constant("BIND_FIRST")
_MOST = _native.constant("MAX_BINDS")
_HINTS = {
    E.ENOENT: "nothing can be made there, for it is read-only or the host's: choose a target below /workspace"
    " or /tmp, or one that exists",
    E.EACCES: "the payload may not make anything there: choose a target below /workspace or /tmp, or one that"
    " exists",
    E.ENOTDIR: "source and target have to be directories, or neither of them",
    E.EISDIR: "source and target have to be directories, or neither of them",
    E.ELOOP: "the target is, or lies behind, a symbolic link",
    E.EBUSY: "something else is mounted there",
    E.ESTALE: "somebody in the sandbox has renamed the target meanwhile",
}


class MissingTarget(Exception):
    """The target is not there and may be made: a directory, or a file."""

    def __init__(self, *, directory: bool) -> None:
        super().__init__()
        self.directory = directory


class LiveBinds(Resources):
    """The part of :class:`Sandbox` that has to do with binds while it runs."""

    _binds: dict[int, Mount]
    _file_server: FileServer
    _capabilities: SandboxCapabilities | None

    @property
    def binds(self) -> tuple[Mount, ...]:
        """What :meth:`bind` has added and :meth:`unbind` has not taken away, in this order."""
        return tuple(self._binds.values())

    def bind(self, source: StrPath, target: StrPath, *, read_only: bool = True) -> None:
        """Show a directory or file of the host at ``target``, also to commands that run, as ``ro=`` and
        ``rw=`` of the spec do from the start, until :meth:`unbind` or the sandbox's end.

        source: path on the host; symbolic links in it are followed once, now.
        target: absolute path inside, without symbolic links, on which nothing is mounted yet. If it is
            missing, it is made where the sandbox has something private to write to, as the payload; it stays.
        read_only: False for what is really writable; what the payload makes there is the owner's.

        The spec has to allow it: ``live_binds="ro"``, or overlays, or ``writable``; and ``live_binds="rw"``
        for ``read_only=False``. At most 64. They stay through :meth:`snapshot`, :meth:`restore` and
        :meth:`discard`, and are not part of a snapshot. Not of a persistent sandbox.

        Raises :class:`SpecError` for what cannot be, :class:`UnsupportedHost` for ``read_only=False`` as root
        where the file system has no id-mapped mounts, :class:`SetupError` where the kernel refuses. Then
        nothing was added.
        """
        with self._lock:
            wanted = self._bindable(source, target, read_only=read_only)
            try:
                _waited(self._binding(wanted))
            except MissingTarget as missing:
                files = Files(cast("Sandbox", self), self._file_server)
                with refused_as_set_up(wanted):
                    if missing.directory:
                        files.mkdir(wanted.target, parents=True, exist_ok=True)
                    else:
                        files.write(wanted.target, b"", append=True)
                _waited(self._binding(wanted, made=True))

    def unbind(self, target: StrPath, *, lazy: bool = False) -> None:
        """Take away what :meth:`bind` has added.

        lazy: also while it is in use. Whoever has a file of it open, or is in a directory of it, keeps that;
            but with Landlock, nothing more can be opened from there.

        Raises :class:`SandboxBusy` while something of it is open, or a working directory, or has another file
        system mounted on it, unless ``lazy``; :class:`SpecError` where nothing was bound at ``target``.
        """
        with self._lock:
            _waited(self._unbinding(target, lazy=lazy))

    # --- what may be ----------------------------------------------------------------------------

    def _bindable(self, source: StrPath, target: StrPath, *, read_only: bool) -> Mount:
        """What is asked for, if it can be. Raises SpecError, InvalidTransition, SandboxError."""
        path = path_text(source, "bind: source")
        wanted = Mount(
            kind="bind", source=path, target=path_text(target, "bind: target"), read_only=read_only
        )
        self._ready("bind")
        allowed = self._plan.live_binds
        if allowed is None or (allowed == "ro" and not read_only):
            access = "ro" if read_only else "rw"
            raise SpecError(f'bind: sandbox {self.name}: start it with live_binds="{access}" in its spec')
        for denied in self.spec.deny:
            if below(denied, wanted.target) or below(wanted.target, denied):
                raise SpecError(f"bind: {wanted.target!r} would bring back {denied!r}, which the spec denies")
        for other in (*(target for target, _ in self._plan.mounted), *(bind.target for bind in self.binds)):
            if other == wanted.target or below(other, wanted.target):
                raise SpecError(f"bind: {wanted.target!r} would hide {other!r}, where something is mounted")
        if len(self._binds) >= _MOST:
            raise SandboxError(f"bind: sandbox {self.name} has {_MOST} already")
        return wanted

    def _is_private(self, target: str) -> bool:
        """Whether what is missing there may be made: on something of the sandbox's own, not of the host."""
        over = [*self._plan.mounted, *((bind.target, False) for bind in self.binds)]
        above = [(path, private) for path, private in over if below(target, path)]
        return max(above, key=lambda item: len(item[0]), default=("", False))[1]

    # --- steps: each waits for an answer ----------------------------------------------------------

    def _binding(self, wanted: Mount, *, made: bool = False) -> Steps:
        """Raises :class:`MissingTarget` where it may be made, unless it was ``made``."""
        link = self._link_now()
        number = next(n for n in range(_MOST) if n not in self._binds)
        mount, there = _opened(wanted, self._plan.host, self._plan.ids)
        try:
            lent = yield from self._lent(mount, there)
        finally:
            os.close(there)
        try:
            with self._through(lambda link: link.ask_bind(number, wanted.target, lent)) as answer:
                self._binds[number] = wanted  # whoever is interrupted here cannot know; but can take it away
                self._capabilities = None
                yield answer, ANSWER_PATIENCE
                link.hear_bind(answer)
            self._note_bind(EventKind.SANDBOX_BOUND, wanted)
        except GeneratorExit:
            self._note_bind(EventKind.SANDBOX_BOUND, wanted, error="interrupted")
            raise
        except _native.NativeFailure as failure:
            error = self._rendered(None, failure, link)
            self._binds.pop(number, None)
            if failure.errno == E.ENOENT and not made and self._is_private(wanted.target):
                raise MissingTarget(directory=mount.directory) from None
            raise error from None
        finally:
            os.close(lent)

    def _lent(self, mount: TreeMount, there: int) -> Generator[Wait, None, int]:
        """A mount of the source, a descriptor."""
        plan = replace(self._plan, names={"mount": (str(mount),)})
        for attempt in range(ATTEMPTS):
            connection = reach_spawner(plan, None)
            try:
                with connection.ask_mount(mount, there, FAULT) as answer:
                    yield answer, PATIENCE
                    return Spawner.hear(answer).fd
            except _native.NativeFailure as failure:
                if failure.errno == E.EAGAIN and failure.stage == "spawner":
                    raise SetupError("source", E.ETIMEDOUT, subject=str(mount)) from None
                if failure.stage != "spawner":
                    raise render(plan, None, failure) from None
                # a mount that nobody got is none: another attempt does no harm
                again = _native.NativeFailure.of("spawner", 14, failure.errno)
                help_spawner(plan, None, connection, again, last=attempt == ATTEMPTS - 1)
        raise AssertionError("unreachable")

    def _unbinding(self, target: StrPath, *, lazy: bool) -> Steps:
        path = clean_path(target, "unbind: target")
        self._ready("unbind")
        inside = [number for number, bind in self._binds.items() if below(bind.target, path)]
        if not any(self._binds[number].target == path for number in inside):
            raise SpecError(f"unbind: nothing was bound at {path!r} in sandbox {self.name}")
        if len(inside) > 1 and not lazy:
            raise SandboxBusy(f"sandbox {self.name}: unbind {path!r}: something else was bound below it")
        for number in sorted(inside, key=lambda number: self._binds[number].target, reverse=True):
            self._capabilities = None
            yield from self._unbinding_one(number, lazy=lazy)
            if (bind := self._binds.pop(number, None)) is not None:
                self._note_bind(EventKind.SANDBOX_UNBOUND, bind, lazy=lazy)

    def _note_bind(self, kind: EventKind, bind: Mount, **more: Any) -> None:
        about = {"source": bind.source, "target": bind.target, "read_only": bind.read_only}
        self._note(kind, **about, **more)

    def _unbinding_one(self, number: int, *, lazy: bool) -> Steps:
        link, path = self._link_now(), self._binds[number].target
        try:
            with self._through(lambda link: link.ask_bind(number, None, lazy=lazy)) as answer:
                yield answer, ANSWER_PATIENCE
                link.hear_bind(answer)
        except _native.NativeFailure as failure:
            if failure.errno == E.EBUSY:
                why = "something of it is in use, or mounted on; lazy=True takes it away all the same"
                raise SandboxBusy(f"sandbox {self.name}: unbind {path!r}: {why}") from None
            raise self._rendered(None, failure, link) from None

    def _rendered(
        self, req: Request | None, failure: _native.NativeFailure, link: Link | None = None
    ) -> Exception:
        bind = self._binds.get(failure.index - _FIRST) if failure.stage == "mount" else None
        return super()._rendered(req, failure, link) if bind is None else _refused(bind, failure.errno)


def _refused(bind: Mount, errno: int) -> SetupError:
    subject = f"{bind.source} on {bind.target} (live {'ro' if bind.read_only else 'rw'})"
    return SetupError("mount", errno, subject=subject, hint=_HINTS.get(errno, ""))


@contextlib.contextmanager
def refused_as_set_up(wanted: Mount) -> Iterator[None]:
    """What keeps the payload from making a target is why it cannot be bound."""
    try:
        yield
    except OSError as error:
        if isinstance(error, SandboxError):
            raise
        raise _refused(wanted, error.errno or E.EIO) from None


def _opened(wanted: Mount, host: HostFeatures, ids: tuple[int, int]) -> tuple[TreeMount, int]:
    """The bind, and a descriptor of its source. Raises SpecError, SetupError."""
    assert wanted.source is not None
    real = os.path.realpath(wanted.source)
    check_source(wanted.source, real)
    try:
        there = os.open(real, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (E.EMFILE, E.ENFILE, E.ENOMEM):
            raise SetupError("host", error.errno) from error
        raise SpecError(f"bind: source {wanted.source!r}: {error.strerror}") from error
    st = os.fstat(there)
    return granted(wanted, real, st, owner_maps((st.st_uid, st.st_gid), host, ids), "live"), there


def _waited(steps: Steps) -> None:
    with contextlib.closing(steps):
        for answer, patience in steps:
            poller = select.poll()
            poller.register(answer, select.POLLIN)
            poller.poll(patience * 1000)  # if it does not come in time, the next step says so
