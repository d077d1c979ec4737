"""Trees of files inside a sandbox: made, changed at random, and described."""

import json
import os
import textwrap
from pathlib import Path

from support import IS_ROOT, PYTHON

from sandboxcore import Sandbox

PATIENCE = 60


def given_away(path: Path) -> Path:
    """As root, to an ordinary user, who has it in a sandbox."""
    if IS_ROOT:
        for item in (path, *path.rglob("*")):
            os.lchown(item, 12345, 12345)
    return path


def small_source(path: Path) -> Path:
    """A directory of the host, of an ordinary user."""
    (path / "dir").mkdir(parents=True)
    (path / "file").write_text("host\n")
    (path / "dir/deep").write_text("deep\n")
    return given_away(path)


def make_source(path: Path) -> Path:
    """A directory of the host, of an ordinary user, with something in it."""
    for folder in ("a/b", "c", "d/e/f"):
        (path / folder).mkdir(parents=True)
    for number, file in enumerate(("a/x", "a/b/y", "c/z", "d/e/f/a", "h", "g")):
        (path / file).write_text(f"host {number}")
    (path / "b").symlink_to("h")
    return given_away(path)


# Random changes; what they touch is printed, for a file that was written to counts as changed.
SHUFFLE = """
import os, random, shutil, sys
random.seed(int(sys.argv[1]))
os.chdir("/data")
mounts = {line.split()[4] for line in open("/proc/self/mountinfo")}
def everything():
    return [os.path.join(path, name) for path, folders, names in os.walk(".") for name in folders + names
            if os.path.abspath(os.path.join(path, name)) not in mounts]
def folders():
    return ["."] + [path for path in everything() if os.path.isdir(path) and not os.path.islink(path)]
def name():
    return random.choice("abcdefgh")
for _ in range(random.randrange(1, 40)):
    there = everything()
    path = random.choice(there) if there else "."
    new = os.path.join(random.choice(folders()), name())
    try:
        match random.randrange(10):
            case 0 | 1 if os.path.isfile(new) or not os.path.lexists(new):  # the others may block
                with open(new, "w") as file: file.write(random.choice(["", "x", "y" * 5000]))
            case 2: os.mkdir(new)
            case 3: os.symlink(name(), new)
            case 4:
                if os.path.isdir(path) and not os.path.islink(path): shutil.rmtree(path)
                else: os.unlink(path)
            case 5: os.rename(path, new)
            case 6: os.chmod(path, random.choice([0o755, 0o700, 0o750])) if not os.path.islink(path) else None
            case 7: os.link(path, new)
            case 8: os.mkfifo(new)
            case 9:
                if os.path.isfile(path):
                    with open(path, "a") as file: file.write("more")
    except OSError:
        pass
"""


def shuffle(sandbox: Sandbox, seed: int) -> None:
    done = sandbox.exec([PYTHON, "-I", "-S", "-c", textwrap.dedent(SHUFFLE), str(seed)], timeout=PATIENCE)
    assert done.ok, done.stderr


# Everything that can be said of what is in some directories.
MANIFEST = f"""
exec {PYTHON} -I -S - "$@" <<'EOF'
import hashlib, json, os, stat, sys
found, names = {{}}, {{}}
mounts = {{line.split()[4] for line in open("/proc/self/mountinfo")}}  # st_dev says nothing on an overlay
def look(path):
    if path in mounts and path != top:
        return
    st = os.lstat(path)
    kind = stat.S_IFMT(st.st_mode)
    about = [st.st_mode, st.st_uid, st.st_gid, st.st_nlink if kind != stat.S_IFDIR else 0, st.st_mtime_ns]
    about += [hashlib.sha256(open(path, "rb").read()).hexdigest() if kind == stat.S_IFREG else ""]
    about += [os.readlink(path) if kind == stat.S_IFLNK else ""]
    about += [names.setdefault((st.st_dev, st.st_ino), path)]
    if kind != stat.S_IFLNK:
        about += [sorted((n, os.getxattr(path, n).hex()) for n in os.listxattr(path))]
    found[path] = about
    if kind == stat.S_IFDIR:
        for name in sorted(os.listdir(path)):
            look(os.path.join(path, name))
for top in sys.argv[1:]:
    look(top)
print(json.dumps(found))
EOF
"""

FILL = """
set -e
cd /data
mkdir -p a/b "odd name" many && echo one > a/one && echo two > a/b/two && : > empty
ln -s a/one link && ln -s /nowhere dangling && ln a/one a/hard && mkfifo fifo
chmod 600 a/one && chmod 1777 a/b && chmod 711 .
touch -d @1000000000.5 a/one empty . && touch -h -d @7 link
for i in $(seq 200); do echo $i > many/$i; done
head -c 3000000 /dev/urandom > random && truncate -s 16M sparse
"""
XATTR = f"""{PYTHON} -I -S -c '
import os
os.setxattr("/data/a/one", "user.note", b"x")
os.setxattr("/data", "user.top", b"y")
'"""


def ok(sandbox: Sandbox, script: str) -> bytes:
    done = sandbox.shell(script, timeout=PATIENCE)
    assert done.ok, done
    return done.stdout


def manifest(sandbox: Sandbox, *paths: str) -> bytes:
    done = sandbox.exec(["sh", "-c", MANIFEST, "sh", *(paths or ("/data",))], timeout=PATIENCE)
    assert done.ok, done
    return done.stdout


def filled(sandbox: Sandbox) -> bytes:
    ok(sandbox, FILL)
    ok(sandbox, XATTR)
    return manifest(sandbox)


def same(one: bytes, other: bytes) -> bool:
    """But for the time of directories, in which a place to mount on is made again."""
    trees = [json.loads(text) for text in (one, other)]
    for tree in trees:
        for about in tree.values():
            about[4] = 0 if about[0] & 0o170000 == 0o040000 else about[4]
    return bool(trees[0] == trees[1])
