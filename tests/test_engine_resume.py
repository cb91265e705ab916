"""Training that goes on where a checkpoint ends, and what is refused as another run."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.online import Students
from tests.helpers import content_of
from tests.training import CPU, META, Forgetful, arguments, loaders, of_forgetful
from utils.checkpoint import Inputs, best_student
from utils.device import Execution
from utils.engine import Trainer
from utils.errors import UserError
from utils.files import from_plain
from utils.job import wall_times
from utils.options import completed


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
