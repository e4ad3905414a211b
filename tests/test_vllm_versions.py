"""What happens outside the tested range of vLLM."""

import pytest

from rlalign.rollout import versions


def test_outside_the_tested_range_is_refused_and_only_the_newer_side_can_be_opened(monkeypatch):
    monkeypatch.delenv(versions.ALLOW_UNTESTED, raising=False)
    for version in ("0.28.0", "0.30.1", "0.33.0"):
        versions.require_supported(version)
    with pytest.raises(
        RuntimeError, match=r"vLLM 0.34.0 is newer than .*\(0.28 to 0.33\).*RLALIGN_ALLOW_UNTESTED_VLLM=1"
    ):
        versions.require_supported("0.34.0")
    with pytest.raises(RuntimeError, match=r"vLLM 0.27.1 is older .*install vllm>=0.28"):
        versions.require_supported("0.27.1")
    monkeypatch.setenv(versions.ALLOW_UNTESTED, "1")
    versions.require_supported("0.34.0")
    with pytest.raises(RuntimeError, match="is older"):
        versions.require_supported("0.27.1")


@pytest.mark.parametrize("version", ["", "dev", "main.1", "1"])
def test_an_unreadable_version_is_refused(version):
    with pytest.raises(ValueError, match="does not start with MAJOR.MINOR"):
        versions.parse(version)
