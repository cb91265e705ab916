"""What a report says in words and side by side."""

import pytest

from utils import tables

META = {"model": "resnet_20_sparse", "conv": "depthwise", "pruned_num": 18, "config": {"teacher_model": "resnet_20"}}


def table(*tests, onnx=False, **ratios):
    """A standard network and students, of which the last has these ratios; with the given test accuracies."""
    keys = [key for key in tables.COSTS if onnx or not key.startswith("onnx")]
    rows = [
        {"name": "a", "role": "student", "test": test, "params": 8, "macs": 4, **dict.fromkeys(keys, 2.0)}
        for test in tests
    ]
    for row in rows:
        row |= {key.replace("latency", "spread"): 0.1 for key in keys} | {"ratios": dict.fromkeys(keys, 1.0)}
    rows[-1]["ratios"] |= ratios
    return rows


BETTER = {"params": 6.724, "macs": 5.14, "latency_1": 1.41, "latency_256": 2.47}
COSTS = "resnet_20 -> resnet_20_sparse (depthwise): 6.72x smaller, 5.14x fewer MACs"
PYTORCH = "1.41x faster at batch 1 and 2.47x at batch 256 (PyTorch)"


def test_the_sentence_says_what_one_got():
    assert tables.verdict(table(75.27, 72.11, **BETTER), 1, META) == (
        f"{COSTS}, {PYTORCH}; 72.11 % of the test images right, 3.16 points less than the standard network"
    )


def test_the_sentence_tells_the_runtimes_apart():
    rows = table(None, 50.0, onnx=True, **BETTER, onnx_latency_1=1.9, onnx_latency_256=2.5)
    assert f"{PYTORCH}, 1.90x and 2.50x (ONNX Runtime); 50.00 %" in tables.verdict(rows, 1, META)
    rows[1]["ratios"] |= {"onnx_latency_1": 0.5, "onnx_latency_256": 2.5}
    assert f"{PYTORCH}, 2.00x slower and 2.50x faster (ONNX Runtime);" in tables.verdict(rows, 1, META)


def test_the_sentence_says_that_latencies_are_unsteady():
    rows = table(None, 50.0, onnx=True, **BETTER)
    rows[0]["spread_256"] = 0.6
    sentence = tables.verdict(rows, 1, META)
    assert "2.47x at batch 256 (PyTorch, unsteady), as fast and as fast (ONNX Runtime);" in sentence


def test_a_student_that_costs_more_is_said_to():
    rows = table(None, 50.0, params=1 / 5.61, macs=0.8, latency_1=0.5, latency_256=1.25)
    assert tables.verdict(rows, 1, META | {"conv": "group"}) == (
        "resnet_20 -> resnet_20_sparse (group): 5.61x larger, 1.25x more MACs, "
        "2.00x slower at batch 1 and 1.25x faster at batch 256 (PyTorch); 50.00 % of the test images right"
    )
    assert "5.61x larger" in tables.summary(rows)


def test_a_student_that_is_like_the_standard_network_is_said_to_be():
    sentence = tables.verdict(table(50.0, 50.001), 1, META | {"pruned_num": 0, "model": "resnet_20"})
    assert sentence == (
        "resnet_20 -> resnet_20: as large, as many MACs, as fast at batch 1 and as fast at batch 256 (PyTorch); "
        "50.00 % of the test images right, as many as the standard network"
    )


@pytest.mark.parametrize(
    ("tests", "end"),
    [
        ((50.0, 51.2), "51.20 % of the test images right, 1.20 points more than the standard network"),
        ((None, 51.2), "51.20 % of the test images right"),
        ((50.0, None), "no accuracy, for its logits are not finite"),
    ],
)
def test_the_sentence_compares_what_is_known(tests, end):
    assert tables.verdict(table(*tests), 1, META).endswith(f"; {end}")


def test_the_sentence_compares_a_refined_student_with_the_one_before():
    rows = table(50.0, 48.0, 49.0)
    rows[1]["role"] = "before"
    assert tables.verdict(rows, 2, META).endswith(
        "1.00 points less than the standard network, 1.00 points more than before it was refined"
    )


def test_the_standard_network_and_the_student_stand_side_by_side():
    rows = table(50.0, 48.0, 49.0, onnx=True, latency_1=0.5, onnx_bytes=4.0)
    rows[2] |= {"latency_1": 4.0, "onnx_bytes": 5000, "onnx_spread_256": 0.9}
    lines = tables.deployment_table(rows, 2)
    assert len(lines) == 2 + 6
    assert "| PyTorch, batch 1 | 2.00 ms | 4.00 ms | 2.00x slower |" in lines
    assert "| ONNX Runtime, batch 256 | 2.00 ms | 2.00 ms (unsteady) | as fast |" in lines
    assert lines[-1].endswith("5,000 bytes | 4.00x smaller |")
    del rows[0]["onnx_bytes"], rows[2]["ratios"]["onnx_bytes"]  # PyTorch cannot export the standard network
    assert tables.deployment_table(rows, 2)[-1] == "| .onnx file | - | 5,000 bytes |  |"


def test_classes_are_listed_all_or_the_worst():
    classes = [{"name": f"c{i}", "images": 10, "accuracy": float(90 - i)} for i in range(4)]
    classes.append({"name": "unseen", "images": 0, "accuracy": None})
    lines = tables.class_table(classes, most=5, worst=2)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| c0", "| c1", "| c2", "| c3"]
    lines = tables.class_table(classes, most=4, worst=2)
    assert lines[2:] == ["| c3 | 10 | 87.00 |", "| c2 | 10 | 88.00 |"]
    assert "2 worst of 5 classes" in lines[0]


def test_top_5_has_columns_where_it_is_known():
    row = {"name": "a", "params": 1, "macs": 1, "val": 50.0, "test": 51.0}
    assert "top-5" not in "".join([*tables.accuracy_table([row]), tables.summary([row])])
    row |= {"val_top5": 80.0, "test_top5": 81.0}
    assert tables.accuracy_table([row])[-1] == "| a | 50.00 | 80.00 | 51.00 | 81.00 |"
    assert "81.00" in tables.summary([row])
