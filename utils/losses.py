"""The objective (arXiv 1909.13063, section 3).

    L = CE(z_t, y) + sum_i CE(z_i, y)
      + lambda T^2 sum_i KL(p_t || p_i)      online: the teacher is not detached, so both sides learn
      + miu T^2 sum_i KL(p_p || p_i)         from the pretrained teacher, one way

with z_i, z_t, z_p the logits of student i, the online teacher and the pretrained teacher, and p = softmax(z / T).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("batchmean", "element")


def online_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    lam: float,
    temperature: float = 4.0,
    pretrained_logits: Tensor | None = None,
    miu: float = 0.0,
    reduction: str = "batchmean",
) -> dict[str, Tensor]:
    """The loss and its terms, each a scalar with its weight applied, so that `loss` is the sum of the others.

    Special cases: without an online teacher (teacher_logits None, lam 0) and N = 1 this is plain training, or, with
    miu, Hinton's distillation (arXiv 1503.02531). Logits below float32 are raised to it.

    Args:
        student_logits: (N, B, K).
        teacher_logits: (B, K) of the online teacher, not detached; None where there is none.
        targets: (B,) class indices.
        lam: weight of the online term.
        pretrained_logits: (B, K) of the pretrained teacher; no gradient flows into them.
        miu: weight of the term of the pretrained teacher.
        reduction: of each KL over (B, K): "batchmean" sums over classes and averages over images, the mathematical
            KL; "element" averages over both, as the authors' code does, which is K times weaker.

    Returns:
        loss; ce_students; with an online teacher ce_teacher; with lam kl_online; with miu kl_pretrained.

    Raises:
        ValueError: an unknown reduction, lam without teacher_logits, miu without pretrained_logits.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction '{reduction}': choose from {', '.join(REDUCTIONS)}")
    if lam and teacher_logits is None:
        raise ValueError("lam needs teacher_logits: there is no online teacher to learn from")
    if miu and pretrained_logits is None:
        raise ValueError("miu needs pretrained_logits: there is no pretrained teacher to learn from")

    student_logits = _at_least_float32(student_logits)
    num_students = len(student_logits)
    # The mean over N * B rows, times N, is the sum over students of the mean over B.
    flat_logits, flat_targets = student_logits.flatten(0, 1), targets.repeat(num_students)
    terms = {"ce_students": num_students * F.cross_entropy(flat_logits, flat_targets)}
    if teacher_logits is not None:
        teacher_logits = _at_least_float32(teacher_logits)
        terms["ce_teacher"] = F.cross_entropy(teacher_logits, targets)
    if lam:
        terms["kl_online"] = lam * _distillation(teacher_logits, student_logits, temperature, reduction)
    if miu:
        pretrained_logits = _at_least_float32(pretrained_logits.detach())
        terms["kl_pretrained"] = miu * _distillation(pretrained_logits, student_logits, temperature, reduction)
    return {"loss": torch.stack(list(terms.values())).sum(), **terms}


def _distillation(teacher_logits: Tensor, student_logits: Tensor, temperature: float, reduction: str) -> Tensor:
    """T^2 sum_i KL(softmax(teacher / T) || softmax(student_i / T)), with gradients to both."""
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    log_students = F.log_softmax(student_logits / temperature, dim=-1)
    total = F.kl_div(log_students, log_teacher.expand_as(log_students), reduction="sum", log_target=True)
    batch_size, num_classes = teacher_logits.shape
    return temperature**2 * total / (batch_size if reduction == "batchmean" else batch_size * num_classes)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
