"""Many processes compute what one process computes on the same batches."""

import copy

import pytest
import torch
from torch import nn

from tests.processes import in_processes
from utils import distributed


def normalize(norm, x):
    """Output of two training steps and one evaluation, the state, and the gradients, of this process's share of x."""
    distributed.synchronize_batch_norm(norm)
    share = distributed.share(len(x))
    outputs, weights = [], torch.arange(x.numel(), dtype=x.dtype).view_as(x).cos()
    mine = x[share].clone().requires_grad_()
    for _ in range(2):
        norm.zero_grad()
        mine.grad = None
        y = norm(mine)
        (y * weights[share]).sum().backward()
    norm.eval()
    gathered = torch.zeros_like(x)
    gathered[share] = y.detach()
    grads = torch.zeros_like(x)
    grads[share] = mine.grad
    outputs = [gathered, grads, norm.weight.grad, norm.bias.grad]
    outputs = [distributed.total(value) for value in outputs]
    return [*outputs, norm.running_mean, norm.running_var, norm.num_batches_tracked, norm(x).detach()]


@pytest.mark.parametrize("count", [2, 3])
def test_synchronized_batch_norm_is_batch_norm_of_the_whole_batch(tmp_path, count):
    torch.manual_seed(0)
    x = 100 + torch.randn(7, 5, 3, 2, dtype=torch.float64)
    norm = nn.BatchNorm2d(5).double()
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    reference, inputs = copy.deepcopy(norm), x.clone().requires_grad_()
    for _ in range(2):
        reference.zero_grad()
        inputs.grad = None
        y = reference(inputs)
        (y * torch.arange(x.numel(), dtype=x.dtype).view_as(x).cos()).sum().backward()
    reference.eval()
    expected = [y.detach(), inputs.grad, reference.weight.grad, reference.bias.grad]
    expected += [reference.running_mean, reference.running_var, reference.num_batches_tracked, reference(x).detach()]
    result = in_processes(count, tmp_path, normalize, norm, x)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
