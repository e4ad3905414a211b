"""Which hook is chosen for which vLLM, and what happens outside the tested range."""

from itertools import pairwise

import pytest

from rlalign.rollout import versions
from rlalign.rollout.versions import Hook


@pytest.mark.parametrize(
    ("version", "hook"),
    [
        ("0.24.0", Hook.GET_LOGITS),
        ("0.25.1", Hook.GET_LOGITS),
        ("0.26.0", Hook.APPLY_HEAD),
        ("0.32.0+cpu", Hook.APPLY_HEAD),
        ("0.34.0rc1", Hook.APPLY_HEAD),
        ("1.0", Hook.APPLY_HEAD),
    ],
)
def test_the_hook_follows_the_version(version, hook):
    assert versions.hook(version) is hook
    assert versions.has_native_head(version) == (hook is Hook.APPLY_HEAD)


def test_what_a_version_offers_grows_in_order():
    offers = (
        versions.has_native_head,
        versions.has_weight_version,
        versions.has_weight_transfer,
        versions.has_output_spans,
    )
    for earlier, later in pairwise(offers):
        for minor in range(20, 40):
            assert earlier(f"0.{minor}.0") or not later(f"0.{minor}.0")


def test_outside_the_tested_range_is_refused_and_only_the_newer_side_can_be_opened(monkeypatch):
    monkeypatch.delenv(versions.ALLOW_UNTESTED, raising=False)
    for version in ("0.24.0", "0.28.0", "0.33.0"):
        versions.require_supported(version)
    with pytest.raises(
        RuntimeError, match=r"vLLM 0.34.0 is newer than .*\(0.24 to 0.33\).*RLALIGN_ALLOW_UNTESTED_VLLM=1"
    ):
        versions.require_supported("0.34.0")
    with pytest.raises(RuntimeError, match=r"vLLM 0.23.1 is older .*install vllm>=0.24"):
        versions.require_supported("0.23.1")
    monkeypatch.setenv(versions.ALLOW_UNTESTED, "1")
    versions.require_supported("0.34.0")
    with pytest.raises(RuntimeError, match="is older"):
        versions.require_supported("0.23.1")


@pytest.mark.parametrize("version", ["", "dev", "main.1", "1"])
def test_an_unreadable_version_is_refused(version):
    with pytest.raises(ValueError, match="does not start with MAJOR.MINOR"):
        versions.parse(version)
