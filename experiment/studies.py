"""The studies: one row of a table a line, with its title, the name of its variant and the flags of main.py.

In flags, {teacher} stands for the checkpoint that the row of that variant trains. A study's own flags come first; of
two equal flags the last one counts. Runs are done in the order of the tables, and within a table seed by seed.
"""

from typing import NamedTuple


class Row(NamedTuple):
    title: str
    variant: str
    flags: str
    seeds: int = 3


class Table(NamedTuple):
    """Rows that are compared with each other.

    Attributes:
        key: begins the names of its runs.
        compared: (variant, other variant), differences to state.
    """

    key: str
    title: str
    rows: tuple[Row, ...]
    compared: tuple[tuple[str, str], ...] = ()


class Study(NamedTuple):
    """
    Attributes:
        data: what --data_dir has to be; None where none is needed.
        flags: of every run.
    """

    title: str
    data: str | None
    flags: str
    tables: tuple[Table, ...]


TEACHER_FREE = (("od_teacher_free", "scratch"), ("od_teacher_free", "dml"), ("od_teacher_free", "one"))
WITH_TEACHER = (("od", "scratch"), ("od", "kd"), ("od", "od_teacher_free"), ("od", "od_lambda_0"))
FROM_WEIGHTS = (("scratch_init", "scratch"), ("kd_init", "scratch_init"), ("od_init", "scratch_init"))
FLAGS = "--dataset folder --val_size 5000 --arch resnet --teacher_model resnet_20 --num_epochs 30 --precision bf16"

CIFAR100 = Study(
    "CIFAR-100, ResNet-20",
    "CIFAR-100 as a tree of image files, train/<class>/* and test/<class>/*",
    FLAGS,
    (
        Table(
            "depthwise",
            "Depthwise, 45,000 training images, 30 epochs",
            (
                Row("standard: the pretrained teacher", "teacher", "--pretrain", seeds=1),
                Row("scratch", "scratch", "--conv depthwise --method scratch"),
                Row("KD", "kd", "--conv depthwise --method kd --teacher_dir {teacher}"),
                Row("scratch, from the teacher's weights", "scratch_init",
                    "--conv depthwise --method scratch --init teacher --teacher_dir {teacher}"),
                Row("KD, from the teacher's weights", "kd_init",
                    "--conv depthwise --method kd --init teacher --teacher_dir {teacher}"),
                Row("OD, no pretrained teacher (μ = 0)", "od_teacher_free", "--conv depthwise"),
                Row("OD", "od", "--conv depthwise --teacher_dir {teacher}"),
                Row("OD, from the teacher's weights", "od_init",
                    "--conv depthwise --init teacher --teacher_dir {teacher}"),
                Row("standard, 60 epochs", "teacher_60", "--pretrain --num_epochs 60", seeds=1),
                Row("scratch, 60 epochs", "scratch_60", "--conv depthwise --method scratch --num_epochs 60", seeds=1),
                Row("OD, λ = 0, no pretrained teacher", "od_teacher_free_lambda_0", "--conv depthwise --lambda 0"),
                Row("OD, λ = 0", "od_lambda_0", "--conv depthwise --lambda 0 --teacher_dir {teacher}"),
                Row("DML", "dml", "--conv depthwise --method dml"),
                Row("ONE", "one", "--conv depthwise --method one"),
            ),
            (*TEACHER_FREE, ("od_teacher_free", "od_teacher_free_lambda_0"), *WITH_TEACHER, *FROM_WEIGHTS),
        ),
        Table(
            "depthwise_5000",
            "Depthwise, 5,000 training images, 60 epochs",
            (
                Row("standard: the pretrained teacher", "teacher_5000",
                    "--pretrain --train_size 5000 --num_epochs 60", seeds=1),
                Row("scratch", "scratch", "--conv depthwise --train_size 5000 --num_epochs 60 --method scratch"),
                Row("KD", "kd",
                    "--conv depthwise --train_size 5000 --num_epochs 60 --method kd --teacher_dir {teacher_5000}"),
                Row("OD, no pretrained teacher (μ = 0)", "od_teacher_free",
                    "--conv depthwise --train_size 5000 --num_epochs 60"),
                Row("OD", "od", "--conv depthwise --train_size 5000 --num_epochs 60 --teacher_dir {teacher_5000}"),
                Row("scratch, from the teacher's weights", "scratch_init",
                    "--conv depthwise --train_size 5000 --num_epochs 60 --method scratch --init teacher "
                    "--teacher_dir {teacher_5000}"),
                Row("KD, from the teacher's weights", "kd_init",
                    "--conv depthwise --train_size 5000 --num_epochs 60 --method kd --init teacher "
                    "--teacher_dir {teacher_5000}"),
                Row("OD, from the teacher's weights", "od_init",
                    "--conv depthwise --train_size 5000 --num_epochs 60 --init teacher --teacher_dir {teacher_5000}"),
                Row("KD, teacher of 45,000 images", "kd_transfer",
                    "--conv depthwise --train_size 5000 --num_epochs 60 --method kd --teacher_dir {teacher}"),
                Row("OD, teacher of 45,000 images", "od_transfer",
                    "--conv depthwise --train_size 5000 --num_epochs 60 --teacher_dir {teacher}"),
                Row("scratch, from the weights of the teacher of 45,000 images", "scratch_init_transfer",
                    "--conv depthwise --train_size 5000 --num_epochs 60 --method scratch --init teacher "
                    "--teacher_dir {teacher}"),
                Row("KD, from the weights of the teacher of 45,000 images", "kd_init_transfer",
                    "--conv depthwise --train_size 5000 --num_epochs 60 --method kd --init teacher "
                    "--teacher_dir {teacher}"),
                Row("OD, from the weights of the teacher of 45,000 images", "od_init_transfer",
                    "--conv depthwise --train_size 5000 --num_epochs 60 --init teacher --teacher_dir {teacher}"),
            ),
            (("od_teacher_free", "scratch"), *WITH_TEACHER[:3], *FROM_WEIGHTS,
             ("scratch_init_transfer", "scratch"), ("od_init_transfer", "scratch_init_transfer")),
        ),
        Table(
            "shift_5000",
            "Shift, 5,000 training images, 60 epochs",
            (
                Row("scratch", "scratch", "--conv shift --train_size 5000 --num_epochs 60 --method scratch"),
                Row("scratch, from the teacher's weights", "scratch_init",
                    "--conv shift --train_size 5000 --num_epochs 60 --method scratch --init teacher "
                    "--teacher_dir {teacher_5000}"),
                Row("OD, from the teacher's weights", "od_init",
                    "--conv shift --train_size 5000 --num_epochs 60 --init teacher --teacher_dir {teacher_5000}"),
            ),
            (FROM_WEIGHTS[0], FROM_WEIGHTS[2]),
        ),
        Table(
            "group_5000",
            "Group (g = 4), 5,000 training images, 60 epochs",
            (
                Row("scratch", "scratch", "--conv group --train_size 5000 --num_epochs 60 --method scratch"),
                Row("scratch, from the teacher's weights", "scratch_init",
                    "--conv group --train_size 5000 --num_epochs 60 --method scratch --init teacher "
                    "--teacher_dir {teacher_5000}"),
                Row("OD, from the teacher's weights", "od_init",
                    "--conv group --train_size 5000 --num_epochs 60 --init teacher --teacher_dir {teacher_5000}"),
            ),
            (FROM_WEIGHTS[0], FROM_WEIGHTS[2]),
        ),
        Table(
            "shift",
            "Shift, 45,000 training images, 30 epochs",
            (
                Row("scratch", "scratch", "--conv shift --method scratch"),
                Row("scratch, from the teacher's weights", "scratch_init",
                    "--conv shift --method scratch --init teacher --teacher_dir {teacher}"),
                Row("OD, no pretrained teacher (μ = 0)", "od_teacher_free", "--conv shift"),
                Row("scratch, 120 epochs", "scratch_120", "--conv shift --method scratch --num_epochs 120", seeds=1),
            ),
            (("od_teacher_free", "scratch"), FROM_WEIGHTS[0]),
        ),
    ),
)  # fmt: skip

CIFAR10 = Study(
    "CIFAR-10, ResNet-20",
    "CIFAR-10 as a tree of image files, train/<class>/* and test/<class>/*",
    FLAGS,
    (
        Table(
            "depthwise",
            "Depthwise, 45,000 training images, 30 epochs",
            (
                Row("standard: the pretrained teacher", "teacher", "--pretrain", seeds=1),
                Row("scratch", "scratch", "--conv depthwise --method scratch"),
                Row("scratch, from the teacher's weights", "scratch_init",
                    "--conv depthwise --method scratch --init teacher --teacher_dir {teacher}"),
                Row("OD, no pretrained teacher (μ = 0)", "od_teacher_free", "--conv depthwise"),
                Row("OD, from the teacher's weights", "od_init",
                    "--conv depthwise --init teacher --teacher_dir {teacher}"),
            ),
            (("od_teacher_free", "scratch"), FROM_WEIGHTS[0], FROM_WEIGHTS[2]),
        ),
    ),
)  # fmt: skip

DIGITS = Study(
    "The embedded digits, ResNet-20",
    None,
    "--dataset digits --train_size 300 --train_batch_size 32 --arch resnet --teacher_model resnet_20 --num_epochs 40",
    (
        Table(
            "resnet_20-depthwise",
            "Depthwise",
            (
                Row("standard: the pretrained teacher", "teacher", "--pretrain", seeds=1),
                Row("scratch", "scratch", "--conv depthwise --method scratch", seeds=5),
                Row("KD", "kd", "--conv depthwise --method kd --teacher_dir {teacher}", seeds=5),
                Row("OD", "od", "--conv depthwise --teacher_dir {teacher}", seeds=5),
                Row("OD, λ = 0", "od_lambda_0", "--conv depthwise --teacher_dir {teacher} --lambda 0", seeds=5),
                Row("OD, no pretrained teacher (μ = 0)", "od_teacher_free", "--conv depthwise", seeds=5),
                Row("DML", "dml", "--conv depthwise --method dml", seeds=5),
                Row("ONE", "one", "--conv depthwise --method one", seeds=5),
            ),
            (*TEACHER_FREE, *WITH_TEACHER),
        ),
        Table(
            "resnet_20-group",
            "Group (g = 4)",
            (
                Row("scratch", "scratch", "--conv group --method scratch", seeds=5),
                Row("KD", "kd", "--conv group --method kd --teacher_dir {teacher}", seeds=5),
                Row("OD", "od", "--conv group --teacher_dir {teacher}", seeds=5),
                Row("OD, λ = 0", "od_lambda_0", "--conv group --teacher_dir {teacher} --lambda 0", seeds=5),
                Row("OD, no pretrained teacher (μ = 0)", "od_teacher_free", "--conv group", seeds=5),
                Row("DML", "dml", "--conv group --method dml", seeds=5),
                Row("ONE", "one", "--conv group --method one", seeds=5),
            ),
            (*TEACHER_FREE, *WITH_TEACHER),
        ),
        Table(
            "resnet_20-shift",
            "Shift",
            (
                Row("scratch", "scratch", "--conv shift --method scratch", seeds=5),
                Row("KD", "kd", "--conv shift --method kd --teacher_dir {teacher}", seeds=5),
                Row("OD", "od", "--conv shift --teacher_dir {teacher}", seeds=5),
                Row("OD, λ = 0", "od_lambda_0", "--conv shift --teacher_dir {teacher} --lambda 0", seeds=5),
                Row("OD, no pretrained teacher (μ = 0)", "od_teacher_free", "--conv shift", seeds=5),
                Row("DML", "dml", "--conv shift --method dml", seeds=5),
                Row("ONE", "one", "--conv shift --method one", seeds=5),
            ),
            (*TEACHER_FREE, *WITH_TEACHER),
        ),
    ),
)

STUDIES = {"digits": DIGITS, "cifar100": CIFAR100, "cifar10": CIFAR10}
