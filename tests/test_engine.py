"""The training step, the schedule, what a run keeps, and what stops it."""

import copy
import json
import re
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import model
from data.loader import AugmentedBatches
from model.online import OnlineTeacher, Students
from tests.helpers import content_of
from tests.training import CPU, META, arguments, loaders, of_forgetful
from utils.device import Execution
from utils.engine import Trainer
from utils.errors import UserError
from utils.files import to_plain
from utils.losses import online_distillation
from utils.metrics import evaluate


def online_teacher(count=2, num_classes=4):
    torch.manual_seed(0)
    return OnlineTeacher([model.build("resnet_20_sparse", num_classes) for _ in range(count)], num_classes)


def pretrained_teacher(num_classes=4):
    torch.manual_seed(1)
    return model.build("resnet_20", num_classes).eval().requires_grad_(False)


def batch(count=6, num_classes=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % num_classes


@pytest.mark.parametrize("nesterov", [False, True])
def test_train_step_is_sgd_with_momentum_and_weight_decay_on_the_objective(nesterov):
    """Two steps in float64, against the update rule written out."""
    args = arguments("--lr", 0.05, "--momentum", 0.8, "--weight_decay", 0.01, "--lambda", 0.7, "--temperature", 3)
    args = replace(args, miu=0.4, nesterov=nesterov)
    learner, reference = online_teacher().double(), online_teacher().double()
    teacher = pretrained_teacher().double()
    trainer = Trainer(learner, teacher, args, CPU, Execution())
    learner.train()
    reference.train()
    images, targets = batch()
    images = images.double()
    velocity = {}
    for _ in range(2):
        losses, *_ = trainer.train_step(images, targets)
        expected = online_distillation(*reference(images), targets, 0.7, 3, pretrained_logits=teacher(images), miu=0.4)[
            "loss"
        ]
        assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-9)
        names, parameters = zip(*reference.named_parameters(), strict=True)
        for name, p, grad in zip(names, parameters, torch.autograd.grad(expected, parameters), strict=True):
            update = grad + 0.01 * p.data
            velocity[name] = 0.8 * velocity[name] + update if name in velocity else update
            p.data -= 0.05 * (update + 0.8 * velocity[name] if nesterov else velocity[name])
    for key, value in learner.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[key], rtol=1e-7, atol=1e-9)


def test_train_step_counts_correct_answers():
    learner = online_teacher(2)
    trainer = Trainer(learner, None, arguments("--lr", 1e-30), CPU, Execution())
    learner.train()
    images, targets = batch()
    _, correct, _ = trainer.train_step(images, targets)
    student_logits, teacher_logits = learner(images)
    expected = [(logits.argmax(1) == targets).sum() for logits in (*student_logits, teacher_logits)]
    assert correct.tolist() == expected


def test_accumulation_is_the_average_over_the_parts_of_a_batch():
    """Seven images in three parts, each normalized by itself: the gradients against those of the parts, one by one."""
    images, targets = batch(7)
    learner = online_teacher().double()
    reference = copy.deepcopy(learner)
    trainer = Trainer(learner, None, arguments("--accumulate", 3, "--lambda", 0.8), CPU, Execution())
    learner.train()
    losses, correct, size = trainer.train_step(images.double(), targets)
    expected, right = 0, 0
    for part in (slice(0, 3), slice(3, 5), slice(5, 7)):
        student_logits, teacher_logits = reference(images[part].double())
        weight = len(targets[part]) / 7
        loss = weight * online_distillation(student_logits, teacher_logits, targets[part], 0.8)["loss"]
        loss.backward()
        expected += loss.item()
        right += (teacher_logits.argmax(1) == targets[part]).sum().item()
    assert losses["loss"].item() == pytest.approx(expected)
    assert correct[-1].item() == right
    assert size == 7
    for mine, theirs in zip(learner.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_pretrained_teacher_stays_frozen_and_in_eval_mode():
    teacher = pretrained_teacher()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    args = replace(arguments(), miu=1.0)
    trainer = Trainer(online_teacher(), teacher, args, CPU, Execution())
    trainer.learner.train()
    losses, *_ = trainer.train_step(*batch())
    assert losses["kl_pretrained"] > 0
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_one_student_without_teachers_trains_as_plain_cross_entropy():
    torch.manual_seed(0)
    network = model.build("resnet_20_sparse", 4).double()
    torch.manual_seed(0)
    plain = model.build("resnet_20_sparse", 4).double()
    args = arguments("--num_students", 1, "--lambda", 0, "--momentum", 0, "--weight_decay", 0, "--lr", 0.1)
    trainer = Trainer(Students([network]), None, args, CPU, Execution())
    images, targets = batch()
    trainer.learner.train()
    trainer.train_step(images.double(), targets)
    F.cross_entropy(plain(images.double()), targets).backward()
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.data, q.data - 0.1 * q.grad)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batchnorm_losses_and_optimizer_stay_float32(precision):
    learner = online_teacher()
    trainer = Trainer(learner, None, arguments(), CPU, Execution(precision=precision))
    learner.train()
    losses, *_ = trainer.train_step(*batch())
    assert {value.dtype for value in losses.values()} == {torch.float32}
    floats = [value for value in learner.state_dict().values() if value.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32}
    momenta = [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
    assert {momentum.dtype for momentum in momenta} == {torch.float32}


def test_every_step_takes_its_own_rate(job, monkeypatch):
    trainer = Trainer(online_teacher(), None, arguments("--lr", 0.4), CPU, Execution())
    train, _ = loaders()
    taken, step = [], trainer.step

    def watched(*batch):
        taken.append(trainer.optimizer.param_groups[0]["lr"])
        return step(*batch)

    trainer.step = watched
    trainer.epoch = 1
    trainer.train_one_epoch(train, job, META)
    assert taken == pytest.approx([0.4 * step / 6 for step in range(1, 7)])


def test_epoch_averages_weigh_every_image_the_same(job):
    """22 images in batches of 4: the last batch, of 2, must not count as much as the others."""
    trainer = Trainer(online_teacher(), None, arguments("--lr", 1e-30, "--lambda", 0.8), CPU, Execution())
    train, _ = loaders()
    trainer.epoch = 1
    scores = trainer.train_one_epoch(train, job, META)
    expected = correct = 0
    for images, targets in train:
        student_logits, teacher_logits = trainer.learner(images)
        expected += len(targets) * online_distillation(student_logits, teacher_logits, targets, 0.8)["loss"].item()
        correct += (teacher_logits.argmax(1) == targets).sum().item()
    assert scores.loss["total"] == pytest.approx(expected / 22, rel=1e-4)
    assert scores.accuracy.online_teacher == pytest.approx(100 * correct / 22)
    assert scores.loss["total"] == pytest.approx(sum(v for k, v in scores.loss.items() if k != "total"))


def test_best_epoch_is_the_one_exported(job):
    """Epochs that end worse than an earlier one leave model_best.pt alone."""
    torch.manual_seed(0)
    args = arguments("--num_epochs", 6, "--lr", 0.1, "--warmup_epochs", 0)
    trainer = Trainer(online_teacher(), None, args, CPU, Execution())
    train, val = loaders()
    trainer.fit(train, val, job, META)
    epochs = [json.loads(line)["val"] for line in job.metrics.read_text().splitlines()]
    ranked = [(max(zip(e["accuracy"]["students"], [-x for x in e["loss"]["students"]], strict=True))) for e in epochs]
    best = ranked.index(max(ranked))
    assert trainer.best.epoch == best + 1
    assert content_of(job.best)["epoch"] == best + 1
    assert content_of(job.last)["epoch"] == 6
    trainer.load_best(job)
    assert to_plain(evaluate(trainer.learner, val)) == epochs[best]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(job):
    trainer = Trainer(
        online_teacher(), None, arguments("--num_epochs", 5, "--print_freq", 4, "--warmup_epochs", 0), CPU, Execution()
    )
    train, val = loaders()
    step, calls = trainer.step, []

    def poisoned(images, targets):
        calls.append(1)
        return step(images * (torch.nan if len(calls) == 6 + 3 else 1), targets)  # 6 steps an epoch

    trainer.step = poisoned
    with pytest.raises(UserError, match=r"epoch 2, step 3: .*ce_students nan.*learning rate 0\.1") as error:
        trainer.fit(train, val, job, META)
    assert str(job.last) in str(error.value)
    kept = content_of(job.last)
    assert kept["epoch"] == 1
    assert all(value.isfinite().all() for value in kept["model"].values())
    assert len(job.metrics.read_text().splitlines()) == 1


def test_weights_that_only_validation_shows_to_be_broken_stop_the_run(job):
    trainer = Trainer(online_teacher(), None, arguments("--num_epochs", 1), CPU, Execution())
    train, val = loaders()
    step, calls = trainer.step, []

    def poisoned(images, targets):
        calls.append(1)
        result = step(images, targets)
        if len(calls) == 6:
            trainer.learner.students[1].fc.bias.data.fill_(torch.inf)
        return result

    trainer.step = poisoned
    with pytest.raises(UserError, match="epoch 1, on the validation set"):
        trainer.fit(train, val, job, META)
    assert not job.last.exists()


def test_step_waits_for_the_device_only_every_print_freq_steps(job, monkeypatch):
    trainer = Trainer(online_teacher(), None, arguments("--print_freq", 3), CPU, Execution())
    train, _ = loaders(count=32)
    trainer.epoch = 1
    waits, steps = [], []
    step = trainer.step

    def watched(original):
        def method(self, *args, **kwargs):
            waits.append(len(steps))
            return original(self, *args, **kwargs)

        return method

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
    trainer.step = lambda *batch: (steps.append(1), step(*batch))[1]
    trainer.train_one_epoch(train, job, META)
    assert set(waits) == {3, 6, 8}  # 8: the end of the epoch


class Slow(AugmentedBatches):
    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.05)
            yield batch


@pytest.mark.parametrize("slow", ["data", "step"])
def test_log_states_how_much_of_the_time_was_waiting_for_data(job, slow):
    trainer, meta = of_forgetful("--num_epochs", 1, "--print_freq", 2)
    (train, val), step = loaders(), trainer.step
    if slow == "data":
        train.__class__ = Slow
    else:
        trainer.step = lambda *batch: (time.sleep(0.05), step(*batch))[1]
    trainer.fit(train, val, job, meta)
    shares = [int(share) for share in re.findall(r", data (\d+) %", job.log_file.read_text())]
    assert len(shares) == 3  # steps 2 and 4 of 6, and the epoch
    assert all(share > 50 if slow == "data" else share < 50 for share in shares)
