"""The command line: options in, one line and an exit code out; every command shows an example."""

import errno
import inspect
import re
import shlex
from pathlib import Path

import pytest

from spark3d import __version__, cli
from spark3d.errors import ConfigError, DataError, EnvironmentProblem, Interrupted

COMMANDS = {
    c.name or c.callback.__name__: c.callback for c in cli.app.registered_commands if c.callback
}
FULL = (
    "error: No space left on device (metrics.jsonl); free space or check rights, then repeat the "
    "command\n"
)
EXAMPLE = re.compile(r"`(spark3d [^`]+)`")


def examples(name: str) -> list[list[str]]:
    """The worked examples of a command, in words."""
    found = EXAMPLE.findall(inspect.getdoc(COMMANDS[name]) or "")
    return [shlex.split(example) for example in found]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    """Exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as left:
        cli.main(list(words))
    text = capsys.readouterr()
    return left.value.code, text.out, text.err


def test_the_promised_commands_are_there() -> None:
    assert {"prepare", "pretrain", "finetune", "predict", "evaluate", "report", "demo"} <= set(
        COMMANDS
    )


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_holds_a_worked_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, name, "--help")
    assert code == 0
    assert f"spark3d {name} " in " ".join(out.split())
    assert examples(name)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_examples_use_options_that_exist(name: str) -> None:
    parameters = set(inspect.signature(COMMANDS[name]).parameters)
    for _, command, *words in examples(name):
        assert command == name
        options = {w.removeprefix("--").replace("-", "_") for w in words if w.startswith("--")}
        assert options <= parameters


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_is_explained(name: str) -> None:
    for parameter in inspect.signature(COMMANDS[name], eval_str=True).parameters.values():
        info = parameter.annotation.__metadata__[0]
        assert info.help, parameter.name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version")[:2] == (0, f"spark3d {__version__}\n")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["no-such"], "no-such"),
        (["pretrain", "--no-such"], "--no-such"),
        (["pretrain", "--dims", "x"], "--dims"),
        (["report"], "folders"),
    ],
)
def test_wrong_usage_ends_with_2(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = said(capsys, *words)
    assert code == 2
    assert named in err.lower()
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "recipe", "overrides"),
    [
        (None, None, ()),
        (["demo"], "demo", ()),
        (["optim.lr=1"], None, ("optim.lr=1",)),
        (["mine.yaml", "a.b=1", "c.d=x=y"], "mine.yaml", ("a.b=1", "c.d=x=y")),
    ],
)
def test_a_recipe_comes_before_its_overrides(
    arguments: list[str] | None, recipe: str | None, overrides: tuple[str, ...]
) -> None:
    assert cli.split_recipe(arguments) == (recipe, overrides)


@pytest.mark.parametrize(
    ("problem", "code", "line"),
    [
        (ConfigError("key a is wrong"), 2, "error: key a is wrong\n"),
        (DataError("two cases:\n  one\n  two\n"), 3, "error: two cases:; one; two\n"),
        (EnvironmentProblem("no space"), 4, "error: no space\n"),
        (Interrupted("stopped after step 3"), 75, "error: stopped after step 3\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"),
            4,
            FULL,
        ),
    ],
)
def test_a_problem_is_one_line_and_an_exit_code(
    problem: Exception,
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*words: object, **options: object) -> None:
        raise problem

    monkeypatch.setattr(cli, "app", fail)
    assert said(capsys) == (code, "", line)


@pytest.mark.parametrize("problem", [KeyError("a"), OSError(errno.ENOENT, "gone", "x")])
def test_a_bug_keeps_its_traceback(problem: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: object, **options: object) -> None:
        raise problem

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(type(problem)):
        cli.main([])


def test_flips_are_numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folders = ["--model", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "o")]
    code, _, err = said(capsys, "predict", *folders, "--flips", "left")
    assert (code, err) == (2, "error: --flips=left must be numbers with commas, e.g. 0,1\n")
