"""What a report says in words and side by side."""

import pytest

from utils import tables
from utils.cost import Cost, Latency
from utils.metrics import Accuracy
from utils.tables import ONNX, PYTORCH, ClassAccuracy, Row

TITLE = "resnet_20 -> resnet_20_sparse (depthwise)"


def network(test, role="student", params=8000, macs=4000, pytorch=(2.0, 2.0), onnx=None, **others):
    """A row with this test accuracy and these latencies, in ms; None for networks that are not timed."""
    latencies = {(PYTORCH, batch): Latency(time, 0.1) for batch, time in zip(tables.BATCHES, pytorch, strict=True)}
    latencies |= {(ONNX, batch): Latency(time, 0.1) for batch, time in zip(tables.BATCHES, onnx or (), strict=False)}
    accuracy = None if test is None else Accuracy(test)
    return Row(role, role, Cost(params, macs), None, accuracy, latencies=latencies, **others)


def pair(before, after, onnx=None, **costs):
    """The standard network and an exported student with these costs, and test accuracies."""
    onnx_before = onnx and (2.0, 2.0)
    return [network(before, "standard", onnx=onnx_before), network(after, onnx=onnx, exported=True, **costs)]


BETTER = {"params": 1190, "macs": 778, "pytorch": (2 / 1.41, 2 / 2.47)}
COSTS = "6.72x smaller, 5.14x fewer MACs"
SPEED = "1.41x faster at batch 1 and 2.47x faster at batch 256 (PyTorch)"


def test_the_sentence_says_what_one_got():
    assert tables.verdict(pair(75.27, 72.11, **BETTER), TITLE) == (
        f"{TITLE}: {COSTS}, {SPEED}; 72.11 % test accuracy, 3.16 points less than the standard network"
    )


def test_the_sentence_tells_the_runtimes_apart():
    rows = pair(None, 50.0, onnx=(4.0, 0.8), **BETTER)
    slower = "2.00x slower at batch 1 and 2.50x faster at batch 256 (ONNX Runtime)"
    assert f"{SPEED}, {slower}; 50.00 %" in tables.verdict(rows, TITLE)


def test_the_sentence_says_that_latencies_are_unsteady():
    rows = pair(None, 50.0, onnx=(2.0, 2.0), **BETTER)
    rows[0].latencies[PYTORCH, 256] = Latency(2.0, 0.6)
    sentence = tables.verdict(rows, TITLE)
    assert "2.47x faster at batch 256 (PyTorch, unsteady), as fast at batch 1 and as fast at batch 256 (O" in sentence


def test_a_student_that_costs_more_is_said_to():
    rows = pair(None, 50.0, params=44880, macs=5000, pytorch=(4.0, 1.6))
    assert tables.verdict(rows, TITLE) == (
        f"{TITLE}: 5.61x larger, 1.25x more MACs, 2.00x slower at batch 1 and 1.25x faster at batch 256 (PyTorch); "
        "50.00 % test accuracy"
    )
    assert "5.61x larger" in tables.plain(tables.overview(rows, "test"))


def test_a_student_that_is_like_the_standard_network_is_said_to_be():
    assert tables.verdict(pair(50.0, 50.001), TITLE) == (
        f"{TITLE}: as large, as many MACs, as fast at batch 1 and as fast at batch 256 (PyTorch); "
        "50.00 % test accuracy, as much as the standard network"
    )


@pytest.mark.parametrize(
    ("tests", "end"),
    [
        ((50.0, 51.2), "51.20 % test accuracy, 1.20 points more than the standard network"),
        ((None, 51.2), "51.20 % test accuracy"),
        ((50.0, None), "no accuracy, because its logits are not finite"),
        ((50.0, float("nan")), "no accuracy, because its logits are not finite"),
    ],
)
def test_the_sentence_compares_what_is_known(tests, end):
    assert tables.verdict(pair(*tests), TITLE).endswith(f"; {end}")


def test_the_sentence_compares_a_refined_student_with_the_one_before():
    standard, refined = pair(50.0, 49.0)
    assert tables.verdict([standard, network(48.0, "before"), refined], TITLE).endswith(
        "1.00 points less than the standard network, 1.00 points more than before it was refined"
    )


def test_measured_networks_stand_side_by_side():
    standard, student = pair(50.0, 49.0, onnx=(2.0, 2.0), pytorch=(4.0, 2.0))
    standard.onnx_bytes, student.onnx_bytes = 20_000, 5000
    student.latencies[ONNX, 256] = Latency(2.0, 0.9)
    not_timed = Row("student 2", "student", Cost(8000, 4000))
    rows = [standard, not_timed, student]
    lines = tables.markdown(tables.measurements(rows)).splitlines()
    assert lines[0] == "| measured | standard | student |  |"
    assert len(lines) == 2 + 5
    assert "| PyTorch, batch 1 | 2.00 ms | 4.00 ms | 2.00x slower |" in lines
    assert "| ONNX Runtime, batch 256 | 2.00 ms | 2.00 ms (unsteady) | as fast |" in lines
    assert lines[-1] == "| .onnx file | 20,000 bytes | 5,000 bytes | 4.00x smaller |"
    standard.onnx_bytes = None  # PyTorch cannot export the standard network
    assert tables.markdown(tables.measurements(rows)).splitlines()[-1] == "| .onnx file | - | 5,000 bytes |  |"


def test_plain_values_have_the_keys_of_the_report():
    standard, student = tables.as_json(pair(50.0, 49.0, onnx=(1.0, 2.0), params=2000, file_bytes=7))
    assert (student["role"], student["exported"], standard["exported"]) == ("student", True, False)
    assert (student["val"], student["test"], student["params"], student["macs"]) == (None, 49.0, 2000, 4000)
    assert (student["onnx_latency_1"], student["onnx_spread_256"], student["file_bytes"]) == (1.0, 0.1, 7)
    speeds = {f"{runtime}latency_{batch}": 1.0 for runtime in ("", "onnx_") for batch in (1, 256)}
    assert student["ratios"] == speeds | {"params": 4.0, "macs": 1.0, "onnx_latency_1": 2.0}


@pytest.mark.parametrize("forgotten", [(), ("role",)])
def test_a_network_is_found_by_its_role_in_the_metadata_of_files_or_by_its_name_in_older_ones(forgotten):
    cost = Cost(2, 3)
    rows = [
        Row("resnet_20, standard", "standard", cost, Accuracy(1.0), Accuracy(2.0, 3.0)),
        Row("student 1, best", "student", cost),
        Row("online teacher", "online_teacher", cost, Accuracy(4.0)),
    ]
    for row in rows:
        summary = {key: value for key, value in row.summary().items() if key not in forgotten}
        assert tables.read_row(summary) == row


def test_classes_are_listed_all_or_the_worst():
    classes = [ClassAccuracy(f"c{i}", 10, float(90 - i)) for i in range(4)] + [ClassAccuracy("unseen", 0, None)]
    lines = tables.markdown(tables.classes(classes, most=5, worst=2)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| c0", "| c1", "| c2", "| c3"]
    lines = tables.markdown(tables.classes(classes, most=4, worst=2)).splitlines()
    assert lines[2:] == ["| c3 | 10 | 87.00 |", "| c2 | 10 | 88.00 |"]
    assert "2 worst of 5 classes" in lines[0]


def test_a_name_cannot_break_a_table():
    assert tables.markdown([["a", "b"], ["x|y", "1"]]).splitlines()[-1] == "| x&#124;y | 1 |"


def test_top_5_has_columns_where_it_is_known():
    row = Row("a", "standard", Cost(1, 1), Accuracy(50.0), Accuracy(51.0))
    assert "top-5" not in tables.plain(tables.overview([row], "val", "test"))
    row.val, row.test = Accuracy(50.0, 80.0), Accuracy(51.0, 81.0)
    line = tables.markdown(tables.overview([row], "val", "test")).splitlines()[-1]
    assert line.startswith("| a | 50.00 | 80.00 | 51.00 | 81.00 |")
