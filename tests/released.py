"""Wheels of stacks that are no requirement of the tests, since they have none for every Python here: fetched and unpacked."""

import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

from tests.peers import without_transport

VERSIONS = {"openrlhf": "0.11.2", "skyrl": "0.3.0"}  # as the support matrix names them


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
