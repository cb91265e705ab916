"""The objective (arXiv 1909.13063, section 3), and those of the methods that it is compared with.

    L = CE(z_t, y) + sum_i CE(z_i, y)
      + lambda T^2 sum_i KL(p_t || p_i)      online: the teacher is not detached, so both sides learn
      + miu T^2 sum_i KL(p_p || p_i)         from the pretrained teacher, one way

with z_i, z_t, z_p the logits of student i, the online teacher and the pretrained teacher, and p = softmax(z / T).
"""

import math
from collections.abc import Callable

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
    detach_teacher: bool = False,
    rampup: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """The loss and its terms, each a scalar with its weight applied, so that `loss` is the sum of the others.

    Logits below float32 are raised to it.

    Args:
        student_logits: (N, B, K).
        teacher_logits: (B, K) of the online teacher, if there is one.
        targets: (B,) class indices.
        lam: weight of the online term.
        pretrained_logits: (B, K) of the pretrained teacher; no gradient flows into them.
        miu: weight of the term of the pretrained teacher.
        reduction: of each KL: "batchmean" sums over classes and averages over images, the mathematical KL; "element"
            averages over both, as the authors' code does, which is K times weaker.
        detach_teacher: no gradient of the online term to the online teacher, which then learns from the targets alone.
        rampup: factor of lam, from 0 to 1; a tensor if a CUDA graph reads it from memory.
        label_smoothing: of the cross-entropy, as torch's; the KL terms have none.

    Returns:
        loss; ce_students; with an online teacher ce_teacher; with lam kl_online; with miu kl_pretrained.

    Raises:
        ValueError: an unknown reduction, lam without teacher_logits, miu without pretrained_logits.
    """
    _check_reduction(reduction)
    for weight, logits, kind in ((lam, teacher_logits, "online"), (miu, pretrained_logits, "pretrained")):
        if weight and logits is None:
            raise ValueError(f"there is no {kind} teacher to learn from: give its logits, or the weight 0")

    student_logits = _at_least_float32(student_logits)
    terms = {"ce_students": _cross_entropy(student_logits, targets, label_smoothing)}
    if teacher_logits is not None:
        teacher_logits = _at_least_float32(teacher_logits)
        terms["ce_teacher"] = F.cross_entropy(teacher_logits, targets, label_smoothing=label_smoothing)
    if lam:
        source = teacher_logits.detach() if detach_teacher else teacher_logits
        terms["kl_online"] = rampup * lam * _distillation(source, student_logits, temperature, reduction)
    if miu:
        pretrained_logits = _at_least_float32(pretrained_logits.detach())
        terms["kl_pretrained"] = miu * _distillation(pretrained_logits, student_logits, temperature, reduction)
    return _summed(terms)


def among_students(
    online_term: Callable[[Tensor, Tensor, float, str], Tensor],
    student_logits: Tensor,
    teacher_logits: None,
    targets: Tensor,
    *others: Tensor,
    lam: float,
    temperature: float,
    pretrained_logits: None = None,
    reduction: str = "batchmean",
    rampup: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """As `online_distillation`, but without teachers: L = sum_i CE(z_i, y) + lambda `online_term`.

    Args:
        online_term: `mutual_learning`, `collaborative_learning` or `diverse_peers`.
        others: further inputs of the online term, after the targets.

    Raises:
        ValueError: an unknown reduction, fewer than two students for mutual learning.
    """
    _check_reduction(reduction)
    student_logits = _at_least_float32(student_logits)
    online = online_term(student_logits, targets, *others, temperature, reduction)
    ce_students = _cross_entropy(student_logits, targets, label_smoothing)
    return _summed({"ce_students": ce_students, "kl_online": rampup * lam * online})


def mutual_learning(student_logits: Tensor, targets: Tensor, temperature: float, reduction: str) -> Tensor:
    """Deep mutual learning (arXiv 1706.00384, section 3.3, where T and lam are 1):

    T^2 sum_i 1/(N-1) sum_{j != i} KL(p_j || p_i), with p_j detached.
    """
    if len(student_logits) < 2:
        raise ValueError("mutual learning needs at least two students")
    # The terms with j = i are included: they are 0 and have no gradient.
    peers = student_logits.detach()
    return sum(_distillation(peer, student_logits, temperature, reduction) for peer in peers) / (len(peers) - 1)


def collaborative_learning(student_logits: Tensor, targets: Tensor, temperature: float, reduction: str) -> Tensor:
    """KDCL-MinLogit (Guo et al., CVPR 2020, section 3):

    T^2 sum_i KL(p_t || p_i), with z_t,c = min_i (z_i,c - z_i,y) of each image, detached.
    """
    known = student_logits.detach()
    teacher_logits = (known - known.gather(-1, targets.expand(len(known), -1)[..., None])).amin(0)
    return _distillation(teacher_logits, student_logits, temperature, reduction)


def diverse_peers(
    student_logits: Tensor, targets: Tensor, scores: Tensor, temperature: float, reduction: str
) -> Tensor:
    """OKDDip (arXiv 1912.00350), with N - 1 peers and, as the last student, a leader:

    T^2 (sum_a KL(t_a || p_a) + KL(mean_a t_a || p_leader))

    with a's targets t_a = sum_b attention_ab p_b over all peers b. Nothing is detached: the attention learns from the
    KL alone. The authors' code averages logits instead of the softened outputs p.

    Args:
        scores: (B, N - 1, N - 1), whose softmax over the last dimension is the attention.
    """
    log_attention = F.log_softmax(_at_least_float32(scores), dim=-1).permute(1, 2, 0)  # (a, b, B)
    log_peers = F.log_softmax(student_logits[:-1] / temperature, dim=-1)  # (b, B, K)
    log_targets = torch.logsumexp(log_attention[..., None] + log_peers, dim=1)  # (a, B, K)
    log_mean = torch.logsumexp(log_targets, dim=0, keepdim=True) - math.log(len(log_targets))
    # Logarithms of distributions, times T, are logits of them.
    teacher_logits = temperature * torch.cat([log_targets, log_mean])
    return _distillation(teacher_logits, student_logits, temperature, reduction)


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction '{reduction}': choose from {', '.join(REDUCTIONS)}")


def _summed(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss": torch.stack(list(terms.values())).sum(), **terms}


def _cross_entropy(student_logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """The sum over students of the mean over images."""
    num_students, targets = len(student_logits), targets.repeat(len(student_logits))
    return num_students * F.cross_entropy(student_logits.flatten(0, 1), targets, label_smoothing=label_smoothing)


def _distillation(teacher_logits: Tensor, student_logits: Tensor, temperature: float, reduction: str) -> Tensor:
    """T^2 sum_i KL(softmax(teacher / T) || softmax(student_i / T)), with gradients to both.

    teacher_logits: (B, K), or (N, B, K) with a teacher for each student.
    """
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    log_students = F.log_softmax(student_logits / temperature, dim=-1)
    total = F.kl_div(log_students, log_teacher.expand_as(log_students), reduction="sum", log_target=True)
    batch_size, num_classes = teacher_logits.shape[-2:]
    return temperature**2 * total / (batch_size if reduction == "batchmean" else batch_size * num_classes)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
