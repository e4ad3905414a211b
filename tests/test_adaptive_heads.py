"""Heads start at T = 1, compute what transformers' Llama layer computes, read official checkpoints, and train alone."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from rlalign.calibration.adaptive import AdaptiveTemperature, ClassBatch, Objective, Training
from rlalign.calibration.adaptive.fitting import Fitting
from rlalign.calibration.adaptive.heads import HeadShape, TemperatureHead
from tests.test_adaptive import D, batch, projection

HEADS = ["constant", "linear", "mlp", "transformer"]
SIZES = {"intermediate_size": 40, "num_heads": 4}


def llama_layer(num_key_value_heads: int) -> tuple[LlamaDecoderLayer, LlamaConfig]:
    """Another implementation of the paper's head."""
    config = LlamaConfig(
        hidden_size=D, intermediate_size=40, num_attention_heads=4, num_key_value_heads=num_key_value_heads,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    layer = LlamaDecoderLayer(config, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer, config


def through_llama(layer: LlamaDecoderLayer, config: LlamaConfig, hidden: torch.Tensor) -> torch.Tensor:
    length = hidden.shape[1]
    position = LlamaRotaryEmbedding(config)(hidden, torch.arange(length)[None])
    causal = torch.full((length, length), float("-inf")).triu(1)[None, None]
    out = layer(hidden, attention_mask=causal, position_embeddings=position)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_starts_at_temperature_one(kind):
    head = TemperatureHead(HeadShape(kind=kind, hidden_size=D, **SIZES))
    assert bool((head(torch.randn(2, 5, D)) == 0).all())


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_the_decoder_layer_is_llamas(key_value_heads):
    layer, config = llama_layer(key_value_heads)
    head = TemperatureHead(HeadShape(kind="transformer", hidden_size=D, num_key_value_heads=key_value_heads, **SIZES))
    head.transformer.load_state_dict(layer.state_dict())
    hidden = torch.randn(3, 7, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(head.transformer(hidden), through_llama(layer, config, hidden), rtol=1e-4, atol=1e-4)


def test_what_lies_to_the_right_is_never_read():
    calibrator = AdaptiveTemperature(head="transformer", **SIZES, training=Training(epochs=2, least_steps=1)).fit(
        [batch(0), batch(1)]
    )
    hidden = batch(2).hidden
    changed = hidden.clone()
    changed[:, 5:] = 9.0
    before, after = calibrator.temperatures(hidden), calibrator.temperatures(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])  # entry t comes from states 0..t - 1
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("head", HEADS)
def test_only_the_head_is_trained(head):
    tokens = [batch(i) for i in range(3)]
    seen = [t for b in tokens for t in (b.hidden, b.projection.weight_VD)]
    before = [t.clone() for t in seen]
    AdaptiveTemperature(head=head, **SIZES, training=Training(epochs=2, least_steps=1)).fit(tokens)
    assert all(torch.equal(a, b) and not a.requires_grad and a.grad is None for a, b in zip(seen, before, strict=True))


@pytest.mark.parametrize("head", ["linear", "mlp", "transformer"])
@pytest.mark.slow
def test_temperatures_that_depend_on_the_state_are_found(head):
    """Tokens drawn at T = exp(1 + h0): one temperature cannot follow, a head does, on sequences it has not seen."""
    head_of = projection()
    fit, held = ([batch(i, b=24, head=head_of) for i in range(*ends)] for ends in ((0, 20), (60, 63)))
    calibrator = AdaptiveTemperature(head=head, **SIZES, training=Training(epochs=6, least_steps=1, learning_rate=1e-2))
    calibrator.fit(fit, validation=held)
    fresh = batch(500, b=60, head=head_of)
    true_N = 1 + fresh.states()[:, 0]
    found_N = calibrator.temperature_of(fresh).log()
    assert float(torch.corrcoef(torch.stack((true_N, found_N)))[0, 1]) > 0.8
    assert float((found_N - true_N).mean().abs()) < 0.25
    one = AdaptiveTemperature(head="constant", training=Training(epochs=4, least_steps=1)).fit(fit, validation=held)
    wrong = [Objective().per_token(fresh.rest(s, f), s, f, 0.5).mean()
             for c in (calibrator, one) for f, s in [(fresh.facts(), 1 / c.temperature_of(fresh))]]  # fmt: skip
    assert wrong[0] < 0.9 * wrong[1]


@pytest.mark.slow
def test_the_constant_head_is_the_best_single_temperature():
    tokens = [batch(i, b=20) for i in range(4)]
    training = Training(epochs=2, least_steps=1)
    calibrator = AdaptiveTemperature(head="constant", objective=Objective(loss="cross_entropy"), training=training)
    found = calibrator.fit(tokens, validation=tokens).temperature_of(tokens[0]).unique()
    assert len(found) == 1
    z_NV = torch.cat([b.states() @ b.projection.weight_VD.T for b in tokens]).double()
    labels_N = torch.cat([b.token_ids[b.mask] for b in tokens])
    grid = torch.linspace(0.5, 10, 951).double()
    nll = torch.stack([torch.nn.functional.cross_entropy(z_NV / t, labels_N) for t in grid])
    assert float(found) == pytest.approx(float(grid[nll.argmin()]), abs=0.02)


@pytest.mark.slow
def test_noise_leaves_a_single_temperature():
    """States that say nothing about the temperature: validation keeps the head from learning them by heart."""
    g = torch.Generator().manual_seed(0)

    def rows(n: int) -> ClassBatch:
        logits = 4 * torch.randn(n, 3, generator=g)
        labels = torch.multinomial((logits / 2).softmax(1), 1, generator=g)[:, 0]
        return ClassBatch(hidden=torch.randn(n, 64, generator=g), logits=logits, labels=labels)

    calibrator = AdaptiveTemperature(head="mlp", training=Training(epochs=40, least_steps=1)).fit(
        [rows(60)], validation=[rows(800)]
    )
    temperature_N = calibrator.temperature_of(rows(500))
    assert float(temperature_N.log().std()) < 0.2
    assert float(temperature_N.mean()) == pytest.approx(2.0, abs=0.3)


def test_the_epoch_with_the_lowest_validation_loss_is_kept(monkeypatch):
    """Seen without the rescaling that follows: few tokens, a high rate, so that the last epoch is not the best."""
    fit, held = [batch(0)], [batch(i, b=20) for i in (7, 8)]
    seen, measure = [], Fitting._mean_loss

    def watched(self: Fitting, batches, facts, accuracy) -> float:
        value = measure(self, batches, facts, accuracy)
        seen.extend([value] if batches is held else [])
        return value

    monkeypatch.setattr(Fitting, "_mean_loss", watched)
    monkeypatch.setattr(Fitting, "_rescale", lambda *_: (1.0, 0.0))
    training = Training(epochs=12, least_steps=1, learning_rate=0.1)
    found = AdaptiveTemperature(head="mlp", **SIZES, training=training).fit(fit, validation=held).diagnostics_
    *epochs, after = seen
    assert after == found.validation_after == min(epochs) < epochs[-1]
    assert found.validation_before == epochs[0] and found.epoch == epochs.index(min(epochs)) < 12


@pytest.mark.slow
def test_what_holds_the_other_way_round_on_validation_is_not_kept():
    """Nor is it turned round: one temperature remains."""
    fit, held = ([batch(i, b=20, slope=slope) for i in range(4)] for slope in (1.0, -1.0))
    training = Training(epochs=8, least_steps=1)
    calibrator, one = (
        AdaptiveTemperature(head=h, training=training).fit(fit, validation=held) for h in ("linear", "constant")
    )
    assert calibrator.diagnostics_.epoch > 0 and calibrator.diagnostics_.rescaled[0] == 0.0
    found_N = calibrator.temperature_of(batch(40))
    torch.testing.assert_close(found_N, one.temperature_of(batch(40)), rtol=1e-2, atol=1e-3)


def official_folder(path, config: dict, tensors: dict) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"in_features": D, "feature_key": "hidden_states"} | config))
    save_file(tensors, path / "calibration_head.safetensors")


def test_an_official_transformer_checkpoint_gives_its_calibrated_logits(tmp_path):
    """logits * exp(head).clip(max=10), computed with transformers' layer."""
    layer, config = llama_layer(4)
    linear = torch.nn.Linear(D, 1)
    torch.nn.init.normal_(linear.weight, std=0.3)
    tensors = {f"transformer.{name}": t for name, t in layer.state_dict().items()}
    tensors |= {f"linear_head.{name}": t for name, t in linear.state_dict().items()}
    official = {"calibration_type": "transformer", "intermediate_size": 40, "num_attention_heads": 4,
                "num_key_value_heads": 4, "base_model_name_or_path": "org/chat-7b"}  # fmt: skip
    official_folder(tmp_path / "ats", official, tensors)
    calibrator = AdaptiveTemperature.from_official(tmp_path / "ats")
    tokens = batch(7)
    with torch.no_grad():
        scale_BL = linear(through_llama(layer, config, tokens.hidden))[..., 0].exp().clip(max=10)
    wanted_N = scale_BL[:, :-1][tokens.mask[:, 1:]]
    assert wanted_N.max() == 10 and wanted_N.min() < 0.1
    torch.testing.assert_close(1 / calibrator.temperature_of(tokens), wanted_N, rtol=1e-3, atol=1e-5)
    assert calibrator.model_.id == "org/chat-7b"


def test_official_linear_mlp_and_scalar_heads(tmp_path):
    tokens, g = batch(8), torch.Generator().manual_seed(0)
    w, b = torch.randn(1, D, generator=g), torch.randn(1, generator=g)
    gate, up, down = (torch.randn(*s, generator=g) / 4 for s in ((40, D), (40, D), (D, 40)))
    official_folder(tmp_path / "linear", {"calibration_type": "linear"}, {"linear.weight": w, "linear.bias": b})
    mlp = {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up, "mlp.down_proj.weight": down}
    mlp |= {"linear_head.weight": w, "linear_head.bias": b}
    official_folder(tmp_path / "mlp", {"calibration_type": "mlp", "intermediate_size": 40}, mlp)
    official_folder(tmp_path / "one", {"calibration_type": "temperature"}, {"temperature": torch.tensor([1.7])})
    x = tokens.states()
    inner = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    for name, tau_N in (("linear", x @ w[0] + b), ("mlp", inner @ w[0] + b), ("one", torch.tensor(-math.log(1.7)))):
        scale_N = 1 / AdaptiveTemperature.from_official(tmp_path / name).temperature_of(tokens)
        torch.testing.assert_close(scale_N, tau_N.exp().clip(max=10).expand(len(tokens)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"calibration_type": "platt_scaling_matrix"}, {}, "calibration_type"),
        ({"calibration_type": "linear", "feature_key": "maxlogit"}, {}, "feature_key"),
        ({"calibration_type": "linear"}, {"other": torch.zeros(1)}, "missing"),
        ({"calibration_type": "temperature"}, {"temperature": torch.tensor([-1.0])}, "not positive"),
    ],
)
def test_official_checkpoints_that_mean_something_else_are_refused(tmp_path, config, tensors, message):
    official_folder(tmp_path / "ats", config, tensors or {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=message):
        AdaptiveTemperature.from_official(tmp_path / "ats")
    with pytest.raises(ValueError, match=r"calibration_head\.bin"):
        AdaptiveTemperature.from_official(tmp_path)
