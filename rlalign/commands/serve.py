"""rlalign serve: load a reward model and answer for it until SIGTERM; what is in flight then is still answered."""

from __future__ import annotations

import logging
import os
import signal
import socket
from argparse import ArgumentParser, Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.serve import ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from rlalign.calibration.calibrators.calibration_file import Json
    from rlalign.scoring.params import ModelInfo

KEY_VARIABLE = "RLALIGN_API_KEY"
LIMITS = {
    "max_batch_tokens": "tokens of one forward pass",
    "max_requests": "requests that may wait; more get 429",
    "max_queued_tokens": "tokens that may wait; more get 429",
    "max_items": "of one request; more get 413",
    "max_body_bytes": "of one request; more get 413",
    "request_timeout_s": "seconds until 504",
    "drain_s": "seconds for requests in flight after SIGTERM",
    "drift_window": "labelled scores that the drift report looks at",
    "drift_min_labels": "labels below which it says nothing",
}
log = logging.getLogger("rlalign.server")


def add_options(parser: ArgumentParser) -> None:
    """The command line of `rlalign serve`."""
    defaults = {field.name: field.default for field in fields(ServerSettings)}
    parser.add_argument("model", help="a transformers folder or hub id, or tiny:untied for the demo's own")
    parser.add_argument("--host", default=defaults["host"], help="default %(default)s; any other needs an API key")
    parser.add_argument("--port", type=int, default=defaults["port"], help="default %(default)s")
    parser.add_argument("--model-name", help="what clients call the model (default: as given)")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="from rlalign calibrate, or `own`: beside the weights; without it scores are raw",
    )
    parser.add_argument(
        "--label-token-ids",
        type=int,
        nargs="+",
        metavar="ID",
        help="a judge's answers, yes first, where a request names none",
    )
    parser.add_argument(
        "--truncate-prompt-tokens",
        type=int,
        metavar="K",
        help="cut inputs to K tokens, -1: to what the model reads; without it a longer item is answered with a reason",
    )
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help=f"or set {KEY_VARIABLE}")
    parser.add_argument("--revision")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    for name, what in LIMITS.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(
            option, type=type(defaults[name]), default=defaults[name], help=f"{what} (default %(default)s)"
        )


def run(arguments: Namespace) -> int:
    """`serve` with what the command line says."""
    from rlalign.scoring.params import ScoringParams

    labels = arguments.label_token_ids
    settings = ServerSettings(
        host=arguments.host,
        port=arguments.port,
        model_name=arguments.model_name or arguments.model,
        api_key=api_key(arguments.api_key_file),
        params=ScoringParams(label_token_ids=labels, truncate_prompt_tokens=arguments.truncate_prompt_tokens),
        **{name: getattr(arguments, name) for name in LIMITS},
    )
    logging.basicConfig(
        level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    return serve(
        arguments.model,
        settings,
        calibration=arguments.calibration,
        revision=arguments.revision,
        dtype=arguments.dtype,
        device=arguments.device,
    )


def serve(
    model: str,
    settings: ServerSettings,
    *,
    calibration: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
) -> int:
    """Serve a transformers model until a signal. Returns 0 after a full drain, 1 where requests were cut off.

    model: a folder, a hub id, or tiny:untied / tiny:tied for the demo's own. calibration: a file, or "own" for the one beside
    the model's weights. Raises ValueError on what cannot be served, OSError where the address is taken, both before the
    server listens.
    """
    from rlalign.scoring.hf import HFScorer
    from rlalign.serve.app import create_app

    listener = bound(settings.host, settings.port)  # first: a model may take minutes to load
    path = _folder(model)
    scorer = HFScorer(path, revision=revision, dtype=dtype, device=device, max_batch_tokens=settings.max_batch_tokens)
    document = None if calibration is None else _document(calibration, Path(path), scorer.info, settings)
    app = create_app(scorer, settings, document)
    info, address = scorer.info, listener.getsockname()
    log.info("%s: %s, %s, task %s", settings.model_name or info.id, info.architecture, info.dtype, info.tasks[0])
    log.info("http://%s:%d/docs; calibration %s", address[0], address[1], app.state.service.calibrations.in_force.id)
    return until_signal(app, settings, listener)


def until_signal(app: FastAPI, settings: ServerSettings, listener: socket.socket) -> int:
    """Answer until SIGTERM or SIGINT, then what has been accepted. Returns the exit code; see `serve`."""
    import uvicorn

    drain_s = max(1, round(settings.drain_s))
    config = uvicorn.Config(
        app, access_log=False, log_config=None, server_header=False, timeout_graceful_shutdown=drain_s
    )
    server = uvicorn.Server(config)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it once more after the drain that it asked for
    server.run(sockets=[listener])
    if app.state.service.batcher.busy_since is not None:
        log.error("a batch still runs after %g s: whoever waits for it is cut off", settings.drain_s)
        logging.shutdown()
        os._exit(1)  # an ordinary exit would wait for the batch's thread
    return 0 if server.started else 1


def api_key(file: Path | None) -> str | None:
    """From a file, or from RLALIGN_API_KEY; never from the command line, which every user of the machine can read."""
    return os.environ.get(KEY_VARIABLE) if file is None else file.read_text().strip()


def bound(host: str, port: int) -> socket.socket:
    """A socket on the address, not listening yet. Raises OSError where it is taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


def _folder(model: str) -> str:
    if not model.startswith("tiny:"):
        return model
    from rlalign.reward.training.tiny_reward import cached_reward_model

    return str(cached_reward_model(model.removeprefix("tiny:"), report=log.info))


def _document(calibration: str, folder: Path, info: ModelInfo, settings: ServerSettings) -> Json:
    """The content of a calibration file. The one beside the weights is bound to the name they are served under."""
    from rlalign.calibration.calibrators import Calibrator, calibration_file
    from rlalign.reward.training import CALIBRATION
    from rlalign.scoring.calibrated import identity_of, require_same_model

    if calibration != "own":
        return calibration_file.parsed(Path(calibration))
    calibrator = Calibrator.load(folder / CALIBRATION)
    require_same_model(calibrator, info, what="--calibration own", same_folder=True)
    return calibrator.document(model=replace(identity_of(info), id=settings.model_name or info.id))
