"""What a run logs of its rollout servers."""

from types import SimpleNamespace

from rlalign.run.observation import server_metrics
from tests.rollout_servers import PROMPTS, FakeVLLM, named_model, pool_of, publish


def test_the_log_counts_the_servers_that_have_the_newest_weights_and_what_was_asked_for_again(tmp_path):
    named_model(tmp_path)
    with FakeVLLM(tmp_path) as steady, FakeVLLM(tmp_path) as restarted:
        pool = pool_of(tmp_path, steady, restarted)
        engine = SimpleNamespace(local=pool)
        assert server_metrics(engine) == {"rollout/servers": 2.0, "rollout/reissued": 0.0}
        restarted.label, restarted.said["life"] = "default", "second"
        pool.generate(PROMPTS, prompt_ids=range(len(PROMPTS)), samples=3, seed=5)
        alone = server_metrics(engine)
        assert alone["rollout/servers"] == 1 and alone["rollout/reissued"] == pool.reissued > 0
        publish(pool, 2)
        assert server_metrics(engine) == alone | {"rollout/servers": 2.0}
        pool.close()


def test_an_engine_in_the_process_has_no_servers():
    assert server_metrics(SimpleNamespace(local=object())) == {}
