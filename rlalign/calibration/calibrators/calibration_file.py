"""Calibration files: JSON without pickle, sealed by a digest, bound to the model whose scores were fitted."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = "rlalign-calibration"
FORMAT_VERSION = 1

Json = dict[str, Any]


class CalibrationMismatchError(RuntimeError):
    """The calibration in a file is not for what it is about to be used on, or the file is not what was written."""


class NotFittedError(RuntimeError):
    """A calibrator was used before `fit`, `fit_pairs` or `load`."""


class CalibrationWarning(UserWarning):
    """A fit or a file that works but deserves a look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What produced the scores. None: not known; an expectation of None accepts anything.

    template_sha256: of the chat template text. head_dtype: dtype of the score head's arithmetic; bf16 and fp32 heads
    give different logits, so a calibration of one is not a calibration of the other.
    """

    id: str | None = None
    revision: str | None = None
    template_sha256: str | None = None
    dtype: str | None = None
    head_dtype: str | None = None
    num_labels: int | None = None

    def differences(self, expected: ModelIdentity) -> list[str]:
        """One phrase per field that the expectation names and this identity does not match; empty when it fits."""
        return [
            f"{f.name}: file has {getattr(self, f.name)!r}, expected {getattr(expected, f.name)!r}"
            for f in fields(self)
            if getattr(expected, f.name) is not None and getattr(self, f.name) != getattr(expected, f.name)
        ]


def function_id(method: str, params: Json) -> str:
    """`method-` and 12 hexadecimal digits of the fitted function: equal for equal functions, whatever file they are in."""
    return f"{method}-{_digest({'method': method, 'params': params})[:12]}"


def sealed(content: Json, model: ModelIdentity) -> Json:
    """The document of a calibration, bound to a model and closed by a digest. Raises ValueError on NaN."""
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **content, "model": asdict(model)}
    return document | {"digest": _digest(document)}


def write(path: Path, content: Json, model: ModelIdentity) -> None:
    """Write atomically: a reader sees the old file or the new one, never half of one. Raises ValueError on NaN."""
    write_atomic(path, (json.dumps(sealed(content, model), indent=2, allow_nan=False) + "\n").encode())


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file in one move; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def read(path: Path, *, expect_model: ModelIdentity | None, strict: bool) -> tuple[Json, ModelIdentity]:
    """`opened` of a file's content."""
    return opened(parsed(path), str(path), expect_model=expect_model, strict=strict)


def parsed(path: Path) -> Any:
    """The JSON of a file, unchecked. Raises ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such calibration file")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON, so not a calibration file ({error})") from error


def opened(
    document: Any, where: str, *, expect_model: ModelIdentity | None, strict: bool
) -> tuple[Json, ModelIdentity]:
    """The content of a document after every check. where: its name in errors.

    Raises ValueError when it is not a calibration at all; CalibrationMismatchError on an unknown version, a digest that
    does not fit, or another model. With strict=False those are CalibrationWarnings.
    """
    content = dict(document) if isinstance(document, dict) else {}
    if content.get("format") != FORMAT:
        raise ValueError(f"{where}: not a calibration file; expected a JSON object with format {FORMAT!r}")
    found = []
    if content.get("format_version") != FORMAT_VERSION:
        found.append(f"format_version {content.get('format_version')!r}, this rlalign reads {FORMAT_VERSION}")
    stated = content.pop("digest", None)
    if stated != _digest(content):
        found.append("digest does not fit the content: the file was edited or cut; fit and save again")
    try:
        model = ModelIdentity(**content["model"])
    except (KeyError, TypeError) as error:
        raise CalibrationMismatchError(
            f"{where}: {'; '.join([*found, f'unreadable model identity ({error})'])}"
        ) from error
    if expect_model is not None and (different := model.differences(expect_model)):
        found.append("fitted on another model (" + "; ".join(different) + "); fit a calibration on this model's scores")
    if found and strict:
        raise CalibrationMismatchError(f"{where}: {'; '.join(found)}")
    for what in found:
        warnings.warn(f"{where}: {what}", CalibrationWarning, stacklevel=3)
    return content, model


def _digest(content: Json) -> str:
    """sha256 of the content in one canonical spelling; Python prints every float64 so that it reads back bit-equal."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
