"""--pruned_num auto: the convolutions that are made cheap for a budget."""

import json

import pytest
import torch

import model
from model.conv import CheapConv2d, count_cheap
from tests.helpers import content_of, fail, report_of, succeed
from utils.checkpoint import load_student
from utils.cost import Candidates, count

SIZE = (3, 8, 8)
DIGITS = ("--dataset", "digits", "--teacher_model", "resnet_20", "--train_size", 200, "--num_epochs", 1, "--force")
AUTO = (*DIGITS, "--init", "teacher", "--pruned_num", "auto", "--method", "kd")


def build(replaced):
    return model.build("resnet_20_sparse", replaced=replaced)


def cheap_names(network):
    return [name for name, module in network.named_modules() if isinstance(module, CheapConv2d)]


@pytest.fixture(scope="module")
def candidates():
    torch.manual_seed(0)
    images = torch.randn(16, *SIZE)
    teacher = model.build("resnet_20").eval()
    with torch.no_grad():
        targets = teacher(images).argmax(1)  # so that it has every image right
    return Candidates(build, teacher, SIZE, [images], [(images, targets)])


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet_20", {}), ("vgg_16_bn", {}), ("densenet_40", {}), ("resnet18", {"arch": "torchvision"})],
)
def test_a_network_has_the_cheap_convolutions_that_are_named(name, options):
    known = cheap_names(model.build(f"{name}_sparse", **options))
    chosen = known[1::3]
    student = model.build(f"{name}_sparse", **options, replaced=chosen)
    assert cheap_names(student) == chosen
    assert student.variant == {"replaced": chosen}
    assert cheap_names(model.build(f"{name}_sparse", **options, replaced=chosen, pruned_num=len(chosen))) == chosen
    with pytest.raises(ValueError, match="no convolution 'conv1' to make cheap"):
        model.build(f"{name}_sparse", **options, replaced=["conv1"])


def test_convolutions_are_ordered_by_the_energy_that_a_saved_operation_costs(candidates):
    def cost(name):
        conv, student = candidates.teacher.get_submodule(name), build([name])
        weight = conv.weight.detach()
        _, values, _ = torch.linalg.svd(weight.transpose(0, 1).flatten(2), full_matrices=False)
        lost = values[:, 1:].square().sum() / weight.square().sum()
        saved = standard - count(student, SIZE).macs
        return (lost / saved).item() if saved > 0 else torch.inf

    standard = count(build([]), SIZE).macs
    assert sorted(candidates.names) == sorted(cheap_names(build(None)))
    costs = [cost(name) for name in candidates.names[::3]]
    assert costs == sorted(costs)


@pytest.mark.parametrize("share", [1, 0.7])
def test_a_budget_of_operations_is_kept_with_the_fewest_cheap_convolutions(candidates, share):
    number = candidates.within_macs(share)
    assert candidates.macs(number) <= share
    assert number == 0 or candidates.macs(number - 1) > share


def test_a_budget_that_no_student_keeps_is_refused(candidates):
    with pytest.raises(ValueError, match=r"--macs 0.01 is too small: with all convolutions cheap, 0\.\d+ of the MACs"):
        candidates.within_macs(0.01)


def test_a_budget_of_accuracy_is_kept(candidates):
    number = candidates.within_drop(80)
    assert candidates.top1(0) == 100
    assert candidates.top1(number) >= 20
    assert number == len(candidates.names) or candidates.top1(number + 1) < 20


def test_the_choice_is_in_the_file_and_in_the_report(runs, tmp_path):
    teacher = runs.teacher
    job = tmp_path / "job"
    succeed("main.py", *AUTO, "--teacher_dir", teacher, "--macs", 0.6, "--job_dir", job)
    path = job / "resnet_pruned_auto.pt"
    student, meta = load_student(path)
    assert meta["build"]["replaced"] == content_of(path)["meta"]["build"]["replaced"]
    assert meta["pruned_num"] == count_cheap(student) == len(meta["build"]["replaced"])
    assert count(student, SIZE).macs <= 0.6 * count(model.build("resnet_20"), SIZE).macs
    assert [point[0] for point in meta["budget"]][::4][0] == 0
    text = (job / "report.md").read_text()
    assert "![accuracy before training over MACs](budget.png)" in text
    assert (job / "budget.png").read_bytes().startswith(b"\x89PNG")
    assert json.dumps(report_of(job)["meta"]["budget"]) == json.dumps(meta["budget"])
    succeed("main.py", *AUTO, "--num_epochs", 2, "--teacher_dir", teacher, "--macs", 0.6, "--job_dir", job, "--resume")
    assert load_student(path)[1]["build"] == meta["build"]
    refined = tmp_path / "refined"
    succeed("finetune.py", "--refine", path, "--pruned", "--num_epochs", 1, "--job_dir", refined)
    again, _ = load_student(refined / f"resnet_pruned_{meta['pruned_num']}.pt")
    assert cheap_names(again) == cheap_names(student)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pruned_num", "auto", "--init", "teacher", "--teacher_dir", "x"), "needs one budget"),
        (("--pruned_num", "auto", "--macs", 0.5, "--max_drop", 3), "needs one budget"),
        (("--pruned_num", "auto", "--macs", 0.5), "give --init teacher"),
        (("--macs", 0.5), "--macs is a budget for --pruned_num auto"),
        (("--pruned_num", 3, "--max_drop", 2), "--max_drop is a budget for --pruned_num auto"),
        (("--pruned_num", "few"), "must be a whole number, 0 or more, or auto"),
        (("--macs", 1.5), "must be a number above 0, at most 1"),
        (("--pretrain", "--macs", 0.5), "leave out --macs"),
    ],
)
def test_contradictions_are_answered_in_one_line(flags, message, tmp_path):
    assert message in fail("main.py", *DIGITS[:-1], *flags, "--job_dir", tmp_path / "job")
    assert not (tmp_path / "job").exists()
