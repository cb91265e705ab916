"""What a report's networks cost and achieve, in words and tables; of the plain values that `report.compare` gives."""

from collections.abc import Sequence
from typing import Any

LATENCY_BATCHES = (1, 256)
UNSTEADY = 0.5  # spread of a latency from which on it is marked
MARK = "(unsteady)"
RUNTIMES = {"": "PyTorch", "onnx_": "ONNX Runtime"}  # by what their latencies' keys begin with
LATENCIES = tuple(f"{runtime}latency_{batch}" for runtime in RUNTIMES for batch in LATENCY_BATCHES)
FILES = {"file_bytes": ".pt file", "onnx_bytes": ".onnx file"}
COSTS = ("params", "macs", *LATENCIES, *FILES)

Table = list[dict[str, Any]]
"""A dictionary for each network, the standard one first: name, accuracies, costs, and ratios to the standard one's."""


def verdict(table: Table, chosen: int, meta: dict[str, Any]) -> str:
    """In one sentence what the network table[chosen] is, compared with the standard one."""
    row, cheap = table[chosen], f" ({meta['conv']})" if meta["pruned_num"] else ""
    costs = [
        change(row["ratios"]["params"], "smaller", "larger", "as large"),
        change(row["ratios"]["macs"], "fewer MACs", "more MACs", "as many MACs"),
        *_speeds(table[0], row),
    ]
    text = f"{meta['config']['teacher_model']} -> {meta['model']}{cheap}: {', '.join(costs)}; "
    if row["test"] is None:
        return text + "no accuracy, for its logits are not finite"
    others = [("the standard network", table[0]["test"])]
    others += [("before it was refined", entry["test"]) for entry in table if entry["role"] == "before"]
    compared = [_points(row["test"] - value, name) for name, value in others if value is not None]
    return text + ", ".join([f"{row['test']:.2f} % of the test images right", *compared])


def change(ratio: float, better: str, worse: str, equal: str) -> str:
    """How a network compares with the standard one: "1.25x smaller" for 1.25, "1.25x larger" for 0.8."""
    times = f"{max(ratio, 1 / ratio):.2f}x"
    return equal if times == "1.00x" else f"{times} {better if ratio > 1 else worse}"


def _speeds(standard: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """Of each runtime: "1.41x faster at batch 1 and 2.47x at batch 256 (PyTorch)"."""
    texts, before, place = [], "", " at batch {}"
    for runtime, name in RUNTIMES.items():
        if f"{runtime}latency_{LATENCY_BATCHES[0]}" not in row["ratios"]:
            continue
        words = []
        for batch in LATENCY_BATCHES:
            text = change(row["ratios"][f"{runtime}latency_{batch}"], "faster", "slower", "as fast")
            times, compared, word = text.partition("x ")
            words.append((f"{times}x" if compared and word == before else text) + place.format(batch))
            before = word
        spreads = [entry[f"{runtime}spread_{batch}"] for entry in (standard, row) for batch in LATENCY_BATCHES]
        doubt = ", unsteady" if max(spreads) > UNSTEADY else ""
        texts.append(f"{' and '.join(words)} ({name}{doubt})")
        place = ""
    return texts


def _points(gained: float, name: str) -> str:
    points = f"{abs(gained):.2f}"
    if points == "0.00":
        return f"as many as {name}"
    return f"{points} points {'more' if gained > 0 else 'less'} than {name}"


def summary(table: Table) -> str:
    """The table for a person at a terminal: accuracy, parameters, MACs."""
    top5 = _with_top5(table)
    cells = [("network", "test top-1, %", *(["top-5, %"] if top5 else []), "parameters", "", "MACs", "")]
    for row in table:
        ratios = ("", "")
        if row is not table[0]:
            size, macs = row["ratios"]["params"], row["ratios"]["macs"]
            ratios = change(size, "smaller", "larger", "as large"), change(macs, "fewer", "more", "as many")
        accuracies = [_percent(row["test"]), *([_percent(row.get("test_top5"))] if top5 else [])]
        cells.append((row["name"], *accuracies, f"{row['params']:,}", ratios[0], _mega(row), ratios[1]))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *values in cells:
        padded = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def accuracy_table(table: Table) -> list[str]:
    titles = {"val": "validation", "test": "test"}
    if _with_top5(table):
        titles = {"val": "validation top-1", "val_top5": "top-5", "test": "test top-1", "test_top5": "top-5"}
    lines = [[row["name"], *(_percent(row.get(key)) for key in titles)] for row in table]
    title = "accuracy, %" if "val_top5" in titles else "top-1 accuracy, %"
    return [f"| {' | '.join(line)} |" for line in ([title, *titles.values()], ["---", *["--:"] * len(titles)], *lines)]


def class_table(classes: Sequence[dict[str, Any]], most: int, worst: int) -> list[str]:
    """Test accuracy of the exported network by class: all classes up to `most` of them, else the `worst` ones."""
    known = [entry for entry in classes if entry["accuracy"] is not None]
    title = "class"
    if len(classes) > most:
        known = sorted(known, key=lambda entry: entry["accuracy"])[:worst]
        title = f"the {len(known)} worst of {len(classes):,} classes"
    lines = [f"| {entry['name']} | {entry['images']:,} | {_percent(entry['accuracy'])} |" for entry in known]
    return [f"| {title} | test images | top-1 accuracy, % |", "|---|--:|--:|", *lines]


def _with_top5(table: Table) -> bool:
    return any("test_top5" in row or "val_top5" in row for row in table)


def cost_table(table: Table) -> list[str]:
    header = ["network", "parameters", "smaller", "MACs", "fewer"]
    header += [title for batch in LATENCY_BATCHES for title in (f"latency, batch {batch}", "faster")]
    lines = [header, ["---", *["--:"] * (len(header) - 1)]]
    for row in table:
        if f"latency_{LATENCY_BATCHES[0]}" in row:  # the other students cost what the best one costs
            cells = [row["name"], f"{row['params']:,}", _times(row, "params"), _mega(row), _times(row, "macs")]
            for batch in LATENCY_BATCHES:
                cells += [_measured(row, f"latency_{batch}"), _times(row, f"latency_{batch}")]
            lines.append(cells)
    return [f"| {' | '.join(line)} |" for line in lines]


def deployment_table(table: Table, chosen: int) -> list[str]:
    """The standard network and the exported one side by side: measured latencies and the sizes of the files."""
    networks = [table[0], table[chosen]] if chosen else [table[0]]
    lines = [["measured", *(row["name"] for row in networks), ""], ["---", *["--:"] * len(networks), "---"]]
    for key in (*LATENCIES, *FILES):
        if key in table[chosen]:
            cells = [_measured(row, key) if key in row else "-" for row in networks]
            words = ("smaller", "larger", "as large") if key in FILES else ("faster", "slower", "as fast")
            ratio = table[chosen]["ratios"].get(key) if chosen else None
            lines.append([_title(key), *cells, change(ratio, *words) if ratio else ""])
    return [f"| {' | '.join(line)} |" for line in lines]


def _title(key: str) -> str:
    if key in FILES:
        return FILES[key]
    runtime, _, batch = key.partition("latency_")
    return f"{RUNTIMES[runtime]}, batch {batch}"


def _measured(row: dict[str, Any], key: str) -> str:
    if key in FILES:
        return f"{row[key]:,} bytes"
    mark = f" {MARK}" if row[key.replace("latency", "spread")] > UNSTEADY else ""
    return f"{row[key]:.2f} ms{mark}"


def _times(row: dict[str, Any], key: str) -> str:
    return f"{row['ratios'][key]:.2f}x"


def _mega(row: dict[str, Any]) -> str:
    return f"{row['macs'] / 1e6:.2f} M"


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.2f}"
