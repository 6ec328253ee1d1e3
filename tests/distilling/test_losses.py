"""The losses: against values by hand, against TRL's own function, and what becomes of the tail."""

import math

import pytest
import torch

from semiopen.host.distilling.losses import GKDTrainer, cross_entropy, divergence, top_k

P, Q = [0.7, 0.2, 0.1], [0.5, 0.25, 0.25]


def logits(*rows):
    """Logits whose softmax is given, moved by a constant each: a loss must not see it."""
    shift = torch.arange(len(rows))[:, None] * 3.0
    return torch.tensor(rows).log() + shift


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(
    ("mixing", "expected"),
    [
        (0.0, kl(P, Q)),
        (1.0, kl(Q, P)),
        # The mixture leans on the teacher by beta, and so does the sum.
        (0.3, 0.3 * kl(P, [0.56, 0.235, 0.205]) + 0.7 * kl(Q, [0.56, 0.235, 0.205])),
    ],
)
def test_values_by_hand(mixing, expected):
    student, teacher = logits(Q, P), logits(P, P)
    assert divergence(student, teacher, mixing).item() == pytest.approx(expected, rel=1e-5)


def test_temperature_by_hand():
    def soften(p, t):
        raised = [value ** (1 / t) for value in p]
        return [value / sum(raised) for value in raised]

    found = divergence(logits(Q), logits(P), 0.0, temperature=2.0).item()
    assert found == pytest.approx(kl(soften(P, 2), soften(Q, 2)), rel=1e-5), "and it is not multiplied by 4"


@pytest.mark.parametrize("mixing", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_whole_vocabulary_is_trls_loss(mixing, temperature):
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 50, generator=draw) * 3 for _ in range(2))
    expected = GKDTrainer.generalized_jsd_loss(student, teacher, beta=mixing, temperature=temperature, reduction="sum")
    assert divergence(student, teacher, mixing, temperature).item() == pytest.approx(expected.item(), rel=1e-6)
    # All tokens but one, and the one as the rest: the same outcomes.
    short = top_k(teacher, 49, temperature)
    assert divergence(student, short, mixing, temperature).item() == pytest.approx(expected.item(), rel=1e-4)
    assert top_k(teacher, 1000).ids.shape == (6, 49)


@pytest.mark.parametrize("mixing", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [None, 5])
def test_zero_where_student_is_teacher_and_nowhere_else(mixing, k):
    teacher = torch.randn(4, 30, generator=torch.Generator().manual_seed(1)) * 4
    targets = teacher if k is None else top_k(teacher, k)
    same, other = teacher.clone().requires_grad_(), (teacher + torch.eye(30)[teacher.argmax(1)]).requires_grad_()
    for student, zero in ((same, True), (other, False)):
        loss = divergence(student, targets, mixing)
        (gradient,) = torch.autograd.grad(loss, student)
        assert (abs(loss.item()) < 1e-5) is zero
        assert (gradient.abs().max().item() < 1e-5) is zero


def test_the_tail_is_one_outcome():
    teacher, student = [0.5, 0.3, 0.1, 0.06, 0.04], [0.4, 0.1, 0.2, 0.25, 0.05]
    found = top_k(logits(teacher), 2)
    assert found.ids.tolist() == [[0, 1]]
    assert found.log_probs.exp()[0].tolist() == pytest.approx([0.5, 0.3, 0.2])
    loss = divergence(logits(student), found, 0.0).item()
    assert loss == pytest.approx(kl([0.5, 0.3, 0.2], [0.4, 0.1, 0.5]), rel=1e-5)
    assert loss < kl(teacher, student), "merging outcomes can only lower it"
    # The student may share the tail out as it likes, and pays for its size.
    moved = [0.4, 0.1, 0.05, 0.05, 0.4]
    assert divergence(logits(moved), found, 0.0).item() == pytest.approx(loss, rel=1e-5)
    assert divergence(logits([0.4, 0.3, 0.1, 0.1, 0.1]), found, 0.0).item() < loss


def test_a_teacher_that_is_sure_leaves_numbers():
    """1 - p would be 0 here, and its logarithm minus infinity; float16 must hold it too."""
    teacher = torch.tensor([[60.0, 0.0, 0.0, 0.0], [0.0, 200.0, 0.0, 0.0]])
    found = top_k(teacher, 2)
    assert found.log_probs[:, -1].tolist() == pytest.approx([math.log(2) - 60, math.log(2) - 200], rel=1e-5)
    student = torch.zeros(2, 4, requires_grad=True)
    for mixing in (0.0, 0.5, 1.0):
        short = type(found)(found.ids, found.log_probs.half())
        loss = divergence(student, short, mixing)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite() and gradient.isfinite().all()


def test_cross_entropy_by_hand():
    assert cross_entropy(logits(P, Q), torch.tensor([0, 2])).item() == pytest.approx(-math.log(0.7) - math.log(0.25))
