"""Students that start from the weights of a trained standard network."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import main
import model
from model.conv import KINDS, CheapConv2d
from model.convert import add_noise, cheapen, inherit, not_inherited
from model.reconstruct import reconstruct
from tests.helpers import report_of
from utils import options
from utils.checkpoint import load_student
from utils.errors import UserError
from utils.teacher import NOISE, start_from


def dense(conv):
    """The weight (out, in, k, k) that both stages amount to, one input channel and one tap at a time."""
    pointwise = conv.pointwise.weight.detach().double()[:, :, 0, 0]
    out_channels, in_channels = pointwise.shape
    rows, columns = conv.spatial.kernel_size
    weight = torch.zeros(out_channels, in_channels, rows, columns, dtype=torch.float64)
    for m in range(in_channels):  # the m-th channel between the stages
        if isinstance(conv.spatial, nn.Conv2d):
            n = conv.spatial.weight.shape[1]
            for j in range(n):
                kernel = conv.spatial.weight.detach().double()[m, j]
                weight[:, m // n * n + j] += pointwise[:, m, None, None] * kernel
        else:
            moved = m < in_channels - in_channels % (rows * columns)
            tap = (m // columns % rows, m % columns) if moved else (rows // 2, columns // 2)
            weight[:, m, tap[0], tap[1]] = pointwise[:, m]
    return weight


def least_distance(matrix, rank):
    """Squared distance of a matrix to the nearest one of this rank, by alternating least squares from many starts."""
    generator, best = np.random.default_rng(0), np.inf
    for _ in range(10):
        right = generator.standard_normal((rank, matrix.shape[1]))
        for _ in range(300):
            left = np.linalg.lstsq(right.T, matrix.T, rcond=None)[0].T
            right = np.linalg.lstsq(left, matrix, rcond=None)[0]
        best = min(best, ((matrix - left @ right) ** 2).sum())
    return best


@pytest.mark.parametrize(("groups", "channels"), [(1, 2), (2, 6), (6, 6)])
def test_a_cheap_convolution_starts_from_the_nearest_weights(groups, channels):
    torch.manual_seed(0)
    weight = torch.randn(5, channels, 3, 3)
    conv = CheapConv2d(channels, 5, kind="group", groups=groups)
    lost = conv.approximate(weight)
    assert lost == pytest.approx((dense(conv) - weight).square().sum().item(), rel=1e-5)
    n = channels // groups
    matrices = [weight[:, n * i : n * i + n].reshape(5, -1).double().numpy() for i in range(groups)]
    assert lost == pytest.approx(sum(least_distance(matrix, n) for matrix in matrices), rel=1e-4)


def test_a_shift_starts_from_the_tap_that_it_reads():
    weight = torch.randn(4, 11, 3, 3)
    conv = CheapConv2d(11, 4, kind="shift")
    lost = conv.approximate(weight)
    taps = [(c // 3 % 3, c % 3) if c < 9 else (1, 1) for c in range(11)]
    for c, (y, x) in enumerate(taps):
        assert torch.equal(conv.pointwise.weight[:, c, 0, 0], weight[:, c, y, x])
    assert lost == pytest.approx((dense(conv) - weight).square().sum().item(), rel=1e-5)


def test_kernels_that_the_optimum_does_not_need_can_still_learn():
    """A group of 8 channels and 2 outputs: rank 2 is exact, and the other 6 kernels are not left at zero."""
    conv = CheapConv2d(8, 2, kind="group", groups=1)
    assert conv.approximate(torch.randn(2, 8, 3, 3)) == pytest.approx(0, abs=1e-9)
    assert (conv.spatial.weight.flatten(1).norm(dim=1) > 0).all()


class Plain(nn.Module):
    """Convolutions with biases, strides, a dilation and other kernels than 3 x 3; one of them is used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.Sequential(
            nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, (3, 5), padding="same"), nn.ReLU()
        )
        self.wide = nn.Conv2d(12, 12, 3, padding=2, dilation=2, bias=False)
        self.fc = nn.Linear(12, 10)

    def forward(self, x):
        x = self.wide(self.wide(self.layers(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def standard_of(student, standard):
    """`standard` with the weights that compute what the student computes, in float64."""
    student, standard = student.double(), standard.double()
    standard.load_state_dict(student.state_dict(), strict=False)
    for name, module in student.named_modules():
        if isinstance(module, CheapConv2d):
            conv = standard.get_submodule(name)
            conv.weight.data = dense(module)
            if conv.bias is not None:
                conv.bias.data = module.pointwise.bias.data.clone()
    return standard


@pytest.mark.parametrize("pruned_num", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_of_the_cheap_form_is_recovered(kind, pruned_num):
    torch.manual_seed(0)
    network = Plain()
    cheapen(network, kind, groups=4, pruned_num=pruned_num)
    teacher = standard_of(network, Plain()).train()
    teacher(torch.randn(4, 3, 12, 12, dtype=torch.float64))  # statistics of BatchNorm that are worth copying
    student = Plain()
    cheapen(student, kind, groups=4, pruned_num=pruned_num)
    student.double()
    assert inherit(student, teacher) == pytest.approx(1)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(student.eval()(x), teacher.eval()(x))
    assert not_inherited(student, teacher) == []


@pytest.mark.parametrize(
    ("name", "conv", "pruned_num"),
    [*(("resnet_20", conv, pruned_num) for conv in KINDS for pruned_num in (None, 5, 0)), ("densenet_40", "shift", 7)],
)
def test_networks_of_this_project_inherit(name, conv, pruned_num):
    teacher, other = model.build(name).double(), model.build(f"{name}_sparse", conv=conv, pruned_num=pruned_num)
    student = model.build(f"{name}_sparse", conv=conv, pruned_num=pruned_num).double()
    standard_of(other, teacher)
    kept = inherit(student, teacher)
    assert kept == pytest.approx(1)
    for key, value in student.state_dict().items():
        if ".spatial." not in key and ".pointwise." not in key:
            assert torch.equal(value, teacher.state_dict()[key]), key
    for (_, ours), (_, theirs) in zip(student.named_modules(), other.named_modules(), strict=True):
        if isinstance(ours, CheapConv2d):
            torch.testing.assert_close(dense(ours), dense(theirs))


def test_the_energy_kept_is_that_of_all_replaced_convolutions():
    torch.manual_seed(0)
    teacher, student = model.build("resnet_20"), model.build("resnet_20_sparse")
    kept = inherit(student, teacher)
    pairs = [(m, teacher.get_submodule(n).weight) for n, m in student.named_modules() if isinstance(m, CheapConv2d)]
    lost = sum((dense(conv) - weight).square().sum() for conv, weight in pairs)
    assert kept == pytest.approx(1 - (lost / sum(weight.square().sum() for _, weight in pairs)).item(), rel=1e-5)


@pytest.mark.parametrize("teacher", [lambda: model.build("vgg_16_bn"), lambda: model.build("resnet_20_sparse"), Plain])
def test_a_teacher_of_another_network_changes_nothing(teacher):
    student = model.build("resnet_20_sparse")
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(UserError, match=r"layer1\.0\.conv1 replaces .* \(16, 16, 3, 3\), which the teacher does not"):
        inherit(student, teacher())
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


IMAGES = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))]


def started(teacher, students):
    """`start_from` with random images."""
    return start_from(teacher, students, IMAGES, [(IMAGES[0], torch.arange(8) % 4)])


def test_what_the_teacher_does_not_have_is_named():
    student, teacher = model.build("resnet_20_sparse"), model.build("resnet_20", shortcut="A")
    missing = not_inherited(student, teacher)
    assert {name.split(".shortcut.")[0] for name in missing} == {"layer2.0", "layer3.0"}
    assert "layer2.0.shortcut.0.weight" in started(teacher, [student])


def test_students_but_the_first_differ_by_noise():
    torch.manual_seed(0)
    teacher, students = model.build("resnet_20"), [model.build("resnet_20_sparse") for _ in range(3)]
    exact = model.build("resnet_20_sparse")
    inherit(exact, teacher)
    reconstruct(exact, teacher, IMAGES)
    started(teacher, students)
    first, second, third = (student.layer2[1].conv1.pointwise.weight for student in students)
    assert torch.equal(first, exact.layer2[1].conv1.pointwise.weight)
    assert (second - first).std().item() == pytest.approx(NOISE * first.std().item(), rel=0.1)
    assert not torch.equal(second, third)
    assert torch.equal(students[1].fc.weight, teacher.fc.weight)
    noisy = copy.deepcopy(exact)
    add_noise(noisy, 0)
    assert torch.equal(noisy.conv1.weight, exact.conv1.weight)


def run(*flags):
    main.main(options.parse("main", [*map(str, flags), "--compile", "off"]))


DIGITS = ("--dataset", "digits", "--teacher_model", "resnet_20", "--train_size", 200, "--num_epochs", 1)


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """A teacher as akamaster publishes it: shortcuts of option A, normalized as for ImageNet."""
    folder = tmp_path_factory.mktemp("public")
    weights = model.build("resnet_20", shortcut="A").state_dict()
    weights = {f"module.{key}".replace("module.fc.", "module.linear."): value for key, value in weights.items()}
    torch.save({"state_dict": weights, "best_prec1": 90.0}, folder / "resnet20.th")
    return folder


def test_students_are_of_the_variant_and_normalization_of_their_teacher(public, tmp_path):
    flags = (*DIGITS, "--teacher_dir", public, "--force", "--init", "teacher", "--num_students", 2)
    run(*flags, "--job_dir", tmp_path / "job")
    student, meta = load_student(tmp_path / "job" / "resnet_pruned_18.pt")
    assert meta["build"] == {"stem": "cifar", "shortcut": "A"}
    assert tuple(meta["mean"]) == (0.485, 0.456, 0.406)
    assert meta["start"].startswith("from the weights of the pretrained teacher, with ")
    assert "random" not in meta["start"]
    assert not any("shortcut" in name for name, _ in student.named_parameters())
    report = report_of(tmp_path / "job")
    assert report["start"] == meta["start"]
    assert f"Students started {meta['start']}." in report["notes"]
    assert f"students start {meta['start']}" in (tmp_path / "job" / "logger.log").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--init", "teacher"), "give --teacher_dir"),
        (("--init", "teacher", "--teacher_dir", "x", "--student_model", "resnet_56_sparse"), "resnet_20_sparse"),
        (("--init", "teacher", "--pretrain"), "leave out --init"),
    ],
)
def test_init_asks_for_what_it_needs(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        options.parse("main", [*map(str, DIGITS), *flags])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
