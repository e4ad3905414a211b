"""rlalign serve and its settings: what is refused before it listens."""

from __future__ import annotations

import socket

import pytest
from transformers import Qwen3ForSequenceClassification

from rlalign.calibration.calibrators import ModelIdentity, PlattCalibrator
from rlalign.cli import main
from rlalign.commands.serve import KEY_VARIABLE, api_key
from rlalign.serve import ServerSettings
from tests.test_serve_sglang import qwen, save


def test_other_addresses_need_a_key_on_the_command_line_too(capsys, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert main(["serve", "no/model", "--host", "0.0.0.0"]) == 2
    assert "no API key is set" in capsys.readouterr().err


def test_a_taken_port_is_found_before_the_model_is_loaded(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "no/model", "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_a_calibration_of_another_model_is_refused_before_it_listens(capsys, tmp_path):

    model = save(Qwen3ForSequenceClassification(qwen(num_labels=1)), tmp_path / "rm")
    file = tmp_path / "c.json"
    PlattCalibrator().fit([-3.0, -1.0, 0.5, 2.0] * 20, [0, 0, 1, 1, 0, 1, 0, 1] * 10).save(
        file, model=ModelIdentity(id="some/other")
    )
    assert main(["serve", model, "--port", "0", "--calibration", str(file)]) == 2
    assert "fitted on another model" in capsys.readouterr().err
    file.write_text("{")
    assert main(["serve", model, "--port", "0", "--calibration", str(file)]) == 2
    assert "not a calibration file" in capsys.readouterr().err


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "from the environment")
    (tmp_path / "key").write_text("from a file\n")
    assert api_key(tmp_path / "key") == "from a file"
    assert api_key(None) == "from the environment"
    monkeypatch.delenv(KEY_VARIABLE)
    assert api_key(None) is None


def test_other_addresses_need_a_key():
    for host in ("0.0.0.0", "::", "10.0.0.3", "example.org"):
        with pytest.raises(ValueError, match="no API key is set"):
            ServerSettings(host=host)
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        assert ServerSettings(host=host).api_key is None
    assert "correct horse" not in repr(ServerSettings(api_key="correct horse"))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_items": 0},
        {"request_timeout_s": 0},
        {"request_timeout_s": float("nan")},
        {"port": 70_000},
        {"api_key": "short"},
    ],
)
def test_settings_that_cannot_work(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ServerSettings(**changes)
