"""The studies: their tables, and the rows of these, one a line with its title, its variant and its flags of main.py.

A run's flags are those of its study, of its table and of its row; of two equal flags the last one counts. Runs are done
in the order of the tables, and within a table seed by seed.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """Runs that differ in their seeds."""

    title: str
    variant: str  # in the names of its runs
    flags: str  # with --pretrain the row trains a standard network, and the table's flags do not apply
    teacher: str | None = None  # variant of the row whose exported network is the pretrained teacher (--teacher_dir)
    seeds: int | None = None  # None for those of the study


class Table(NamedTuple):
    """Rows that are compared with each other."""

    key: str  # first part of the names of its runs
    title: str
    flags: str  # of its students
    rows: tuple[Row, ...]


class Study(NamedTuple):
    """Tables on the same data."""

    title: str
    data: str | None  # content of --data_dir; None if the study needs no --data_dir
    flags: str  # of every run
    tables: tuple[Table, ...]
    seeds: int = 3


SIZE_5000 = "--train_size 5000 --num_epochs 60"


def _rows(variants: str, teacher: str = "teacher") -> tuple[Row, ...]:
    """The rows of these variants; `teacher` is the pretrained teacher's variant where a row names no other one."""
    rows = (
        Row("standard: the pretrained teacher", "teacher", "--pretrain", seeds=1),
        Row("standard: the pretrained teacher", "teacher_5000", f"--pretrain {SIZE_5000}", seeds=1),
        Row("standard, 60 epochs", "teacher_60", "--pretrain --num_epochs 60", seeds=1),
        Row("scratch", "scratch", "--method scratch"),
        Row("scratch, 60 epochs", "scratch_60", "--method scratch --num_epochs 60", seeds=1),
        Row("scratch, 120 epochs", "scratch_120", "--method scratch --num_epochs 120", seeds=1),
        Row("scratch, from the teacher's weights", "scratch_init", "--method scratch --init teacher", teacher),
        Row("scratch, weights of 45,000 images", "scratch_init_transfer", "--method scratch --init teacher", "teacher"),
        Row("KD", "kd", "--method kd", teacher),
        Row("KD, from the teacher's weights", "kd_init", "--method kd --init teacher", teacher),
        Row("KD, teacher of 45,000 images", "kd_transfer", "--method kd", "teacher"),
        Row("KD, weights of 45,000 images", "kd_init_transfer", "--method kd --init teacher", "teacher"),
        Row("OD", "od", "", teacher),
        Row("OD, λ = 0", "od_lambda_0", "--lambda 0", teacher),
        Row("OD, from the teacher's weights", "od_init", "--init teacher", teacher),
        Row("OD, from the teacher's weights, μ = 0", "od_init_miu_0", "--init teacher --miu 0", teacher, seeds=1),
        Row("OD, teacher of 45,000 images", "od_transfer", "", "teacher"),
        Row("OD, weights of 45,000 images", "od_init_transfer", "--init teacher", "teacher"),
        Row("OD, no pretrained teacher (μ = 0)", "od_teacher_free", ""),
        Row("OD, no pretrained teacher, 60 epochs", "od_teacher_free_60", "--num_epochs 60", seeds=1),
        Row("OD, λ = 0, no pretrained teacher", "od_teacher_free_lambda_0", "--lambda 0"),
        Row("DML", "dml", "--method dml"),
        Row("ONE", "one", "--method one"),
        Row("KDCL-MinLogit", "kdcl", "--method kdcl", seeds=1),
        Row("OKDDip", "okddip", "--method okddip", seeds=1),
    )
    by_variant = {row.variant: row for row in rows}
    return tuple(by_variant[variant] for variant in variants.split())


# A table states the differences of these variants to the others, as far as it has both.
COMPARED = {
    "od_teacher_free": "scratch dml one od_teacher_free_lambda_0",
    "od": "scratch kd od_teacher_free od_lambda_0",
    "scratch_init": "scratch",
    "kd_init": "scratch_init",
    "od_init": "scratch_init od_init_miu_0",
    "od_teacher_free_60": "scratch_60",
    "scratch_init_transfer": "scratch",
    "od_init_transfer": "scratch_init_transfer",
}

CIFAR = "--dataset folder --val_size 5000 --arch resnet --teacher_model resnet_20 --num_epochs 30 --precision bf16"
TREE = "as a tree of image files, train/<class>/* and test/<class>/*"
FEW, ALL = "5,000 training images, 60 epochs", "45,000 training images, 30 epochs"
ALL_VARIANTS = (
    "teacher scratch kd scratch_init kd_init od_teacher_free od od_init teacher_60 scratch_60 od_teacher_free_60 "
    "od_init_miu_0 od_teacher_free_lambda_0 od_lambda_0 dml one kdcl okddip"
)
FEW_VARIANTS = "scratch scratch_init od_init"
TRANSFER_VARIANTS = (
    "teacher_5000 scratch kd od_teacher_free od scratch_init kd_init od_init kd_transfer od_transfer "
    "scratch_init_transfer kd_init_transfer od_init_transfer"
)
CIFAR10_VARIANTS = "teacher scratch scratch_init od_teacher_free od_init"
DEPTHWISE, DEPTHWISE_5000 = "--conv depthwise", f"--conv depthwise {SIZE_5000}"
CIFAR100 = Study(
    "CIFAR-100, ResNet-20",
    f"CIFAR-100 {TREE}",
    CIFAR,
    (
        Table("depthwise", f"Depthwise, {ALL}", DEPTHWISE, _rows(ALL_VARIANTS)),
        Table("depthwise_5000", f"Depthwise, {FEW}", DEPTHWISE_5000, _rows(TRANSFER_VARIANTS, "teacher_5000")),
        Table("shift_5000", f"Shift, {FEW}", f"--conv shift {SIZE_5000}", _rows(FEW_VARIANTS, "teacher_5000")),
        Table("group_5000", f"Group (g = 4), {FEW}", f"--conv group {SIZE_5000}", _rows(FEW_VARIANTS, "teacher_5000")),
        Table("shift", f"Shift, {ALL}", "--conv shift", _rows("scratch scratch_init od_teacher_free scratch_120")),
    ),
)
CIFAR10 = Study(
    "CIFAR-10, ResNet-20",
    f"CIFAR-10 {TREE}",
    CIFAR,
    (Table("depthwise", f"Depthwise, {ALL}", DEPTHWISE, _rows(CIFAR10_VARIANTS)),),
)
DIGITS_ROWS = _rows("scratch kd od od_lambda_0 od_teacher_free dml one")
DIGITS = Study(
    "The embedded digits, ResNet-20",
    None,
    "--dataset digits --train_size 300 --train_batch_size 32 --arch resnet --teacher_model resnet_20 --num_epochs 40",
    (
        Table("resnet_20-depthwise", "Depthwise", "--conv depthwise", _rows("teacher") + DIGITS_ROWS),
        Table("resnet_20-group", "Group (g = 4)", "--conv group", DIGITS_ROWS),
        Table("resnet_20-shift", "Shift", "--conv shift", DIGITS_ROWS),
    ),
    seeds=5,
)

STUDIES = {"digits": DIGITS, "cifar100": CIFAR100, "cifar10": CIFAR10}
