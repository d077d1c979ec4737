"""Keys of the host's user: keyrings are in no namespace, and every clone inherits them."""

import json
from typing import Any

import pytest
from escape.hostile import Hostile, call, calls
from support import host_program

pytestmark = pytest.mark.escape

GET_KEYRING_ID = 0
SESSION, USER, USER_SESSION = -3, -4, -5

# Joins a new session keyring, plants a key in it and then tries to find it: outside, inside behind
# the filter, and inside without one.
LAUNCHER = """
import ctypes, json, os, sys
from pathlib import Path
from escape.hostile import BUFFER, Hostile, allowing, call, calls, libc, number, result

hostile, name = Hostile(Path(sys.argv[1])), sys.argv[2]
JOIN, SEARCH, READ, SESSION = 1, 10, 11, -3
c = libc()
if c.syscall(number("keyctl"), JOIN, None) < 0:
    sys.exit(os.strerror(ctypes.get_errno()))
key = c.syscall(number("add_key"), b"user", name.encode(), b"the secret", 10, SESSION)
if key < 0:
    sys.exit(os.strerror(ctypes.get_errno()))

attacks = {
    "request": calls(call("request_key", "user", name, 0, 0)),
    "search": calls(
        call("keyctl", SEARCH, SESSION, "user", name, 0),
        call("keyctl", READ, result(0), BUFFER, 100),
    ),
    "number": calls(call("keyctl", READ, key, BUFFER, 100)),
}
places = {
    "outside": hostile.outside,
    "inside": hostile.inside,
    "unfiltered": lambda attack: hostile.inside(
        attack, seccomp=allowing("keyctl", "add_key", "request_key"), user="0"
    ),
}
json.dump(
    {
        place: {how: [done.verdict, done.data.decode()] for how, done in tries.items()}
        for place, tries in (
            (place, {how: run(attack) for how, attack in attacks.items()})
            for place, run in places.items()
        )
    },
    sys.stdout,
)
"""


def try_everywhere(hostile: Hostile, marker: str) -> Any:
    done = host_program(LAUNCHER, str(hostile.program), marker)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_session_keyring_of_the_launcher(hostile: Hostile, marker: str) -> None:
    seen = try_everywhere(hostile, marker)
    assert seen["outside"] == {
        "request": ["ok", ""],
        "search": ["ok", "the secret"],
        "number": ["ok", "the secret"],
    }
    assert seen["inside"] == {
        "request": ["EPERM", ""],
        "search": ["EPERM", ""],
        "number": ["EPERM", ""],
    }
    # the second wall: a session keyring of the sandbox's own, in which nothing is found
    assert seen["unfiltered"]["request"] == ["ENOKEY", ""]
    assert seen["unfiltered"]["search"][0] == "ENOKEY"
    assert seen["unfiltered"]["number"][0] == "EACCES"


@pytest.mark.parametrize("ring", [SESSION, USER, USER_SESSION])
def test_key_calls(hostile: Hostile, ring: int) -> None:
    attacks = {
        "keyctl": call("keyctl", GET_KEYRING_ID, ring, 1),
        "add_key": call("add_key", "user", "ours", "payload", 7, ring),
    }
    for attack in attacks.values():
        assert hostile.outside(calls(attack)).verdict == "ok"
        assert hostile.inside(calls(attack)).verdict == "EPERM"
