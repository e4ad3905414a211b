"""The OpenAPI document against the server: schemathesis sends what it allows and what it forbids, and holds the answers to it."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from rlalign.serve import ServerSettings, create_app
from tests.reward_serving import HashScorer, serving

KEY = "correct horse"
schema = schemathesis.openapi.from_dict(create_app(HashScorer(), ServerSettings(api_key=KEY)).openapi())


@pytest.fixture(scope="module")
def url():
    with serving(HashScorer(), api_key=KEY) as address:
        yield address


@schema.parametrize()
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_answers_are_as_documented(case, url):
    """Excluded: that whatever fits the schema is accepted. A schema cannot say that one of two fields is needed, or which model."""
    headers = {"Authorization": f"Bearer {KEY}"}
    case.call_and_validate(base_url=url, headers=headers, timeout=20, excluded_checks=[positive_data_acceptance])
