"""Builds the cffi module and, beside it, the static helper that becomes the spawner."""

import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
from build_core import CFLAGS, CSRC, HELPER_SOURCES, SANITIZE, SANITIZERS


class BuildWithHelper(build_ext):
    """cffi's build, and ``sandboxcore/_spawner`` into the same place as ``_core``."""

    def run(self) -> None:
        super().run()
        core = Path(self.get_ext_fullpath("sandboxcore._core"))
        link = ["-Wl,-z,relro,-z,now", *(SANITIZERS if SANITIZE else ["-static"])]
        compiler = (sysconfig.get_config_var("CC") or "cc").split()[:1]
        sources = [str(CSRC / name) for name in HELPER_SOURCES]
        core.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [*compiler, *CFLAGS, *link, *sources, "-o", str(core.parent / "_spawner")],
            check=True,
        )


setup(
    cffi_modules=["csrc/build_core.py:ffi"],
    cmdclass={"build_ext": BuildWithHelper},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
