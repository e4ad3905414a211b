"""The table that ships, found again: every family through every cell that it has."""

import pytest

from rlalign.diagnose.doctor.examine import TABLE as SHIPS
from rlalign.diagnose.families import family_table, matrix

TABLE = family_table.read(SHIPS)


@pytest.mark.nightly
@pytest.mark.parametrize("name", TABLE)
def test_every_cell_has_the_state_that_the_table_says(name, tmp_path):
    found = matrix.row(family_table.RECIPES[name], tmp_path, list(TABLE[name]), timeout_s=1200)
    states = {column: (c.state, c.found) for column, c in found.items()}
    assert {c: s for c, (s, _) in states.items()} == {c: wanted.state for c, wanted in TABLE[name].items()}, states
