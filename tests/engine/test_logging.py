"""The metrics file survives kills: cut lines do not count, nor those after the checkpoint."""

from pathlib import Path

from spark3d.engine.logging import MetricsFile, finite_or_none, read_metrics


def test_resuming_drops_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, resume_step=0)
    for step in range(1, 6):
        first.write("train", step, {"loss": step / 10})
    first.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    again = MetricsFile(path, resume_step=3)
    again.write("train", 4, {"loss": 9.0})
    again.close()
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] == 9.0


def test_json_has_no_nan() -> None:
    assert finite_or_none(float("nan")) is None
    assert finite_or_none(2.5) == 2.5
