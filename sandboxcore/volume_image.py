"""A volume with a size: an ext4 in a sparse file, on a loop device (loop(4)).

A file must never be on two loop devices at once, for each would have a file system of its own on it. So
whoever needs a device looks for the one that has the file already; callers exclude each other. A device goes
(LO_FLAGS_AUTOCLEAR) when nobody has it open and nothing of it is mounted any more, by whatever death.
"""

import contextlib
import errno as E
import fcntl
import glob
import os
import shutil
import struct
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path

from sandboxcore import _native
from sandboxcore.errors import SandboxError, UnsupportedHost

MINIMUM = 1 << 20  # bytes: the file system's own tables are larger than that
TRIES = 8  # for the size of a file whose file system has the room that is wanted
PATIENCE = 600  # seconds for mkfs
ATTEMPTS = 64  # others take loop devices as well

_LOOP_CONFIGURE, _LOOP_GET_STATUS64, _LOOP_CTL_GET_FREE = 0x4C0A, 0x4C05, 0x4C82
_LO_FLAGS_AUTOCLEAR = 4
_INFO = struct.Struct("=5Q4I64s64s32s2Q")  # struct loop_info64
_CONFIG = struct.Struct(f"=2I{_INFO.size}s8Q")  # struct loop_config
_FITRIM, _RANGE = 0xC0185879, struct.Struct("=3Q")

OWN_INODES = 10  # which ext4 keeps for itself, its root included
_BLOCK = 4096
_REMEDY = "run as root of the machine, with the loop driver (modprobe loop) and ext4"


def require() -> str:
    """The program that makes such a file system. Raises :class:`UnsupportedHost`."""
    if os.geteuid():
        raise UnsupportedHost(
            "a volume with a quota",
            "only root can have the kernel bound a directory: create and use it as root, or put the state"
            " directory (SANDBOXCORE_STATE_DIR) on a file system that is as large as its volumes may become",
        )
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    program = shutil.which("mkfs.ext4", path=path)
    if program is None:
        raise UnsupportedHost("a volume with a quota", "install e2fsprogs, for mkfs.ext4")
    if not os.path.exists("/dev/loop-control"):
        raise UnsupportedHost("a volume with a quota", _REMEDY)
    return program


def make(path: Path, quota: int, inodes: int | None) -> None:
    """A new image with room for so many bytes, and not many more (one in 64, or 256 KiB); its root belongs to
    us. What the tables take on top of that is known when they are there. Raises :class:`UnsupportedHost`,
    :class:`SandboxError`."""
    slack = max(256 << 10, quota // 64)
    size = quota + quota // 16 + (8 << 20)
    for _ in range(TRIES):
        room = _format(path, size, inodes)
        if quota <= room <= quota + slack:
            return
        path.unlink()
        size += -(-(quota - room + slack // 2) // _BLOCK) * _BLOCK
    raise SandboxError(f"{path}: no ext4 with room for {quota} bytes")


def _format(path: Path, size: int, inodes: int | None) -> int:
    """A new file with a new file system. Returns the bytes that there is room for."""
    with open(path, "xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(size)
    owner = f"root_owner={os.geteuid()}:{os.getegid()}"
    options = ["-q", "-F", "-b", str(_BLOCK), "-m", "0", "-E", owner]
    if inodes is not None:
        options += ["-N", str(inodes + OWN_INODES)]
    command = [require(), *options, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    if done.returncode:
        raise SandboxError(f"mkfs.ext4 {path}: {done.stderr.strip() or done.returncode}")
    with attach(path) as device, device.mounted() as root:
        os.rmdir("lost+found", dir_fd=root)  # fsck makes it again if it needs it
        room = os.statvfs(root)
        return room.f_bavail * room.f_frsize


class LoopDevice:
    """A loop device, as ours as long as this exists."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd, self.path = fd, path
        self.close = weakref.finalize(self, os.close, fd)

    def __enter__(self) -> "LoopDevice":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def options(self) -> tuple[str, ...]:
        """For fsconfig(2): the same for everybody, for all share one file system. What is removed in it gives
        its place in the file back."""
        return ("source", self.path, "discard", "")

    @contextlib.contextmanager
    def mounted(self) -> Iterator[int]:
        """The root of the file system, a descriptor; mounted nowhere. Raises :class:`UnsupportedHost`."""
        try:
            fd = _native.mount_fs("ext4", self.options)
        except PermissionError as error:
            raise UnsupportedHost("a mount of a loop device", _REMEDY) from error
        except OSError as error:
            raise SandboxError(f"{self.path}: ext4: {error.strerror}") from error
        try:
            yield fd
        finally:
            os.close(fd)


def find(path: Path) -> LoopDevice | None:
    """The device that has a file already, if one does."""
    wanted = os.stat(path, follow_symlinks=False)
    for name in glob.glob("/dev/loop[0-9]*"):
        with contextlib.suppress(OSError):  # not in use, not a device, gone
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)  # or udev looks at it anew when we close it
            device = LoopDevice(fd, name)
            status = _INFO.unpack(fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_INFO.size)))
            if status[:2] == (wanted.st_dev, wanted.st_ino):
                return device
            device.close()
    return None


def attach(path: Path) -> LoopDevice:
    """The device of a file, or a new one. Callers exclude each other. Raises :class:`UnsupportedHost`."""
    try:
        return find(path) or _new(path)
    except (PermissionError, FileNotFoundError) as error:
        if error.filename == os.fspath(path):
            raise SandboxError(f"{path}: {error.strerror}") from error
        raise UnsupportedHost("a loop device", _REMEDY) from error


def _new(path: Path) -> LoopDevice:
    with contextlib.ExitStack() as stack:
        image = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        stack.callback(os.close, image)
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, control)
        info = _INFO.pack(*(0,) * 8, _LO_FLAGS_AUTOCLEAR, os.fsencode(path)[:63], b"", b"", 0, 0)
        for _ in range(ATTEMPTS):
            name = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            device = LoopDevice(os.open(name, os.O_RDWR | os.O_CLOEXEC), name)
            try:
                fcntl.ioctl(device.fd, _LOOP_CONFIGURE, _CONFIG.pack(image, 0, info, *(0,) * 8))
            except OSError as error:
                device.close()
                if error.errno != E.EBUSY:  # else somebody was faster
                    raise
            else:
                return device
    raise SandboxError("every free loop device was taken by others; try again")


def empty(path: Path) -> None:
    """Give back what an image occupies that nobody uses, but that may still be mounted somewhere: a
    process that has used it keeps it ready for another sandbox."""
    device = find(path)
    if device is None:
        return
    with device, device.mounted() as root:
        top = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
        try:
            for name in os.listdir(top):
                _native.remove_tree(top, name)
            os.fsync(top)  # what is removed counts as free with the journal's next entry
            with contextlib.suppress(OSError):  # where the file below cannot have holes
                fcntl.ioctl(top, _FITRIM, _RANGE.pack(0, 2**64 - 1, 0))
        finally:
            os.close(top)
