"""Attacks on layers of other moments and other sandboxes, and on who seals and copies them."""

import os
import textwrap
import time
from pathlib import Path

import pytest
from escape.hostile import Hostile, call, calls, open_for
from escape.test_living import inside, python
from support import PYTHON, wait_until

from sandboxcore import PIPE, Limits, Sandbox, SandboxBusy, SandboxSpec

pytestmark = [pytest.mark.escape, pytest.mark.usefixtures("overlays")]

PATIENCE = 60
SECRET = "eb1f6a3c-a word that is nowhere else"

# Everything that can be read from the root on, by every name; and what mounts and descriptors say.
SEARCH = f"""
import os, sys
word = {SECRET!r}[:8] + {SECRET!r}[8:]
found = []
for top in ("/", "/proc/1/root", "/proc/scratch", "/proc/nodes", "/proc/1/cwd"):
    for path, folders, names in os.walk(top):
        folders[:] = [name for name in folders if path != "/" or name not in ("proc", "sys", "usr")]
        for name in names:
            full = os.path.join(path, name)
            if os.path.isfile(full) and os.access(full, os.R_OK):
                with open(full, "rb") as file:
                    if word.encode() in file.read(1 << 20):
                        found.append(full)
print(*sorted(set(found)))
"""


def search(sandbox: Sandbox) -> list[str]:
    done = sandbox.exec(python(SEARCH), timeout=PATIENCE, text=True)
    assert done.ok, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("user", [None, "0"])
def test_what_was_discarded(user: str | None) -> None:
    with Sandbox(SandboxSpec(writable=True, user=user)) as sandbox:
        kept = sandbox.snapshot()
        sandbox.files.write("/workspace/secret", SECRET.encode())
        assert search(sandbox) == ["/workspace/secret"], "the control: there it is found"
        sandbox.restore(kept)
        assert search(sandbox) == []
        sandbox.files.write("/workspace/secret", SECRET.encode())
        later = sandbox.snapshot()
        sandbox.restore(kept)
        assert search(sandbox) == [], "in a layer that is not below"
        with Sandbox.from_snapshot(kept) as child:
            assert search(child) == []
        with Sandbox.from_snapshot(later) as child:
            assert search(child) == ["/workspace/secret"]


def test_what_another_fork_writes() -> None:
    with Sandbox(SandboxSpec(writable=True)) as sandbox:
        sandbox.files.write("/workspace/common", b"common")
        one, other = sandbox.fork(2)
        with one, other:
            one.files.write("/workspace/common", SECRET.encode())
            sandbox.files.write("/workspace/own", SECRET.encode())
            assert search(other) == []
            assert search(one) == ["/workspace/common"]
            assert search(sandbox) == ["/workspace/own"]


@pytest.mark.parametrize("user", [None, "0"])
def test_places_of_layers(hostile: Hostile, user: str | None) -> None:
    """Below /proc, which nothing uncovers; in a sandbox whose layers have changed, and in a fork."""
    with Sandbox(hostile.spec.replace(writable=True, user=user)) as sandbox:
        sandbox.snapshot()
        sandbox.discard()
        with sandbox.fork()[0] as child:
            for box in (sandbox, child):
                for name in ("nodes", "scratch", "scratch/l0", "scratch/l1", "scratch/l0/u0", "proc", "dir"):
                    for path in (f"/proc/{name}", f"/proc/1/cwd/{name}", f"/proc/self/../{name}"):
                        verdict = inside(box, open_for(path, os.O_PATH)).verdict
                        assert verdict in ("ENOENT", "EACCES", "ENOTDIR"), path
                for attack in (call("umount2", "/proc", 2), call("open_tree", -100, "/proc", 1)):
                    assert inside(box, calls(attack)).verdict == "EPERM"


# What makes it hard to stop everything; each goes on for ever, and says so once.
RESTLESS = {
    "fork storm": """
        import os
        print("on", flush=True)
        while True:
            try:
                if os.fork() == 0:
                    os._exit(0)
                os.waitpid(-1, os.WNOHANG)
            except OSError:
                pass
        """,
    "fork chain": """
        import os
        print("on", flush=True)
        while True:
            try:
                if os.fork():
                    os._exit(0)
            except OSError:
                pass
        """,
    "threads": """
        import threading, time
        def work():
            while True:
                time.sleep(0)
        for _ in range(20):
            threading.Thread(target=work).start()
        print("on", flush=True)
        """,
    "spawns": """
        import os
        print("on", flush=True)
        while True:
            os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
        """,
    "signals": """
        import os, signal
        print("on", flush=True)
        while True:
            os.kill(-1, signal.SIGCONT)
        """,
    "stops": """
        import os, signal, time
        child = os.fork()
        if child == 0:
            while True:
                time.sleep(0)
        print("on", flush=True)
        while True:
            os.kill(child, signal.SIGSTOP)
            os.kill(child, signal.SIGCONT)
        """,
}
WRITER = """
import os
os.chdir("/workspace")
for n in range(10 ** 9):
    with open("new", "w") as file:
        file.write(str(n) * 10)
    os.rename("new", "whole")
    if n == 10:
        print("on", flush=True)
"""


@pytest.mark.parametrize("kind", RESTLESS)
def test_whoever_will_not_stand_still(kind: str) -> None:
    """A copy of one moment, or SandboxBusy, in time; afterwards all go on, and nobody is left stopped."""
    spec = SandboxSpec(writable=True, limits=Limits(pids=64))
    with (
        Sandbox(spec) as sandbox,
        sandbox.popen(python(WRITER), stdout=PIPE) as writer,
        sandbox.popen([PYTHON, "-I", "-S", "-c", textwrap.dedent(RESTLESS[kind])], stdout=PIPE) as restless,
    ):
        for process in (writer, restless):
            assert process.stdout is not None
            assert process.stdout.readline() == b"on\n"
        for _ in range(3):
            began = time.monotonic()
            try:
                kept = sandbox.snapshot()
            except SandboxBusy:
                kept = None
            assert time.monotonic() - began < 10
            if kept is not None:
                assert kept.copied
                with Sandbox.from_snapshot(kept) as child:
                    text = child.files.read("/workspace/whole").decode()
                    assert text == text[: len(text) // 10] * 10
            seen = sandbox.files.read("/workspace/whole")
            wait_until(lambda s=seen: sandbox.files.read("/workspace/whole") != s, "the writer", PATIENCE)
        assert restless.poll() is None or kind == "fork chain"
        writer.kill()
        restless.kill()


def test_a_tree_made_to_confuse_who_copies(tmp_path: Path) -> None:
    """Names, modes, kinds, links and attributes; nothing outside is touched, and all of it is there."""
    outside = tmp_path / "outside"
    outside.write_text("host")
    make = f"""
        import os, socket
        os.chdir("/workspace")
        odd = (b"\\xff\\xfe", b"-rf", b"a\\nb", b" ", b"'\\"$(x)", b"...", b"l1", b"u0", b"links", b"x" * 255)
        for name in odd:
            os.mkdir(name)
            open(os.path.join(name, b"f"), "w").write("1")
        os.symlink({str(outside)!r}, "absolute")
        os.symlink("../../../../..", "up"); os.symlink("loop", "loop")
        os.symlink("x" * 4095, "long")
        os.mkfifo("fifo"); socket.socket(socket.AF_UNIX).bind("socket")
        open("secret", "w").write("2"); os.link("secret", "hard")
        open("mute", "w").write("2"); os.chmod("mute", 0)
        os.mkdir("closed"); open("closed/f", "w").write("3"); os.chmod("closed", 0)
        os.mkdir("sticky"); os.chmod("sticky", 0o3777)
        for n in range(200):
            os.setxattr("sticky", f"user.n{{n}}", b"x" * 100)
        os.setxattr("sticky", "user.big", b"y" * 30000)
        os.mkdir("opaque"); open("opaque/f", "w").write("4")
        """
    look = """
        import os, stat
        os.chdir("/workspace")
        os.chmod("closed", 0o700); os.chmod("mute", 0o600)
        for path, folders, names in sorted(os.walk(b".")):
            for name in sorted(folders + names):
                full = os.path.join(path, name)
                st = os.lstat(full)
                link = os.readlink(full) if stat.S_ISLNK(st.st_mode) else b""
                data = open(full).read() if stat.S_ISREG(st.st_mode) else ""
                attributes = [] if link or stat.S_ISFIFO(st.st_mode) or stat.S_ISSOCK(st.st_mode) else [
                    (n, os.getxattr(full, n)) for n in sorted(os.listxattr(full))]
                names = 0 if stat.S_ISDIR(st.st_mode) else st.st_nlink
                print(full, oct(st.st_mode), st.st_uid, names, st.st_mtime_ns, link, data, attributes)
        """
    with Sandbox(SandboxSpec(writable=True)) as sandbox:
        made = sandbox.exec(python(make))
        assert made.ok, made.stderr
        with sandbox.popen(["sleep", "100"]) as process:
            kept = sandbox.snapshot()
            process.kill()
        assert kept.copied
        seen = sandbox.exec(python(look))
        assert seen.ok, seen.stderr
        with Sandbox.from_snapshot(kept) as child:
            again = child.exec(python(look))
            assert again.ok, again.stderr
            assert _lines(again.stdout) == _lines(seen.stdout)
    assert outside.read_text() == "host"


def _lines(output: bytes) -> list[bytes]:
    assert output.count(b"\n") >= 30
    return output.splitlines()
