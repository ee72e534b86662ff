"""The help of every script of a data set tells where to get it, its licence and its size."""

import importlib

import pytest


@pytest.mark.parametrize("name", ["btcv", "msd", "ct_folder", "nnunet", "imagenet"])
def test_help_tells_place_licence_and_size(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"data_prep.{name}")
    with pytest.raises(SystemExit) as left:
        module.main(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    for word in ("where  ", "licence  ", "size  "):
        lines = [line.split(None, 1) for line in said.splitlines() if line.startswith(f"  {word}")]
        assert len(lines) == 1, word
        assert len(lines[0][1]) > 8
    assert "downloaded" in said, "that nothing is, unasked"
    assert f"python -m data_prep.{name} " in said
