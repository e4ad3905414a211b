"""Recordings, differences, bias, shares: the numbers of attribution against independent ones."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlalign.diagnose.attribution.findings import Spread, bias, common_rows, counted, differences, distinct
from rlalign.diagnose.attribution.trainer_side import removed
from rlalign.rollout.engine.teacher_forcing import Route
from rlalign.rollout.worker.recording import LOGITS, TOKENS, Recorder, Recording, join
from tests import attribution_parts as parts


def rows(*keys):
    return torch.tensor(keys, dtype=torch.int64)


def recording(folder, values_ND, keys_N3=None, point="p"):
    keys_N3 = rows(*((0, i, 0) for i in range(len(values_ND)))) if keys_N3 is None else keys_N3
    recorder = Recorder(folder / "rank0")
    recorder.rows(TOKENS, keys_N3)
    recorder.write(point, values_ND)
    recorder.close()
    return Recording(folder)


def test_what_was_written_is_read_bit_for_bit_in_its_own_dtype_and_in_token_order(tmp_path):
    values = torch.randn(6, 5).bfloat16()
    found = recording(tmp_path, values, rows((1, 0, 0), (1, 1, 0), (0, 0, 0), (0, 1, 0), (0, 2, 1), (-1, 0, 0)))
    assert found.table("p").tolist() == [[0, 0, 0], [0, 1, 0], [0, 2, 1], [1, 0, 0], [1, 1, 0]], (
        "nobody's row is left out"
    )
    read = found.read("p", range(5), width=5)
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, values[[2, 3, 4, 0, 1]])


def test_of_a_token_that_ran_twice_the_first_run_counts(tmp_path):
    values = torch.arange(3.0)[:, None]
    found = recording(tmp_path, values, rows((0, 4, 1), (0, 5, 1), (0, 4, 0)))
    assert found.read("p", range(2), width=1)[:, 0].tolist() == [0.0, 1.0]


def test_a_module_that_does_not_run_once_per_forward_is_refused(tmp_path):
    recorder = Recorder(tmp_path / "rank0")
    recorder.rows(TOKENS, rows((0, 0, 0)))
    recorder.write("p", torch.zeros(1, 2))
    recorder.write("p", torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="'p' was recorded for 2 rows of 1.*exactly once"):
        recorder.close()


def test_a_point_that_changes_its_width_is_refused(tmp_path):
    recorder = Recorder(tmp_path / "rank0")
    recorder.write("p", torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="changed while it was recorded"):
        recorder.write("p", torch.zeros(1, 3))


def test_ranks_are_joined_whatever_they_hold():
    whole = torch.arange(24.0).view(2, 12)
    halves = list(whole.split(6, dim=1))
    assert torch.equal(join([whole, whole], 12, "p"), whole), "held whole on each"
    assert torch.equal(join(halves, 12, "p"), whole), "cut into slices"
    assert torch.equal(join([halves[0], halves[0], halves[1], halves[1]], 12, "p"), whole), "key/value heads held twice"
    with pytest.raises(RuntimeError, match="12 features in the trainer and 5 on each of 2"):
        join([whole[:, :5]] * 2, 12, "p")
    with pytest.raises(RuntimeError, match="not the same activation"):
        join([whole[:, :3]] * 2, 12, "p")


def test_dense_values_lie_at_their_tokens(tmp_path):
    found = recording(tmp_path, torch.tensor([[1.0], [2.0], [3.0]]), rows((0, 1, 0), (2, 0, 0), (2, 2, 0)))
    values, known = found.dense("p", [2, 0], 3, width=1)
    assert known.tolist() == [[True, False, True], [False, True, False]]
    assert values[known][:, 0].tolist() == [2.0, 3.0, 1.0]


def test_differences_equal_numpy_and_chunks_change_nothing(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    one_ND, other_ND = torch.randn(40, 7, generator=generator), torch.randn(40, 7, generator=generator)
    one_ND[3] = other_ND[3] = 0.0
    one, other = recording(tmp_path / "a", one_ND), recording(tmp_path / "b", other_ND)
    every = torch.arange(40), torch.arange(40)
    found = differences(one, other, "p", every, width=7)
    monkeypatch.setattr("rlalign.diagnose.attribution.findings.ELEMENTS", 21)
    again = differences(one, other, "p", every, width=7)
    a, b = one_ND.double().numpy(), other_ND.double().numpy()
    apart = np.linalg.norm(a - b, axis=1)
    assert np.allclose(found.absolute_N, apart / 7**0.5, rtol=1e-12)
    scale = np.maximum(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    assert np.allclose(found.relative_N, np.divide(apart, scale, out=np.zeros(40), where=scale > 0), rtol=1e-12)
    assert float(found.cosine_N[3]) == 1.0, "two zeros are equal"
    assert np.isclose(found.cosine_N[5], a[5] @ b[5] / np.linalg.norm(a[5]) / np.linalg.norm(b[5]))
    for name in ("absolute_N", "relative_N", "cosine_N"):
        assert torch.equal(getattr(found, name), getattr(again, name))


def test_a_spread_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        Spread.of(torch.zeros(0))


def test_only_context_of_scored_tokens_counts(tmp_path):
    batch = parts.batch(2)
    lengths = batch.attention_mask_BL.sum(1).tolist()
    keys = [(s, p, int(p >= lengths[s] - 8)) for s in range(2) for p in range(lengths[s])]
    found = recording(tmp_path / "a", torch.zeros(len(keys), 1), rows(*keys))
    mine, _ = counted(found, found, "p", batch)
    assert found.table("p")[mine][:, 1].max() == max(lengths) - 2, "the last token predicts nothing"
    assert len(mine) == sum(lengths) - 2
    decoded, _ = counted(found, found, "p", batch, Route.decode)
    assert len(decoded) == 2 * 7 and bool((found.table("p")[decoded][:, 2] == 1).all())


def test_logits_count_where_a_scored_token_is_predicted(tmp_path):
    batch = parts.batch(1)
    recorder = Recorder(tmp_path / "rank0")
    keys = [(0, p, 0) for p in range(int(batch.attention_mask_BL.sum()))]
    recorder.rows(LOGITS, rows(*keys))
    recorder.write(LOGITS, torch.zeros(len(keys), 3), table=LOGITS)
    recorder.close()
    found = Recording(tmp_path)
    mine, _ = counted(found, found, LOGITS, batch, Route.decode)
    scored = batch.loss_mask_BL[0].nonzero()[:, 0]
    assert (found.table(LOGITS)[mine][:, 1] + 1).tolist() == scored.tolist()


def test_a_shared_prompt_is_evidence_once(tmp_path):
    one = parts.batch(1)
    batch = one.rows(slice(0, 1)).__class__(
        **{
            name: torch.cat([getattr(one, name)] * 2)
            for name in ("token_ids_BL", "attention_mask_BL", "loss_mask_BL", "rollout_logprobs_BL", "prompt_id_B", "group_id_B",
                         "policy_version_BL", "kv_version_BL")
        },
        spec=one.spec,
    )  # fmt: skip
    length = batch.token_ids_BL.shape[1]
    found = recording(tmp_path, torch.zeros(2 * length, 1), rows(*((s, p, 0) for s in range(2) for p in range(length))))
    mine, _ = distinct(found, "p", counted(found, found, "p", batch), batch)
    assert len(mine) == length - 1


def noisy(tmp_path, gain_D, *, tokens=400, seed=0):
    """Recordings of the same values in bfloat16, one of them times a gain before it is rounded."""
    values = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed))
    one = recording(tmp_path / f"a{seed}", values.bfloat16())
    wobble = 1 + 2e-3 * torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed + 1))
    other = recording(tmp_path / f"b{seed}", (values * gain_D * wobble).bfloat16())
    every = torch.arange(tokens), torch.arange(tokens)
    return bias(one, other, "p", every, width=16)


@pytest.mark.parametrize("seed", range(10))
def test_rounding_alone_has_no_bias(tmp_path, seed):
    assert noisy(tmp_path, torch.ones(16), seed=2 * seed).where == ""


def test_a_gain_below_the_rounding_of_a_token_is_found_and_measured(tmp_path):
    found = noisy(tmp_path, torch.full((16,), 1.002))
    assert found.where == "all" and 0.0015 < found.size < 0.0025


def test_one_wrong_feature_is_named(tmp_path):
    gain = torch.ones(16)
    gain[11] = 1.01
    found = noisy(tmp_path, gain)
    assert found.where == "feature 11" and 0.008 < found.size < 0.012


def test_a_scalar_per_token_is_not_taken_for_a_bias(tmp_path):
    """A router's weight, rounded once, moves all features of its token alike; over tokens it averages out."""
    values = torch.randn(100, 2048, generator=torch.Generator().manual_seed(0))
    scalar = 1 + 1e-6 * torch.randn(100, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, other = recording(tmp_path / "a", values), recording(tmp_path / "b", (values.double() * scalar).float())
    assert bias(one, other, "p", (torch.arange(100), torch.arange(100)), width=2048).where == ""


def test_equal_activations_are_evidence_once(tmp_path):
    """One token two hundred times rounds the same way two hundred times."""
    values = torch.full((200, 3), 1.3)
    one, other = recording(tmp_path / "a", values), recording(tmp_path / "b", values * (1 + 1e-6))
    assert bias(one, other, "p", (torch.arange(200), torch.arange(200)), width=3).where == ""


@given(st.lists(st.lists(st.floats(-1, 1), min_size=5, max_size=5), min_size=1, max_size=6), st.integers(0, 9))
def test_shares_add_up_to_one(cuts, seed):
    whole = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    deltas = {f"cut {i}": torch.tensor(c, dtype=torch.float64) for i, c in enumerate(cuts)} | {
        "logprobs": torch.zeros(5)
    }
    found = removed(whole, deltas)
    assert sum(r.share for r in found) == pytest.approx(1.0)
    assert found[0].remaining == pytest.approx(float(deltas["cut 0"].abs().mean()))


def test_where_nothing_differs_there_is_nothing_to_share():
    assert [r.share for r in removed(torch.zeros(4), {"embed": torch.zeros(4)})] == [0.0]


def test_rows_in_both_tables():
    one, other = rows((0, 1, 0), (0, 2, 0), (3, 1, 0)), rows((3, 1, 1), (0, 1, 1), (9, 9, 1))
    mine, theirs = common_rows(one, other)
    assert mine.tolist() == [0, 2] and theirs.tolist() == [1, 0]
