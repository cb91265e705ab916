"""--compile: which code runs a training step, that it is said, and that nothing else depends on it."""

import copy

import pytest
import torch
from torch import nn

import model
from model import fused
from model.kernels import library as compiled
from model.online import OnlineTeacher
from tests.helpers import fail, run_process, succeed
from utils import options
from utils.device import GRAPH, KERNELS, PLAIN, Execution, apply_execution, changes, pick_execution
from utils.engine import Trainer
from utils.errors import UserError
from utils.metrics import Best

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    fused.disable()
    compiled.load.cache_clear()


def kernels_are_used():
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    return "NormReLU" in type(fused.norm_relu(nn.BatchNorm2d(16), x).grad_fn).__name__


def used(choice):
    execution = pick_execution(choice, "fp32", CPU)
    apply_execution(execution)
    return execution


def trained(execution, steps=3, on_device=False, device=CPU):
    """A trainer after some steps, and what each step returned."""
    torch.manual_seed(0)
    learner = OnlineTeacher([model.build("resnet_20_sparse", 4) for _ in range(2)], 4)
    args = options.parse("main", ["--dataset", "digits"])
    trainer = Trainer(learner, None, args, device, execution)
    if on_device:
        trainer.on_device = torch.ones(2, device=device).unbind()
    trainer.learner.train()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(steps, 8, 3, 8, 8, generator=generator).to(device)
    targets = (torch.arange(8) % 4).to(device)
    returned = []
    for i in range(steps):
        trainer.set_rates(0.001 * (i + 1), rampup=i / steps)
        losses, correct, _ = trainer.step(images[i].contiguous(memory_format=torch.channels_last), targets)
        returned.append(({name: value.item() for name, value in losses.items()}, correct.tolist()))
    return trainer, returned


def test_a_cpu_with_a_compiler_uses_the_kernels():
    assert used("auto") == Execution(KERNELS)
    assert kernels_are_used()
    assert used("on") == Execution(KERNELS)


def test_off_means_pytorch_alone():
    used("auto")
    assert used("off") == Execution(PLAIN)
    assert not kernels_are_used()


def test_without_a_compiler_auto_does_without_and_on_stops(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.load.cache_clear()
    assert str(used("auto")).startswith(f"{PLAIN} (no fused kernels: ")
    assert not kernels_are_used()
    with pytest.raises(UserError, match="--compile on has no fused kernels"):
        pick_execution("on", "fp32", CPU)


def test_where_the_cache_cannot_be_written_the_kernels_are_compiled_for_this_process(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiled.load.cache_clear()
    assert used("auto") == Execution(KERNELS)
    assert kernels_are_used()


def test_kernels_are_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    written = []
    for _ in range(2):
        compiled.load.cache_clear()
        fused.enable()
        (library,) = (tmp_path / "od-cheap-convolution").iterdir()
        written.append(library.stat().st_mtime_ns)
    assert written[0] == written[1]


def test_checkpoints_are_the_same_whatever_trained_them():
    states = []
    for choice in ("auto", "off"):
        trainer, _ = trained(used(choice))
        trainer.best = Best(epoch=1, student=0, accuracy=50.0, loss=1.0)
        states.append(trainer._state({}))
    fast, plain = states
    layouts = [{key: (x.dtype, x.shape, x.stride()) for key, x in state.model.items()} for state in states]
    assert layouts[0] == layouts[1]
    assert fast.optimizer["param_groups"] == plain.optimizer["param_groups"]


def test_a_learning_rate_and_a_rampup_in_memory_train_the_same_and_is_saved_as_a_number():
    """That is where a recorded step reads it."""
    (plain, expected), (trainer, returned) = trained(Execution()), trained(Execution(), on_device=True)
    for (losses, correct), (wanted, wanted_correct) in zip(returned, expected, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-6)
        assert correct == wanted_correct
    rates = [t._state({}).optimizer["param_groups"][0]["lr"] for t in (plain, trainer)]
    assert all(type(rate) is float for rate in rates)
    assert rates[1] == pytest.approx(rates[0])
    trainer.optimizer.load_state_dict(copy.deepcopy(trainer._state({}).optimizer))
    trainer.set_rates(0.5, rampup=1.0)
    assert trainer.optimizer.param_groups[0]["lr"] is trainer.on_device[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_cuda_graph_trains_as_single_kernels_do():
    device = torch.device("cuda")
    (_, expected), (trainer, returned) = (
        trained(execution, 8, device=device) for execution in map(Execution, (PLAIN, GRAPH))
    )
    assert trainer.step.graph is not None
    for (losses, correct), (wanted, wanted_correct) in zip(returned, expected, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-3)
        assert correct == wanted_correct


@pytest.mark.slow
def test_scripts_say_what_runs_the_steps_and_resume_with_another(runs, tmp_path):
    assert f", {KERNELS}\n" in runs.output["students"]
    job = ("--job_dir", tmp_path / "job")
    output = succeed(
        "main.py", *runs.student_flags, *job, "--num_epochs", 1, "--lr_decay_step", 1, 2, "--compile", "off"
    )
    assert f", {PLAIN}\n" in output
    assert "resuming after epoch 1" in succeed("main.py", *runs.student_flags, *job, "--resume")


@pytest.mark.slow
def test_on_without_a_compiler_ends_in_one_line(tmp_path):
    environment = {"CXX": str(tmp_path / "none"), "XDG_CACHE_HOME": str(tmp_path)}
    flags = ("--dataset", "digits", "--teacher_model", "resnet_20", "--job_dir", tmp_path / "job")
    assert "--compile on has no fused kernels" in fail(
        "main.py", *flags, "--compile", "on", run=run_process, **environment
    )
    assert not (tmp_path / "job").exists()


def test_what_differs_from_the_environment_of_a_checkpoint_is_named():
    was, now = (
        {"device": "cpu", "threads": threads, "kernels": kernels} for threads, kernels in ((1, None), (2, "ab"))
    )
    assert changes(was, now) == ", with threads 2 (was 1), kernels ab (was none): results may differ in the last bits"
    assert changes(was, was) == changes({}, now) == ""
