"""Routed experts of one `generate`, as rollouts carry them."""

from __future__ import annotations

from array import array
from collections.abc import Callable

Ask = Callable[[str], list[dict]]


class RoutedExperts:
    """What the workers recorded. bytes_per_token: of every position that a rollout carries."""

    def __init__(self, ask: Ask) -> None:
        """Start recording on every rank. Raises what the workers raise: a model without experts, a runner that hides them."""
        about = ask("rlalign_routes_start")[0]
        self._ask, self._code = ask, "H" if about["wide"] else "B"
        self.layers: list[int] = about["layers"]
        self.shape = (len(self.layers), about["k"])
        self.bytes_per_token = self.shape[0] * self.shape[1] * array(self._code).itemsize

    def forget(self) -> None:
        """Drop what was recorded so far: of requests that failed, or that were scored and not sampled."""
        self._ask("rlalign_routes_take")

    def take(self, version: int) -> Callable[[int, int], array]:
        """A function from (seed of a completion, its tokens) to its entries: of all positions but the last, which was only sampled.

        Raises RuntimeError for a completion without all of them, or with routes that another version's gates made.
        """
        found = {int(seed): entry for seed, entry in self._ask("rlalign_routes_take")[0]["routes"].items()}

        def of(seed: int, tokens: int) -> array:
            entry = found.get(seed, {"positions": 0, "versions": [], "data": b""})
            if entry["positions"] < tokens - 1:
                raise RuntimeError(
                    f"routed experts: the engine recorded {entry['positions']} positions of a completion of {tokens} tokens; "
                    f"expected {tokens - 1}. Report it with the model's name; rollout.replay_experts=off runs without"
                )
            if entry["versions"] != [version]:
                raise RuntimeError(
                    f"routed experts: made by the gates of versions {entry['versions']} for a completion of version {version}: a "
                    "prefix cache outlived its weights"
                )
            entries = array(self._code, entry["data"])
            return entries[: (tokens - 1) * self.shape[0] * self.shape[1]]

        return of
