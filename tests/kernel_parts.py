"""What the tests of the head kernel share: a library of their own, compiled once."""

import shutil

import pytest

from rlalign.head import kernel

COMPILER = next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
needs_compiler = pytest.mark.skipif(
    COMPILER is None or not kernel.host_paths(), reason="needs gcc or clang, and a CPU with AVX2"
)


def forget() -> None:
    """As in a new process: no library has been looked for yet."""
    kernel.forget()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A cache folder with the library in it."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLALIGN_CACHE", str(folder))
        kernel.build()
    return folder
