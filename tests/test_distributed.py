"""Many processes compute what one process computes on the same batches."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import data
import model
from data import make_loaders
from data.streaming import Order
from model.online import OnlineTeacher, Students
from tests.helpers import ROOT, make_tree, report_of, succeed
from tests.processes import in_processes
from utils import distributed, options
from utils.device import Execution
from utils.engine import Trainer
from utils.errors import UserError
from utils.files import to_plain
from utils.interruption import resume_command
from utils.metrics import evaluate


def normalize(norm, x):
    """Output of two training steps and one evaluation, the state, and the gradients, of this process's share of x."""
    distributed.synchronize_batch_norm(norm)
    share = distributed.share(len(x))
    outputs, weights = [], torch.arange(x.numel(), dtype=x.dtype).view_as(x).cos()
    mine = x[share].clone().requires_grad_()
    for _ in range(2):
        norm.zero_grad()
        mine.grad = None
        y = norm(mine)
        (y * weights[share]).sum().backward()
    norm.eval()
    gathered = torch.zeros_like(x)
    gathered[share] = y.detach()
    grads = torch.zeros_like(x)
    grads[share] = mine.grad
    outputs = [gathered, grads, norm.weight.grad, norm.bias.grad]
    outputs = [distributed.total(value) for value in outputs]
    return [*outputs, norm.running_mean, norm.running_var, norm.num_batches_tracked, norm(x).detach()]


@pytest.mark.parametrize("count", [2, 3])
def test_synchronized_batch_norm_is_batch_norm_of_the_whole_batch(tmp_path, count):
    torch.manual_seed(0)
    x = 100 + torch.randn(7, 5, 3, 2, dtype=torch.float64)
    norm = nn.BatchNorm2d(5).double()
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    reference, inputs = copy.deepcopy(norm), x.clone().requires_grad_()
    for _ in range(2):
        reference.zero_grad()
        inputs.grad = None
        y = reference(inputs)
        (y * torch.arange(x.numel(), dtype=x.dtype).view_as(x).cos()).sum().backward()
    reference.eval()
    expected = [y.detach(), inputs.grad, reference.weight.grad, reference.bias.grad]
    expected += [reference.running_mean, reference.running_var, reference.num_batches_tracked, reference(x).detach()]
    result = in_processes(count, tmp_path, normalize, norm, x)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# --- whole steps and runs


def gradients(images, targets, flags):
    """The gradients of one step, and what it reports, with this process's share of a batch."""
    args = options.parse("main", ["--dataset", "digits", "--num_students", "2", *flags])
    torch.manual_seed(0)
    learner = OnlineTeacher([model.build("resnet_20_sparse", 4) for _ in range(2)], 4).double()
    teacher = model.build("resnet_20", 4).double().eval()
    trainer = Trainer(learner, teacher, args, torch.device("cpu"), Execution())
    share = distributed.share(len(images))
    trainer.learner.train()
    losses, correct, size = trainer.train_step(images[share], targets[share])
    outcome = {name: parameter.grad for name, parameter in learner.named_parameters()} | losses
    return outcome | {"correct": correct, "size": torch.tensor(size)}


@pytest.mark.parametrize("count", [2, 3])
def test_a_step_of_many_processes_is_that_of_one_on_the_whole_batch(tmp_path, count):
    """A batch that neither 2 nor 3 divide; the objective with all of its terms."""
    torch.manual_seed(1)
    images, targets = torch.randn(11, 3, 8, 8, dtype=torch.float64), torch.arange(11) % 4
    flags = ["--teacher_dir", "x", "--miu", "0.5"]
    expected = gradients(images, targets, flags)
    result = in_processes(count, tmp_path, gradients, images, targets, [*flags, "--sync_bn"])
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(result[name].to(value) / scale, value / scale, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "", "LOCAL_RANK": "0"}, "RANK is ''"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ],
)
def test_half_of_what_torchrun_sets_is_refused(monkeypatch, variables, named):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{named}.* with torchrun, or unset WORLD_SIZE"):
        distributed.start(torch.device("cpu"))


def test_variables_of_one_process_need_no_torchrun(monkeypatch):
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    device = torch.device("cpu")
    assert distributed.start(device) == device
    with distributed.first_on_each_machine():
        pass
    assert resume_command()


def uneven_step(images, targets):
    """The gradients of a step in parts, in which the first process has two images and the second has the others."""
    args = options.parse("main", ["--num_students", "1", "--lambda", "0", "--accumulate", "4"])
    torch.manual_seed(0)
    learner = Students([nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()])
    trainer = Trainer(learner, None, args, torch.device("cpu"), Execution())
    mine = slice(None) if distributed.world_size() == 1 else slice(2) if distributed.rank() == 0 else slice(2, None)
    trainer.train_step(images[mine], targets[mine])
    return {name: parameter.grad for name, parameter in learner.named_parameters()}


def test_processes_may_have_shares_of_different_sizes(tmp_path):
    """As damaged images leave them."""
    images, targets = torch.randn(9, 4, 1, 1, dtype=torch.float64), torch.arange(9) % 3
    expected = uneven_step(images, targets)
    torch.testing.assert_close(in_processes(2, tmp_path, uneven_step, images, targets), expected)


def read_damaged(root):
    """What the first process makes of streamed images, some of them damaged: training batches, scores, damage."""
    dataset = data.load("folder", root, 0, image_size=8)
    dataset.skipped.total = 10_000
    loaders = make_loaders(dataset, 8, 19, 0, torch.device("cpu"), workers=0)
    loaders.train.set_epoch(1)
    sizes = [distributed.counts(len(targets)) for _, targets in loaders.train]
    torch.manual_seed(0)
    learner = Students([nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))])
    scores = evaluate(learner, loaders.test, confusion_of=0)
    dataset.skipped.share()
    known = {"scores": to_plain(replace(scores, confusion=None)), "confusion": scores.confusion.tolist()}
    return known | {"sizes": sizes, "damaged": set(dataset.skipped.reasons)}


def test_damaged_images_stop_no_run_that_one_process_finishes(tmp_path):
    """The second process has no test image, and of one batch for training too few."""
    make_tree(tmp_path / "set", count=20, size=(10, 8))
    paths = data.load("folder", tmp_path / "set", 0, image_size=8)
    order = Order(len(paths.train), 8, 0)
    order.epoch = 1
    chosen = [index for index, _ in list(order)[2]]
    damaged = {os.fsdecode(path) for path in [*paths.train.images[chosen[1:6:2]], *paths.test.images[1::2]]}
    for path in damaged:
        Path(path).write_bytes(b"")
    one, two = read_damaged(tmp_path / "set"), in_processes(2, tmp_path, read_damaged, tmp_path / "set")
    assert one["sizes"] == [[8], [8], [5], [8], [8]]
    assert two["sizes"] == [[4, 4], [4, 4], [4, 4], [4, 4]]
    assert one["damaged"] == two["damaged"] == damaged
    assert two["confusion"] == one["confusion"]
    assert two["scores"]["accuracy"] == one["scores"]["accuracy"]
    assert two["scores"]["loss"]["students"] == pytest.approx(one["scores"]["loss"]["students"])


FLAGS = ("--dataset", "digits", "--teacher_model", "resnet_20", "--device", "cpu", "--precision", "fp32")


def torchrun(job, *flags, processes=2, launcher=()):
    """Start main.py in several processes; its output goes to job.log."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *launcher]
    command += [ROOT / "main.py", *FLAGS, "--job_dir", job, *flags]
    with open(f"{job}.log", "w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=environment)


def wait_for_checkpoint(job, run):
    while not (job / "checkpoint" / "last.pt").exists():
        assert run.poll() is None, Path(f"{job}.log").read_text()
        time.sleep(0.1)


def kill_one(job, run):
    """Kill a process of the run, not the first, once there is a checkpoint."""
    wait_for_checkpoint(job, run)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(max(map(int, children)), signal.SIGKILL)


def metrics(job):
    return [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_of_three_processes_is_that_of_one(tmp_path):
    """Batches of 37 images, and 200 validation images, which 3 does not divide."""
    flags = ("--num_students", 2, "--num_epochs", 2, "--lr", 0.01, "--train_batch_size", 37)
    flags += ("--train_size", 200, "--val_size", 200)
    succeed("main.py", *FLAGS, *flags, "--job_dir", tmp_path / "one")
    run = torchrun(tmp_path / "three", *flags, "--sync_bn", processes=3)
    assert run.wait(200) == 0, (tmp_path / "three.log").read_text()
    one, three = metrics(tmp_path / "one"), metrics(tmp_path / "three")
    assert len(three) == 2
    assert three[0]["train"]["loss"]["total"] == pytest.approx(one[0]["train"]["loss"]["total"], rel=1e-2)
    reports = [report_of(tmp_path / name) for name in ("one", "three")]
    assert reports[1]["networks"][1]["test"] is not None
    counts = [np.array(report["confusion"]) for report in reports]
    assert counts[1].sum(1).tolist() == counts[0].sum(1).tolist(), "each image is counted once"
    assert [entry["images"] for entry in reports[1]["classes"]] == counts[0].sum(1).tolist()
    names = {path.name for path in (tmp_path / "one").rglob("*") if "events" not in path.name}
    assert {path.name for path in (tmp_path / "three").rglob("*") if "events" not in path.name} == names


@pytest.mark.slow
def test_a_process_whose_peer_died_says_so(tmp_path):
    """Without torchrun, which ends the survivor as well, at times before it has said anything."""
    job, flags = tmp_path / "job", ("--num_students", 1, "--lambda", 0, "--num_epochs", 40)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = list(map(str, [sys.executable, ROOT / "main.py", *FLAGS, "--job_dir", job, *flags]))
    processes = []
    with open(f"{job}.log", "w") as log:
        for rank in ("0", "1"):
            environment = os.environ | meeting | {"RANK": rank, "LOCAL_RANK": rank}
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    survivor, victim = processes
    wait_for_checkpoint(job, survivor)
    victim.kill()
    assert survivor.wait(60) == 2
    last = Path(f"{job}.log").read_text().splitlines()[-1]
    assert last.startswith("error: another process of this run has died")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds child processes in /proc")
def test_a_process_that_dies_ends_the_run_or_has_it_started_again(tmp_path):
    job, flags = tmp_path / "job", ("--num_students", 1, "--lambda", 0, "--num_epochs", 15, "--train_size", 300)
    run = torchrun(job, *flags)
    kill_one(job, run)
    assert run.wait(60) != 0
    done = len(metrics(job))

    run = torchrun(job, *flags, "--resume", launcher=["--max-restarts=1"])
    while len(metrics(job)) < done + 2:
        assert run.poll() is None, Path(f"{job}.log").read_text()
        time.sleep(0.1)
    kill_one(job, run)
    assert run.wait(200) == 0, Path(f"{job}.log").read_text()
    assert Path(f"{job}.log").read_text().count("resuming after") == 2
    assert [line["epoch"] for line in metrics(job)] == list(range(1, 16))
