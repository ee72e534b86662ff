"""The report: one file that holds all it shows, says no more than the numbers, refuses the rest."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from spark3d.commands.report import report_command
from spark3d.commands.report_runs import duration, read_run, run_card
from spark3d.commands.report_scores import tone, verdict
from spark3d.errors import ConfigError, DataError
from spark3d.evaluation.results import load_evaluation
from spark3d.evaluation.statistics import Interval, PairedDifference
from spark3d.reports.html import spaced

VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """Checks that tags nest, and collects text, ids, link targets and sources."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.ids, self.links, self.sources = "", [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in found and tag in ("section", "input"):
            self.ids.append(found["id"])
        if tag == "a":
            self.links.append(found["href"])
        self.sources += [found[k] for k in ("src", "data", "poster") if k in found]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data + " "


@pytest.fixture(scope="module")
def page(tmp_path_factory, make_run, make_evaluation) -> str:
    """A report on a pre-training, two fine-tunings and their evaluations."""
    root = tmp_path_factory.mktemp("report")
    folders = [
        make_run(root / "pretraining", "pretrain"),
        make_run(root / "scratch", "finetune", seed=1),
        make_run(root / "pretrained", "finetune", seed=2),
        make_evaluation(root / "e1", "scratch"),
        make_evaluation(root / "e2", "pretrained", gain=0.03),
    ]
    return report_command(folders, root / "new" / "report.html").read_text("utf-8")


def test_the_page_holds_everything_and_loads_nothing(page):
    parsed = Page(page)
    assert parsed.sources
    assert all(s.startswith("data:image/png;base64,") for s in parsed.sources)
    assert len(parsed.sources) == 3 + 2 * 3
    for word in ("<script", "<link", "@import", "javascript:"):
        assert word not in page
    assert not re.findall(r"url\((?!#)", page)
    loaded = re.findall(r"(?:src|href)=\"(https?:[^\"]*)", page)
    assert loaded == []


def test_links_of_the_page_lead_somewhere_and_ids_are_unique(page):
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert len(parsed.links) >= 6
    assert all(link[1:] in parsed.ids for link in parsed.links)


def test_the_page_says_what_was_run_and_found(page):
    text = " ".join(Page(page).text.split())
    assert "Pretrained is better than scratch: +0.0" in text
    assert "spark3d pretrain --data 'my scans'" in text
    assert "spark3d evaluate --name scratch" in text
    for word in ("right parotid", "NSD within 2 mm", "cells of 8 × 8 × 8", "6 min 12 s", "absent"):  # noqa: RUF001
        assert word in text
    assert "random weights (scratch)" in text
    assert "encoder weights abababababab" in text


def test_names_from_outside_are_text_and_never_markup(tmp_path, evaluation_folder):
    folder = evaluation_folder("e", "<script>alert(1)</script>")
    text = report_command([folder], tmp_path / "r.html").read_text("utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_report_on_one_evaluation_or_one_run_has_no_comparison(
    tmp_path, run_folder, evaluation_folder
):
    text = report_command([evaluation_folder("e", "one")], tmp_path / "a.html").read_text("utf-8")
    assert "One" not in Page(text).text.split("Scores per organ")[0] or "reaches" in text
    assert "minus" not in Page(text).text
    run = run_folder("pre", "pretrain")
    (run / "metrics.jsonl").unlink()
    text = report_command([run], tmp_path / "b.html").read_text("utf-8")
    assert "1 training run" in Page(text).text
    assert 'id="scores"' not in text


def test_evaluations_take_names_from_the_command_line(tmp_path, evaluation_folder):
    folders = [
        f"base={evaluation_folder('e1', 'x')}",
        f"new={evaluation_folder('e2', 'x', gain=0.1)}",
    ]
    text = Page(report_command(folders, tmp_path / "r.html").read_text("utf-8")).text
    assert "New is better than base" in " ".join(text.split())


def test_what_cannot_be_reported_on_is_told(tmp_path, run_folder, evaluation_folder):
    out = tmp_path / "r.html"
    with pytest.raises(ConfigError, match="nothing to report"):
        report_command([], out)
    with pytest.raises(
        DataError, match=r"neither a run .* an evaluation .* nor a study .*nowhere, .*void"
    ):
        report_command([tmp_path / "nowhere", tmp_path / "void"], out)
    with pytest.raises(ConfigError, match="'x' stands twice"):
        report_command([evaluation_folder("e1", "x"), evaluation_folder("e2", "x")], out)
    broken = run_folder("broken", "pretrain")
    (broken / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json cannot be read"):
        report_command([broken], out)
    other = evaluation_folder("e3", "y")
    file = other / "evaluation.json"
    document = json.loads(file.read_text())
    document["labels"] = {"1": "heart"}
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match="no organ in common"):
        report_command([tmp_path / "e1", other], out)
    assert not out.exists()


def changed(folder: Path, **settings: object) -> Path:
    """The same evaluation with other settings."""
    document = json.loads((folder / "evaluation.json").read_text())
    document["settings"].update(settings)
    (folder / "evaluation.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"tolerance_mm": 1.0}, "surface Dice of brainstem is within 2.0 mm in a, 1.0 mm in b"),
        ({"tolerance_mm": {"mandible": 2.0}}, "brainstem is within 2.0 mm in a, None mm in b"),
        ({"grid": "of the prepared store"}, "the original grid, b on the grid of the prepared"),
    ],
)
def test_scores_that_mean_other_things_are_not_compared(
    tmp_path, evaluation_folder, settings, word
):
    one = evaluation_folder("e1", "a")
    other = changed(evaluation_folder("e2", "b"), **settings)
    with pytest.raises(ConfigError, match=re.escape(word)) as caught:
        report_command([one, other], tmp_path / "r.html")
    assert "\n" not in str(caught.value)


def test_the_page_says_on_which_grid_scores_are(tmp_path, evaluation_folder):
    usual = report_command([evaluation_folder("e1", "a")], tmp_path / "a.html")
    assert "On the original grid." in usual.read_text("utf-8")
    store = changed(evaluation_folder("e2", "b"), grid="of the prepared store")
    text = report_command([store], tmp_path / "b.html").read_text("utf-8")
    assert "On the grid of the prepared store." in text
    assert "original grid" not in text


def test_runs_without_a_common_case_are_not_compared(tmp_path, evaluation_folder):
    one, other = evaluation_folder("e1", "fold0"), evaluation_folder("e2", "fold1")
    document = (other / "evaluation.json").read_text().replace("case_", "other_")
    (other / "evaluation.json").write_text(document)
    for picture in (other / "overlays").iterdir():
        picture.rename(picture.with_name(picture.name.replace("case_", "other_")))
    text = Page(report_command([one, other], tmp_path / "r.html").read_text("utf-8")).text
    assert "Fold1 and fold0 share no case, so they are not compared." in text
    assert "nan" not in text


def paired(low: float, high: float) -> PairedDifference:
    mean = (low + high) / 2
    return PairedDifference(8, mean, 0.01, Interval(low, high), 5, 3, 0.1, 0.1)


def test_a_difference_counts_only_if_its_interval_leaves_out_zero():
    assert tone(paired(0.01, 0.03), "dice") == "good"
    assert tone(paired(-0.03, -0.01), "dice") == "bad"
    assert tone(paired(-0.01, 0.03), "dice") == "even"
    assert tone(paired(0.0004, 0.03), "dice") == "even"
    assert tone(paired(-0.03, -0.01), "hd95_mm") == "good"
    assert tone(paired(0.01, 0.03), "volume_error") == "even"
    assert tone(paired(float("nan"), float("nan")), "dice") == "even"


def test_the_verdict_claims_no_more_than_the_interval(evaluation_folder):
    base = load_evaluation(evaluation_folder("e1", "scratch"))
    same = load_evaluation(evaluation_folder("e2", "pretrained", gain=0.0))
    worse = load_evaluation(evaluation_folder("e3", "broken", gain=-0.5))
    assert verdict([base, same]).startswith("No clear difference between pretrained and scratch")
    text = verdict([base, worse])
    assert text.startswith("Broken is worse than scratch: -0.49")
    assert "under-trained" in verdict([worse, base])
    assert "under-trained" not in verdict([base, worse])


def test_a_run_that_is_not_finished_is_shown_as_such(run_folder):
    folder: Path = run_folder("pre", "pretrain")
    record = json.loads((folder / "run.json").read_text())
    del record["seconds"], record["summary"]
    (folder / "run.json").write_text(json.dumps(record))
    card = run_card(read_run("pre", folder))
    assert dict(card.facts)["Time"] == "not finished"
    assert [p.caption for p in card.film] == ["step 1", "step 60", "step 120"]


def test_durations_and_spacing_of_panels():
    assert [duration(s) for s in (4.4, 59.9, 200, 7505)] == [
        "4 s", "1 min 00 s", "3 min 20 s", "2 h 05 min",
    ]  # fmt: skip
    paths = [Path(str(i)) for i in range(20)]
    assert spaced(paths, 3) == [paths[0], paths[10], paths[19]]
    assert spaced(paths[:2], 3) == paths[:2]
