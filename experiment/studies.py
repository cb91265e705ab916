"""The studies: one row of a table per line, with its title, the name of its variant and its flags of main.py.

A run's flags are those of its study, of its table and of its row; of two equal flags the last one counts. Runs are done
in the order of the tables, and within a table seed by seed.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """
    Attributes:
        flags: with --pretrain the row trains a standard network, and the table's flags do not apply.
        teacher: variant of the row whose exported network is the pretrained teacher (--teacher_dir).
    """

    title: str
    variant: str
    flags: str
    teacher: str | None = None
    seeds: int = 3


class Table(NamedTuple):
    """Rows that are compared with each other.

    Attributes:
        key: first part of the names of its runs.
        flags: of its students.
        compared: pairs (variant, other variant) whose difference is stated.
    """

    key: str
    title: str
    flags: str
    rows: tuple[Row, ...]
    compared: tuple[tuple[str, str], ...] = ()


class Study(NamedTuple):
    """
    Attributes:
        data: what --data_dir has to contain; None if the study needs no --data_dir.
        flags: of every run.
    """

    title: str
    data: str | None
    flags: str
    tables: tuple[Table, ...]


TEACHER_FREE = (("od_teacher_free", "scratch"), ("od_teacher_free", "dml"), ("od_teacher_free", "one"))
WITH_TEACHER = (("od", "scratch"), ("od", "kd"), ("od", "od_teacher_free"), ("od", "od_lambda_0"))
FROM_WEIGHTS = (("scratch_init", "scratch"), ("kd_init", "scratch_init"), ("od_init", "scratch_init"))
TRANSFER = (("scratch_init_transfer", "scratch"), ("od_init_transfer", "scratch_init_transfer"))

CIFAR = "--dataset folder --val_size 5000 --arch resnet --teacher_model resnet_20 --num_epochs 30 --precision bf16"
SIZE_5000 = "--train_size 5000 --num_epochs 60"

DEPTHWISE_ROWS = (
    Row("standard: the pretrained teacher", "teacher", "--pretrain", seeds=1),
    Row("scratch", "scratch", "--method scratch"),
    Row("KD", "kd", "--method kd", "teacher"),
    Row("scratch, from the teacher's weights", "scratch_init", "--method scratch --init teacher", "teacher"),
    Row("KD, from the teacher's weights", "kd_init", "--method kd --init teacher", "teacher"),
    Row("OD, no pretrained teacher (μ = 0)", "od_teacher_free", ""),
    Row("OD", "od", "", "teacher"),
    Row("OD, from the teacher's weights", "od_init", "--init teacher", "teacher"),
    Row("standard, 60 epochs", "teacher_60", "--pretrain --num_epochs 60", seeds=1),
    Row("scratch, 60 epochs", "scratch_60", "--method scratch --num_epochs 60", seeds=1),
    Row("OD, λ = 0, no pretrained teacher", "od_teacher_free_lambda_0", "--lambda 0"),
    Row("OD, λ = 0", "od_lambda_0", "--lambda 0", "teacher"),
    Row("DML", "dml", "--method dml"),
    Row("ONE", "one", "--method one"),
)
DEPTHWISE_5000_ROWS = (
    Row("standard: the pretrained teacher", "teacher_5000", f"--pretrain {SIZE_5000}", seeds=1),
    Row("scratch", "scratch", "--method scratch"),
    Row("KD", "kd", "--method kd", "teacher_5000"),
    Row("OD, no pretrained teacher (μ = 0)", "od_teacher_free", ""),
    Row("OD", "od", "", "teacher_5000"),
    Row("scratch, from the teacher's weights", "scratch_init", "--method scratch --init teacher", "teacher_5000"),
    Row("KD, from the teacher's weights", "kd_init", "--method kd --init teacher", "teacher_5000"),
    Row("OD, from the teacher's weights", "od_init", "--init teacher", "teacher_5000"),
    Row("KD, teacher of 45,000 images", "kd_transfer", "--method kd", "teacher"),
    Row("OD, teacher of 45,000 images", "od_transfer", "", "teacher"),
    Row("scratch, weights of 45,000 images", "scratch_init_transfer", "--method scratch --init teacher", "teacher"),
    Row("KD, weights of 45,000 images", "kd_init_transfer", "--method kd --init teacher", "teacher"),
    Row("OD, weights of 45,000 images", "od_init_transfer", "--init teacher", "teacher"),
)
SHIFT_GROUP_5000_ROWS = (
    Row("scratch", "scratch", "--method scratch"),
    Row("scratch, from the teacher's weights", "scratch_init", "--method scratch --init teacher", "teacher_5000"),
    Row("OD, from the teacher's weights", "od_init", "--init teacher", "teacher_5000"),
)
SHIFT_ROWS = (
    Row("scratch", "scratch", "--method scratch"),
    Row("scratch, from the teacher's weights", "scratch_init", "--method scratch --init teacher", "teacher"),
    Row("OD, no pretrained teacher (μ = 0)", "od_teacher_free", ""),
    Row("scratch, 120 epochs", "scratch_120", "--method scratch --num_epochs 120", seeds=1),
)
CIFAR100 = Study(
    "CIFAR-100, ResNet-20",
    "CIFAR-100 as a tree of image files, train/<class>/* and test/<class>/*",
    CIFAR,
    (
        Table(
            "depthwise",
            "Depthwise, 45,000 training images, 30 epochs",
            "--conv depthwise",
            DEPTHWISE_ROWS,
            (*TEACHER_FREE, ("od_teacher_free", "od_teacher_free_lambda_0"), *WITH_TEACHER, *FROM_WEIGHTS),
        ),
        Table(
            "depthwise_5000",
            "Depthwise, 5,000 training images, 60 epochs",
            f"--conv depthwise {SIZE_5000}",
            DEPTHWISE_5000_ROWS,
            (("od_teacher_free", "scratch"), *WITH_TEACHER[:3], *FROM_WEIGHTS, *TRANSFER),
        ),
        Table(
            "shift_5000",
            "Shift, 5,000 training images, 60 epochs",
            f"--conv shift {SIZE_5000}",
            SHIFT_GROUP_5000_ROWS,
            (FROM_WEIGHTS[0], FROM_WEIGHTS[2]),
        ),
        Table(
            "group_5000",
            "Group (g = 4), 5,000 training images, 60 epochs",
            f"--conv group {SIZE_5000}",
            SHIFT_GROUP_5000_ROWS,
            (FROM_WEIGHTS[0], FROM_WEIGHTS[2]),
        ),
        Table(
            "shift",
            "Shift, 45,000 training images, 30 epochs",
            "--conv shift",
            SHIFT_ROWS,
            (("od_teacher_free", "scratch"), FROM_WEIGHTS[0]),
        ),
    ),
)

CIFAR10_ROWS = (
    Row("standard: the pretrained teacher", "teacher", "--pretrain", seeds=1),
    Row("scratch", "scratch", "--method scratch"),
    Row("scratch, from the teacher's weights", "scratch_init", "--method scratch --init teacher", "teacher"),
    Row("OD, no pretrained teacher (μ = 0)", "od_teacher_free", ""),
    Row("OD, from the teacher's weights", "od_init", "--init teacher", "teacher"),
)
CIFAR10 = Study(
    "CIFAR-10, ResNet-20",
    "CIFAR-10 as a tree of image files, train/<class>/* and test/<class>/*",
    CIFAR,
    (
        Table(
            "depthwise",
            "Depthwise, 45,000 training images, 30 epochs",
            "--conv depthwise",
            CIFAR10_ROWS,
            (("od_teacher_free", "scratch"), FROM_WEIGHTS[0], FROM_WEIGHTS[2]),
        ),
    ),
)

DIGITS_ROWS = (
    Row("scratch", "scratch", "--method scratch", seeds=5),
    Row("KD", "kd", "--method kd", "teacher", seeds=5),
    Row("OD", "od", "", "teacher", seeds=5),
    Row("OD, λ = 0", "od_lambda_0", "--lambda 0", "teacher", seeds=5),
    Row("OD, no pretrained teacher (μ = 0)", "od_teacher_free", "", seeds=5),
    Row("DML", "dml", "--method dml", seeds=5),
    Row("ONE", "one", "--method one", seeds=5),
)
DIGITS = Study(
    "The embedded digits, ResNet-20",
    None,
    "--dataset digits --train_size 300 --train_batch_size 32 --arch resnet --teacher_model resnet_20 --num_epochs 40",
    (
        Table(
            "resnet_20-depthwise",
            "Depthwise",
            "--conv depthwise",
            (Row("standard: the pretrained teacher", "teacher", "--pretrain", seeds=1), *DIGITS_ROWS),
            (*TEACHER_FREE, *WITH_TEACHER),
        ),
        Table("resnet_20-group", "Group (g = 4)", "--conv group", DIGITS_ROWS, (*TEACHER_FREE, *WITH_TEACHER)),
        Table("resnet_20-shift", "Shift", "--conv shift", DIGITS_ROWS, (*TEACHER_FREE, *WITH_TEACHER)),
    ),
)

STUDIES = {"digits": DIGITS, "cifar100": CIFAR100, "cifar10": CIFAR10}
