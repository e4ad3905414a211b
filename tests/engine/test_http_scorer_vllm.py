"""HTTPScorer against vLLM's own servers, in processes of their own: the numbers of HFScorer, and what the probes find."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlalign.calibration.calibrators import PlattCalibrator
from rlalign.ranks import free_port
from rlalign.scoring import HFScorer, HTTPScorer, ScoringParams, with_calibration
from rlalign.scoring.http import KnownLogits
from tests.engine.scoring_models import CONTEXT, save

QUERY, ITEMS = "What is 2 + 2? ", ["4", "5, I would say", "It is four. " * 6, "?"]
SERVERS = {  # kind -> (arguments, development mode)
    "one_label": (["--runner", "pooling", "--pooler-config", '{"logit_mean": 0.5, "logit_sigma": 2.0}'], True),
    "three_labels": (["--runner", "pooling"], False),
    "judge": ([], False),
    "bert": (["--runner", "pooling"], False),
}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """kind -> (URL, HFScorer of the same folder). They start side by side."""
    started = {}
    for kind, (arguments, development) in SERVERS.items():
        folder, port = save(kind, tmp_path_factory.mktemp(kind)), free_port()
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", kind,
            "--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT), "--max-num-seqs", "16",
            "--host", "127.0.0.1", "--port", str(port), *arguments,
        ]  # fmt: skip
        with Path(folder, "server.log").open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=folder,
                env={**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                     "VLLM_SERVER_DEV_MODE": str(int(development))},
            )  # fmt: skip
        started[kind] = process, f"http://127.0.0.1:{port}", folder
    try:
        for process, url, folder in started.values():
            _wait(process, url, folder)
        yield {kind: (url, HFScorer(folder, dtype="float32")) for kind, (_, url, folder) in started.items()}
    finally:
        for process, _, _ in started.values():
            process.terminate()
        for process, _, _ in started.values():
            process.wait(30)


def _wait(process, url, folder) -> None:
    import httpx

    deadline = time.monotonic() + 600  # four servers that import at once, perhaps on a busy machine
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health", timeout=1.0).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError(f"vLLM's server did not start:\n{Path(folder, 'server.log').read_text()[-3000:]}")


def close(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["one_label", "three_labels", "bert"])
@pytest.mark.parametrize("activated", [False, True])
def test_the_same_numbers_as_transformers(servers, kind, activated):
    url, theirs = servers[kind]
    tokenizer = None if kind == "bert" else theirs.tokenizer
    with_pairs = {"cross_encoder": True} if kind == "bert" else {}
    ours = HTTPScorer(url, tokenizer=tokenizer, **with_pairs)
    assert ours.dialect == "vllm" and ours.info.id == kind
    assert (ours.info.num_labels, ours.info.activation) == (theirs.info.num_labels, theirs.info.activation)
    affine = {"logit_mean": 0.5, "logit_sigma": 2.0} if kind == "one_label" else {}
    a = ours.score(QUERY, ITEMS, ScoringParams(use_activation=activated))
    b = theirs.score(QUERY, ITEMS, ScoringParams(use_activation=activated, **affine))
    assert a.errors == [None] * len(ITEMS)
    close(a.scores, b.scores)
    close(a.logits, b.logits)
    if tokenizer is not None:
        assert a.prompt_tokens == b.prompt_tokens
        close(ours.score([5, 6], [[7], [8] * 40]).logits, theirs.score([5, 6], [[7], [8] * 40]).logits)
    ours.close()


def test_a_judges_answers(servers):
    url, theirs = servers["judge"]
    ours = HTTPScorer(url, tokenizer=theirs.tokenizer)
    params = ScoringParams(label_token_ids=[60, 61, 62], min_label_mass=0.0)
    a, b = (scorer.score(QUERY, ITEMS, params) for scorer in (ours, theirs))
    close(a.logits, b.logits)
    close(a.scores, b.scores)
    assert a.label_mass == pytest.approx(b.label_mass, abs=1e-5)
    with pytest.raises(ValueError, match="reads at most 127"):
        ours.score(QUERY, ["x" * 200], params)
    ours.close()


def test_calibration_is_found_or_has_to_be_ruled_out(servers):
    x = np.linspace(-2, 2, 200)
    platt = PlattCalibrator().fit(x, (x + np.sin(37 * x) > 0.3).astype(float))
    url, _ = servers["one_label"]
    calibrated = HTTPScorer(url)  # development mode: /server_info shows mean and sigma
    assert (calibrated.info.pooler.logit_mean, calibrated.info.pooler.logit_sigma) == (0.5, 2.0)
    with pytest.raises(ValueError, match="already"):
        with_calibration(calibrated, platt)
    url, theirs = servers["bert"]  # not in development mode: nothing shows that there is none
    with pytest.raises(ValueError, match="already"):
        with_calibration(HTTPScorer(url, cross_encoder=True), platt)
    known = KnownLogits(query=QUERY, items=ITEMS, logits=[float(x[0]) for x in theirs.score(QUERY, ITEMS).logits])
    proven = HTTPScorer(url, cross_encoder=True, known_logits=known)
    want = platt.transform(np.array(known.logits))
    close([np.array(with_calibration(proven, platt).score(QUERY, ITEMS).rewards())], [want])


def test_what_the_server_refuses_is_an_error_with_its_words(servers):
    url, _ = servers["three_labels"]
    scorer = HTTPScorer(url)
    result = scorer.score(QUERY, ["fine", "x" * 300])
    assert result.errors[0] is None and "maximum context length" in result.errors[1]  # each item asked for by itself
    alone = scorer.score(QUERY, ["fine"])
    assert alone.errors == [None] and result.rewards(0) == [pytest.approx(alone.rewards(0)[0], abs=1e-5), None]
