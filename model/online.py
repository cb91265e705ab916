"""N students side by side, and what methods build on them: the paper's online teacher and ONE's, OKDDip's attention."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.fused import norm_relu
from model.split import split


class Students(nn.Module):
    """N networks trained on the same batch, without an online teacher: with N = 1, plain training.

    `forward`: (B, 3, H, W) -> (student_logits (N, B, K), None). Subclasses return the logits (B, K) of an online
    teacher in place of None, and may return more, for the loss of their method.
    """

    def __init__(self, students: Sequence[nn.Module]):
        super().__init__()
        if not students:
            raise ValueError("there must be at least one student")
        self.students = nn.ModuleList(students)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.stack([student(x) for student in self.students]), None

    def features_and_logits(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Feature maps of each student, (B, C, H, W), computed once for a head and for the logits (N, B, K).

        Students follow timm's protocol: `forward_features`, `forward_head`, `num_features`.
        """
        features = [student.forward_features(x) for student in self.students]
        logits = [student.forward_head(f) for student, f in zip(self.students, features, strict=True)]
        return features, torch.stack(logits)


class Ensemble(nn.Module):
    """The online teacher of trained students as one network, to deploy: (B, 3, H, W) -> (B, K)."""

    def __init__(self, learner: Students):
        super().__init__()
        self.learner = learner

    def forward(self, x: Tensor) -> Tensor:
        return self.learner(x)[1]


class OnlineTeacher(Students):
    """N students whose concatenated feature maps make a stronger network, the online teacher, with its own classifier.

    Head: concatenate (B, sum C, H, W) - BatchNorm - ReLU - global average pool - Linear. Nothing is detached. The
    feature maps of all students have one height and width. Students that do not follow timm's protocol
    (`forward_features`, `forward_head`, `num_features`) get it, in place (`model.split.split`).

    Args:
        input_size: (C, H, W) of the images, for students that do not follow the protocol.

    Raises:
        UserError (a ValueError): a student cannot be split into features and head.
    """

    def __init__(self, students: Sequence[nn.Module], num_classes: int, input_size: Sequence[int] = (3, 224, 224)):
        super().__init__(students)
        for student in students:
            split(student, input_size)
        channels = sum(student.num_features for student in students)
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (student_logits (N, B, K), teacher_logits (B, K))."""
        features, student_logits = self.features_and_logits(x)
        fused = norm_relu(self.norm, torch.cat(features, dim=1))
        return student_logits, self.fc(fused.mean((2, 3)))


class GatedEnsemble(Students):
    """N students whose logits, weighted by a gate, make the teacher of ONE (arXiv 1806.04606, section 3.1).

    Gate: Linear - BatchNorm - ReLU - softmax over students, for each image. There it looks at the layers that branches
    share; whole networks share none, so here it looks at their pooled features, concatenated.
    """

    def __init__(self, students: Sequence[nn.Module]):
        super().__init__(students)
        self.fc = nn.Linear(sum(student.num_features for student in students), len(students))
        self.norm = nn.BatchNorm1d(len(students))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (student_logits (N, B, K), teacher_logits (B, K))."""
        features, logits = self.features_and_logits(x)
        pooled = torch.cat([f.mean((2, 3)) for f in features], dim=1)
        gate = self.norm(self.fc(pooled)).relu().softmax(dim=1)
        return logits, torch.einsum("bn,nbk->bk", gate, logits)


class PeerAttention(Students):
    """N - 1 peers that attend to each other, and a leader: OKDDip, network-based (arXiv 1912.00350).

    Peer a attends to peer b with the score L(h_a)^T E(h_b): h are the pooled features (B, C), L and E linear maps
    without bias to C / 8, the factor of the authors' code (github.com/DefangChen/OKDDip). All peers share L and E, so
    C is the same for all. The leader is the last student; nobody attends to it.
    """

    FACTOR = 8

    def __init__(self, students: Sequence[nn.Module]):
        super().__init__(students)
        channels = students[0].num_features
        self.query, self.key = (nn.Linear(channels, max(1, channels // self.FACTOR), bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        """(B, 3, H, W) -> (student_logits (N, B, K), None, scores (B, N - 1, N - 1) of peer a for peer b)."""
        features, logits = self.features_and_logits(x)
        pooled = torch.stack([f.mean((2, 3)) for f in features[:-1]], dim=1)
        return logits, None, self.query(pooled) @ self.key(pooled).transpose(1, 2)
