"""The head's forward product in C, for x86-64: one source, paths for AVX2, AVX-512 and AMX, chosen when it is loaded.

`rlalign build-kernel` compiles it once into the user's cache (seconds, no library but libc). It loads on every x86-64 processor:
what it may call there it finds out by itself (head.c). Its name has a hash of sources and flags, its last bytes one of its content.
avx2 and avx512 share one law (fma.c), so they share their bits; amx has those of the library's bf16 product. `RLALIGN_HEAD_KERNEL`
picks one: "auto" (default), "none", or the name of a path; hosts of different kinds in one job agree under "avx2".
N rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from rlalign.cache_folder import VARIABLE as CACHE_VARIABLE
from rlalign.cache_folder import cache_folder

__all__ = [
    "FMA_PATHS",
    "Kernel",
    "amx",
    "available",
    "build",
    "fma",
    "forced",
    "forget",
    "host_paths",
    "library_path",
    "why_none",
]

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


logger = logging.getLogger(__name__)

VARIABLE = "RLALIGN_HEAD_KERNEL"
INSTRUCTIONS = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f"}, "amx": {"avx512f", "amx_tile", "amx_bf16"}}
FMA_PATHS = ("avx512", "avx2")  # the same bits, the faster first
ROWS, COLUMNS, INNER = 16, 64, 32  # of a tile; vocabulary of a thread's share; hidden elements that AMX takes at once
WORTH_THREADS = 2**20  # multiplications below which starting threads costs more than it saves


def forced() -> str:
    """What the environment asks for. Raises ValueError for a name that does not exist."""
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in ("auto", "none", *PATHS):
        raise ValueError(f"{VARIABLE} must be auto, none, {', '.join(PATHS)}; got {asked!r}")
    return asked


def fma() -> Kernel | None:
    """The kernel with the law of fma.c for float32 and bf16 operands; None where none was built or none can run.

    Raises RuntimeError when the environment names a path that cannot run here.
    """
    return _best(FMA_PATHS, forced(), _home())


def amx() -> Kernel | None:
    """The kernel for AMX: bf16 operands, hidden sizes that are multiples of 32, the bits of the library product. None: as `fma`."""
    return _best(("amx",), forced(), _home())


def available() -> tuple[str, ...]:
    """The paths that this library, processor and operating system can run, whatever the environment asks for."""
    library = _library(_home())
    return () if library is None else names(library.rlalign_host() & library.rlalign_built())


@lru_cache(maxsize=1)
def host_paths() -> tuple[str, ...]:
    """The paths that this processor and its kernel have the instructions for, built or not."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return tuple(path for path, needed in INSTRUCTIONS.items() if needed <= flags)


def why_none() -> str:
    """Why `fma` gives nothing here, for a log line."""
    if forced() == "none":
        return f"{VARIABLE}=none"
    if problem := problem_of(library_path()):
        return problem
    return "this processor has no AVX2, the least it is written for"


def forget() -> None:
    """Look for the library anew at the next use. A run keeps the one it started with."""
    _best.cache_clear()
    _library.cache_clear()


def _usable(asked: str) -> tuple[str, ...]:
    if asked == "none":
        return ()
    found = available()
    if asked in PATHS and asked not in found:
        raise RuntimeError(
            f"{VARIABLE}={asked}, but this host can run {', '.join(found) or 'none'} "
            f"(the library: {problem_of(library_path()) or 'whole'}; the processor: {', '.join(host_paths()) or 'none'}). "
            "Run `rlalign build-kernel` here, or name another path"
        )
    return found


def _home() -> str | None:
    return os.environ.get(CACHE_VARIABLE)


@lru_cache(maxsize=16)
def _best(paths: tuple[str, ...], asked: str, home: str | None) -> Kernel | None:
    """The first of these paths that is usable and not ruled out. Looked up once: it is asked for at every product."""
    found = _usable(asked)
    wanted = (
        path for path in paths if path in found and (asked in ("auto", path) or (asked == "amx" and path in FMA_PATHS))
    )
    path = next(wanted, None)
    return None if path is None else Kernel(path, PATHS[path], _library(home))


@lru_cache(maxsize=4)
def _library(home: str | None) -> ctypes.CDLL | None:
    path = library_path()
    problem = problem_of(path)
    if problem is None:
        return bind(path)
    if path.is_file():
        logger.warning("head kernel: %s is not used: %s; `rlalign build-kernel` makes it anew", path, problem)
    return None


@dataclass(frozen=True, slots=True)
class Kernel:
    """One path of the library: (hidden [N, D], weight [V, D], out [N, V] float32) -> out. No gradient.

    Any strides; bf16 operands are read where they lie, float32 ones too, except by amx. The number of torch's threads changes
    no bit.
    """

    path: str
    _code: int
    _library: ctypes.CDLL
    _pool: ClassVar[tuple[tuple[int, int], ThreadPoolExecutor] | None] = None

    def takes(self, hidden_ND: Tensor, weight_VD: Tensor) -> bool:
        """Whether this path multiplies operands of these dtypes and sizes."""
        if self.path == "amx":
            return hidden_ND.dtype == weight_VD.dtype == torch.bfloat16 and hidden_ND.shape[1] % INNER == 0
        return all(x.dtype in (torch.bfloat16, torch.float32) for x in (hidden_ND, weight_VD))

    def __call__(self, hidden_ND: Tensor, weight_VD: Tensor, out_NV: Tensor) -> Tensor:
        """Fill `out` (float32, rows of any stride) and return it."""
        assert self.takes(hidden_ND, weight_VD)
        if not _rows_lie_whole(out_NV):
            return out_NV.copy_(self(hidden_ND, weight_VD, torch.empty(out_NV.shape)))
        hidden_ND, weight_VD = (x if _rows_lie_whole(x) else x.contiguous() for x in (hidden_ND, weight_VD))
        (n, d), vocab = hidden_ND.shape, weight_VD.shape[0]
        packed = torch.empty(-(-n // ROWS) * ROWS * d)
        threads = torch.get_num_threads() if n * d * vocab > WORTH_THREADS else 1

        def pack(first: int, last: int) -> None:
            self._library.rlalign_pack(
                self._code, hidden_ND.data_ptr(), hidden_ND.stride(0), hidden_ND.dtype == torch.float32, n, d,
                first, last, packed.data_ptr(),
            )  # fmt: skip

        def multiply(start: int, stop: int) -> None:
            self._library.rlalign_logits(
                self._code, weight_VD.data_ptr(), weight_VD.stride(0), weight_VD.dtype == torch.float32, start, stop, d,
                packed.data_ptr(), n, out_NV.data_ptr(), out_NV.stride(0),
            )  # fmt: skip

        self._share(pack, self._library.rlalign_panels(self._code, n), 1, threads if n >= 256 else 1)
        self._share(multiply, vocab, COLUMNS, threads)
        return out_NV

    def _share(self, part, count: int, multiple: int, threads: int) -> None:
        share = -(-count // (threads * multiple)) * multiple
        if share >= count:
            part(0, count)
        else:
            starts = range(0, count, share)
            list(self._threads(threads).map(lambda start: part(start, min(count, start + share)), starts))

    @classmethod
    def _threads(cls, threads: int) -> ThreadPoolExecutor:
        # torch's own threads cannot be lent to C without its headers; these wait in the kernel, outside the interpreter's lock
        owner = (os.getpid(), threads)
        if cls._pool is None or cls._pool[0] != owner:
            cls._pool = owner, ThreadPoolExecutor(threads, "rlalign-head")
        return cls._pool[1]


def _rows_lie_whole(x: Tensor) -> bool:
    return x.shape[1] == 1 or x.stride(1) == 1
