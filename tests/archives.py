"""Archives and OCI image layouts made by hand, also such as no honest program makes."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
from pathlib import Path
from typing import Any

import zstandard

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
PACK = {
    "": bytes,
    "gzip": lambda data: gzip.compress(data, 1),
    "bzip2": bz2.compress,
    "xz": lambda data: lzma.compress(data, preset=0),
    "zstd": lambda data: zstandard.compress(data, 1),
}
Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", kind: bytes | None = None, **fields: Any) -> Member:
    """One member: a file if it has data, a directory if its name ends with a slash; or what ``kind`` says."""
    info = tarfile.TarInfo(name)
    info.type = kind or (tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE)
    info.size = len(data)
    info.mode = 0o755 if info.isdir() else 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def link(name: str, target: str, **fields: Any) -> Member:
    """A symbolic link."""
    return member(name, kind=tarfile.SYMTYPE, linkname=target, **fields)


def hard(name: str, target: str) -> Member:
    """A hard link."""
    return member(name, kind=tarfile.LNKTYPE, linkname=target)


def tar(*members: Member) -> bytes:
    """An archive of them, in their order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def digest(data: bytes) -> str:
    """As OCI writes it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Layout:
    """An OCI image layout; every blob can be had and replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifests: list[dict[str, Any]] = []
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.write()

    def place(self, name: str) -> Path:
        """The file of a digest."""
        return self.path / "blobs/sha256" / name.removeprefix("sha256:")

    def blob(self, data: bytes, kind: str) -> dict[str, Any]:
        """Put a blob there; returns its descriptor."""
        self.place(digest(data)).write_bytes(data)
        return {"mediaType": kind, "digest": digest(data), "size": len(data)}

    def document(self, value: Any, kind: str) -> dict[str, Any]:
        """The same for JSON."""
        return self.blob(json.dumps(value).encode(), f"application/vnd.oci.image.{kind}.v1+json")

    def write(self) -> None:
        """The index."""
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self.manifests}))

    def image(
        self, *layers: bytes, pack: str = "gzip", architecture: str = ARCHITECTURE, **config: Any
    ) -> dict[str, Any]:
        """An image of these archives; returns the descriptor of its manifest."""
        kind = "application/vnd.oci.image.layer.v1.tar" + (f"+{pack}" if pack else "")
        about = {
            "architecture": architecture,
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "config": self.document(about, "config"),
            "layers": [self.blob(PACK[pack](layer), kind) for layer in layers],
        }
        return self.document(manifest, "manifest")

    def add(self, descriptor: dict[str, Any], tag: str = "", **fields: Any) -> None:
        """Name a manifest, or an index, in the index."""
        named = {"annotations": {"org.opencontainers.image.ref.name": tag}} if tag else {}
        self.manifests.append({**descriptor, **named, **fields})
        self.write()
