"""The decode head in C, for CPUs with AMX: the bits of `products`, at the speed of vLLM's own bf16 head.

Optional. `rlalign build-kernel` compiles head_amx.c once into the user's cache (a second, no library but libc); without it, or
where its bits differ from those of the library products, those are used and `loaded` says so.
N rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rlalign.cache_folder import cache_folder
from rlalign.products import Route, cpu_bf16_route, logits_of

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("head_amx.c")
FLAGS = ("-O3", "-shared", "-fPIC", "-mavx512f", "-mamx-tile", "-mamx-bf16")
NAME = "amx"
TILE = 16  # rows of a tile
BLOCK, INNER = 64, 32  # the vocabulary of a thread's share, and hidden elements, come in multiples of these

Logits = Callable[[Tensor, Tensor, Tensor], Tensor]


def library_path() -> Path:
    """Where the compiled library lies or will lie; the name carries a hash of the source and of the flags."""
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    return cache_folder("kernels") / f"head_{NAME}-{digest}.so"


def build(compiler: str | None = None) -> Path:
    """Compile the kernel and return the library; nothing is done where it exists. It appears whole or not at all.

    compiler: a C compiler that knows AMX (gcc 11, clang 12 or later); by default $CC, gcc, clang or cc.
    Raises RuntimeError when this processor lacks AMX, no compiler is found, or it fails.
    """
    target = library_path()
    if target.is_file():
        return target
    if not _has_amx():
        raise RuntimeError("this processor has no AMX for bf16; the library products are used here, with the same bits")
    named = compiler or os.environ.get("CC")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    if found is None:
        raise RuntimeError(
            f"no C compiler ({named or 'gcc, clang or cc'}); install one (Debian: apt-get install gcc) or set CC"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, target.name)
        done = subprocess.run([found, *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{found} could not compile {SOURCE.name}: {done.stderr.strip()[-500:]}")
        os.replace(made, target)
    return target


@lru_cache(maxsize=8)
def loaded(hidden_size: int) -> Logits | None:
    """The kernel for this hidden size: (hidden [N, D], weight [V, D], out [N, V] float32) -> out. None where it cannot be used.

    It is tried against the library product first, and used only if every bit agrees; a difference is logged.
    """
    if hidden_size % INNER or not _has_amx() or not library_path().is_file():
        return None
    library = _bind(library_path())
    if not library.rlalign_allow_tiles():
        logger.warning(
            "head kernel: the operating system does not lend AMX tiles to this process; using the library product"
        )
        return None
    kernel = _Kernel(library)
    if cpu_bf16_route(hidden_size, torch.get_num_threads()) is not Route.MKL_BF16 or not _same_bits(
        kernel, hidden_size
    ):
        logger.warning(
            "head kernel: its bits differ from the library product's for hidden size %d here; using that one",
            hidden_size,
        )
        return None
    return kernel


class _Kernel:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._threads: ThreadPoolExecutor | None = None
        self._owner = (0, 0)  # process and number of threads the pool was made for

    def __call__(self, hidden_ND: Tensor, weight_VD: Tensor, out_NV: Tensor) -> Tensor:
        (n, d), vocab = hidden_ND.shape, weight_VD.shape[0]
        packed = torch.empty(-(-n // TILE) * TILE * d, dtype=torch.bfloat16)
        self._library.rlalign_pack(hidden_ND.data_ptr(), hidden_ND.stride(0), n, d, packed.data_ptr())
        threads = torch.get_num_threads()
        share = -(-vocab // (threads * BLOCK)) * BLOCK

        def part(start: int) -> None:
            self._library.rlalign_logits(
                weight_VD.data_ptr(), weight_VD.stride(0), start, min(vocab, start + share), vocab, d,
                packed.data_ptr(), n, out_NV.data_ptr(), out_NV.stride(0),
            )  # fmt: skip

        if share >= vocab:
            part(0)
        else:
            list(self._pool(threads).map(part, range(0, vocab, share)))
        return out_NV

    def _pool(self, threads: int) -> ThreadPoolExecutor:
        # torch's own threads cannot be lent to C without its headers; these wait in the kernel, outside the interpreter's lock
        if self._owner != (os.getpid(), threads):
            self._threads, self._owner = ThreadPoolExecutor(threads, "rlalign-head"), (os.getpid(), threads)
        return self._threads


def _bind(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.rlalign_allow_tiles.restype = ctypes.c_int
    library.rlalign_pack.argtypes = [pointer, size, size, size, pointer]
    library.rlalign_pack.restype = None
    library.rlalign_logits.argtypes = [pointer, size, size, size, size, size, pointer, size, pointer, size]
    library.rlalign_logits.restype = None
    return library


def _has_amx() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and all(f" {flag}" in cpuinfo.read_text() for flag in ("amx_tile", "amx_bf16", "avx512f"))


def _same_bits(kernel: Logits, hidden_size: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(70, hidden_size, generator=generator).bfloat16()
    weight_VD = torch.randn(661, hidden_size, generator=generator).bfloat16()  # ends inside a tile
    for n in (1, 16, 17, 70):
        expected = logits_of(hidden_ND[:n], weight_VD, Route.MKL_BF16)
        if not torch.equal(kernel(hidden_ND[:n], weight_VD, torch.empty(n, len(weight_VD))), expected):
            return False
    return True
