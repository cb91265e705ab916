"""The training step, the schedule, what a run keeps, and what stops it."""

import copy
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
from data.loader import AugmentedBatches, Batches
from data.sources import Split
from model.online import OnlineTeacher, Students
from tests.helpers import content_of, meta
from utils import options
from utils.checkpoint import Inputs, Meta, best_student
from utils.device import Execution
from utils.engine import Trainer
from utils.errors import UserError
from utils.files import from_plain, to_plain
from utils.job import Job, wall_times
from utils.losses import online_distillation
from utils.metrics import evaluate
from utils.options import completed

CPU = torch.device("cpu")
META = from_plain(Meta, meta(num_students=2, num_classes=4, classes=list("abcd")))


def arguments(*flags):
    return options.parse("main", ["--dataset", "digits", *map(str, flags)])


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


@pytest.fixture
def job(tmp_path):
    job = Job(tmp_path / "job", arguments().recorded())
    job.open(None, epoch=0, reset=False)
    yield job
    job.close()


def loaders(count=22, batch_size=4):
    generator = np.random.default_rng(0)
    split = Split(generator.integers(0, 256, (count, 8, 8, 3), np.uint8), np.arange(count) % 4)
    statistics = (0.5,) * 3, (0.25,) * 3, CPU
    return AugmentedBatches(split, batch_size, *statistics, padding=1, flip=False, seed=0), Batches(
        split, 10, *statistics
    )


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


class Forgetful(torch.nn.Module):
    """A network whose training draws random numbers of its own."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(192, 4)

    def forward(self, x):
        return self.fc(F.dropout(x.flatten(1), training=self.training))


def test_dropout_draws_the_same_after_a_resume(job):
    args = arguments("--num_epochs", 3, "--num_students", 1, "--lambda", 0, "--lr_decay_step", 9)
    meta = replace(META, config=args.recorded())

    def trainer():
        torch.manual_seed(0)
        return Trainer(Students([Forgetful()]), None, args, CPU, Execution())

    whole, (train, val) = trainer(), loaders()
    whole.fit(train, val, job, meta)
    first, second = trainer(), trainer()
    first.config = replace(args, num_epochs=1)
    first.fit(train, val, job, meta)
    torch.manual_seed(99)
    second.resume(job.last, meta)
    second.fit(train, val, job, meta)
    assert all(torch.equal(p, q) for p, q in zip(whole.learner.parameters(), second.learner.parameters(), strict=True))


def test_run_goes_on_exactly_from_any_step(job):
    """A run is saved after every step, and gone on with from each of those states."""
    flags = ("--num_epochs", 2, "--num_students", 1, "--lambda", 0, "--print_freq", 4)
    args = arguments(*flags, "--save_every_minutes", 1e-9)
    meta = replace(META, config=args.recorded())

    def trainer():
        torch.manual_seed(0)
        return Trainer(Students([Forgetful()]), None, args, CPU, Execution())

    whole, (train, val) = trainer(), loaders()
    states, step = [job.last.with_name(f"{i}.pt") for i in range(12)], whole.step

    def watched(*batch):
        if job.last.exists():
            shutil.copy(job.last, states[len(list(job.last.parent.glob("[0-9]*.pt")))])
        return step(*batch)

    whole.step = watched
    whole.fit(train, val, job, meta)
    metrics = [json.loads(line) for line in job.metrics.read_text().splitlines()]
    positions = []
    for path in filter(Path.exists, states):
        content = content_of(path)
        positions.append((content["epoch"], content["progress"]["position"] if content["progress"] else 0))
        resumed = trainer()
        resumed.resume(path, meta)
        torch.manual_seed(99)
        resumed.fit(train, val, job, meta)
        for p, q in zip(whole.learner.parameters(), resumed.learner.parameters(), strict=True):
            assert torch.equal(p, q)
        lines = [json.loads(line) for line in job.metrics.read_text().splitlines()]
        assert lines[-1] == metrics[-1]
        if content["epoch"] == 0:
            assert lines[-2:] == metrics
    assert positions == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (1, 5)]


def test_checkpoint_of_a_first_epoch_has_no_best_student_yet(job):
    args = arguments("--num_students", 1, "--lambda", 0, "--save_every_minutes", 1e-9)
    trainer = Trainer(Students([Forgetful()]), None, args, CPU, Execution())
    trainer.epoch = 1
    trainer.train_one_epoch(loaders()[0], job, replace(META, config=args.recorded()))
    assert content_of(job.last)["progress"]["position"] == 6
    with pytest.raises(UserError, match="is of a run's first epoch"):
        best_student(job.last)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_epochs", 4), "--lr_decay_step 1 2, not with --lr_decay_step 2 3: resume it with --lr_decay_step 1 2"),
        (("--scheduler", "cosine"), "with --scheduler step, not with --scheduler cosine"),
        (("--seed", 1), "--seed 0, not with --seed 1"),
        (("--train_size", 100), "without --train_size, not with --train_size 100: resume it without --train_size"),
        (("--sync_bn",), "without --sync_bn"),
        (("--method", "scratch"), "with --method od, not with --method scratch"),
        (("--teacher_model", "resnet_32"), "with --teacher_model resnet_20"),
        (("--teacher_dir", "x", "--miu", 0), "without --teacher_dir"),
        (("--lr", 0.3), "--lr 0.1, not with --lr 0.3"),
    ],
)
def test_resume_refuses_what_would_be_another_run(job, flags, message):
    base = ("--teacher_model", "resnet_20", "--num_epochs", 3, "--num_students", 1, "--lambda", 0)
    args, changed = arguments(*base), arguments(*base, *flags)
    first = Trainer(Students([Forgetful()]), None, args, CPU, Execution())
    first.config = replace(args, num_epochs=1)
    first.fit(*loaders(), job, replace(META, config=args.recorded()))
    with pytest.raises(UserError, match=message):
        Trainer(Students([Forgetful()]), None, changed, CPU, Execution()).resume(
            job.last, replace(META, config=changed.recorded())
        )
    with pytest.raises(UserError, match="other data"):
        Trainer(Students([Forgetful()]), None, args, CPU, Execution()).resume(
            job.last, replace(META, config=args.recorded(), classes=["another"])
        )


def test_length_of_a_cosine_schedule_is_fixed(job):
    short, long = (
        arguments("--scheduler", "cosine", "--num_epochs", n, "--num_students", 1, "--lambda", 0) for n in (1, 2)
    )
    first = Trainer(Students([Forgetful()]), None, short, CPU, Execution())
    first.fit(*loaders(), job, replace(META, config=short.recorded()))
    with pytest.raises(UserError, match="with --num_epochs 1, not with --num_epochs 2"):
        Trainer(Students([Forgetful()]), None, long, CPU, Execution()).resume(
            job.last, replace(META, config=long.recorded())
        )


NEWER_FLAGS = {
    "method", "detach_teacher", "rampup_epochs", "train_size", "image_size", "warmup_epochs", "accumulate", "sync_bn",
    "teacher_norm", "save_every_minutes", "nesterov", "label_smoothing",
}  # fmt: skip


def of_forgetful(*flags):
    """A trainer of one student, and the metadata of its run; it has no online teacher."""
    args = arguments("--teacher_model", "resnet_20", "--num_students", 1, "--lambda", 0, "--lr_decay_step", 9, *flags)
    torch.manual_seed(0)
    return Trainer(Students([Forgetful()]), None, args, CPU, Execution()), replace(META, config=args.recorded())


def test_run_of_a_version_without_newer_flags_is_resumed_as_it_was(job):
    trainer, meta = of_forgetful("--num_epochs", 1, "--warmup_epochs", 0)
    old = replace(meta, config={name: value for name, value in meta.config.items() if name not in NEWER_FLAGS})
    trainer.fit(*loaders(), job, old)
    resumed, meta = of_forgetful("--num_epochs", 2, "--warmup_epochs", 0)
    resumed.resume(job.last, meta)
    assert resumed.epoch == 1
    for flags, message in {
        ("--warmup_epochs", 1): "with --warmup_epochs 0, not with --warmup_epochs 1: resume it with",
        ("--warmup_epochs", 0, "--rampup_epochs", 2): "with --rampup_epochs 0,",
        ("--warmup_epochs", 0, "--accumulate", 2): "with --accumulate 1,",
        ("--warmup_epochs", 0, "--nesterov"): "without --nesterov,",
        ("--warmup_epochs", 0, "--label_smoothing", 0.1): "with --label_smoothing 0,",
        ("--warmup_epochs", 0, "--train_size", 9): "without --train_size",
    }.items():
        resumed, meta = of_forgetful(*flags)
        with pytest.raises(UserError, match=message) as error:
            resumed.resume(job.last, meta)
        assert "None" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"pretrain": False}, "od"),
        ({"pretrain": True}, "scratch"),
        ({"refine": "x.pt", "miu": 1.0}, "kd"),
        ({"refine": "x.pt", "miu": 0.0}, "scratch"),
    ],
)
def test_method_of_versions_that_had_no_choice(config, method):
    assert completed(config)["method"] == method


def test_fewer_epochs_than_were_trained_are_refused(job):
    trainer, meta = of_forgetful("--num_epochs", 3)
    trainer.fit(*loaders(), job, meta)
    for epochs, works in {2: False, 3: True, 4: True}.items():
        resumed, meta = of_forgetful("--num_epochs", epochs)
        if works:
            resumed.resume(job.last, meta)
        else:
            with pytest.raises(UserError, match="is of epoch 3 already: give --num_epochs 3 or more"):
                resumed.resume(job.last, meta)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("train", {"count": 23, "sha256": "b"}, r"other training images \(22, now 23\): give the same, or .* --force"),
        ("test", {"count": 22, "sha256": "b"}, "other test images"),
        ("teacher", "b", "other weights of the pretrained teacher"),
        ("refined", "b", "other weights of the student to refine"),
    ],
)
def test_resume_from_other_data_or_networks_is_refused_unless_forced(job, name, other, message):
    trainer, meta = of_forgetful("--num_epochs", 1)
    images = {"count": 22, "sha256": "a"}
    inputs = {"train": images, "val": images, "test": images, "teacher": "a", "refined": "a"}
    meta = replace(meta, inputs=from_plain(Inputs, inputs))
    trainer.fit(*loaders(), job, meta)
    resumed, _ = of_forgetful()
    resumed.resume(job.last, meta)
    changed = replace(meta, inputs=from_plain(Inputs, inputs | {name: other}))
    with pytest.raises(UserError, match=message):
        resumed.resume(job.last, changed)
    resumed.resume(job.last, changed, force=True)


def test_resumed_run_says_what_changes_its_last_bits(job):
    trainer, meta = of_forgetful("--num_epochs", 1)
    trainer.fit(*loaders(), job, meta)
    resumed, _ = of_forgetful()
    resumed.resume(job.last, meta)
    assert resumed.reached == "epoch 1"
    resumed.environment = trainer.environment | {"threads": 77, "precision": "bf16"}
    resumed.resume(job.last, meta)
    threads = trainer.environment["threads"]
    assert f"epoch 1, with threads 77 (was {threads}), precision bf16 (was fp32): results may" in resumed.reached


def test_no_speed_is_told_of_an_epoch_whose_steps_were_done_before(job):
    trainer, meta = of_forgetful("--num_epochs", 1, "--save_every_minutes", 1e-9)
    trainer.epoch = 1
    trainer.train_one_epoch(loaders()[0], job, meta)
    resumed, meta = of_forgetful("--num_epochs", 1)
    resumed.resume(job.last, meta)
    resumed.fit(*loaders(), job, meta)
    assert "epoch 1/1: loss" in job.log_file.read_text()
    assert "images/s" not in job.log_file.read_text()


def test_tensorboard_keeps_the_wall_times_of_a_resumed_run(job):
    trainer, meta = of_forgetful("--num_epochs", 2)
    trainer.fit(*loaders(), job, meta)
    job.close()
    times = wall_times(job.events / "test")
    assert times.keys() >= {1, 2}
    time.sleep(0.1)
    job.open(job.last, epoch=2, reset=False)
    assert wall_times(job.events / "test").items() >= {step: times[step] for step in (1, 2)}.items()


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
