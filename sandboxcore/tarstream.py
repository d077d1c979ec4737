"""The bytes of a tar archive that nobody vouches for: decompressed, counted, hashed and cut into members.

All is read once, from the beginning to the end, and never more at a time than a fixed amount: not for what a
header claims, nor for what a compressed byte becomes.
"""

import hashlib
import importlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from sandboxcore.errors import SpecError, UnsupportedHost

CHUNK = 1 << 20
MAX_HEADERS = 1 << 20  # bytes of all headers of one member: tarfile has them in memory
MAX_WINDOW = 128 << 20  # bytes that a decompressor may need for itself; zstd's own default
FULL = "that is the limit, or all that is free"
ZEROS = bytes(tarfile.BLOCKSIZE)


class Hashed(io.RawIOBase):
    """A file, read once, and not much further than ``most`` bytes: ``digest`` and ``size`` are of what was
    read so far."""

    def __init__(self, fd: int, most: int = 1 << 62) -> None:
        super().__init__()
        self._fd, self._most, self.digest, self.size = fd, most, hashlib.sha256(), 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As everywhere."""
        if self.size > self._most:  # it is wrong already
            return 0
        count = os.readv(self._fd, [buffer])
        self.digest.update(memoryview(buffer)[:count])
        self.size += count
        return count


def _decompressed(packed: BinaryIO, make: Callable[[], Any]) -> Iterator[bytes]:
    """Streams one behind the other; ``make`` gives a decompressor such as those of bz2, lzma,
    compression.zstd."""
    data = packed.read(CHUNK)
    while data:
        stream = make()
        while not stream.eof:
            if piece := stream.decompress(data, CHUNK):
                yield piece
            data = b""
            if stream.needs_input and not stream.eof:
                data = packed.read(CHUNK)
                if not data:
                    raise EOFError("the compressed data ends too early")
        data = (stream.unused_data or packed.read(CHUNK)).lstrip(b"\0")  # xz may be padded


def _of_zstd(packed: BinaryIO) -> Iterator[bytes]:
    try:  # Python 3.14
        zstd = importlib.import_module("compression.zstd")
    except ImportError:
        pass
    else:
        return _decompressed(packed, zstd.ZstdDecompressor)
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        remedy = "install sandboxcore[images], or the package zstandard, or use Python 3.14"
        raise UnsupportedHost("archives compressed with zstd", remedy) from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    reader = decompressor.stream_reader(packed, read_across_frames=True)
    return iter(lambda: reader.read(CHUNK), b"")


def _pieces(packed: "io.BufferedReader[Hashed]") -> Iterator[bytes]:
    """What is in a file that may be compressed, as its first bytes tell."""
    magic = packed.peek(8)[:6]
    if magic.startswith(b"\x1f\x8b"):
        import gzip

        plain = gzip.GzipFile(fileobj=packed)
        return iter(lambda: plain.read(CHUNK), b"")
    if magic.startswith(b"BZh"):
        import bz2

        return _decompressed(packed, bz2.BZ2Decompressor)
    if magic == b"\xfd7zXZ\0":
        import lzma

        return _decompressed(packed, lambda: lzma.LZMADecompressor(memlimit=MAX_WINDOW))
    if magic.startswith(b"\x28\xb5\x2f\xfd") or magic[1:4] == b"\x2a\x4d\x18":  # a frame, or one to skip
        return _of_zstd(packed)
    return iter(lambda: packed.read(CHUNK), b"")


class TarStream:
    """An archive's members and what is in them. ``what`` names it in errors; ``most`` is how many bytes it
    may have, uncompressed. Raises :class:`SpecError` for everything that is wrong with it."""

    def __init__(self, file: Hashed, what: str, most: int) -> None:
        self._file: io.BufferedReader[Hashed]
        self._file, self.what, self._most = io.BufferedReader(file, CHUNK), what, most
        self.size, self.digest = 0, hashlib.sha256()
        self._pieces = _pieces(self._file)
        self._piece = memoryview(b"")
        self._last = b""
        self._allowance = MAX_HEADERS

    def refuse(self, why: str) -> SpecError:
        """The error to raise."""
        return SpecError(f"{self.what}: {why}")

    def take(self, size: int) -> memoryview:
        """At least one byte of the next so many; none at the end."""
        if not self._piece:
            try:
                self._piece = memoryview(next(self._pieces, b""))
            except Exception as error:  # each decompressor has its own
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise self.refuse(f"damaged: {error}") from error
            self.digest.update(self._piece)
        data, self._piece = self._piece[:size], self._piece[size:]
        self.size += len(data)
        if self.size > self._most:
            raise self.refuse(
                f"more than {self._most} bytes unpacked: that is the limit, or all that is free"
            )
        return data

    # What tarfile needs of a file: it reads headers only.

    def read(self, size: int) -> bytes:
        """So many bytes of headers, or less at the end."""
        self._allowance -= size
        if size < 0 or self._allowance < 0:
            raise self.refuse(f"more than {MAX_HEADERS} bytes of headers for one member")
        data = b""
        while len(data) < size and (piece := self.take(size - len(data))):
            data += piece
        self._last = data[-tarfile.BLOCKSIZE :]
        return data

    def tell(self) -> int:
        """How much has been read."""
        return self.size

    def seek(self, offset: int) -> None:
        """Forward only."""
        if offset < self.size:
            raise self.refuse("a member that overlaps the one before")
        while self.size < offset:
            if not self.take(offset - self.size):
                raise self.refuse("cut off")

    def members(self) -> Iterator[tuple[tarfile.TarInfo, list[tuple[int, int]]]]:
        """Each member with the pieces of its file that are no holes, as (offset, size): they are to be read
        with :meth:`take` before the next one is asked for."""
        tar = self._parsed(self._open)
        while (member := self._parsed(tar.next)) is not None:
            self._allowance = MAX_HEADERS
            pieces = self._check_pieces(member, tar.offset - member.offset_data) if member.isreg() else []
            if pieces:
                self.seek(member.offset_data)
            yield member, pieces
            tar.members.clear()  # a million of them are too many
        if self._last != ZEROS:  # tarfile takes whatever is no header for the end
            raise self.refuse("damaged or cut off: no end of archive where one should be")
        while self.take(CHUNK):  # padding: the digest is of all
            pass

    def _open(self) -> tarfile.TarFile:
        file: Any = self
        return tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape")

    def _parsed(self, parse: Callable[[], Any]) -> Any:
        try:
            return parse()
        except (SpecError, OSError, MemoryError, UnsupportedHost):
            raise
        except Exception as error:  # tarfile is not written for what was made to break it
            if self.size <= tarfile.BLOCKSIZE:
                raise self.refuse("Not a directory, nor a tar archive") from error
            raise self.refuse(f"damaged: {error or type(error).__name__}") from error

    def _check_pieces(self, member: tarfile.TarInfo, stored: int) -> list[tuple[int, int]]:
        """A file's pieces, which fit into each other's gaps and into what the archive has of it."""
        sparse: list[tuple[int, int]] | None = getattr(member, "sparse", None)
        pieces = [(0, member.size)] if sparse is None else [piece for piece in sparse if piece[1]]
        end = total = 0
        for offset, size in pieces:
            if size < 0 or offset < end:
                raise self.refuse(f"{member.name!r}: a size or an offset that cannot be")
            end, total = offset + size, total + size
        if end > member.size or total > stored:
            raise self.refuse(f"{member.name!r}: a size or an offset that cannot be")
        return [piece for piece in pieces if piece[1]]

    def drain(self) -> None:
        """Read what is left of the file itself: its digest is of all."""
        while self._file.read(CHUNK):
            pass
