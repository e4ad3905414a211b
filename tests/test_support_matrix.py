"""The support page says what marked tests show, and nothing else."""

from importlib.metadata import version

import pytest

from tests import released, support_matrix


def test_the_page_is_what_the_tests_give():
    assert support_matrix.PAGE.read_text() == support_matrix.page(), "run: python -m tests.support_matrix"


def test_the_versions_are_those_that_the_tests_run_on():
    packages = {support_matrix.PACKAGES[row.stack.split()[0]] for row in support_matrix.rows()}
    for name in packages - set(released.VERSIONS):  # those are fetched by the tests themselves
        assert version(name) == support_matrix.pinned()[name], (
            f"the page speaks of another {name} than the installed one"
        )


def test_marks_of_single_parameters_and_nightly_ones_are_found(tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_a.py").write_text(
        "@pytest.mark.nightly\n"
        "@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.proves('TRL a', 'one')), 2])\n"
        "def test_x(x): pass\n"
        "def test_y(): pass\n"
    )
    assert support_matrix.rows(tests) == [support_matrix.Row("TRL a", "one", "tests/test_a.py::test_x", "nightly")]


def test_a_mark_of_the_whole_file_counts(tmp_path):
    (tmp_path / "tests").mkdir()
    file = tmp_path / "tests" / "test_a.py"
    proof = "@pytest.mark.proves('TRL a', 'one')\ndef test_x(): pass\n"
    file.write_text(f"pytestmark = pytest.mark.nightly\n{proof}")
    assert [row.when for row in support_matrix.rows(tmp_path / "tests")] == ["nightly"]
    for line in ("pytestmark = [pytest.mark.slow, pytest.mark.skipif(True)]", "pytest.importorskip('verl')"):
        file.write_text(f"{line}\n{proof}")
        with pytest.raises(ValueError, match="proves something and may (skipif|importorskip)"):
            support_matrix.rows(tmp_path / "tests")


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "@pytest.mark.proves('TRL', 'x')\n@pytest.mark.skipif(True)\ndef test_x(): pass",
            "proves something and may skipif",
        ),
        ("@pytest.mark.proves('TRL', 'x')\ndef test_x(): pytest.importorskip('trl')", "may importorskip"),
        ("@pytest.mark.proves('TRL', NAME)\ndef test_x(): pass", "two literal strings"),
    ],
)
def test_a_test_that_may_not_run_proves_nothing(tmp_path, text, said):
    (tmp_path / "test_x.py").write_text(text)
    with pytest.raises(ValueError, match=said):
        support_matrix.rows(tmp_path)
