"""Inputs of calibration and its metrics as checked float64 arrays: every bad input is an error of its own.

N rows, K classes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    Numbers = ArrayLike | Tensor
    Floats = NDArray[np.float64]


def numbers(values: Numbers, what: str, *, booleans: bool = False) -> Floats:
    """A list, NumPy array or torch tensor (any device and float dtype) as float64, every entry finite.

    booleans: True and False count as 1 and 0. Raises ValueError on ragged, non-numeric, NaN or infinite input, naming
    the first bad index.
    """
    torch = sys.modules.get("torch")  # a tensor can only be passed by someone who has imported torch
    if torch is not None and isinstance(values, torch.Tensor):
        tensor = cast("Tensor", values).detach().cpu()
        values = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{what}: rows of different lengths cannot become an array ({error})") from error
    if array.size and not (array.dtype.kind in "iuf" or (booleans and array.dtype.kind == "b")):
        raise ValueError(f"{what}: expected real numbers, got dtype {array.dtype}")
    array = array.astype(np.float64)
    if bad := np.argwhere(~np.isfinite(array)).tolist():
        index = bad[0][0] if array.ndim == 1 else tuple(bad[0])
        raise ValueError(
            f"{what}: {len(bad)} of {array.size} entries are not finite; the first is {array[tuple(bad[0])]} at index {index}"
        )
    return array


def _refuse(array: Floats, wrong: np.ndarray, what: str, expected: str, hint: str = "") -> None:
    """Raise ValueError naming the first wrong entry, if there is one."""
    if wrong.any():
        first = tuple(np.argwhere(wrong)[0].tolist())
        at = first[0] if array.ndim == 1 else first
        raise ValueError(f"{what}: expected {expected}, got {array[first]} at index {at}{hint}")


def as_rows(values: Numbers, what: str) -> Floats:
    """Logits as [N] (also from [N, 1]) or [N, K] with K > 1. Raises ValueError on any other shape."""
    array = numbers(values, what)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] == 0):
        raise ValueError(f"{what}: expected shape [N], [N, 1] or [N, K], got {array.shape}")
    return array


def require_rows(array: Floats, other: np.ndarray, what: str, other_what: str) -> None:
    """Raise ValueError when there are no rows, or when two columns have different numbers of them."""
    if other.ndim != 1 or len(array) != len(other):
        raise ValueError(
            f"{what} and {other_what}: expected one {other_what} entry per row, got shapes {array.shape} and {other.shape}"
        )
    if len(array) == 0:
        raise ValueError(f"{what}: empty, shapes {array.shape} and {other.shape}; at least one row is needed")


def binary_labels(values: Numbers, *, soft: bool, what: str = "labels") -> Floats:
    """Labels 0 or 1 as [N]; with `soft`, any number in [0, 1]. Raises ValueError naming the first bad index."""
    labels_N = numbers(values, what, booleans=True)
    if labels_N.ndim == 2 and labels_N.shape[1] == 1:
        labels_N = labels_N[:, 0]
    if labels_N.ndim != 1:
        raise ValueError(f"{what}: expected shape [N] or [N, 1], got {labels_N.shape}")
    wrong_N = (labels_N < 0) | (labels_N > 1) if soft else (labels_N != 0) & (labels_N != 1)
    hint = "" if soft or what != "labels" else "; pass soft_labels=True (--soft-labels) for probabilities in [0, 1]"
    _refuse(labels_N, wrong_N, what, "numbers in [0, 1]" if soft else "0 or 1", hint)
    return labels_N


def class_labels(values: Numbers, num_classes: int, *, what: str = "labels") -> NDArray[np.int64]:
    """Labels 0..K-1 as [N] int64. Raises ValueError naming the first bad index."""
    labels_N = numbers(values, what, booleans=True)
    if labels_N.ndim != 1:
        raise ValueError(f"{what}: expected shape [N], got {labels_N.shape}")
    wrong_N = (labels_N != np.round(labels_N)) | (labels_N < 0) | (labels_N >= num_classes)
    _refuse(labels_N, wrong_N, what, f"a class 0..{num_classes - 1}")
    return labels_N.astype(np.int64)


def row_weights(values: Numbers | None, rows: int) -> Floats:
    """Weights [N], ones when None. Raises ValueError when negative, all zero, not finite, or of another length."""
    if values is None:
        return np.ones(rows)
    weights_N = numbers(values, "sample_weight", booleans=True)
    if weights_N.shape != (rows,):
        raise ValueError(f"sample_weight: expected shape ({rows},), got {weights_N.shape}")
    _refuse(weights_N, weights_N < 0, "sample_weight", "nothing negative")
    if not weights_N.any():
        raise ValueError("sample_weight: all zero, so no row would count")
    return weights_N


def probabilities(values: Numbers, what: str = "p") -> Floats:
    """Probabilities [N] or [N, K]. Raises ValueError outside [0, 1]: nothing is passed through a sigmoid silently."""
    array = as_rows(values, what)
    hint = "; are these logits? apply a calibrator or a sigmoid first"
    _refuse(array, (array < 0) | (array > 1), what, "probabilities in [0, 1]", hint)
    return array


def whole(value: int, what: str, *, at_least: int) -> int:
    """A whole number of at least `at_least`. Raises ValueError on bool, float or anything smaller."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < at_least:
        raise ValueError(f"{what}: expected a whole number of at least {at_least}, got {value!r}")
    return int(value)


def binary_rows(
    p: Numbers, y: Numbers, sample_weight: Numbers | None, *, soft_labels: bool = False
) -> tuple[Floats, Floats, Floats]:
    """p, y and weights of the rows that have weight."""
    p_N = probabilities(p)
    if p_N.ndim != 1:
        raise ValueError(f"p: expected shape [N] or [N, 1], got {p_N.shape}; pick a column, or use a per-class metric")
    y_N = binary_labels(y, soft=soft_labels, what="y")
    require_rows(p_N, y_N, "p", "y")
    weight_N = row_weights(sample_weight, len(p_N))
    counted_N = weight_N > 0
    return p_N[counted_N], y_N[counted_N], weight_N[counted_N]


def class_rows(p: Numbers, y: Numbers) -> tuple[Floats, NDArray[np.int64]]:
    """p [N, K] and classes y [N]. Raises ValueError on other shapes and on rows of p that do not sum to 1."""
    p_NK = probabilities(p)
    if p_NK.ndim != 2:
        raise ValueError(f"p: expected shape [N, K] with K > 1, got {p_NK.shape}")
    y_N = class_labels(y, p_NK.shape[1], what="y")
    require_rows(p_NK, y_N, "p", "y")
    off_N = np.abs(p_NK.sum(1) - 1) > 1e-2  # loose enough for probabilities that were stored in bfloat16
    if off_N.any():
        first = int(np.argmax(off_N))
        raise ValueError(f"p: rows must sum to 1, row {first} sums to {p_NK[first].sum()}")
    return p_NK, y_N


def one_of(value: str, allowed: tuple[str, ...], what: str) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{what}: expected one of {', '.join(allowed)}, got {value!r}")


def root(of: Callable[[float], float], low: float, high: float, *, xtol: float, rtol: float = 2.0**-50) -> float:
    """Where `of` crosses zero between `low` and `high`, at which it has opposite signs (Brent 1973)."""
    from scipy.optimize import brentq

    return float(cast("float", brentq(of, low, high, xtol=xtol, rtol=np.float64(rtol))))
