"""Building the head kernel once for any x86-64 host, and never calling an instruction that the host at hand lacks."""

import logging
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from rlalign.head import kernel, projection, routes
from rlalign.head.kernel import DIGEST_BYTES, FOLDER, SOURCES, problem_of
from rlalign.head.products import Route
from rlalign.rollout.engine import handshake
from tests.kernel_parts import COMPILER, forget, needs_compiler

# (name of the emulated processor, what it can run)
EMULATED = {"Nehalem": "", "Haswell": "avx2", "EPYC-Milan": "avx2"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder in which no library has been looked for."""
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path))
    monkeypatch.delenv(kernel.VARIABLE, raising=False)
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def copied(cache, compiled):
    """The path of a library in this test's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLALIGN_CACHE", str(compiled))
        made = kernel.library_path()
    target = kernel.library_path()
    target.parent.mkdir(parents=True)
    shutil.copy(made, target)
    return target


@pytest.fixture
def fast(tmp_path, compiled, monkeypatch):
    """CC is what gives a library compiled before, a moment later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLALIGN_CACHE", str(compiled))
        content = kernel.library_path().read_bytes()[:-DIGEST_BYTES]
    (tmp_path / "made.so").write_bytes(content)
    script = tmp_path / "fastcc"
    script.write_text(f'#!/bin/sh\nsleep 0.1\nfor target; do :; done\nexec cp {tmp_path}/made.so "$target"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))


def test_nothing_is_compiled_behind_the_users_back_and_the_slow_way_is_named(cache, caplog):
    routes._chosen.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert kernel.fma() is None
        chosen = projection.route(torch.empty(1, 64), torch.empty(3, 64))
    assert chosen is Route.BLOCKED_FP32
    assert (
        "without the compiled kernel (it has not been built)" in caplog.text and "rlalign build-kernel" in caplog.text
    )
    assert not kernel.library_path().exists()


@needs_compiler
def test_what_is_built_is_used_by_the_next_process(copied):
    assert kernel.build() == copied
    assert kernel.available() == kernel.host_paths()
    assert kernel.fma().path == ("avx512" if "avx512" in kernel.host_paths() else "avx2")


@needs_compiler
@pytest.mark.parametrize("left", [0, 10, 5000, -1])
def test_a_damaged_library_is_neither_loaded_nor_kept(copied, fast, caplog, left):
    whole = copied.read_bytes()
    copied.write_bytes(whole[:left])
    assert kernel.fma() is None and "its file is damaged" in caplog.text
    assert kernel.build() == copied and problem_of(copied) is None
    forget()
    assert kernel.fma() is not None


@needs_compiler
def test_a_library_that_another_system_made_is_not_used(copied, caplog):
    import hashlib

    foreign = b"\x7fELF of another machine"
    copied.write_bytes(foreign + hashlib.sha256(foreign).digest())
    assert kernel.fma() is None and "it cannot be loaded" in caplog.text


def test_without_a_compiler_it_says_what_to_install(cache, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError, match="no C compiler .*install"):
        kernel.build()


def test_another_architecture_is_told_what_happens(cache, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(RuntimeError, match="written for x86-64, this is aarch64"):
        kernel.build()


def test_a_compiler_that_fails_leaves_nothing(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no such flag' >&2; exit 3\n")
    broken.chmod(0o755)
    with pytest.raises(RuntimeError, match="could not compile .*head.c: no such flag"):
        kernel.build(str(broken))
    assert list(kernel.library_path().parent.iterdir()) == []


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("refused", "kept"), [("AMX", ("avx2", "avx512")), ("AVX512", ("avx2",))])
def test_an_old_compiler_leaves_out_what_it_does_not_know(cache, tmp_path, refused, kept):
    """As a compiler that fails on the sources of a path until it is told to leave that path out."""
    old = tmp_path / "oldcc"
    old.write_text(f'#!/bin/sh\ncase "$*" in *RLALIGN_NO_{refused}*) exec {COMPILER} "$@" -O0;; esac\nexit 1\n')
    old.chmod(0o755)
    kernel.build(str(old))
    assert kernel.available() == tuple(path for path in kernel.host_paths() if path in kept)


@needs_compiler
def test_two_processes_that_build_at_once_both_end_with_a_whole_library(cache, fast):
    threads = [threading.Thread(target=kernel.build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problem_of(kernel.library_path()) is None
    assert list(kernel.library_path().parent.iterdir()) == [kernel.library_path()]


@needs_compiler
def test_a_path_that_cannot_run_is_refused_by_name(copied, monkeypatch):
    monkeypatch.setenv(kernel.VARIABLE, "sse")
    with pytest.raises(ValueError, match="RLALIGN_HEAD_KERNEL must be auto, none, avx2, avx512, amx; got 'sse'"):
        kernel.fma()
    monkeypatch.setenv(kernel.VARIABLE, "avx2")
    copied.unlink()
    forget()
    with pytest.raises(RuntimeError, match="this host can run none .*not been built.*build-kernel"):
        kernel.fma()


@needs_compiler
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)")
def test_wide_registers_appear_only_in_functions_of_their_path(copied):
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", copied], capture_output=True, text=True, check=True
    ).stdout
    users = {"zmm": set(), "ymm": set(), "tmm": set()}
    function = ""
    for line in text.splitlines():
        if found := re.match(r"[0-9a-f]+ <(.*)>:", line):
            function = found[1]
        for register, functions in users.items():
            if f"%{register}" in line:
                functions.add(function)
    assert users["zmm"] and all(re.search("_avx512|_amx|^put$|^few$|^many$", name) for name in users["zmm"])
    assert all(re.search("_avx2|_avx512|_amx|^put$|^few$|^many$", name) for name in users["ymm"])
    assert all(re.search("_amx|^few$|^many$|^configure$", name) for name in users["tmm"])


DRIVER = """
#include "head.h"
#include <stdio.h>
#include <stdlib.h>
int rlalign_host(void); int64_t rlalign_panels(int, int64_t);
void rlalign_pack(int, const void *, int64_t, int, int64_t, int64_t, int64_t, int64_t, void *);
void rlalign_logits(int, const void *, int64_t, int, int64_t, int64_t, int64_t, const void *, int64_t, float *, int64_t);
static uint32_t seed = 1;
static uint32_t draw(void) { return seed = seed * 1664525u + 1013904223u; }
int main(int count, char **arguments) { /* a sum of the bits of many products by path `argument`, or the host's best */
  int host = rlalign_host() & 3, path = count > 1 ? atoi(arguments[1]) : host & 2 ? 2 : host;
  uint64_t sum = 0;
  printf("%d ", host);
  if (!path) return 0;
  static bf16 hidden[40 * 300], weight[50 * 300];
  static float packed[48 * 300], logits[40 * 50];
  for (int i = 0; i < 40 * 300; i++) hidden[i] = 0x3f00 | (draw() >> 16 & 0x80ff);
  for (int i = 0; i < 50 * 300; i++) weight[i] = 0x3e00 | (draw() >> 16 & 0x81ff);
  for (int n = 1; n <= 40; n++)
    for (int d = 1; d <= 300; d += 37) {
      rlalign_pack(path, hidden, 300, 0, n, d, 0, rlalign_panels(path, n), packed);
      rlalign_logits(path, weight, 300, 0, 0, 50, d, packed, n, logits, 50);
      for (int i = 0; i < n * 50; i++) { uint32_t bits; memcpy(&bits, logits + i, 4); sum = sum * 31 + bits; }
    }
  printf("%016lx", (unsigned long)sum);
  return 0;
}
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (Debian: apt-get install qemu-user)")
@pytest.mark.parametrize("processor", ["Nehalem", "Haswell", pytest.param("EPYC-Milan", marks=pytest.mark.nightly)])
def test_an_emulated_processor_runs_its_path_and_nothing_else(tmp_path, processor):
    """The emulator executes no AVX-512 at all: one such instruction outside its path would end it."""
    source, program = tmp_path / "driver.c", tmp_path / "driver"
    source.write_text(DRIVER)
    files = [str(FOLDER / name) for name in SOURCES]
    subprocess.run([COMPILER, "-O3", f"-I{FOLDER}", str(source), *files, "-o", str(program)], check=True)

    def said(*command: str) -> list[str]:
        return subprocess.run([*command], capture_output=True, text=True, check=True).stdout.split()

    mask, *bits = said(
        "qemu-x86_64", "-U", "LD_PRELOAD", "-cpu", processor, str(program)
    )  # as_host's, which qemu cannot serve
    assert int(mask) == (1 if EMULATED[processor] else 0)
    if EMULATED[processor]:
        assert bits == said(str(program), "1")[1:]
        assert bits == said(str(program))[1:], "whatever this host takes has the same bits"


PROOF = {"rank": 0, "route": "kernel_fma", "kernel": "avx2", "bits": "0123456789ab"}


def test_two_processes_that_make_other_bits_are_named():
    trainer = {"trainer rank 0": PROOF}
    handshake.require_same_bits(trainer | handshake.proofs_of([PROOF | {"kernel": "avx512"}]))
    handshake.require_same_bits(trainer | handshake.proofs_of([PROOF | {"route": None, "bits": None}]))
    for other in ({"bits": "ba9876543210"}, {"route": "blocked_fp32", "kernel": None}, {"route": "mkl_bf16"}):
        said = r"trainer rank 0 has route kernel_fma \(avx2\), bits 0123.*rollout rank 0 has.*RLALIGN_HEAD_KERNEL"
        with pytest.raises(RuntimeError, match=said):
            handshake.require_same_bits(trainer | handshake.proofs_of([PROOF | other]))
    both = [PROOF | {"route": "mkl_bf16"}, PROOF | {"route": "onednn_bf16", "rank": 1}]
    handshake.require_same_bits(handshake.proofs_of(both))


def test_the_proof_is_of_what_is_computed_now():
    honest = routes.bits(projection.project, 96, torch.bfloat16, torch.bfloat16)
    assert honest == routes.bits(projection.project, 96, torch.bfloat16, torch.bfloat16)

    def off_by_one_bit(hidden, weight):
        logits = projection.project(hidden, weight)
        logits.view(torch.int32)[-1, -1] ^= 1
        return logits

    assert routes.bits(off_by_one_bit, 96, torch.bfloat16, torch.bfloat16) != honest


def test_sources_travel_with_the_package():
    assert all((FOLDER / name).is_file() for name in SOURCES)
    patterns = re.search(
        r'"rlalign.head.kernel" = \[(.*)\]', (Path(__file__).parents[1] / "pyproject.toml").read_text()
    )
    assert {f'"*{file.suffix}"' for file in FOLDER.glob("*.[ch]")} == set(patterns[1].split(", "))
