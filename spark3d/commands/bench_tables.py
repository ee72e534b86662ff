"""The tables of `spark3d bench core`, from its JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from spark3d.benchmarks.cases import Case
from spark3d.reports.growth import GrowthPoint

Results = dict[str, dict[str, Any]]
"""By case, then by measure."""


def main_table(cases: Sequence[Case], results: Results) -> Table:
    """A row per case and contestant."""
    table = _table(
        "Packed cells (p) against the whole grid: e0 as ported, e1 tuned",
        (
            "case",
            "bound",
            "contestant",
            "seconds",
            "times",
            "saved MiB",
            "times",
            "peak MiB",
            "times",
        ),
    )
    for case in cases:
        found = results.get(case.name, {})
        last = case.contestants[-1]
        label = f"{case.network} {case.task} {case.crop}^3 x {case.batch}, {case.ratio:g} hidden"
        for number, name in enumerate(case.contestants):
            first = (label, f"{case.bound:.2f}") if number == 0 else ("", "")
            row = (*_time(found, name, last), *_saved(found, name, last), *_peak(found, name, last))
            table.add_row(*first, name, *row, end_section=name == last)
    return table


def curve_table(cases: Sequence[Case], results: Results) -> Table:
    """A row per size and share: packed cells against the ideal, the tuned grid's visible share."""
    table = _table(
        "Growth of the encoder's cost: packed cells (p), tuned grid (e1)",
        ("network", "crop", "hidden", "visible", "e1 s", "p s", "over ideal", "e1 MiB", "p MiB",
         "over ideal"),
    )  # fmt: skip
    for case in cases:
        found = results.get(case.name, {})
        row = [case.network, f"{case.crop}^3", f"{case.ratio:g}", f"{case.visible}/{case.cells}"]
        spread = found.get("time", {}).get("spread", {})
        row += _growth(case, [spread.get(n, {}).get("median", 0.0) for n in ("e1", "p")], "{:.3f}")
        kept = [saved_total(found, n) / 2**20 for n in ("e1", "p")]
        table.add_row(*row, *_growth(case, kept, "{:.0f}"))
    return table


def growth_points(cases: Sequence[Case], results: Results) -> list[GrowthPoint]:
    """For the figure: packed cells over the tuned grid, in time and in saved memory."""
    points = []
    for case in cases:
        found = results.get(case.name, {})
        spread = found.get("time", {}).get("spread", {})
        pairs = {
            "time": [spread.get(name, {}).get("median", 0.0) for name in ("e1", "p")],
            "saved memory": [float(saved_total(found, name)) for name in ("e1", "p")],
        }
        points += [
            GrowthPoint(case.network, what, case.crop, 1 / case.bound, packed / grid)
            for what, (grid, packed) in pairs.items()
            if grid and packed
        ]
    return points


def profile_tables(cases: Sequence[Case], results: Results) -> list[Table]:
    """One for every case: milliseconds of phases and operations, a column per contestant."""
    tables = []
    for case in cases:
        found = results.get(case.name, {})
        known = {name: found.get(f"profile: {name}", {}) for name in case.contestants}
        known = {name: said for name, said in known.items() if "phases" in said}
        if not known:
            continue
        title = f"{case.network} {case.task} {case.crop}^3 x {case.batch}, {case.ratio:g} hidden"
        table = _table(f"{title}: milliseconds", ("", *known))
        for part in ("phases", "operations"):
            heads = list(dict.fromkeys(head for said in known.values() for head in said[part]))
            for head in heads:
                times = [said[part].get(head) for said in known.values()]
                shown = ["" if t is None else f"{1e3 * t:.1f}" for t in times]
                table.add_row(head, *shown, end_section=head == heads[-1])
        tables.append(table)
    return tables


def as_markdown(table: Table) -> str:
    """A table of the screen, for a page."""
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = [[str(column.header) for column in table.columns], ["---"] * len(table.columns)]
    lines += [[str(cell) for cell in row] for row in rows]
    return f"{table.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _growth(case: Case, pair: Sequence[float], style: str) -> list[str]:
    """Both values, and the second over the visible share of the first; empty if not measured."""
    if not all(pair):
        return ["", "", ""]
    return [*(style.format(v) for v in pair), f"{pair[1] * case.bound / pair[0]:.2f}"]


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    for heading in headings:
        words = heading in ("case", "network", "contestant", "")
        table.add_column(heading, justify="left" if words else "right", no_wrap=True)
    return table


def footer(document: Mapping[str, Any], out: Path) -> str:
    """Machine and load, and where the figures are."""
    machine = document["machine"]
    timed = [found["time"] for found in document["results"].values() if "time" in found]
    loads = [value for measured in timed for value in measured.get("load", ())]
    parts = (
        f"{machine.get('cpu', 'unknown')}, {machine.get('cores', '?')} cores",
        f"{machine['threads']} threads",
        f"torch {machine.get('torch', 'unknown')}",
        f"load {min(loads):.1f} to {max(loads):.1f}" if loads else "no time measured",
        "median (lowest to highest)",
        "`times`: over the last contestant of the case, paired by round",
        "saved: activations + index tables, the ratio without these",
        str(out),
    )
    return "; ".join(parts)


def saved_total(found: Mapping[str, Any], name: str) -> int:
    """Bytes kept for the backward pass, index tables included; 0 if not measured."""
    kept = found.get("saved", {}).get(name)
    return kept["activations"] + kept["tables"] if kept else 0


def _time(found: Mapping[str, Any], name: str, last: str) -> tuple[str, str]:
    measured = found.get("time", {})
    if "spread" not in measured:
        return measured.get("failed", ""), ""
    s = measured["spread"][name]
    ratio = measured["ratios"].get(f"{name}/{last}")
    text = f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else ""
    return f"{s['median']:.2f}", text


def _saved(found: Mapping[str, Any], name: str, last: str) -> tuple[str, str]:
    kept = found.get("saved", {})
    if name not in kept:
        return kept.get("failed", ""), ""
    value, tables = kept[name]["activations"], kept[name]["tables"]
    text = _mib(value) + (f" + {_mib(tables)}" if tables else "")
    return text, f"{value / kept[last]['activations']:.2f}" if name != last else ""


def _peak(found: Mapping[str, Any], name: str, last: str) -> tuple[str, str]:
    value, base = (found.get(f"peak: {n}", {}) for n in (name, last))
    if "peak" not in value:
        return value.get("failed", ""), ""
    ratio = f"{value['peak'] / base['peak']:.2f}" if name != last and "peak" in base else ""
    return _mib(value["peak"]), ratio


def _mib(value: int) -> str:
    return f"{value / 2**20:.0f}"
