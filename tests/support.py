"""What many tests share: payloads in Python, waiting with a deadline, looking at the host from outside."""

import contextlib
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sandboxcore
from sandboxcore import spawner
from sandboxcore.identity import start_ticks

IS_ROOT = os.geteuid() == 0
TESTS = Path(__file__).parent
PROJECT = TESTS.parent


def _visible_python() -> str:
    """An interpreter that a sandbox sees: below /usr."""
    own = os.path.realpath(sys.executable)
    if own.startswith("/usr/"):
        return own
    return shutil.which("python3", path="/usr/local/bin:/usr/bin") or "/usr/bin/python3"


PYTHON = _visible_python()
Spec = sandboxcore.SandboxSpec


def run_python(code: str, *args: str, **options: Any) -> sandboxcore.ExecResult:
    """Run a Python program in a sandbox, without site packages."""
    options.setdefault("timeout", 60)
    return sandboxcore.run([PYTHON, "-I", "-S", "-c", textwrap.dedent(code), *args], **options)


def ask_python(code: str, *args: str, **options: Any) -> Any:
    """Run a Python program in a sandbox that prints JSON; returns the value."""
    done = run_python("import json, os, sys\n" + textwrap.dedent(code), *args, **options)
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def can_grant(directory: Path) -> None:
    """Have rw= refused here and now, where the file system cannot do it, and not later in a thread."""
    sandboxcore.run(["true"], spec=Spec(rw=[(directory, "/granted")]), timeout=60)


def shell(script: str, *args: str, **options: Any) -> sandboxcore.ExecResult:
    """Run a shell script in a sandbox."""
    options.setdefault("timeout", 60)
    return sandboxcore.run(["/bin/sh", "-c", script, "sh", *args], **options)


def host_program(code: str, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program of our own interpreter outside, for what must not happen to the test process."""
    options.setdefault("timeout", 90)
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    return subprocess.run(command, capture_output=True, text=True, env=host_environment(), **options)


@contextmanager
def host_process(code: str, *args: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The same, while it runs; it is killed at the end."""
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=host_environment(), **pipes, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def host_environment() -> dict[str, str]:
    """The environment of a host program: like ours, and it finds the package and this module."""
    path = os.pathsep.join([str(PROJECT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 10) -> Any:
    """The condition's value as soon as it is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.005)


# --- the host, seen from outside --------------------------------------------------------------------


def parents() -> dict[int, int]:
    """Every process and its parent."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                stat = Path(f"/proc/{entry}/stat").read_bytes()
            except OSError:
                continue
            found[int(entry)] = int(stat.rpartition(b")")[2].split()[1])
    return found


def descendants(*roots: int) -> set[int]:
    """Every process below `roots`, in any depth."""
    parent_of, found, size = parents(), set(roots), -1
    while size != len(found):
        size = len(found)
        found |= {pid for pid, parent in parent_of.items() if parent in found}
    return found - set(roots)


def spawner_pids() -> list[int]:
    """The spawners that this process uses now. One that was killed is known until it is needed again."""
    return sorted(known.pid for known in spawner._spawners.values() if not gone(known.pid))


def sandbox_processes() -> set[int]:
    """What runs below this process's spawners. The makers of network namespaces belong there for good."""
    return descendants(*spawner_pids())


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that nobody reaped has, too)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(b")")[2].split()[0] in (b"Z", b"X")


def marked(mark: str) -> set[int]:
    """Processes whose command line has `mark` in it, whoever their parent is, but not this one."""
    found = set()
    for pid in parents():
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if mark.encode() in line and pid != os.getpid():
            found.add(pid)
    return found


def kill_spawners() -> None:
    """End this process's spawners as an administrator might."""
    for pid in spawner_pids():
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: gone(pid), f"the end of spawner {pid}")


def snapshot(tree: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below a directory that a sandbox could have changed."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in (tree, *sorted(tree.rglob("*"))):
        st = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        link = os.readlink(path) if path.is_symlink() else None
        found[str(path.relative_to(tree))] = (st.st_mode, st.st_uid, st.st_gid, st.st_ino, link, content)
    return found


class Counts(dict[str, int]):
    """How much there is of everything that a sandbox could leave behind."""

    @classmethod
    def now(cls) -> "Counts":
        """Count."""
        own = {os.getpid(), *spawner_pids()}
        return cls(
            processes=_working_processes(),
            host_fds=len(os.listdir("/proc/self/fd")),
            spawner_fds=sum(map(_working_fds, spawner_pids())),
            mounts=len(Path("/proc/self/mountinfo").read_bytes().splitlines()),
            net_namespaces=len(_namespaces("net", own | sandbox_processes())),
            mount_namespaces=len(_namespaces("mnt", own | sandbox_processes())),
            cgroups=_groups(),
            files=sum(
                ("sandbox" in name or "sbx" in name) and _is_ours(f"{place}/{name}")
                for place in ("/tmp", "/dev/shm")
                for name in os.listdir(place)
            ),
        )


def _groups() -> int:
    """Control groups of ours: of sandboxes of this process, and whatever processes left that are gone. A few
    for runs are kept ready on purpose, and other processes have theirs."""
    count = 0
    for path, _, _ in os.walk("/sys/fs/cgroup"):
        match = re.search(r"/sandboxcore/host-(\d+)-(\d+)-[^/]*(/sbx-)?", path)
        if match is None or not _is_ours(path):
            continue
        pid, began = int(match[1]), int(match[2])
        count += bool(match[3]) if pid == os.getpid() else start_ticks(pid) != began
    return count


def _is_ours(path: str) -> bool:
    """Whether it is of the user who runs these tests: another one may run them at the same time."""
    with contextlib.suppress(FileNotFoundError):
        return os.lstat(path).st_uid == os.geteuid()
    return False


def open_fds() -> list[str]:
    """This process's descriptors, but for those that an earlier test has left to the collector."""
    gc.collect()
    return os.listdir("/proc/self/fd")


def _working_processes() -> int:
    """What runs below this process's spawners, but for spare launchers: each sandbox keeps a few of those, as
    many as its commands happened to overlap (SPARE in csrc/launcher.c, and one that was late)."""
    parent_of, found = parents(), sandbox_processes()
    spare: Counter[int] = Counter()
    for pid in found - set(parent_of.values()):
        with contextlib.suppress(OSError):
            spare[parent_of.get(pid, 0)] += Path(f"/proc/{pid}/comm").read_text() == "sbx-launcher\n"
    return len(found) - sum(min(count, 3) for count in spare.values())


def _working_fds(pid: int) -> int:
    """A process's descriptors, but for templates: those are a cache of bounded size."""
    count = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += not os.readlink(f"/proc/{pid}/fd/{fd}").startswith("mnt:")
    return count


def _namespaces(kind: str, pids: set[int]) -> set[str]:
    found = set()
    for pid in pids:
        try:
            found.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
        except OSError:
            continue
    return found


@contextmanager
def leaves_nothing(seconds: float = 10) -> Iterator[None]:
    """Nothing countable is more afterwards than before; what ends asynchronously has `seconds`."""
    before = settled()
    yield
    deadline = time.monotonic() + seconds
    while (more := _increase(before, Counts.now())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert more == {}, f"{more} more than {before}"


def settled() -> Counts:
    """The counts when the sandboxes of earlier runs have been reaped, too."""
    counts = Counts.now()
    for _ in range(100):
        time.sleep(0.03)
        counts, last = Counts.now(), counts
        if counts == last:
            break
    return counts


def _increase(before: Counts, after: Counts) -> dict[str, int]:
    return {name: after[name] - count for name, count in before.items() if after[name] > count}


# --- a program without libraries --------------------------------------------------------------------

_TOOLBOX = r"""
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int list(const char *path)
{
	DIR *dir = opendir(path);
	if (!dir)
		return perror(path), 1;
	for (struct dirent *e; (e = readdir(dir));)
		if (strcmp(e->d_name, ".") && strcmp(e->d_name, ".."))
			puts(e->d_name);
	return 0;
}

static int copy(const char *path, int flags, int from, int to)
{
	char buf[4096];
	int fd = open(path, flags, 0644);
	if (fd < 0)
		return perror(path), 1;
	from = from < 0 ? fd : from;
	to = to < 0 ? fd : to;
	for (ssize_t n; (n = read(from, buf, sizeof buf)) > 0;)
		if (write(to, buf, (size_t)n) != n)
			return perror(path), 1;
	return 0;
}

int main(int argc, char **argv)
{
	char buf[4096];
	if (argc == 3 && !strcmp(argv[1], "ls"))
		return list(argv[2]);
	if (argc == 3 && !strcmp(argv[1], "cat"))
		return copy(argv[2], O_RDONLY, -1, 1);
	if (argc == 3 && !strcmp(argv[1], "write"))
		return copy(argv[2], O_WRONLY | O_CREAT, 0, -1);
	if (argc == 2 && !strcmp(argv[1], "id"))
		return printf("%d:%d\n", (int)getuid(), (int)getgid()) < 0;
	if (argc == 2 && !strcmp(argv[1], "pwd"))
		return puts(getcwd(buf, sizeof buf) ? buf : "?") < 0;
	return 2;
}
"""


def compile_objects(sources: Iterable[Path], directory: Path, *flags: str) -> list[Path]:
    """Compile each source, on all processors; returns the object files."""

    def compiled(source: Path) -> Path:
        target = directory / f"{source.stem}.o"
        subprocess.run(["gcc", *flags, "-c", source, "-o", target], check=True, timeout=120)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(compiled, sources))


def compile_static(target: Path) -> str:
    """Compile the toolbox; returns its path."""
    command = ["gcc", "-static", "-O1", "-x", "c", "-", "-o", str(target)]
    subprocess.run(command, input=_TOOLBOX, text=True, check=True, timeout=60)
    target.chmod(0o755)
    target.parent.chmod(0o755)
    return str(target)
