"""Rules of the C code that a compiler does not enforce: symbols after clone, no statics, includes."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support import compile_objects

CSRC = Path(__file__).parents[2] / "csrc"

# What runs between clone3 and exec, or as PID 1.
AFTER_CLONE = (
    *("path", "mount", "overlay", "layers", "layer", "copy", "pack", "unpack", "root", "idmap", "session"),
    *("fds", "rlimit", "cred", "file", "landlock", "seccomp", "record", "child", "init", "inbox", "message"),
    *("resident", "pool", "launcher", "command", "stdio", "pump", "pty", "proc", "files", "remove", "group"),
    *("meter", "watch", "binds", "mountinfo", "room", "fsmount", "sweep", "restack", "door"),
)
HOST = ("plan", "error", "wire", "client", "stream", "ask", "run")
HELPER_ONLY = ("template", "source", "shelf", "net", "spawn", "spawner", "probe", "visit")

# Neither locks nor heap nor stdio behind any of these. memcpy and friends may be emitted by the compiler.
SAFE = {"syscall", "vfork", "clock_gettime", "__errno_location", "__stack_chk_fail", "_exit"}
SAFE |= {"memcpy", "memmove", "memset", "strlen", "strncmp", "memchr", "memcmp"}

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every source compiled as it ships."""
    directory = tmp_path_factory.mktemp("objects")
    flags = ["-std=gnu11", "-O2", "-D_GNU_SOURCE", "-fstack-protector-strong"]
    return {path.stem: path for path in compile_objects(sorted(CSRC.glob("*.c")), directory, *flags)}


def symbols(path: Path, kinds: str) -> set[str]:
    listing = subprocess.run(["nm", path], capture_output=True, text=True, check=True, timeout=60)
    found = re.findall(r"^[0-9a-f ]* ([A-Za-z]) (\S+)$", listing.stdout, re.MULTILINE)
    return {name for kind, name in found if kind in kinds}


def test_every_source_belongs_to_a_layer() -> None:
    assert {path.stem for path in CSRC.glob("*.c")} == {*AFTER_CLONE, *HOST, *HELPER_ONLY}


@pytest.mark.parametrize("name", AFTER_CLONE)
def test_after_clone_only_safe_symbols(objects: dict[str, Path], name: str) -> None:
    undefined = symbols(objects[name], "U")
    assert {symbol for symbol in undefined if not symbol.startswith("sbx_")} <= SAFE


def test_no_writable_statics(objects: dict[str, Path]) -> None:
    writable = {name: symbols(path, "BbDdCGgSs") for name, path in objects.items()}
    # a table of pointers in position-independent code lies in .data.rel.ro: nm calls it d
    relocated = {
        name: {s for s in found if not is_relro(objects[name], s)} for name, found in writable.items()
    }
    assert not {name: found for name, found in relocated.items() if found}


def is_relro(path: Path, symbol: str) -> bool:
    table = subprocess.run(["objdump", "-t", path], capture_output=True, text=True, check=True, timeout=60)
    line = next(line for line in table.stdout.splitlines() if line.endswith(f" {symbol}"))
    return ".data.rel.ro" in line


def test_shipped_code_has_no_fault_hook(objects: dict[str, Path]) -> None:
    assert not any(symbols(path, "BbDdCTtU") & {"sbx_fault"} for path in objects.values())


def test_concern_files_do_not_include_each_other() -> None:
    own = {"box.h", "plan.h", "resident.h", "sandboxcore.h", "stream.h", "sys.h", "util.h"}
    for source in CSRC.glob("*.c"):
        included = set(re.findall(r'#include "([^"]+)"', source.read_text()))
        assert included <= own, source.name


def test_sizes_stay_readable() -> None:
    """The guides of CONTRIBUTING: a C file up to 400 lines, a function up to 60."""
    for source in CSRC.glob("*.c"):
        text = source.read_text()
        assert text.count("\n") <= 400, source.name
        for body in re.findall(r"^\{\n(.*?)^\}$", text, re.MULTILINE | re.DOTALL):
            assert body.count("\n") <= 60, f"{source.name}: {body[:80]}"


def test_stage_names_are_complete() -> None:
    enum = re.search(r"enum sbx_stage \{(.*?)\};", (CSRC / "plan.h").read_text(), re.DOTALL)
    assert enum is not None
    declared = re.findall(r"SBX_STAGE_(\w+)", enum[1])[:-1]
    named = re.findall(r"\[SBX_STAGE_(\w+)\]\s*=\s*\"(\w+)\"", (CSRC / "error.c").read_text())
    assert [name for name, _ in named] == declared
    assert all(name.lower() == text for name, text in named)
