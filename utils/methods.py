"""The methods that --method names: one class each, the paper's and those that it is compared with.

To add a method, add a subclass of `Method` with a `name` and a row to the table of the README. Imports no torch until a
learner or an objective is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from model.online import Students
    from utils.config import Config

    # (student_logits, teacher_logits, targets, *others, pretrained_logits=, rampup=) -> the loss and its terms, where
    # others is what the learner returns besides logits
    Objective = Callable[..., dict[str, Tensor]]


class Method:
    """Students, perhaps with an online teacher made of them, and the loss that trains them."""

    name: str  # value of --method
    title: str  # for --help
    # Defaults of the flags.
    num_students, fewest_students = 1, 1
    lam = 0.0  # weight of the online term; 0 if the method has no such term
    temperature = 4.0
    rampup = 0.0  # --rampup_epochs, as a share of the epochs
    online_term: str | None = None  # function of utils/losses.py, in methods without teachers
    uses_pretrained = False  # it can learn from a pretrained teacher (--teacher_dir, --miu)
    detaches: bool | None = False  # the online teacher gets no gradient from the online term; None: --detach_teacher

    def check(self, config: Config) -> None:
        """Raise a UserError for flags, settled or not, that do not suit the method."""
        this = f"--method {self.name}"
        if not self.lam:
            config.refuse("lam", "rampup_epochs", message=f"{this} has no online term: leave out {{flag}}")
        if not self.uses_pretrained:
            config.refuse("miu", message=f"{this} learns from no pretrained teacher: leave out {{flag}}")
        if self.detaches is not None:
            message = f"{{flag}} belongs to --method od: {self.name} has nothing that it could detach"
            config.refuse("detach_teacher", message=message)
        if config.num_students < self.fewest_students:
            raise UserError(
                f"with {this} students learn from each other: --num_students must be {self.fewest_students} or more"
            )

    def names(self, num_students: int) -> list[str]:
        """Names of the students in reports."""
        return [f"student {i + 1}" for i in range(num_students)]

    def candidates(self, num_students: int) -> Sequence[int]:
        """Indices of the students of which the best one is exported."""
        return range(num_students)

    def has_online_teacher(self, config: Config) -> bool:
        return False

    def needs_features(self, config: Config) -> bool:
        """Whether the learner takes the students' feature maps, which not all networks give."""
        return self.has_online_teacher(config)

    def online_teacher(self, students: Sequence[nn.Module], num_classes: int) -> Students:
        """The students with their online teacher; raises a UserError if the method has none."""
        raise UserError(f"the method '{self.name}' has no online teacher")

    def learner(self, config: Config, students: Sequence[nn.Module], num_classes: int) -> Students:
        """The networks to train: the students, with their online teacher if there is one."""
        from model.online import Students

        return self.online_teacher(students, num_classes) if self.has_online_teacher(config) else Students(students)

    def objective(self, config: Config) -> Objective:
        """The loss from utils/losses.py, with the weights from the flags."""
        from utils import losses

        settings = {"lam": config.lam, "temperature": config.temperature, "reduction": config.kl_reduction}
        settings["label_smoothing"] = config.label_smoothing
        if self.online_term:
            return partial(losses.among_students, getattr(losses, self.online_term), **settings)
        detach = self.detaches or config.detach_teacher
        return partial(losses.online_distillation, miu=config.miu, detach_teacher=detach, **settings)


class OnlineDistillation(Method):
    """arXiv 1909.13063: students and an online teacher made of their features teach each other.

    The released recipe has lambda 0.8 with a KL that is K times weaker, i.e. 0.08 with this one on ten classes.
    """

    name, title = "od", "online distillation"
    num_students, lam = 4, 0.1
    uses_pretrained = True
    detaches = None

    def has_online_teacher(self, config: Config) -> bool:
        """Without the online term, a single student has nothing to learn from an online teacher."""
        return config.lam > 0 or config.num_students > 1

    def online_teacher(self, students: Sequence[nn.Module], num_classes: int) -> Students:
        from model.online import OnlineTeacher

        return OnlineTeacher(students, num_classes)


class Scratch(Method):
    """Each student learns from the targets alone."""

    name, title = "scratch", "plain training"


class KnowledgeDistillation(Method):
    """arXiv 1503.02531, offline: each student learns from the pretrained teacher."""

    name, title = "kd", "knowledge distillation, offline, from the pretrained teacher"
    uses_pretrained = True

    def check(self, config: Config) -> None:
        super().check(config)
        if not config.teacher_dir or config.miu == 0:
            raise UserError("--method kd learns from a pretrained teacher: give --teacher_dir, and no --miu 0")


class DeepMutualLearning(Method):
    """arXiv 1706.00384: each student learns from the others."""

    name, title = "dml", "deep mutual learning"
    num_students, fewest_students, lam, temperature = 4, 2, 1.0, 1.0
    online_term = "mutual_learning"


class NativeEnsemble(Method):
    """arXiv 1806.04606: students learn from an ensemble of their logits; the authors' code ramps up over 80 of 300."""

    name, title = "one", "on-the-fly native ensemble"
    num_students, fewest_students, lam, temperature, rampup = 4, 2, 1.0, 3.0, 80 / 300
    detaches = True

    def has_online_teacher(self, config: Config) -> bool:
        return True

    def online_teacher(self, students: Sequence[nn.Module], num_classes: int) -> Students:
        from model.online import GatedEnsemble

        return GatedEnsemble(students)


class CollaborativeLearning(Method):
    """KDCL-MinLogit (Guo et al., CVPR 2020, section 3): each student learns from the least confident logits of all.

    There, each student sees an augmentation of its own; here all see the same batch. The authors published no code: the
    default temperature is not verified.
    """

    name, title = "kdcl", "collaborative learning, KDCL-MinLogit"
    num_students, fewest_students, lam, temperature = 4, 2, 1.0, 2.0
    online_term = "collaborative_learning"


class DiversePeers(Method):
    """OKDDip, network-based (arXiv 1912.00350): peers learn from each other by attention, and a leader from them all.

    The last student is the leader. Defaults are those of the authors' code, github.com/DefangChen/OKDDip (train_GL.py).
    """

    name, title = "okddip", "diverse peers and a leader, OKDDip"
    num_students, fewest_students, lam, temperature, rampup = 4, 3, 1.0, 3.0, 80 / 300
    online_term = "diverse_peers"

    def names(self, num_students: int) -> list[str]:
        return [*(f"peer {i + 1}" for i in range(num_students - 1)), "leader"]

    def candidates(self, num_students: int) -> Sequence[int]:
        return [num_students - 1]

    def needs_features(self, config: Config) -> bool:
        return True

    def learner(self, config: Config, students: Sequence[nn.Module], num_classes: int) -> Students:
        from model.online import PeerAttention

        return PeerAttention(students)


METHODS: dict[str, Method] = {kind.name: kind() for kind in Method.__subclasses__()}
