"""The broken environment is recognised and the fix is printed; a good one passes."""

from importlib.metadata import PackageNotFoundError

import pytest

from rlalign import cli
from rlalign.tracking import environment


def installed(**versions):
    def version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    return version


def test_this_environment_works():
    environment.require_working()


@pytest.mark.parametrize("extra", ["torchvision", "torchaudio", "torchcodec"])
def test_a_cuda_package_beside_a_cpu_torch_is_named_with_the_fix(monkeypatch, extra, capsys):
    monkeypatch.setattr(environment, "version", installed(torch="2.13.0+cpu", **{extra: "0.28.0"}))
    with pytest.raises(RuntimeError, match=f"pip uninstall -y {extra}"):
        environment.require_working()
    assert cli.main(["report", "nowhere"]) == 1
    assert f"pip uninstall -y {extra}" in capsys.readouterr().err


@pytest.mark.parametrize("versions", [{"torch": "2.13.0"}, {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}, {}])
def test_matching_builds_are_left_alone(monkeypatch, versions):
    monkeypatch.setattr(environment, "version", installed(**versions))
    assert environment.broken_packages() == []
