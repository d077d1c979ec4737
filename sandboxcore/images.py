"""Root file systems that are not directories: tar archives, and OCI image layouts on disk.

``SandboxSpec(rootfs=)`` takes them; here is what it does not do: :func:`describe` tells what an image says
about itself (none of it is applied by itself), :func:`load` unpacks ahead of use, or with other bounds, and
:func:`collect` removes what nobody uses.

An archive may be compressed with gzip, bzip2, xz or zstd. Of an OCI layout, ``DIRECTORY`` or
``DIRECTORY:TAG``, everything is checked against the digests and sizes that lead to it, before any of it is
used. Layers are unpacked once (:mod:`sandboxcore.layerstore`); set-ID bits, devices, fifos and extended
attributes but those of users are left out.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sandboxcore import host
from sandboxcore.errors import SandboxError, SpecError
from sandboxcore.layerstore import Layer, LayerStore, StatePath, collect
from sandboxcore.spec import parse_size
from sandboxcore.tarstream import Hashed, TarStream
from sandboxcore.unpack import MAX_BYTES, MAX_ENTRIES, Bounds, Contents, unpack

__all__ = ["Image", "ImageInfo", "Layer", "StatePath", "collect", "describe", "load"]

MAX_JSON = 4 << 20
MAX_NESTING = 4  # indexes of indexes
TAG = "org.opencontainers.image.ref.name"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_INDEX = {"application/vnd.oci.image.index.v1+json",
          "application/vnd.docker.distribution.manifest.list.v2+json"}  # fmt: skip
_MANIFEST = {"application/vnd.oci.image.manifest.v1+json",
             "application/vnd.docker.distribution.manifest.v2+json"}  # fmt: skip
_LAYER = re.compile(
    r"application/vnd\.(oci\.image\.layer(\.nondistributable)?\.v1\.tar(\+gzip|\+zstd)?"
    r"|docker\.image\.rootfs\.(foreign\.)?diff\.tar(\.gzip|\.zstd)?)"
)
_ARCHITECTURES = {"x86_64": "amd64", "i686": "386", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm",
                  "loongarch64": "loong64"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Image:
    """What a root file system is made of. ``layers``: the lowest first; they stay as long as this object.
    ``sources``: the host's files that said so, as they were then."""

    layers: tuple[Layer, ...]
    sources: Mapping[str, os.stat_result]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """What an image says about itself, empty where it says nothing.

    digest: of its manifest. tag: its name in the layout. architecture: as Go calls it: amd64, arm64.
    env, workdir, user, entrypoint, command, labels: how its maker wants it to be run.
    layers: digests of its layers, unpacked, the lowest first.
    """

    digest: str
    tag: str
    architecture: str
    env: Mapping[str, str]
    workdir: str
    user: str
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    labels: Mapping[str, str]
    layers: tuple[str, ...]


def load(
    path: str | os.PathLike[str],
    *,
    max_bytes: int | str = MAX_BYTES,
    max_entries: int = MAX_ENTRIES,
    owners: bool | None = None,
) -> Image:
    """Unpack what is not unpacked yet, and hold it. ``rootfs=`` does the same with the default bounds, which
    hold for each layer: 16 GiB unpacked, holes included, and a million files and directories. That takes its
    time: who must not wait when a sandbox is made (asyncio) does this before, in a thread.

    Raises :class:`SpecError` for what is wrong with it, :class:`UnsupportedHost` for what this host cannot
    hold, :class:`SandboxError` where it fails; then nothing is left of the layer that failed. ``owners`` is
    for the compiler of plans.
    """
    text = os.path.abspath(os.fspath(path))
    if owners is None:
        owners = host.features().mode == "root"
    store = LayerStore(owners=owners)
    bounds = Bounds(parse_size(max_bytes, "max_bytes"), max_entries)
    if (found := _layout(text)) is not None:
        return _Layout(*found).load(store, bounds)
    return _load_archive(text, store, bounds)


def describe(path: str | os.PathLike[str]) -> ImageInfo:
    """What an image in an OCI layout, ``DIRECTORY`` or ``DIRECTORY:TAG``, says about itself.

    Raises :class:`SpecError` for what is none, or is damaged. Nothing is unpacked."""
    text = os.path.abspath(os.fspath(path))
    found = _layout(text)
    if found is None:
        raise SpecError(f"{text}: not an OCI image layout")
    return _Layout(*found).describe()


def _layout(path: str) -> tuple[str, str] | None:
    """The directory and the tag, if it is a layout."""
    if os.path.lexists(path):
        return (path, "") if os.path.isfile(os.path.join(path, "oci-layout")) else None
    parts = path.split(":")
    for count in range(1, len(parts)):
        directory = ":".join(parts[:count])
        if os.path.isfile(os.path.join(directory, "oci-layout")):
            return directory, ":".join(parts[count:])
    return None


@contextlib.contextmanager
def _opened(path: str, what: str) -> Iterator[tuple[int, os.stat_result]]:
    """A regular file and what it was before it was read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a fifo has nobody to wait for
    except OSError as error:
        raise SpecError(f"{what}: {error.strerror}") from error
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise SpecError(f"{what}: Not a directory, nor a file")
        yield fd, about
    finally:
        os.close(fd)


def _load_archive(path: str, store: LayerStore, bounds: Bounds) -> Image:
    what = f"rootfs: {path}"
    with _opened(path, what) as (fd, about):
        since = time.time()

        def fill(root: int) -> Contents:
            contents = unpack(TarStream(Hashed(fd), what, room.bytes), root, room, owners=store.owners)
            if _changed(about, os.fstat(fd)):
                raise SandboxError(f"{what}: changed while it was read; try again")
            for name in ("oci-layout", "manifest.json"):
                if _exists(root, name) and _exists(root, "blobs"):
                    raise SpecError(f"{what}: an image in an archive; unpack it, and name the directory")
            return contents

        room = store.room(bounds)
        key = f"{about.st_dev}:{about.st_ino}"
        layer = store.obtain(key, lambda: store.known(about), fill)
        store.remember(about, layer.diff_id, since)
    return Image((layer,), {path: about})


def _changed(before: os.stat_result, after: os.stat_result) -> bool:
    names = ("st_size", "st_mtime_ns", "st_ctime_ns")
    return any(getattr(before, name) != getattr(after, name) for name in names)


def _exists(directory: int, name: str) -> bool:
    try:
        os.lstat(name, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True


class _Layout:
    """An OCI image layout: what is in it is believed as far as digests lead."""

    def __init__(self, path: str, tag: str) -> None:
        self.path, self.tag = path, tag
        self.what = f"rootfs: {path}{':' if tag else ''}{tag}"
        self.sources: dict[str, os.stat_result] = {}
        machine = os.uname().machine
        self.architecture = _ARCHITECTURES.get(machine, machine)

    def load(self, store: LayerStore, bounds: Bounds) -> Image:
        """All layers, the lowest first."""
        manifest, config, _ = self._image()
        diff_ids = self._diff_ids(config)
        blobs = _objects(manifest.get("layers"))
        if len(blobs) != len(diff_ids):
            raise self._refuse(f"{len(blobs)} layers, but {len(diff_ids)} in its configuration")
        for blob in blobs:
            if not _LAYER.fullmatch(str(blob.get("mediaType"))):
                raise self._refuse(f"a layer of a kind that is not known: {blob.get('mediaType')!r}")
        layers = [self._layer(*pair, store, bounds) for pair in zip(blobs, diff_ids, strict=True)]
        return Image(tuple(layers), self.sources)

    def describe(self) -> ImageInfo:
        """Its configuration."""
        _, config, descriptor = self._image()
        about = _object(config.get("config"))
        env = (text.partition("=") for text in _texts(about.get("Env")))
        return ImageInfo(
            digest=str(descriptor["digest"]),
            tag=_tag(descriptor) or self.tag,
            architecture=str(config.get("architecture", "")),
            env=MappingProxyType({name: value for name, _, value in env if name}),
            workdir=str(about.get("WorkingDir") or ""),
            user=str(about.get("User") or ""),
            entrypoint=_texts(about.get("Entrypoint")),
            command=_texts(about.get("Cmd")),
            labels=MappingProxyType({str(k): str(v) for k, v in _object(about.get("Labels")).items()}),
            layers=self._diff_ids(config),
        )

    def _refuse(self, why: str) -> SpecError:
        return SpecError(f"{self.what}: {why}")

    # --- finding the image ------------------------------------------------------------------------

    def _image(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Manifest, configuration and the manifest's descriptor."""
        if self._read("oci-layout").get("imageLayoutVersion") != "1.0.0":
            raise self._refuse("not version 1.0.0 of an OCI image layout")
        descriptor = self._choose(_objects(self._read("index.json").get("manifests")), self.tag)
        first, depth = descriptor, 0
        while descriptor.get("mediaType") in _INDEX:
            if (depth := depth + 1) > MAX_NESTING:
                raise self._refuse("an index of indexes of indexes")
            descriptor = self._choose(_objects(self._blob(descriptor).get("manifests")), "")
        if descriptor.get("mediaType") not in _MANIFEST:
            raise self._refuse(f"not an image: {descriptor.get('mediaType')!r}")
        manifest = self._blob(descriptor)
        config = self._blob(_object(manifest.get("config")))
        found = config.get("os"), config.get("architecture")
        if found != ("linux", self.architecture):
            raise self._refuse(f"for {found[0]}/{found[1]}, and this is linux/{self.architecture}")
        return manifest, config, {**descriptor, "annotations": first.get("annotations")}

    def _choose(self, descriptors: list[dict[str, Any]], tag: str) -> dict[str, Any]:
        """The one for this machine, of that name."""
        named = [one for one in descriptors if not tag or _tag(one) == tag]
        fits = {str(one.get("digest")): one for one in named if self._fits(one)}
        if len(fits) == 1:
            return next(iter(fits.values()))
        tags = ", ".join(sorted({_tag(one) for one in descriptors} - {""})) or "none"
        if len(fits) > 1:
            raise self._refuse(f"several images; say which, as DIRECTORY:TAG: {tags}")
        if named:
            platforms = {"/".join(map(str, _object(one.get("platform")).values())) for one in named}
            raise self._refuse(f"none for linux/{self.architecture}, but for {', '.join(sorted(platforms))}")
        raise self._refuse(f"no such image; there is: {tags}")

    def _fits(self, descriptor: dict[str, Any]) -> bool:
        """One that does not say is asked later."""
        platform = _object(descriptor.get("platform"))
        return not platform or (platform.get("os"), platform.get("architecture")) == (
            "linux",
            self.architecture,
        )

    def _diff_ids(self, config: dict[str, Any]) -> tuple[str, ...]:
        diff_ids = _texts(_object(config.get("rootfs")).get("diff_ids"))
        if not diff_ids or not all(_DIGEST.fullmatch(one) for one in diff_ids):
            raise self._refuse("its configuration names no layers by sha256")
        return diff_ids

    # --- reading ----------------------------------------------------------------------------------

    def _read(self, name: str) -> dict[str, Any]:
        """A file that no digest is known of; a change of it is a change of the image."""
        path = os.path.join(self.path, name)
        with _opened(path, f"{self.what}: {name}") as (fd, about):
            self.sources[path] = about
            return self._parse(_read_all(fd, MAX_JSON), name)

    def _blob(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        path, digest, size = self._place(descriptor)
        with _opened(path, f"{self.what}: {digest}") as (fd, _):
            data = _read_all(fd, MAX_JSON)
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest[7:]:
            raise self._refuse(f"{digest}: its digest or size is another")
        return self._parse(data, digest)

    def _place(self, descriptor: dict[str, Any]) -> tuple[str, str, int]:
        digest, size = descriptor.get("digest"), descriptor.get("size")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise self._refuse(f"a digest that is no sha256: {digest!r}")
        if not isinstance(size, int) or size < 0:
            raise self._refuse(f"{digest}: a size that is none: {size!r}")
        return os.path.join(self.path, "blobs", "sha256", digest[7:]), digest, size

    def _parse(self, data: bytes, name: str) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self._refuse(f"{name}: not JSON, no object, or more than {MAX_JSON} bytes")
        return value

    def _layer(self, blob: dict[str, Any], diff_id: str, store: LayerStore, bounds: Bounds) -> Layer:
        path, digest, size = self._place(blob)

        def fill(root: int) -> Contents:
            room = store.room(bounds)
            with _opened(path, f"{self.what}: {digest}") as (fd, _):
                file = Hashed(fd, size)
                stream = TarStream(file, f"{self.what}: {digest}", room.bytes)
                contents = unpack(stream, root, room, owners=store.owners)
                stream.drain()
            if (file.digest.hexdigest(), file.size) != (digest[7:], size):
                raise self._refuse(f"{digest}: its digest or size is another")
            if contents.diff_id != diff_id:
                raise self._refuse(f"{digest}: unpacked it is {contents.diff_id}, not {diff_id}")
            return contents

        return store.obtain(diff_id, lambda: store.get(diff_id), fill)


def _read_all(fd: int, most: int) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        data = file.read(most + 1)
    return data if len(data) <= most else b""


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [_object(one) for one in value] if isinstance(value, list) else []


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _tag(descriptor: dict[str, Any]) -> str:
    return str(_object(descriptor.get("annotations")).get(TAG, ""))
