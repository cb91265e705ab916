#!/bin/sh
# The recipes. `sh run.sh NAME [flags]` runs the recipe NAME and adds the flags to its command (demo: to the command that
# trains students). `sh run.sh` runs the recipe whose line at the end of this file is active. Every recipe works in a
# fresh clone: missing packages are installed into .venv first, unless the active environment has them.
#
# Times and accuracies are stated where they were measured. Nothing has been measured on a GPU.
set -eu
cd "$(dirname "$0")"

# Set PYTHON to an interpreter that satisfies the given requirement files.
setup() {
    satisfied() {
        "$1" - "$@" <<'EOF' 2>/dev/null
import sys
from importlib.metadata import version
from packaging.requirements import Requirement

for file in sys.argv[2:]:
    for line in map(str.strip, open(file)):
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.specifier.contains(version(requirement.name), prereleases=True)
EOF
    }
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && satisfied python "$@"; then
        PYTHON=python
        return
    fi
    PYTHON=.venv/bin/python
    if satisfied "$PYTHON" "$@"; then
        return
    fi
    for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "installing $* into .venv"
            "$python" -m venv .venv
            for file in "$@"; do
                "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$file"
            done
            return
        fi
    done
    echo "error: no Python 3.10 or newer found: install one, or activate an environment that has it" >&2
    exit 2
}

# Pretrain, compress and refine on the embedded digits. 53 s on 2 cores of an Intel Xeon; test accuracy of the standard
# network 99.17 %, of the student 98.89 %. In one thread of an AMD EPYC: 43 s of CPU time, 98.33 % and 99.44 %.
demo() {
    setup requirements.txt
    "$PYTHON" main.py --pretrain --dataset digits --arch resnet --teacher_model resnet_20 \
        --num_epochs 30 --job_dir experiment/digits/teacher --reset
    "$PYTHON" main.py --teacher_dir experiment/digits/teacher --dataset digits --arch resnet \
        --teacher_model resnet_20 --student_model resnet_20_sparse \
        --num_epochs 30 --job_dir experiment/digits/students --reset "$@"
    "$PYTHON" finetune.py --arch resnet --lr 1e-3 --refine experiment/digits/students/resnet_pruned_*.pt --pruned \
        --num_epochs 10 --job_dir experiment/digits/refined --reset
}

# The tests, in two processes. TEST_BUDGET=4 tries four times as many random cases. `python tests/faults.py` checks that
# the tests notice deliberate faults.
test() {
    setup requirements.txt tests/requirements.txt
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m pytest --numprocesses 2 --dist loadfile "$@"
}

# The runs of a study, for experiment/RESULTS.md, as in `sh run.sh study digits`. Their accuracies are in that file.
study() {
    setup requirements.txt
    "$PYTHON" experiment/study.py "$@"
}

# CIFAR-10, ResNet-56, as in the paper; the whole training has not been measured. TEACHER, here and below, is a checkpoint
# of the standard network or a folder with one; these recipes use the one of pretrain_resnet_56 unless it is set.
pretrain_resnet_56() {
    setup requirements.txt
    "$PYTHON" main.py --pretrain --arch resnet --teacher_model resnet_56 --job_dir experiment/resnet/teacher "$@"
}

resnet_56() {
    setup requirements.txt
    "$PYTHON" main.py \
        --teacher_dir "${TEACHER:-experiment/resnet/teacher}" \
        --arch resnet --teacher_model resnet_56 --student_model resnet_56_sparse \
        --lambda 0.8 --miu 1 \
        --job_dir experiment/resnet/lambda_0.8_miu_1 "$@"
}

finetune_resnet_56() {
    setup requirements.txt
    "$PYTHON" finetune.py \
        --arch resnet \
        --lr 1e-4 \
        --refine experiment/resnet/lambda_0.8_miu_1/resnet_pruned_54.pt \
        --job_dir experiment/resnet/ft_lambda_0.8_miu_1/ \
        --pruned "$@"
}

# The same without a pretrained teacher.
resnet_56_teacher_free() {
    setup requirements.txt
    "$PYTHON" main.py --arch resnet --teacher_model resnet_56 --student_model resnet_56_sparse \
        --lambda 0.8 --miu 0 --job_dir experiment/resnet/lambda_0.8_miu_0 "$@"
}

# Shift and group convolutions instead of depthwise ones.
resnet_56_shift() {
    resnet_56 --conv shift --job_dir experiment/resnet/shift_lambda_0.8_miu_1 "$@"
}

resnet_56_group() {
    resnet_56 --conv group --groups 4 --job_dir experiment/resnet/group_lambda_0.8_miu_1 "$@"
}

# Other networks and data, with the pretrained teacher TEACHER if it is set. Time of an epoch without a teacher, computed
# from the time of a step on 2 cores of an Intel Xeon with bf16 units (torch 2.14): VGG-16 4 minutes, DenseNet-40 33,
# GoogLeNet 50, ResNet-56 on CIFAR-100 4. ImageNet is too large for such a machine: ResNet-18 trains on 50 images/s,
# ResNet-50 on 12. Accuracies have not been measured.
compress() {
    setup requirements.txt
    "$PYTHON" main.py ${TEACHER:+--teacher_dir "$TEACHER"} "$@"
}

vgg_16() {
    compress --arch vgg --teacher_model vgg_16_bn --student_model vgg_16_bn_sparse --job_dir experiment/vgg_16 "$@"
}

densenet_40() {
    compress --arch densenet --teacher_model densenet_40 --student_model densenet_40_sparse \
        --job_dir experiment/densenet_40 "$@"
}

googlenet() {
    compress --arch googlenet --teacher_model googlenet --student_model googlenet_sparse \
        --job_dir experiment/googlenet "$@"
}

resnet_56_cifar100() {
    compress --dataset cifar100 --arch resnet --teacher_model resnet_56 --student_model resnet_56_sparse \
        --job_dir experiment/resnet_56_cifar100 "$@"
}

# ImageNet. IMAGENET is a folder with train/ and val/; TEACHER may be torchvision's resnet18-f37072fd.pth.
imagenet() {
    compress --dataset imagenet --data_dir "${IMAGENET:-data/imagenet}" --val_size 10000 --num_students 2 \
        --num_epochs 90 --lr_decay_step 30 60 80 --train_batch_size 256 --weight_decay 1e-4 "$@"
}

resnet_18_imagenet() {
    imagenet --arch resnet --teacher_model resnet_18 --student_model resnet_18_sparse \
        --job_dir experiment/resnet_18_imagenet "$@"
}

resnet_50_imagenet() {
    imagenet --arch resnet --teacher_model resnet_50 --student_model resnet_50_sparse \
        --job_dir experiment/resnet_50_imagenet "$@"
}

if [ $# -gt 0 ]; then
    recipes=$(sed -n 's/^\([a-z][a-z0-9_]*\)() {$/\1/p' run.sh | grep -vE '^(setup|compress|imagenet)$')
    for recipe in $recipes; do
        if [ "$1" = "$recipe" ]; then
            "$@"
            exit
        fi
    done
    echo "error: no recipe '$1' in run.sh: choose from" $recipes >&2
    exit 2
fi

demo
# pretrain_resnet_56
# resnet_56
# finetune_resnet_56
# resnet_56_teacher_free
# resnet_56_shift
# resnet_56_group
# vgg_16
# densenet_40
# googlenet
# resnet_56_cifar100
# resnet_18_imagenet
# resnet_50_imagenet
