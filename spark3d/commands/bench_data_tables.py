"""The tables of `spark3d bench data`, from its JSON, for the screen and for a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

FIRST, STORE, MAPPED = "nibabel .nii.gz", "store", "mapped .npy"
FORMATS = {
    "nibabel .nii.gz": ".gz",
    "MONAI LoadImaged": ".gz",
    "nibabel .nii slice": ".nii",
    "mapped .npy": ".npy",
    "store": "store",
}
HEAD = (
    "reader",
    "crops/s warm",
    "times",
    "crops/s cold",
    "times",
    "MiB read a crop",
    "bytes / raw",
    "write s",
    "write / .nii.gz",
)
Rows = list[tuple[str, ...]]


def as_tables(document: Mapping[str, Any]) -> list[Table | str]:
    """For the screen."""
    readers = _table(f"Random crops of {_volume(document)}", HEAD, reader_rows(document["results"]))
    goals = _table("Goals", ("what", "found", "wanted"), goal_rows(document["results"]))
    return [readers, goals, _footer(document)]


def as_markdown(document: Mapping[str, Any]) -> str:
    """For a page."""
    parts = [
        _markdown(HEAD, reader_rows(document["results"])),
        _markdown(("what", "found", "wanted"), goal_rows(document["results"])),
        f"Random crops of {_volume(document)}; {_footer(document)}.",
    ]
    return "\n\n".join(parts)


def reader_rows(results: Mapping[str, Any]) -> Rows:
    """A row per way to read; empty where nothing was measured."""
    rows = []
    for name, suffix in FORMATS.items():
        rows.append(
            (
                name,
                *_speed(results.get("warm", {}), name),
                *_speed(results.get("cold", {}), name),
                _from_disk(results.get("cold", {}), name),
                *_written(results.get("write", {}), suffix),
            )
        )
    return rows


def goal_rows(results: Mapping[str, Any]) -> Rows:
    """What the store must reach, and what it does."""
    warm, cold, write = (results.get(name, {}) for name in ("warm", "cold", "write"))
    size = write["bytes"]["store"] / write["raw"] if "bytes" in write else None
    rows = [
        ("warm crops, times .nii.gz", _ratio(warm, FIRST, STORE), ">= 200"),
        ("cold crops, times .nii.gz", _ratio(cold, FIRST, STORE), ">= 80"),
        ("cold crops, times a mapped .npy", _ratio(cold, MAPPED, STORE), ">= 2"),
        ("bytes over raw", "" if size is None else f"{size:.2f}", "<= 0.60"),
        ("hash, share of a warm read", _percent(results.get("hash", {}).get("share")), "<= 10 %"),
        ("writing, times .nii.gz", _ratio(write, "store", ".gz"), "<= 0.5"),
    ]
    for name in FORMATS:
        if found := results.get(f"memory: {name}"):
            wanted = "<= 40" if name == STORE else ""
            rows.append((f"memory for reading, MB: {name}", f"{found['grew'] / 1e6:.0f}", wanted))
    for key, found in results.items():
        if key.startswith("step: "):
            text = f"{100 * found['idle']:.1f} % of {found['step']:.2f} s on {found['device']}"
            name = f"training step waits for data, {key.removeprefix('step: ')} workers"
            rows.append((name, text, "~0" if key.endswith("2") else ""))
    return rows


def _volume(document: Mapping[str, Any]) -> str:
    volume = document["volume"]
    size = "x".join(map(str, volume["size"]))
    return (
        f"a {size} int16 CT ({volume['source']}, noise {volume['noise_hu']:g} HU, chunks of "
        f"{volume['chunk']})"
    )


def _footer(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    loads = [value for found in document["results"].values() for value in found.get("load", ())]
    load = f"load {min(loads):.1f} to {max(loads):.1f}" if loads else "nothing measured"
    versions = ", ".join(f"{name} {machine.get(name, '?')}" for name in ("blosc2", "nibabel"))
    cpu = machine.get("cpu", "?")
    return f"one thread, {cpu}, {machine.get('cores', '?')} cores, {load}, {versions}"


def _speed(found: Mapping[str, Any], name: str) -> tuple[str, str]:
    if "spread" not in found:
        return found.get("failed", ""), ""
    return f"{1 / found['spread'][name]['median']:.3g}", _ratio(found, FIRST, name)


def _ratio(found: Mapping[str, Any], name: str, last: str) -> str:
    if "ratios" not in found:
        return found.get("failed", "")
    ratio = found["ratios"].get(f"{name}/{last}")
    if ratio is None:
        return "1"
    return f"{ratio['median']:.3g} ({ratio['low']:.3g}-{ratio['high']:.3g})"


def _from_disk(found: Mapping[str, Any], name: str) -> str:
    return f"{found['disk_bytes'][name]['median'] / 2**20:.1f}" if "disk_bytes" in found else ""


def _written(found: Mapping[str, Any], suffix: str) -> tuple[str, str, str]:
    if "spread" not in found:
        return "", "", ""
    seconds = found["spread"][suffix]["median"]
    share = found["bytes"][suffix] / found["raw"]
    return f"{share:.2f}", f"{seconds:.2f}", _ratio(found, suffix, ".gz")


def _percent(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{100 * found['median']:.1f} %"


def _table(title: str, head: Sequence[str], rows: Rows) -> Table:
    table = Table(title=title, box=box.SIMPLE)
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(head: Sequence[str], rows: Rows) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
