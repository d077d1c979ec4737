"""What tests of living sandboxes share."""

from collections.abc import Iterator

import pytest
from support import PYTHON

import sandboxcore
from sandboxcore import Sandbox

CAT = ["cat"]
SLEEP = ["sleep", "600"]


def python(code: str, *args: str) -> list[str]:
    return [PYTHON, "-I", "-S", "-c", code, *args]


@pytest.fixture(scope="module")
def shared() -> Iterator[Sandbox]:
    """One sandbox for the tests that leave it as it was."""
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


def rootless() -> bool:
    return sandboxcore.host.features().mode == "rootless"
