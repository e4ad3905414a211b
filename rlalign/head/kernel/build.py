"""Compiling the head kernel, and telling a library that can be loaded from one that cannot.

The library loads on every x86-64 processor: what it may call there it finds out by itself (head.c). Its name carries a hash of
sources and flags, its last bytes a hash of its content.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from rlalign.cache_folder import cache_folder

FOLDER = Path(__file__).parent
SOURCES = ("head.c", "fma.c", "amx.c")
FLAGS = ("-O3", "-shared", "-fPIC", "-ffp-contract=off")
# An older compiler leaves out what it does not know: AMX needs gcc 11 or clang 12, AVX-512 gcc 4.9.
ATTEMPTS = ((), ("-DRLALIGN_NO_AMX",), ("-DRLALIGN_NO_AVX512",))
PATHS = {"avx2": 1, "avx512": 2, "amx": 4}
DIGEST_BYTES = 32


def library_path() -> Path:
    """Where the compiled library lies or will lie."""
    return cache_folder("kernels") / f"head-{platform.machine()}-{_source_digest()}.so"


@lru_cache(maxsize=1)
def _source_digest() -> str:
    text = b"".join(file.read_bytes() for file in sorted(FOLDER.glob("*.[ch]"))) + " ".join(FLAGS).encode()
    return hashlib.sha256(text).hexdigest()[:16]


def build(compiler: str | None = None) -> Path:
    """Compile the kernel and return the library; an intact one is kept unless a compiler is named. Whole or not at all.

    compiler: a C compiler; by default $CC, gcc, clang or cc. Raises RuntimeError on another processor than x86-64, when no
    compiler is found, or when it fails.
    """
    target = library_path()
    if compiler is None and problem_of(target) is None:
        return target
    if platform.machine() not in ("x86_64", "AMD64"):
        raise RuntimeError(
            f"the head kernel is written for x86-64, this is {platform.machine()}; torch's products are used here"
        )
    found = _compiler(compiler)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, target.name)
        for without in ATTEMPTS:
            sources = [str(FOLDER / name) for name in SOURCES]
            done = subprocess.run([found, *FLAGS, *without, *sources, "-o", str(made)], capture_output=True, text=True)
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(f"{found} could not compile {FOLDER / SOURCES[0]}: {done.stderr.strip()[-500:]}")
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(made, target)
    return target


def problem_of(path: Path) -> str | None:
    """Why the library cannot be loaded; None when it can. A cut file is never mapped: its missing pages would kill the process."""
    if not path.is_file():
        return "it has not been built"
    content = path.read_bytes()
    if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        return "its file is damaged"
    try:
        bind(path)
    except (OSError, AttributeError) as error:
        return f"it cannot be loaded ({error})"
    return None


def bind(path: Path) -> ctypes.CDLL:
    """The library with the types of its functions."""
    library = ctypes.CDLL(str(path))
    integer, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.rlalign_panels.argtypes = [integer, size]
    library.rlalign_panels.restype = size
    library.rlalign_pack.argtypes = [integer, pointer, size, integer, size, size, size, size, pointer]
    library.rlalign_pack.restype = None
    library.rlalign_logits.argtypes = [
        integer, pointer, size, integer, size, size, size, pointer, size, pointer, size
    ]  # fmt: skip
    library.rlalign_logits.restype = None
    return library


def names(mask: int) -> tuple[str, ...]:
    """The paths of a mask that the library gives."""
    return tuple(name for name, bit in PATHS.items() if mask & bit)


def _compiler(named: str | None) -> str:
    named = named or os.environ.get("CC")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    if found is None:
        raise RuntimeError(
            f"no C compiler ({named or 'gcc, clang or cc'}); install one (Debian: apt-get install gcc) or set CC"
        )
    return found
