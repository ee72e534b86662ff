"""The Markdown of `benchmarks/gpu.py`, from its JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

Results = Mapping[str, Mapping[str, Any]]
"""By "network precision", then by part."""
SLOWER = 1.1
"""A strategy that takes so many times as long as the fastest one is worth a line."""


def markdown(document: Mapping[str, Any]) -> str:
    """All tables of a document of results, with the machine on top."""
    results: Results = document["results"]
    machine = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    parts = (
        ("What must hold", checks(results)),
        ("Root mean square errors against float64, over the true values'", errors(results)),
        ("Seconds, and times over packed cells (lowest to highest)", times(results)),
        ("Memory of a step, MiB", memory(results)),
        ("Strategies: the chosen against the fastest", strategies(results)),
    )
    return (
        "\n\n".join([machine, *(f"## {title}\n\n{text}" for title, text in parts if text)]) + "\n"
    )


def checks(results: Results) -> str:
    """A row per check."""
    rows = []
    for setup, found in results.items():
        for part, said in found.items():
            if "failed" in said:
                rows.append((setup, part, "not known", said["failed"]))
            elif "holds" in said:
                rows.append(
                    (setup, part, "yes" if said["holds"] else "**no**", _detail(part, said))
                )
    return table(("network, precision", "check", "holds", "detail"), rows)


def _detail(part: str, said: Mapping[str, Any]) -> str:
    if part == "waiting":
        return f"on {said['on']}" + (f": {said['first']}" if "first" in said else "")
    if part == "determinism":
        same = said["as it is"]["same bits"]
        return "without deterministic cuDNN " + ("too" if same else "not")
    return ""


def errors(results: Results) -> str:
    """A row per way and precision, a column per stage."""
    rows = []
    for setup, found in results.items():
        ways = found.get("accuracy", {}).get("errors", {})
        rows += [
            (setup, way, *(f"{v:.1e}" for v in values.values())) for way, values in ways.items()
        ]
    stages = [f"stage {n}" for n in range(1, 5)]
    return table(("network, precision", "way", *stages, "loss", "gradients"), rows)


def times(results: Results) -> str:
    """A row per comparison and contestant."""
    rows = []
    for setup, found in results.items():
        for what, said in found.get("speed", {}).items():
            if what == "failed":
                continue
            *others, last = said["spread"]
            for name in (*others, last):
                ratio = said["ratios"].get(f"{name}/{last}")
                shown = "{median:.2f} ({low:.2f}-{high:.2f})".format(**ratio) if ratio else "1"
                rows.append((setup, what, name, f"{said['spread'][name]['median']:.4f}", shown))
    return table(("network, precision", "what", "contestant", "seconds", "times"), rows)


def memory(results: Results) -> str:
    """A row per contestant; the peak where the device tells it."""
    rows = []
    for setup, found in results.items():
        said = {k: v for k, v in found.get("memory", {}).items() if k != "failed"}
        for name, kept in said.items():
            peak = kept["peak"]
            rows.append(
                (setup, name, _mib(kept["activations"]), _mib(kept["tables"]),
                 "" if peak is None else _mib(peak))
            )  # fmt: skip
    return table(("network, precision", "contestant", "saved", "index tables", "peak"), rows)


def strategies(results: Results) -> str:
    """Every network's sum over its layers, then each kind that another way computes faster."""
    rows = []
    for setup, found in results.items():
        kinds: Sequence[Any] = found.get("strategies", {}).get("convolutions", ())
        if not kinds:
            continue
        chosen, fastest = (
            sum(kind["layers"] * kind["seconds"][kind[way]] for kind in kinds)
            for way in ("chosen", "fastest")
        )
        rows.append((setup, "all", "", f"{chosen:.4f}", "", f"{fastest:.4f}"))
        for kind in kinds:
            mine, best = (kind["seconds"][kind[way]] for way in ("chosen", "fastest"))
            if mine > SLOWER * best:
                what = f"{kind['convolution']} ({kind['layers']} layers)"
                rows.append(
                    (setup, what, kind["chosen"], f"{mine:.4f}", kind["fastest"], f"{best:.4f}")
                )
    return table(("network, precision", "convolution", "chosen", "s", "fastest", "s"), rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; nothing if it has no rows."""
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mib(value: int) -> str:
    return f"{value / 2**20:.0f}"
