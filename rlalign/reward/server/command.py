"""rlalign serve: load a reward model and answer for it until SIGTERM; what is in flight then is still answered."""

from __future__ import annotations

import json
import logging
import os
import signal
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.reward.server.settings import ServerSettings

if TYPE_CHECKING:
    from rlalign.reward.calibration.file import Json

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
    parser.add_argument(
        "model", help="a transformers folder or hub id: sequence classifier, cross-encoder or causal LM"
    )
    parser.add_argument("--host", default=defaults["host"], help="default %(default)s; any other needs an API key")
    parser.add_argument("--port", type=int, default=defaults["port"], help="default %(default)s")
    parser.add_argument("--model-name", help="what clients call the model (default: as given)")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="from rlalign calibrate; without it scores are raw"
    )
    parser.add_argument(
        "--label-token-ids",
        type=int,
        nargs="+",
        metavar="ID",
        help="a judge's answers, yes first, where a request names none",
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
    from rlalign.reward.params import ScoringParams

    labels = arguments.label_token_ids
    settings = ServerSettings(
        host=arguments.host,
        port=arguments.port,
        model_name=arguments.model_name,
        api_key=api_key(arguments.api_key_file),
        params=None if labels is None else ScoringParams(label_token_ids=labels),
        **{name: getattr(arguments, name) for name in LIMITS},
    )
    return serve(
        arguments.model,
        settings,
        calibration_file=arguments.calibration,
        revision=arguments.revision,
        dtype=arguments.dtype,
        device=arguments.device,
        log_level=arguments.log_level,
    )


def serve(
    model: str,
    settings: ServerSettings,
    *,
    calibration_file: Path | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    log_level: str = "info",
) -> int:
    """Serve a transformers model until a signal. Returns 0 after a full drain, 1 where requests were cut off.

    Raises ValueError on a model, a calibration or settings that cannot be served, OSError where the port is taken.
    """
    import uvicorn

    from rlalign.reward.hf_scorer import HFScorer
    from rlalign.reward.server.app import create_app

    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    document = None if calibration_file is None else _document(calibration_file)
    scorer = HFScorer(model, revision=revision, dtype=dtype, device=device, max_batch_tokens=settings.max_batch_tokens)
    app = create_app(scorer, settings, document)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )
    info = scorer.info
    log.info(
        "%s (%s, %s), task %s; http://%s:%d/docs",
        info.id,
        info.architecture,
        info.dtype,
        info.tasks[0],
        settings.host,
        settings.port,
    )
    server = uvicorn.Server(config)
    signal.signal(
        signal.SIGTERM, lambda *_: None
    )  # uvicorn raises it once more after the drain, which then was asked for
    server.run()
    if not server.started:
        return 1
    if app.state.service.batcher.busy_since is not None:
        log.error(
            "the drain of %g s was not enough: a batch is still running and its requests are cut off", settings.drain_s
        )
        logging.shutdown()
        os._exit(1)  # an ordinary exit would wait for the batch's thread
    return 0


def api_key(file: Path | None) -> str | None:
    """From a file, or from RLALIGN_API_KEY; never from the command line, which every user of the machine can read."""
    if file is not None:
        return file.read_text().strip()
    return os.environ.get(KEY_VARIABLE)


def _document(file: Path) -> Json:
    try:
        return json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a calibration file ({error})") from error
