"""What tests of sandboxcore.aio share."""

import inspect
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from loops import play
from support import PYTHON

import sandboxcore
import sandboxcore.files
import sandboxcore.persistent
from sandboxcore import aio

T = TypeVar("T")
MIB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def spawner_runs() -> None:
    """What is counted is what comes after the first use."""
    sandboxcore.run(["true"])


def with_sandbox(action: Callable[[aio.Sandbox], Awaitable[T]], **options: Any) -> T:
    """The same with a sandbox that runs."""

    async def main() -> T:
        async with aio.Sandbox(**options) as sandbox:
            return await action(sandbox)

    return play(main())


def python(code: str, *args: str) -> list[str]:
    return [PYTHON, "-I", "-S", "-c", inspect.cleandoc(code), *args]


def mark() -> str:
    return f"aio-{os.getpid()}-{time.monotonic_ns()}"
