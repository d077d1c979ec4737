"""CRIU, where the host has it: whether it can checkpoint processes here, and running it inside a sandbox."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from sandboxcore import host
from sandboxcore.errors import CheckpointError, UnsupportedHost

FEATURE = "checkpoints of processes"
PATIENCE = 60  # seconds; `criu check` takes tenths of one
_DIRECTORIES = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_LINES = 4  # of what it said, in an error


def check() -> str:
    """Have ``criu check`` try what this kernel lets it do, now. Returns CRIU's version.

    Raises :class:`UnsupportedHost` with what it said, where CRIU is not installed, where we are not root, or
    where it cannot do it.
    """
    program = find()
    if os.geteuid() != 0:
        raise UnsupportedHost(FEATURE, "CRIU needs root, in the host's own user namespace")
    checked = _run(program, "check")
    if checked.returncode != 0:
        raise UnsupportedHost(FEATURE, f"criu check: {said(checked.stdout)}{_too_old()}")
    return version(program)


def find() -> str:
    """The path of ``criu``. Raises :class:`UnsupportedHost` where there is none."""
    program = shutil.which("criu", path=f"{os.environ.get('PATH', '')}:{_DIRECTORIES}")
    if program is None:
        raise UnsupportedHost(FEATURE, "install CRIU: 3.17 or newer, from Linux 6.13 on 4.1 or newer")
    return str(Path(program).resolve())


def version(program: str) -> str:
    """Its own number, such as ``"3.17.1"``."""
    for line in _run(program, "--version").stdout.splitlines():
        name, _, number = line.partition(":")
        if name == "Version":
            return number.strip()
    return "unknown"


def said(text: str) -> str:
    """What matters of its output: the errors if there are any, on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line] or lines[-_LINES:] or ["nothing"]
    return "; ".join(errors[:_LINES])


def _run(program: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run it with both streams in one, with a clean environment: it reads its options from there, too."""
    try:
        return subprocess.run(
            [program, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={"PATH": _DIRECTORIES},
            timeout=PATIENCE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsupportedHost(FEATURE, f"{program} does not run: {error}") from None


def _too_old() -> str:
    """Linux 6.13 has its vvar area in two parts, which CRIU before 4.1 takes for an error."""
    major, minor = (int(part) for part in os.uname().release.split(".")[:2])
    return " (from Linux 6.13 on CRIU has to be 4.1 or newer)" if (major, minor) >= (6, 13) else ""


# --- inside -----------------------------------------------------------------------------------------


def begin(init: int, images: Path, argv: Sequence[str], fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start CRIU in the namespaces of the sandbox whose init is ``init``, but that of users: csrc/visit.c.

    argv: its path, the verb, and more options. fds: what it inherits.
    """
    program, verb, *options = argv
    with _opened(images) as directory, _pidfd(init) as pidfd, open(images / "output", "wb") as output:
        where = ["--no-default-config", "--manage-cgroups=ignore"]
        where += [f"--images-dir=/proc/self/fd/{directory}", f"--log-file={verb}.log"]
        return subprocess.Popen(
            [host.HELPER, "visit", str(pidfd), str(host.features().id_base), program, verb, *where, *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"PATH": _DIRECTORIES},
            pass_fds=[pidfd, directory, *fds],
        )


def failed(images: Path, verb: str) -> CheckpointError:
    """Why it has, in its own words."""
    words = ""
    for name in (f"{verb}.log", "output"):
        with contextlib.suppress(OSError):
            words = words or (images / name).read_text(errors="replace")
    return CheckpointError(f"criu {verb}: {said(words)}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def of_itself(images: Path) -> None:
    """Let the images be of a CRIU that was in the tasks' own user namespace, or it would make a new one.

    It has numbers of its own for namespaces: in ids-PID.img those of a task, in inventory.img, field 3, those
    of the CRIU that dumped it, which was in all of the sandbox's but this. Both are a task_kobj_ids_entry,
    images/core.proto.
    """
    _, ids = _read_image(next(iter(sorted(images.glob("ids-*.img")))), 8)
    (user,) = [value for number, _, value in _fields(ids) if number == _USER_NS]
    head, body = _read_image(images / "inventory.img", 4)
    mended = [
        (number, kind, _pack([(n, k, user if n == _USER_NS else v) for n, k, v in _fields(value)]))
        if number == _ROOT_IDS and isinstance(value, bytes)
        else (number, kind, value)
        for number, kind, value in _fields(body)
    ]
    data = _pack(mended)
    (images / "inventory.img").write_bytes(head + len(data).to_bytes(4, "little") + data)


_ROOT_IDS, _USER_NS = 3, 10
_VARINT, _BYTES = 0, 2
_Field = tuple[int, int, int | bytes]


def _read_image(path: Path, magic: int) -> tuple[bytes, bytes]:
    """The bytes that say what it is, ``magic`` of them, and its only entry, in protocol buffers' form."""
    data = path.read_bytes()
    size = int.from_bytes(data[magic : magic + 4], "little")
    if len(data) != magic + 4 + size:
        raise CheckpointError(f"{path}: it is not one entry")
    return data[:magic], data[magic + 4 :]


def _fields(data: bytes) -> list[_Field]:
    found: list[_Field] = []
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        value, at = _number(data, at)
        if key & 7 == _BYTES:
            found.append((key >> 3, _BYTES, data[at : at + value]))
            at += value
        elif key & 7 == _VARINT:
            found.append((key >> 3, _VARINT, value))
        else:
            raise CheckpointError(f"CRIU's images: a field of kind {key & 7}")
    return found


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at


def _pack(fields: list[_Field]) -> bytes:
    out = b""
    for number, kind, value in fields:
        out += _packed(number << 3 | kind)
        out += _packed(value) if isinstance(value, int) else _packed(len(value)) + value
    return out


def _packed(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


@contextlib.contextmanager
def lent(images: Path, owner: int) -> Iterator[None]:
    """The images belong to a sandbox's root meanwhile: whoever restores them is no more than that."""
    give(images, owner)
    try:
        yield
    finally:
        give(images, os.geteuid())


def require_private(images: Path) -> None:
    """Raise CheckpointError unless a directory is ours alone: as root, CRIU does what its images say."""
    with _opened(images) as directory:
        found = os.fstat(directory)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise CheckpointError(f"{images}: others may have access to it")


def give(images: Path, owner: int) -> None:
    """Change the owner of a directory and of what is in it."""
    with _opened(images) as directory:
        for name in os.listdir(directory):
            os.chown(name, owner, owner, dir_fd=directory, follow_symlinks=False)
        os.chown(directory, owner, owner)


# --- processes, as /proc tells ----------------------------------------------------------------------


def tree(pid: int) -> list[int]:
    """A process and everything below it, parents first. Exact where they stand still."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                children = Path(f"/proc/{parent}/task/{task}/children").read_text()
                found += [int(child) for child in children.split()]
    return found


def status(pid: int, task: int | None = None) -> dict[str, str]:
    """Its status, or that of one of its threads, proc(5)."""
    text = Path(f"/proc/{pid}/task/{task or pid}/status").read_text()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def stands_still(pid: int) -> bool:
    """Whether all of its threads are stopped, or it has ended."""
    with contextlib.suppress(OSError):
        return all(status(pid, int(task))["State"][0] in "TtZX" for task in os.listdir(f"/proc/{pid}/task"))
    return True


def number_inside(pid: int) -> int:
    """The number that it has in its own pid namespace."""
    return int(status(pid)["NSpid"].split()[-1])


def signal_tree(pid: int, number: int) -> None:
    """Signal a process and everything below it, children first."""
    for member in reversed(tree(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.Signals(number))
