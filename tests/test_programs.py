"""Functions as programs: lists, values from a file, mistakes in one sentence."""

from pathlib import Path
from typing import Any

import pytest

from spl.cli import main
from spl.programs import run_program

GIVEN: list[tuple[Any, ...]] = []


def program(
    files: list[str],
    output: str = "out",
    models: dict[str, str | list[str]] | None = None,
    more: list[int] | None = None,
) -> None:
    """Do something.

    Args:
        files: to read.
        output: where to.
        models: labels to folders.
        more: numbers.
    """
    GIVEN.append((files, output, models, more))


def run(*args: str) -> tuple[Any, ...]:
    run_program(f"{__name__}:program", "something", list(args))
    return GIVEN.pop()


def test_lists_are_given_as_words() -> None:
    assert run("a", "b c", "-o", "page") == (["a", "b c"], "page", None, None)
    assert run("--files", "a", "--more", "1", "2", "--output", "x") == (["a"], "x", None, [1, 2])
    assert run("--files", '["a", "b"]') == (["a", "b"], "out", None, None)
    assert run("a", "--models", "{dpo: x, spl: [y, z]}") == (["a"], "out", {"dpo": "x", "spl": ["y", "z"]}, None)


def test_arguments_may_come_from_a_file(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("files: [a]\nmore: [3]\n")
    assert run("--config", str(config), "--output", "x") == (["a"], "x", None, [3])


@pytest.mark.parametrize(
    ("args", "said"),
    [((), "files"), (("a", "--other", "1"), "--other"), (("a", "--more", "x"), "more")],
)
def test_a_mistake_is_one_sentence(args: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*args)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert "spl something --help" in error


def test_help_describes_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert "Do something." in text
    assert "labels to folders" in text


def test_help_names_the_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "--help"])
    assert "spl evaluate best-of-n --help\n" in capsys.readouterr().out


def test_an_evaluation_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["evaluate"], ["evaluate", "everything"]):
        with pytest.raises(SystemExit) as stopped:
            main(args)
        assert stopped.value.code == 2
        assert "diversity-quality, best-of-n, calibration, opinions" in capsys.readouterr().err
