"""The objective against a reference that loops over images, students and classes in float64."""

import math

import pytest
import torch

from utils.config import Config
from utils.losses import (
    among_students,
    collaborative_learning,
    diverse_peers,
    mutual_learning,
    online_distillation,
)
from utils.methods import METHODS

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


def slow_cross_entropy(rows, targets, smoothing=0.0):
    total = 0.0
    for row, y in zip(rows, targets, strict=True):
        for c, p in enumerate(softmax(row)):
            total -= ((1 - smoothing) * (c == y) + smoothing / K) * math.log(p)
    return total / len(rows)


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


def settings(temperature, reduction):
    return {"lam": 0.7, "temperature": temperature, "reduction": reduction}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["batchmean", "element"])
def test_mutual_learning_is_its_formula(logits, reduction, temperature):
    student, _, _, targets = logits
    losses = among_students(mutual_learning, student, None, targets, **settings(temperature, reduction))

    z = student.tolist()
    pairs = [slow_kl(z[j], z[i], temperature, reduction) for i in range(N) for j in range(N) if i != j]
    assert losses["ce_students"].item() == pytest.approx(sum(slow_cross_entropy(rows, targets.tolist()) for rows in z))
    assert losses["kl_online"].item() == pytest.approx(0.7 * temperature**2 * sum(pairs) / (N - 1))
    assert losses["loss"].item() == pytest.approx((losses["ce_students"] + losses["kl_online"]).item())


def test_a_student_learns_from_its_peers_and_not_them_from_it(logits):
    """The gradient of student i is that of 1/(N-1) sum_j KL(p_j || p_i) with p_j constant: mean over j of p_i - p_j."""
    student, _, _, targets = logits
    online = mutual_learning(student, targets, 1.0, "batchmean")
    (gradient,) = torch.autograd.grad(online, student)
    p = student.detach().softmax(-1)
    expected = torch.stack([p[i] - p[[j for j in range(N) if j != i]].mean(0) for i in range(N)]) / B
    torch.testing.assert_close(gradient, expected)


def test_detached_online_teacher_learns_from_targets_alone(logits):
    student, teacher, _, targets = logits
    losses = online_distillation(student, teacher, targets, 0.8, detach_teacher=True)
    mutual = online_distillation(student, teacher, targets, 0.8)
    assert losses["loss"].item() == mutual["loss"].item()
    gradients = torch.autograd.grad(losses["loss"], (student, teacher))
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(teacher, targets), teacher)
    torch.testing.assert_close(gradients[1:], expected)
    torch.testing.assert_close(gradients[0], torch.autograd.grad(mutual["loss"], student)[0])


def objective(method, lam=0.0, temperature=4.0, miu=0.0, label_smoothing=0.0):
    config = Config(lam=lam, temperature=temperature, miu=miu, label_smoothing=label_smoothing)
    return METHODS[method].objective(config)


def test_rampup_is_a_factor_of_the_online_term(logits):
    student, teacher, pretrained, targets = logits
    for function in (objective("od", lam=0.8, miu=1.0), objective("dml", lam=1.0), objective("kdcl", lam=1.0)):
        whole = function(student, teacher, targets, pretrained_logits=pretrained)
        for rampup in (0.25, torch.tensor(0.25)):
            losses = function(student, teacher, targets, pretrained_logits=pretrained, rampup=rampup)
            for name, term in losses.items():
                if name != "loss":
                    assert term.item() == pytest.approx(whole[name].item() * (0.25 if name == "kl_online" else 1))


def test_objectives_of_the_methods(logits):
    """Which terms, from whom: plain training, Hinton's distillation, ONE as the detached case, mutual learning."""
    student, teacher, pretrained, targets = logits

    def terms(method, teacher, lam, temperature, miu):
        losses = objective(method, lam=lam, temperature=temperature, miu=miu)(
            student, teacher, targets, pretrained_logits=pretrained if miu else None
        )
        return losses["loss"], {name: term.item() for name, term in losses.items() if name != "loss"}

    z, z_p, y = student.tolist(), pretrained.tolist(), targets.tolist()
    plain = sum(slow_cross_entropy(rows, y) for rows in z)
    assert terms("scratch", None, 0.0, 4.0, 0.0)[1] == pytest.approx({"ce_students": plain})
    from_teacher = 16 * sum(slow_kl(z_p, rows, 4.0, "batchmean") for rows in z)
    expected = {"ce_students": plain, "kl_pretrained": from_teacher}
    assert terms("kd", None, 0.0, 4.0, 1.0)[1] == pytest.approx(expected)
    loss, values = terms("one", teacher, 1.0, 3.0, 0.0)
    assert values["kl_online"] == pytest.approx(
        9 * sum(slow_kl(teacher.tolist(), rows, 3.0, "batchmean") for rows in z)
    )
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(teacher, targets), teacher)
    torch.testing.assert_close(torch.autograd.grad(loss, teacher), expected)
    assert set(terms("dml", None, 1.0, 1.0, 0.0)[1]) == {"ce_students", "kl_online"}


def test_mutual_learning_needs_two(logits):
    student, _, _, targets = logits
    with pytest.raises(ValueError, match="at least two students"):
        mutual_learning(student[:1], targets, 1.0, "batchmean")
    with pytest.raises(ValueError, match="batchmean, element"):
        among_students(mutual_learning, student, None, targets, **settings(1.0, "sum"))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("reduction", ["batchmean", "element"])
def test_collaborative_learning_is_its_formula(logits, reduction, temperature):
    student, _, _, targets = logits
    losses = among_students(collaborative_learning, student, None, targets, **settings(temperature, reduction))

    z, y = student.tolist(), targets.tolist()
    teacher = [[min(z[i][b][c] - z[i][b][y[b]] for i in range(N)) for c in range(K)] for b in range(B)]
    kl = sum(slow_kl(teacher, rows, temperature, reduction) for rows in z)
    expected = {"ce_students": sum(slow_cross_entropy(rows, y) for rows in z), "kl_online": 0.7 * temperature**2 * kl}
    assert {name: losses[name].item() for name in expected} == pytest.approx(expected, rel=1e-12)
    assert losses["loss"].item() == pytest.approx(sum(expected.values()), rel=1e-12)


def test_minimal_logits_get_no_gradient(logits):
    """The gradient of student i is that of KL(p_t || p_i) with p_t constant: T (p_i - p_t)."""
    student, _, _, targets = logits
    online = collaborative_learning(student, targets, 2.0, "batchmean")
    (gradient,) = torch.autograd.grad(online, student)
    z = student.detach()
    teacher = torch.stack([z[:, b] - z[:, b, y, None] for b, y in enumerate(targets.tolist())], dim=1).amin(0)
    torch.testing.assert_close(gradient, 2 * ((z / 2).softmax(-1) - (teacher / 2).softmax(-1)) / B)


@pytest.fixture
def scores():
    return torch.randn(
        B, N - 1, N - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["batchmean", "element"])
def test_diverse_peers_is_its_formula(logits, scores, reduction, temperature):
    student, _, _, targets = logits
    losses = among_students(diverse_peers, student, None, targets, scores, **settings(temperature, reduction))

    z, y, peers = student.tolist(), targets.tolist(), range(N - 1)
    soft = [[softmax(row, temperature) for row in rows] for rows in z]
    attention = [[softmax(row) for row in rows] for rows in scores.tolist()]  # [image][a][b]
    taught = [
        [[sum(attention[i][a][b] * soft[b][i][c] for b in peers) for c in range(K)] for i in range(B)] for a in peers
    ]
    taught.append([[sum(taught[a][i][c] for a in peers) / (N - 1) for c in range(K)] for i in range(B)])
    cells = [(a, i, c) for a in range(N) for i in range(B) for c in range(K)]
    kl = sum(taught[a][i][c] * math.log(taught[a][i][c] / soft[a][i][c]) for a, i, c in cells)
    kl /= B if reduction == "batchmean" else B * K
    expected = {"ce_students": sum(slow_cross_entropy(rows, y) for rows in z), "kl_online": 0.7 * temperature**2 * kl}
    assert {name: losses[name].item() for name in expected} == pytest.approx(expected, rel=1e-12)
    assert losses["loss"].item() == pytest.approx(sum(expected.values()), rel=1e-12)


def test_peers_leader_and_attention_get_the_gradients_of_the_formula(logits, scores):
    student, _, _, targets = logits

    def loss(student, scores):
        return among_students(diverse_peers, student, None, targets, scores, **settings(3.0, "batchmean"))["loss"]

    assert torch.autograd.gradcheck(loss, (student, scores))


def test_peers_that_are_certain_have_a_finite_loss_and_gradient():
    """Probabilities that float32 rounds to 0."""
    student = torch.tensor([[[400.0, 0, 0]], [[0, 400.0, 0]], [[0, 0, 400.0]]], requires_grad=True)
    scores = torch.tensor([[[300.0, -300], [0, 0]]], requires_grad=True)
    targets = torch.tensor([0])
    loss = among_students(diverse_peers, student, None, targets, scores, **settings(1.0, "batchmean"))["loss"]
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_label_smoothing_is_of_the_cross_entropy_alone(logits, scores, method):
    student, teacher, pretrained, targets = logits
    has_teacher, learns_from_one = method in ("od", "one"), METHODS[method].uses_pretrained
    inputs = (student, teacher if has_teacher else None, targets, *([scores] if method == "okddip" else []))
    settings = {"lam": METHODS[method].lam, "miu": float(learns_from_one)}
    plain, smooth = (
        objective(method, **settings, label_smoothing=smoothing)(*inputs, pretrained_logits=pretrained)
        for smoothing in (0.0, 0.1)
    )
    y, expected = targets.tolist(), {name: term.item() for name, term in plain.items() if name.startswith("kl_")}
    expected["ce_students"] = sum(slow_cross_entropy(rows, y, 0.1) for rows in student.tolist())
    if has_teacher:
        expected["ce_teacher"] = slow_cross_entropy(teacher.tolist(), y, 0.1)
    expected["loss"] = sum(expected.values())
    assert {name: term.item() for name, term in smooth.items()} == pytest.approx(expected, rel=1e-12)
