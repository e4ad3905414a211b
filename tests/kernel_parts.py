"""What the tests of the head kernel share: a library of their own, compiled once."""

import shutil
from pathlib import Path

import pytest

from rlalign.head import kernel
from rlalign.head.kernel import library_path, problem_of

COMPILER = next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
needs_compiler = pytest.mark.skipif(
    COMPILER is None or not kernel.host_paths(), reason="needs gcc or clang, and a CPU with AVX2"
)


def forget() -> None:
    """As in a new process: no library has been looked for yet."""
    kernel.forget()


def library_in(folder: Path) -> Path:
    """A cache folder with the library in it: this user's, where it is intact and of these sources, else one compiled now."""
    own = library_path()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLALIGN_CACHE", str(folder))
        if problem_of(own) is None:
            library_path().parent.mkdir(parents=True)
            shutil.copy(own, library_path())
        if COMPILER:
            kernel.build()
    forget()  # looked for in another cache, where there may have been none
    return folder
