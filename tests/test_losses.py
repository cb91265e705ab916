"""The objective against a reference that loops over images, students and classes in float64."""

import math

import pytest
import torch

from utils.losses import online_distillation

N, B, K = 3, 5, 4


@pytest.fixture
def logits():
    torch.manual_seed(0)
    student, teacher, pretrained = (
        3 * torch.randn(*shape, dtype=torch.float64) for shape in ((N, B, K), (B, K), (B, K))
    )
    return student.requires_grad_(), teacher.requires_grad_(), pretrained, torch.tensor([0, 3, 1, 1, 2])


def softmax(row, temperature=1.0):
    powers = [math.exp(z / temperature) for z in row]
    return [p / sum(powers) for p in powers]


def slow_cross_entropy(rows, targets):
    return sum(-math.log(softmax(row)[y]) for row, y in zip(rows, targets, strict=True)) / len(rows)


def slow_kl(teacher_rows, student_rows, temperature, reduction):
    total = 0.0
    for teacher_row, student_row in zip(teacher_rows, student_rows, strict=True):
        for p, q in zip(softmax(teacher_row, temperature), softmax(student_row, temperature), strict=True):
            total += p * math.log(p / q)
    return total / (B if reduction == "batchmean" else B * K)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("reduction", ["batchmean", "element"])
@pytest.mark.parametrize(("lam", "miu"), [(0.0, 0.0), (0.8, 0.0), (0.0, 1.0), (0.8, 1.5)])
def test_loss_is_the_formula(logits, lam, miu, reduction, temperature):
    student, teacher, pretrained, targets = logits
    losses = online_distillation(student, teacher, targets, lam, temperature, pretrained, miu, reduction)

    z_i, z_t, z_p, y = student.tolist(), teacher.tolist(), pretrained.tolist(), targets.tolist()
    expected = {
        "ce_students": sum(slow_cross_entropy(rows, y) for rows in z_i),
        "ce_teacher": slow_cross_entropy(z_t, y),
        "kl_online": lam * temperature**2 * sum(slow_kl(z_t, rows, temperature, reduction) for rows in z_i),
        "kl_pretrained": miu * temperature**2 * sum(slow_kl(z_p, rows, temperature, reduction) for rows in z_i),
    }
    assert losses["loss"].item() == pytest.approx(sum(expected.values()), rel=1e-12)
    for name, term in losses.items():
        if name != "loss":
            assert term.item() == pytest.approx(expected[name], rel=1e-12)
    assert set(expected) - set(losses) == {n for n, w in (("kl_online", lam), ("kl_pretrained", miu)) if not w}


def test_gradients_are_those_of_the_formula(logits):
    """Numerically, for the students' and the online teacher's logits together."""
    student, teacher, pretrained, targets = logits

    def loss(student, teacher):
        return online_distillation(student, teacher, targets, 0.8, 4.0, pretrained, 1.0)["loss"]

    assert torch.autograd.gradcheck(loss, (student, teacher))


def test_online_term_has_a_gradient_to_the_teacher(logits):
    student, teacher, _, targets = logits
    online_distillation(student, teacher, targets, lam=1.0)["kl_online"].backward()
    assert teacher.grad.any()
    assert student.grad.any()


def test_pretrained_logits_get_no_gradient(logits):
    student, teacher, pretrained, targets = logits
    pretrained.requires_grad_()
    online_distillation(student, teacher, targets, 0.8, pretrained_logits=pretrained, miu=1.0)["loss"].backward()
    assert pretrained.grad is None


def test_element_reduction_is_k_times_weaker(logits):
    student, teacher, _, targets = logits
    batchmean, element = (
        online_distillation(student, teacher, targets, 1.0, reduction=reduction)["kl_online"]
        for reduction in ("batchmean", "element")
    )
    torch.testing.assert_close(batchmean, K * element)


def test_plain_training_is_the_cross_entropy_alone(logits):
    student, _, _, targets = logits
    losses = online_distillation(student[:1], None, targets, lam=0.0)
    assert set(losses) == {"loss", "ce_students"}
    assert losses["loss"].item() == pytest.approx(slow_cross_entropy(student[0].tolist(), targets.tolist()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_raised_to_float32(logits, dtype):
    student, teacher, pretrained, targets = (x.detach().to(dtype) if x.is_floating_point() else x for x in logits)
    losses = online_distillation(student, teacher, targets, 0.8, pretrained_logits=pretrained, miu=1.0)
    exact = online_distillation(
        student.double(), teacher.double(), targets, 0.8, pretrained_logits=pretrained.double(), miu=1.0
    )
    assert losses["loss"].dtype == torch.float32
    torch.testing.assert_close(losses["loss"].double(), exact["loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": 1.0, "teacher_logits": None}, "no online teacher"),
        ({"lam": 0.0, "miu": 1.0}, "no pretrained teacher"),
        ({"lam": 0.0, "reduction": "mean"}, "batchmean, element"),
    ],
)
def test_impossible_objectives_are_refused(logits, arguments, message):
    student, teacher, _, targets = logits
    with pytest.raises(ValueError, match=message):
        online_distillation(**{"student_logits": student, "teacher_logits": teacher, "targets": targets, **arguments})
