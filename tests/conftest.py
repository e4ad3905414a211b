"""Shared by all tests."""

import pytest


@pytest.fixture
def compiling(monkeypatch):
    """torch.compile really compiles: an engine started earlier in this process may have switched it off for eager runs."""
    import torch._dynamo

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with torch._dynamo.config.patch(disable=False):
        yield
