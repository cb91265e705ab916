"""Flags and other input that cannot be right: one line, code 2, nothing written."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import finetune
import main
import model
from model.conv import KINDS
from tests.helpers import ROOT, make_tree
from utils import options
from utils.errors import UserError
from utils.job import Job
from utils.losses import REDUCTIONS


def rejected(capsys, script, *flags):
    """The one line with which a script's flags are refused."""
    with pytest.raises(SystemExit) as exit_:
        options.parse(script, list(map(str, flags)))
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


REFINE = ("--refine", "x.pt")


CONTRADICTIONS = [
    ("main", ("--lamda", "0.8"), "did you mean --lambda?"),
    ("main", ("--num_student", "2"), "did you mean --num_students?"),
    ("main", ("--conv", "dense"), "depthwise"),
    ("main", ("--lr", "0"), "a number above 0"),
    ("main", ("--lr", "nan"), "a number above 0"),
    ("main", ("--lambda", "-1"), "0 or more"),
    ("main", ("--num_epochs", "1.5"), "a whole number above 0"),
    ("main", ("--num_students", "0"), "a whole number above 0"),
    ("main", ("--pruned_num", "-1"), "0 or more"),
    ("main", ("--momentum", "1"), "below 1"),
    ("main", ("--temperature", "1e200"), "at most 1000"),
    ("main", ("--nesterov", "--momentum", "0"), "--nesterov needs a --momentum above 0"),
    ("finetune", (*REFINE, "--nesterov", "--momentum", "0"), "--nesterov needs a --momentum above 0"),
    ("main", ("--label_smoothing", "1"), "below 1"),
    ("main", ("--train_batch_size", "1"), "BatchNorm cannot train on a single image"),
    ("main", ("--eval_batch_size", "99999999999999999999"), "a whole number above 0"),
    ("main", ("--job_dir", "a\udcff"), "valid UTF-8"),
    ("main", ("--job_dir", ""), "must not be empty"),
    ("main", ("--resume", ""), "must not be empty"),
    ("main", ("--image_size", "32.5"), "a whole number above 0"),
    ("main", ("--val_size", "1.5"), "a fraction below 1 or a whole number"),
    ("main", ("--miu", "1"), "needs a pretrained teacher: give --teacher_dir"),
    ("main", ("--groups", "4"), "--conv group"),
    ("main", ("--refine", "x.pt"), "belongs to finetune.py"),
    ("main", ("--pruned",), "belongs to finetune.py"),
    ("main", ("--pretrain", "--num_students", "2"), "leave out --num_students"),
    ("main", ("--pretrain", "--lambda", "0.5"), "leave out --lambda"),
    ("main", ("--pretrain", "--conv", "shift"), "leave out --conv"),
    ("main", ("--student_model", "resnet_20", "--conv", "shift"), "leave out --conv or add _sparse"),
    ("main", ("--pretrain", "--method", "kd"), "leave out --method"),
    ("main", ("--method", "hinton"), "invalid choice: 'hinton'"),
    ("main", ("--method", "scratch", "--lambda", "1"), "scratch has no online term: leave out --lambda"),
    ("main", ("--method", "kd", "--teacher_dir", "x", "--rampup_epochs", "1"), "leave out --rampup_epochs"),
    ("main", ("--method", "dml", "--teacher_dir", "x", "--miu", "1"), "no pretrained teacher: leave out --miu"),
    ("main", ("--method", "kd"), "give --teacher_dir"),
    ("main", ("--method", "kd", "--teacher_dir", "x", "--miu", "0"), "no --miu 0"),
    ("main", ("--method", "one", "--num_students", "1"), "--num_students must be 2 or more"),
    ("main", ("--method", "one", "--detach_teacher"), "belongs to --method od"),
    ("main", ("--method", "kdcl", "--num_students", "1"), "--num_students must be 2 or more"),
    ("main", ("--method", "kdcl", "--teacher_dir", "x", "--miu", "1"), "no pretrained teacher: leave out --miu"),
    ("main", ("--method", "okddip", "--num_students", "2"), "--num_students must be 3 or more"),
    ("main", ("--method", "okddip", "--detach_teacher"), "belongs to --method od"),
    ("main", ("--method", "okddip", "--export_teacher"), "this run has none"),
    ("main", ("--train_size", "0"), "above 0"),
    ("main", ("--scheduler", "cosine", "--lr_decay_step", "3"), "--scheduler step"),
    ("main", ("--resume", "--reset"), "give one of them"),
    ("main", ("--test_only", "--reset"), "leave out --reset"),
    ("finetune", (), "--refine FILE is missing"),
    ("finetune", (*REFINE, "--pretrain"), "belongs to main.py"),
    ("finetune", (*REFINE, "--pruned_num", "auto"), "leave out --pruned_num"),
    ("finetune", (*REFINE, "--max_drop", "2"), "leave out --max_drop"),
    ("finetune", (*REFINE, "--lambda", "0.8"), "leave out --lambda"),
    ("finetune", (*REFINE, "--num_students", "4"), "leave out --num_students"),
    ("finetune", (*REFINE, "--method", "od"), "leave out --method"),
    ("finetune", (*REFINE, "--miu", "1"), "needs a pretrained teacher"),
]


@pytest.mark.parametrize(("script", "flags", "message"), CONTRADICTIONS)
def test_contradictions_are_refused(capsys, script, flags, message):
    assert message in rejected(capsys, script, *flags)


def test_help_and_contradictions_are_answered_without_pytorch():
    code = """
import json, runpy, sys
sys.modules["torch"] = None  # to import it is an ImportError
for script, flags in json.load(sys.stdin):
    sys.argv = [f"{script}.py", *flags]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert end.code == (0 if "--help" in flags else 2), sys.argv
"""
    commands = [(script, flags) for script, flags, _ in CONTRADICTIONS] + [
        ("main", ["--help"]),
        ("finetune", ["--help"]),
    ]
    command = [sys.executable, "-c", code]
    subprocess.run(command, input=json.dumps(commands), cwd=ROOT, text=True, stdout=subprocess.DEVNULL, check=True)


def test_defaults_are_the_paper_s_recipe():
    args = options.parse("main", [])
    assert (args.arch, args.teacher_model, args.student_model) == ("resnet", "resnet_56", "resnet_56_sparse")
    assert (args.dataset, args.num_epochs, args.train_batch_size, args.eval_batch_size) == ("cifar10", 300, 128, 100)
    assert (args.lr, args.momentum, args.weight_decay, args.lr_decay_step) == (0.1, 0.9, 2e-4, [150, 225])
    assert (args.num_students, args.lam, args.miu, args.temperature) == (4, 0.1, 0.0, 4.0)
    assert args.kl_reduction == "batchmean"
    assert options.parse("main", ["--teacher_dir", "x"]).miu == 1.0
    assert options.parse("finetune", [*REFINE]).lr == 1e-4


@pytest.mark.parametrize(
    ("method", "expected"),  # students, lambda, miu, T, epochs of ramp-up, of the papers; with a pretrained teacher
    [
        ("od", (4, 0.1, 1.0, 4.0, 0.0)),
        ("scratch", (1, 0.0, 0.0, 4.0, 0.0)),
        ("kd", (1, 0.0, 1.0, 4.0, 0.0)),
        ("dml", (4, 1.0, 0.0, 1.0, 0.0)),
        ("one", (4, 1.0, 0.0, 3.0, 80.0)),
        ("kdcl", (4, 1.0, 0.0, 2.0, 0.0)),
        ("okddip", (4, 1.0, 0.0, 3.0, 80.0)),
    ],
)
def test_defaults_of_a_method_are_those_of_its_paper(method, expected):
    args = options.parse("main", ["--method", method, "--teacher_dir", "x"])
    assert (args.num_students, args.lam, args.miu, args.temperature, args.rampup_epochs) == expected


def test_choices_are_those_of_the_code():
    choices = {action.dest: action.choices for action in options.build_parser("main")._actions if action.choices}
    assert tuple(choices["conv"]) == KINDS
    assert tuple(choices["kl_reduction"]) == REDUCTIONS


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("main", "--conv group --groups 2 --lr_decay_step 3 4 --sync_bn --export onnx pt2 --job_dir 'a $b `c`'"),
        ("main", "--pretrain --dataset folder --data_dir 'my photos' --resume --job_dir=-x"),
        ("main", "--method dml --num_epochs 5 --reset --teacher_norm=0,0,0/1,1,1 --teacher_dir x.pt"),
        ("finetune", "--refine 'a b.pt' --pruned --teacher_dir x.pt --lr 1e-5 --job_dir y"),
    ],
)
def test_the_command_of_a_configuration_gives_the_same_configuration(script, flags):
    config = options.parse(script, shlex.split(flags))
    command, defaults = options.command(config)
    python, file, *words = shlex.split(command)
    assert (python, file) == ("python", f"{script}.py")
    assert not {"--resume", "--reset"} & set(words)
    again = options.parse(script, words)
    assert again.recorded() == config.recorded()
    assert (again.export, again.typed) == (config.export, config.typed - {"resume", "reset"})
    assert "--momentum 0.9" in defaults


def test_student_follows_the_standard_network():
    assert options.parse("main", ["--teacher_model", "resnet_20"]).student_model == "resnet_20_sparse"


@pytest.mark.parametrize("script", ["main", "finetune"])
def test_both_scripts_know_every_flag(script):
    flags = """--arch --teacher_model --student_model --teacher_dir --lambda --miu --job_dir --refine --pruned --lr
    --conv --groups --pruned_num --num_students --temperature --kl_reduction --dataset --data_dir --val_size
    --image_size --num_epochs --train_batch_size --eval_batch_size --momentum --weight_decay --lr_decay_step
    --scheduler --resume --reset --test_only --pretrain --seed --workers --device --precision --compile --print_freq"""
    known = {flag for action in options.build_parser(script)._actions for flag in action.option_strings}
    assert set(flags.split()) <= known


def folder_without_images(path):
    make_tree(path / "set")
    for image in (path / "set").rglob("*.png"):
        image.unlink()
    return ("--dataset", "folder", "--data_dir", path / "set")


def folder_of_one_class(path):
    make_tree(path / "set", classes=("cat",))
    return ("--dataset", "folder", "--data_dir", path / "set")


def teacher(path, name="resnet_20", num_classes=10):
    torch.save(model.build(name, num_classes).state_dict(), path / "teacher.pt")
    return ("--teacher_dir", path / "teacher.pt")


def empty_folder(path):
    (path / "empty").mkdir()
    return ("--teacher_dir", path / "empty")


def job_dir_below_a_file(path):
    (path / "file").touch()
    return ("--job_dir", path / "file" / "job")


def job_dir_that_is_a_file(path):
    (path / "file").touch()
    return ("--job_dir", path / "file")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: ("--teacher_dir", path / "nowhere"), "does not exist"),
        (empty_folder, "holds no checkpoint"),
        (lambda path: teacher(path, "resnet_32"), "does not match"),
        (lambda path: teacher(path, num_classes=100), r"fc\.weight is \(100, 64\)"),
        (lambda path: ("--arch", "resnext"), "unknown architecture 'resnext': try resnet"),
        (lambda path: ("--teacher_model", "resnet_21"), "unknown network 'resnet_21': try .*resnet_20"),
        (lambda path: ("--student_model", "resnet_20_spars"), "try resnet_20_sparse"),
        (lambda path: ("--teacher_model", "resnet_20_sparse"), "is a student: the teacher is the standard network"),
        (lambda path: ("--pretrain", "--teacher_model", "resnet_20_sparse"), "is a student"),
        (lambda path: ("--dataset", "mnist"), "choose from digits"),
        (lambda path: ("--dataset", "folder"), "needs --data_dir"),
        (lambda path: ("--dataset", "folder", "--data_dir", path / "nowhere"), "no folder train"),
        (folder_without_images, "no images"),
        (lambda path: ("--image_size", 32), "digits has images of one size, leave it out"),
        (lambda path: ("--dataset", "svhn", "--image_size", 32), "svhn has images of one size, leave it out"),
        (lambda path: ("--dataset", "imagenet"), "needs --data_dir"),
        (lambda path: ("--dataset", "imagenet", "--data_dir", path), "no folder train"),
        (folder_of_one_class, "at least 2 are needed"),
        (lambda path: ("--conv", "group", "--groups", 3), "does not divide the 16 channels"),
        (lambda path: ("--pruned_num", 19), "out of range: this network has 18"),
        (lambda path: ("--val_size", 5000), "leaves nothing to train on"),
        (lambda path: ("--train_size", 5000), "not between 2 and the 1293 training images"),
        (lambda path: ("--device", "tpu"), "choose auto, cpu"),
        (lambda path: ("--device", "cuda:99"), "not usable here"),
        (job_dir_below_a_file, "not a writable folder"),
        (job_dir_that_is_a_file, "not a writable folder"),
        (lambda path: ("--job_dir", "/proc/nothing/here"), "cannot be written"),
        (lambda path: ("--resume", path / "nowhere.pt"), "does not exist"),
        (lambda path: ("--test_only",), "finds no checkpoint"),
    ],
)
def test_bad_input_to_main_is_refused_before_anything_is_written(tmp_path, prepare, message):
    flags = ("--dataset", "digits", "--teacher_model", "resnet_20", "--job_dir", tmp_path / "job")
    args = options.parse("main", [*map(str, (*flags, *prepare(tmp_path)))])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        main.main(args)
    assert len(str(error.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("named", ["the folder", "the file"])
def test_reset_never_deletes_the_teacher_that_the_run_needs(runs, tmp_path, named):
    """A pretrained teacher's own job_dir, given for the students as well."""
    job = tmp_path / "job"
    shutil.copytree(runs.teacher, job)
    before = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    source = job if named == "the folder" else job / "resnet_20.pt"
    flags = (
        "--dataset",
        "digits",
        "--teacher_model",
        "resnet_20",
        "--teacher_dir",
        source,
        "--job_dir",
        job,
        "--reset",
    )
    with pytest.raises(UserError, match="--reset would delete"):
        main.main(options.parse("main", list(map(str, flags))))
    assert {path: path.read_bytes() for path in job.rglob("*") if path.is_file()} == before


def test_reset_minds_only_what_it_deletes(runs, tmp_path):
    """A teacher in a folder of its own below the job_dir is in no danger."""
    shutil.copytree(runs.teacher, tmp_path / "job" / "teacher")
    job = Job(tmp_path / "job", {"pretrain": False, "arch": "resnet", "pruned_num": 18})
    assert job.checkpoint_to_resume(None, True, [tmp_path / "job" / "teacher"]) is None


def test_missing_data_set_without_a_network(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    args = options.parse("main", ["--data_dir", str(tmp_path / "none"), "--job_dir", str(tmp_path / "job")])
    with pytest.raises(UserError, match=r"could not be downloaded .*--data_dir, or try --dataset digits"):
        main.main(args)
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--conv", "shift"), "--conv shift, but .* says depthwise"),
        (("--student_model", "resnet_32_sparse"), "says resnet_20_sparse"),
        (("--pruned_num", "3"), "says 18"),
        (("--val_size", "0.3"), "validated on images that it was trained on; give --val_size 0.1"),
        (("--teacher_model", "resnet_21"), "unknown network 'resnet_21'"),
        (("--teacher_model", "resnet_32_sparse"), "is a student"),
    ],
)
def test_flags_that_contradict_the_refined_file(runs, tmp_path, flags, message):
    args = options.parse("finetune", [*map(str, runs.refine_flags), *flags, "--job_dir", str(tmp_path / "job")])
    with pytest.raises(UserError, match=message):
        finetune.main(args)
    assert not (tmp_path / "job").exists()


def test_refining_on_data_of_other_classes_is_refused(runs, tmp_path):
    make_tree(tmp_path / "set")
    flags = [*runs.refine_flags, "--dataset", "folder", "--data_dir", tmp_path / "set", "--job_dir", tmp_path / "job"]
    with pytest.raises(UserError, match="knows other classes"):
        finetune.main(options.parse("finetune", list(map(str, flags))))
