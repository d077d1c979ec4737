"""Each seccomp profile with real programs: threads, child processes, JITs, compilers."""

import os
import shutil
from pathlib import Path

import pytest
from support import PYTHON, Spec

import sandboxcore
from sandboxcore import Limits

pytestmark = pytest.mark.once

PROFILES = ("minimal", "standard", "full")

THREADS = """
import threading, queue
done = queue.Queue()
threads = [threading.Thread(target=lambda n=n: done.put(sum(range(n)))) for n in range(50)]
[t.start() for t in threads]; [t.join() for t in threads]
print(sum(done.get() for _ in threads))
"""

SUBPROCESS = """
import subprocess, sys
print(subprocess.check_output([sys.executable, '-c', 'print(6 * 7)'], text=True).strip())
print(subprocess.check_output('echo a | tr a b', shell=True, text=True).strip())
print(subprocess.call(['true'], start_new_session=True))
"""

MULTIPROCESSING = """
import multiprocessing as mp
def work(n): return n * n
if __name__ == '__main__':
    for method in ('fork', 'spawn', 'forkserver'):
        with mp.get_context(method).Pool(3) as pool:
            print(sum(pool.map(work, range(20))))
"""

ASYNCIO = """
import asyncio
async def main():
    async def serve(reader, writer):
        writer.write((await reader.readline()).upper()); await writer.drain(); writer.close()
    server = await asyncio.start_server(serve, '127.0.0.1', 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b'hello\\n')
    print((await reader.readline()).decode().strip())
    writer.close(); server.close()
    process = await asyncio.create_subprocess_exec('echo', 'child', stdout=asyncio.subprocess.PIPE)
    print((await process.communicate())[0].decode().strip(), await asyncio.to_thread(lambda: 1))
asyncio.run(main())
"""

SQLITE = """
import sqlite3
for name in (':memory:', 'file.db'):
    db = sqlite3.connect(name)
    db.execute('pragma journal_mode=wal'); db.execute('create table t(x)')
    db.executemany('insert into t values(?)', [(n,) for n in range(1000)]); db.commit()
    print(db.execute('select sum(x) from t').fetchone()[0])
"""

MISCELLANY = """
import mmap, os, select, selectors, signal, socket, tempfile, time, fcntl, resource, hashlib, pty
with tempfile.NamedTemporaryFile() as f:
    f.write(b'x' * 8192); f.flush(); fcntl.flock(f, fcntl.LOCK_EX)
    mmap.mmap(f.fileno(), 8192)[0]
    os.posix_fallocate(f.fileno(), 0, 16384); os.utime(f.name); os.fsync(f.fileno())
select.epoll().close(); select.poll()
a, b = socket.socketpair(); a.send(b'x'); b.recv(1)
signal.setitimer(signal.ITIMER_REAL, 9); signal.setitimer(signal.ITIMER_REAL, 0)
time.sleep(0.001); os.sched_getaffinity(0); os.getrandom(8); os.memfd_create('x')
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)); os.nice(1)
os.mkfifo('fifo'); os.link('fifo', 'other'); os.symlink('a', 'b'); os.rename('b', 'c')
print(hashlib.sha256(b'').hexdigest()[:8], len(os.listdir('.')))
"""

PYTHON_PROGRAMS = {
    "threads": (THREADS, "19600"),
    "subprocess": (SUBPROCESS, "42\nb\n0"),
    "multiprocessing": (MULTIPROCESSING, "2470\n2470\n2470"),
    "asyncio": (ASYNCIO, "HELLO\nchild 1"),
    "sqlite": (SQLITE, "499500\n499500"),
    "miscellany": (MISCELLANY, "e3b0c442 4"),
}


def expect(argv: list[str], output: str, *, spec: sandboxcore.SandboxSpec, **options) -> None:
    done = sandboxcore.run(argv, spec=spec, text=True, timeout=100, **options)
    assert (done.returncode, done.cause.value) == (0, "exited"), (done.stdout, done.stderr)
    assert done.stdout.strip() == output, done.stderr


# The minimal profile makes no sockets, not even local ones.
NEEDS_SOCKETS = ("asyncio", "multiprocessing")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("program", PYTHON_PROGRAMS)
def test_python(program: str, profile: str) -> None:
    code, output = PYTHON_PROGRAMS[program]
    if profile == "minimal" and program in NEEDS_SOCKETS:
        files = {"program.py": code}
        done = sandboxcore.run([PYTHON, "program.py"], spec=Spec(profile=profile), files=files, timeout=60)
        assert (done.returncode, done.cause.value) == (1, "exited")
        return
    expect([PYTHON, "program.py"], output, spec=Spec(profile=profile), files={"program.py": code})


BASH = """exec bash <<'END'
set -e; a=(1 2 3); echo ${#a[@]} $(seq 3 | sort -r | head -1) <<< x; wait; [[ a < b ]]
END"""

PERL = """perl -MPOSIX -e 'my $p = fork // die; exit 0 if !$p; waitpid $p, 0; print "ok $?\\n"'"""

TAR = "mkdir d; echo x > d/f; ln -s f d/l; tar czf a.tgz d && rm -r d && tar xzf a.tgz && cat d/l"

GIT = """set -e
export GIT_CONFIG_GLOBAL=$PWD/config GIT_CONFIG_NOSYSTEM=1
git config --global user.email a@b; git config --global user.name a
git init -q r; cd r; echo x > f; git add f; git commit -qm one; cd ..
git clone -q r s 2>&1; cat s/f; cd s
git gc -q; git fsck --no-progress; git log --format=%s
"""

GCC = """gcc -O1 -pthread -x c -o p - <<'END'
#include <pthread.h>
#include <stdio.h>
static void *f(void *a) { return a; }
int main(void)
{
    pthread_t t;
    void *r;
    pthread_create(&t, 0, f, "ok");
    pthread_join(t, &r);
    return puts(r) < 0;
}
END
./p"""

MAKE = r"printf 'all: a b\n\t@echo all\na b:\n\t@sleep 0\n' > Makefile; make -s -j4"

SCRIPTS = {
    "bash": (BASH, "3 3"),
    "perl": (PERL, "ok 0"),
    "tar": (TAR, "x"),
    "git": (GIT, "x\none"),
    "gcc": (GCC, "ok"),
    "sqlite3": ("sqlite3 x.db 'create table t(x); insert into t values(7); select x from t'", "7"),
    "make": (MAKE, "all"),
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("program", SCRIPTS)
def test_scripts(program: str, profile: str) -> None:
    script, output = SCRIPTS[program]
    if not visible(program):
        pytest.skip(f"no {program} below /usr")
    expect(["/bin/sh", "-c", script], output, spec=Spec(profile=profile))


def visible(name: str) -> bool:
    return shutil.which(name, path="/usr/local/bin:/usr/bin:/bin") is not None


NODE = """
const { Worker, isMainThread, parentPort } = require('worker_threads');
if (isMainThread) {
  let left = 4, sum = 0;
  for (let i = 0; i < 4; i++) {
    const w = new Worker(__filename);
    w.on('message', v => { sum += v; });
    w.on('exit', () => { if (--left == 0) {
      console.log(sum);
      console.log(require('child_process').execSync('echo child').toString().trim());
    } });
    w.postMessage(i);
  }
} else parentPort.once('message', v => { parentPort.postMessage(v * v); });
"""

JAVA = """
import java.util.stream.*;
public class Main {
  public static void main(String[] a) throws Exception {
    Thread[] t = new Thread[20];
    for (int i = 0; i < t.length; i++) { t[i] = new Thread(() -> { }); t[i].start(); }
    for (Thread x : t) x.join();
    System.out.println(IntStream.range(0, 1000000).parallel().asLongStream().sum());
    Process p = new ProcessBuilder("echo", "child").start();
    System.out.println(new String(p.getInputStream().readAllBytes()).trim());
  }
}
"""

GO = """
package main
import ("fmt"; "os/exec"; "sync")
func main() {
	var wg sync.WaitGroup; n := make(chan int, 100)
	for i := 0; i < 100; i++ { wg.Add(1); go func() { defer wg.Done(); n <- 1 }() }
	wg.Wait(); out, err := exec.Command("echo", "child").Output()
	fmt.Print(len(n), " ", string(out)); if err != nil { panic(err) }
}
"""


def prefix_of(program: str, levels: int) -> list[str]:
    """What must be shown of the host for a program that lives outside /usr."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"no {program} on PATH")
    real = Path(os.path.realpath(path))
    return [] if str(real).startswith("/usr/") else [str(real.parents[levels])]


@pytest.mark.parametrize("profile", PROFILES)
def test_node(profile: str) -> None:
    ro = prefix_of("node", 1)
    node = os.path.realpath(str(shutil.which("node")))
    expect([node, "main.js"], "14\nchild", spec=Spec(profile=profile, ro=ro), files={"main.js": NODE})


@pytest.mark.parametrize("profile", PROFILES)
def test_java(profile: str) -> None:
    ro = prefix_of("javac", 1)
    script = 'PATH="$1:$PATH"; javac Main.java && java Main'
    where = os.path.dirname(os.path.realpath(str(shutil.which("javac"))))
    expect(
        ["/bin/sh", "-c", script, "sh", where],
        "499999500000\nchild",
        spec=Spec(profile=profile, ro=ro),
        files={"Main.java": JAVA},
    )


@pytest.mark.slow
def test_go() -> None:
    ro = prefix_of("go", 1)
    go = os.path.realpath(str(shutil.which("go")))
    env = {
        "GOCACHE": "/tmp/cache",
        "GOFLAGS": "-mod=mod",
        "GOPATH": "/tmp/go",
        "CGO_ENABLED": "0",
        "GOTOOLCHAIN": "local",
    }
    spec = Spec(ro=ro, env=env, limits=Limits(disk="4G"))
    expect([go, "run", "main.go"], "100 child", spec=spec, files={"main.go": GO})
