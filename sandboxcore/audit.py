"""For which system call a filter killed a process: only the kernel's log says so, where one may read it.

The kernel writes one line for each process that a seccomp filter kills (audit message 1326,
Documentation/userspace-api/seccomp_filter.rst), limited in their rate. A wait status has no room for it.
"""

import errno as E
import os
import re
from collections.abc import Iterable, Iterator

from sandboxcore.seccomp import call_name

LOG = "/dev/kmsg"  # Documentation/ABI/testing/dev-kmsg
SLACK = 2.0  # seconds that the log's clock may differ from CLOCK_MONOTONIC

_LINE = re.compile(r"\d+,\d+,(\d+),[^;]*;.*\btype=1326\b.*\buid=(\d+)\b.*\bsig=31\b.*\bsyscall=(\d+)\b")


def forbidden_call(began: int, ended: int, uids: range) -> str:
    """The name of the call for which a process of one of these users was killed between two moments of
    CLOCK_MONOTONIC in nanoseconds; an empty string if the log may not be read, or does not tell."""
    try:
        numbers = set(find(_records(), began, ended, uids))
    except OSError:
        return ""
    return call_name(numbers.pop()) if len(numbers) == 1 else ""  # of several, nobody knows which


def find(records: Iterable[str], began: int, ended: int, uids: range) -> Iterator[int]:
    """The numbers of such calls in the log."""
    first, last = began / 1000 - SLACK * 1e6, ended / 1000 + SLACK * 1e6
    for record in records:
        match = _LINE.match(record)
        if match and first <= int(match[1]) <= last and int(match[2]) in uids:
            yield int(match[3])


def _records() -> Iterator[str]:
    fd = os.open(LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while True:
            try:
                yield os.read(fd, 8192).decode(errors="replace")
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != E.EPIPE:  # overwritten while we read: go on with what is there
                    raise
    finally:
        os.close(fd)
