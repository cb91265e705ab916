"""The online teacher against its definition, and what learns from what."""

import pytest
import torch

import model
from model.online import GatedEnsemble, OnlineTeacher, PeerAttention, Students
from utils.losses import among_students, diverse_peers, online_distillation


def students(count, **arguments):
    torch.manual_seed(0)
    return [model.build("resnet_20_sparse", num_classes=5, **arguments) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_head_is_concatenate_norm_relu_pool_linear(count):
    online = OnlineTeacher(students(count), num_classes=5).double().train()
    with torch.no_grad():
        online.norm.weight.normal_()
        online.norm.bias.normal_()
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    student_logits, teacher_logits = online(x)

    features = torch.cat([student.forward_features(x) for student in online.students], dim=1)
    mean = features.mean((0, 2, 3), keepdim=True)
    variance = ((features - mean) ** 2).mean((0, 2, 3), keepdim=True)
    normalized = (features - mean) / (variance + 1e-5).sqrt()
    scaled = normalized * online.norm.weight[:, None, None] + online.norm.bias[:, None, None]
    pooled = torch.where(scaled > 0, scaled, 0).flatten(2).mean(2)
    torch.testing.assert_close(teacher_logits, pooled @ online.fc.weight.T + online.fc.bias)
    assert online.fc.weight.shape == (5, 64 * count)
    for logits, student in zip(student_logits, online.students, strict=True):
        torch.testing.assert_close(logits, student(x))


def test_features_are_computed_once():
    online = OnlineTeacher(students(3), num_classes=5)
    calls = []
    for student in online.students:
        student.conv1.register_forward_hook(lambda *_: calls.append(1))
    online(torch.randn(2, 3, 8, 8))
    assert len(calls) == 3


def gradients(module):
    return {key: None if p.grad is None else p.grad.clone() for key, p in module.named_parameters()}


def test_online_term_alone_moves_the_head_and_every_student():
    """Mutual: the teacher's logits are not detached."""
    online = OnlineTeacher(students(2), num_classes=5)
    student_logits, teacher_logits = online(torch.randn(8, 3, 8, 8))
    targets = torch.arange(8) % 5
    online_distillation(student_logits, teacher_logits, targets, lam=1.0)["kl_online"].backward()
    assert all(grad is not None and grad.any() for grad in gradients(online).values())


def test_nothing_reaches_the_pretrained_teacher():
    pretrained = model.build("resnet_20", num_classes=5)
    online = OnlineTeacher(students(2), num_classes=5)
    x = torch.randn(8, 3, 8, 8)
    losses = online_distillation(*online(x), torch.arange(8) % 5, lam=0.8, pretrained_logits=pretrained(x), miu=1.0)
    losses["loss"].backward()
    assert all(grad is None for grad in gradients(pretrained).values())
    assert all(grad is not None and grad.any() for grad in gradients(online).values())


def test_students_without_online_teacher():
    learner = Students(students(2))
    student_logits, teacher_logits = learner(torch.randn(3, 3, 8, 8))
    assert student_logits.shape == (2, 3, 5)
    assert teacher_logits is None


def test_no_students_is_an_error():
    with pytest.raises(ValueError, match="at least one student"):
        OnlineTeacher([], 10)


def test_gated_ensemble_weighs_logits_by_a_gate_for_each_image():
    ensemble = GatedEnsemble(students(3)).double().train()
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    student_logits, teacher_logits = ensemble(x)

    pooled = torch.cat([student.forward_features(x).mean((2, 3)) for student in ensemble.students], dim=1)
    scores = pooled @ ensemble.fc.weight.T + ensemble.fc.bias
    normalized = (scores - scores.mean(0)) / (scores.var(0, unbiased=False) + 1e-5).sqrt()
    powers = torch.where(normalized > 0, normalized, 0).exp()
    gate = powers / powers.sum(1, keepdim=True)
    expected = sum(gate[:, i, None] * student(x) for i, student in enumerate(ensemble.students))
    torch.testing.assert_close(teacher_logits, expected)
    assert (gate.std(0) > 0).all(), "the same gate for every image would test nothing"
    for logits, student in zip(student_logits, ensemble.students, strict=True):
        torch.testing.assert_close(logits, student(x))


def test_peers_attend_to_each_other_by_linear_maps_of_their_pooled_features():
    learner = PeerAttention(students(4)).double().train()
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    student_logits, teacher_logits, scores = learner(x)

    assert teacher_logits is None
    assert learner.query.weight.shape == learner.key.weight.shape == (8, 64)
    pooled = [student.forward_features(x).mean((2, 3)) for student in learner.students]
    for a in range(3):
        for b in range(3):
            expected = [learner.query.weight @ pooled[a][i] @ (learner.key.weight @ pooled[b][i]) for i in range(5)]
            torch.testing.assert_close(scores[:, a, b], torch.stack(expected))
    for logits, student in zip(student_logits, learner.students, strict=True):
        torch.testing.assert_close(logits, student(x))


def test_attention_learns_by_the_online_term_alone():
    learner = PeerAttention(students(3))
    logits, _, scores = learner(torch.randn(8, 3, 8, 8))
    targets = torch.arange(8) % 5
    losses = among_students(diverse_peers, logits, None, targets, scores, lam=1.0, temperature=3.0)
    losses["ce_students"].backward(retain_graph=True)
    assert learner.query.weight.grad is None
    losses["kl_online"].backward()
    assert all(grad is not None and grad.any() for grad in gradients(learner).values())
