"""Stacks that are no requirement of the tests, since they have no wheel for every Python here, or none at all: fetched."""

import os
import subprocess
import sys
import types
import zipfile
from contextlib import contextmanager
from pathlib import Path

from tests.peers import without_transport

# As the support matrix names them
VERSIONS = {"openrlhf": "0.11.2", "skyrl": "0.3.0", "prime-rl": "0.8.0", "liger_kernel": "0.8.5"}


PRIME_RL = "RLALIGN_PRIME_RL"  # a folder with the released source, where the tests cannot reach its repository


@contextmanager
def prime_rl(folder):
    """Inside, prime_rl of the released source, which is in no registry, can be imported: its heads without its models."""
    root = os.environ.get(PRIME_RL)
    if root is None:
        root = str(folder)
        address, tag = "https://github.com/PrimeIntellect-ai/prime-rl", f"v{VERSIONS['prime-rl']}"
        command = ["git", "clone", "-q", "--depth", "1", "--branch", tag, address, root]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"the nightly tests fetch {address}, or set {PRIME_RL}: {done.stderr[-500:]}"
    said = Path(root, "pyproject.toml").read_text()
    assert f'version = "{VERSIONS["prime-rl"]}"' in said, f"{root} is another prime-rl than {VERSIONS['prime-rl']}"
    source = Path(root, "src")
    models = types.ModuleType("prime_rl.trainer.models")  # whose own __init__ imports every model, and torchtitan
    models.__path__ = [str(source / "prime_rl" / "trainer" / "models")]
    sys.path.append(str(source))
    try:
        import prime_rl  # noqa: F401

        sys.modules[models.__name__] = models
        yield
    finally:
        sys.path.remove(str(source))
        for module in [m for m in sys.modules if m.partition(".")[0] == "prime_rl"]:
            del sys.modules[module]


def unpacked(name, folder):
    """The folder to import the released package from."""
    asked = f"{name}=={VERSIONS[name]}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        folder,
        asked,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"the nightly tests fetch {asked} for this Python: {done.stderr[-500:]}"
    (wheel,) = Path(folder).glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    (root,) = {p.parent.parent for p in Path(folder).rglob(f"{name}/__init__.py") if p.parent.name == name}
    return str(root)


@contextmanager
def released(name, folder, *, absent, importing=None):
    """Inside, the released package can be imported, with placeholders for what it imports and is absent here.

    importing: called with them; then they are gone before the body, for what must find nothing in their place.
    """
    root = unpacked(name, folder)
    sys.path.append(root)
    sys.modules["flash_attn.ops"] = None  # both fall back from its kernel where it is absent
    try:
        with without_transport(absent):
            if importing is None:
                yield
            else:
                importing()
        if importing is not None:
            yield
    finally:
        sys.path.remove(root)
        sys.modules.pop("flash_attn.ops", None)
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            del sys.modules[module]
