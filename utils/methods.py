"""The methods that --method names, the paper's and those that it is compared with."""

from typing import NamedTuple


class Method(NamedTuple):
    """What a method is where flags do not say otherwise.

    Attributes:
        title: its name for people.
        num_students: that it trains side by side.
        lam: weight of the online term, from which the students learn of each other; 0: it has none.
        temperature: T of the softened distributions.
        rampup: share of the epochs in which the weight of the online term rises from 0.
        pretrained: it learns from a pretrained teacher.
    """

    title: str
    num_students: int
    lam: float
    temperature: float
    rampup: float
    pretrained: bool


METHODS = {
    # arXiv 1909.13063: students and an online teacher made of their features teach each other. The released recipe has
    # lambda 0.8 with a KL that is K times weaker, which is 0.08 with this one on ten classes.
    "od": Method("online distillation", 4, 0.1, 4.0, 0.0, True),
    "scratch": Method("plain training", 1, 0.0, 4.0, 0.0, False),
    # arXiv 1503.02531, offline: each student learns from the pretrained teacher alone.
    "kd": Method("knowledge distillation", 1, 0.0, 4.0, 0.0, True),
    # arXiv 1706.00384: each student learns from the others.
    "dml": Method("deep mutual learning", 4, 1.0, 1.0, 0.0, False),
    # arXiv 1806.04606: the students learn from an ensemble of their logits. The authors' code ramps up over 80 of 300
    # epochs.
    "one": Method("on-the-fly native ensemble", 4, 1.0, 3.0, 80 / 300, False),
}
