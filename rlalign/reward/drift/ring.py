"""The last rows of some columns in fixed memory."""

from __future__ import annotations

import numpy as np


class Ring:
    """The last W rows of some columns, oldest first. Appending is vectorised: rows that would be pushed out are not copied."""

    def __init__(self, columns: dict[str, type], capacity: int) -> None:
        self._columns = {name: np.zeros(capacity, dtype=kind) for name, kind in columns.items()}
        self.capacity = capacity
        self.total = 0  # rows ever appended; row number r lies in slot r % capacity

    def __len__(self) -> int:
        return min(self.total, self.capacity)

    @property
    def first(self) -> int:
        """Number of the oldest row that is still held."""
        return self.total - len(self)

    def append(self, rows: dict[str, np.ndarray]) -> range:
        """Append N rows. Returns their row numbers, also of those that never fitted."""
        count = len(next(iter(rows.values())))
        kept = min(count, self.capacity)
        slots_N = np.arange(self.total + count - kept, self.total + count) % self.capacity
        for name, column in self._columns.items():
            column[slots_N] = rows[name][count - kept :]
        numbers = range(self.total, self.total + count)
        self.total += count
        return numbers

    def rows(self) -> dict[str, np.ndarray]:
        """Copies of the held rows, oldest first."""
        slots_W = np.arange(self.first, self.total) % self.capacity
        return {name: column[slots_W] for name, column in self._columns.items()}

    def value(self, name: str, number: int) -> float:
        """One entry of a held row."""
        return float(self._columns[name][number % self.capacity])

    def change(self, name: str, number: int, value: float) -> None:
        """Overwrite one entry of a held row."""
        self._columns[name][number % self.capacity] = value

    def clear(self) -> None:
        """Forget every row."""
        self.total = 0
