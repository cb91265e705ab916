"""What the compiled kernels take, and what they leave to PyTorch's operators."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from model import fused
from model.conv import KINDS, CheapConv2d
from model.fused import FusedSequential
from tests.helpers import BUDGET, channels_last, random_norm

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 16, 4, 4),
        channels_last(2, 16, 4, 4).double(),
        channels_last(2, 12, 4, 4),
        channels_last(2, 16, 4, 4).to("meta"),
    ],
    ids=["NCHW", "float64", "12 channels", "another device"],
)
def test_what_the_kernels_cannot_take_goes_through_pytorch(x):
    channels = x.shape[1]
    conv, norm = (m.to(x.device, x.dtype) for m in (CheapConv2d(channels, channels), nn.BatchNorm2d(channels)))
    out = fused.conv_norm_relu(conv, norm, x)
    assert type(out.grad_fn).__name__ == "ReluBackward0"


def part_of(x, at):
    """x as a part of a larger tensor, which has NaN elsewhere."""
    whole = torch.full([2 * size for size in x.shape], torch.nan, dtype=x.dtype)
    whole = whole.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else whole
    part = whole[tuple(at(size) for size in x.shape)]
    return part.copy_(x)


def in_parameters(module, change):
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(change(parameter.detach())))


LAYOUTS = {
    "as it is": lambda x: x,
    "NCHW": lambda x: x.contiguous(),
    "first half": lambda x: part_of(x, lambda size: slice(size)),
    "every second": lambda x: part_of(x, lambda size: slice(None, None, 2)),
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "meta": lambda x: x.to("meta"),
}
RESIDUALS = LAYOUTS | {
    "none": lambda x: None,
    "of each channel": lambda x: x[:1, :, :1, :1],
    "of each column": lambda x: x.sum((0, 1, 2)),
    "of one image": lambda x: x[:1].expand_as(x),
    "of other channels": lambda x: x.repeat(1, 2, 1, 1),
    "of other pixels": lambda x: F.pad(x, (0, 1, 0, 0)),
    "of more images": lambda x: x.repeat(2, 1, 1, 1),
}
TAMPERING = {
    "as it is": lambda m: None,
    "hook": lambda m: m.register_forward_hook(lambda module, args, out: 2 * out),
    "hook before": lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "hook in backward": lambda m: m.register_full_backward_hook(lambda module, grads, _: (3 * grads[0],)),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "parametrized": lambda m: parametrize.register_parametrization(m, "weight", nn.Tanh()),
    "own forward": lambda m: setattr(m, "forward", lambda x: x.exp()),
    "float64": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "strided": lambda m: in_parameters(m, LAYOUTS["every second"]),
}
NORMS = TAMPERING | {
    "not affine": lambda m: m.__init__(m.num_features, affine=False),
    "no running statistics": lambda m: m.__init__(m.num_features, track_running_stats=False),
    "ignored running statistics": lambda m: setattr(m, "track_running_stats", False),
    "average": lambda m: setattr(m, "momentum", None),
    "not counted": lambda m: setattr(m, "num_batches_tracked", None),
    "other channels": lambda m: m.__init__(m.num_features + 16),
    "statistics of float64": lambda m: setattr(m, "running_var", m.running_var.double()),
    "no bias": lambda m: setattr(m, "bias", None),
}
STAGES = TAMPERING | {
    "stride": lambda m: setattr(m, "stride", (3, 3)),
    "padding": lambda m: setattr(m, "padding", (2, 2)),
    "bias": lambda m: setattr(m, "bias", nn.Parameter(torch.ones(len(m.weight)))),
    "other channels": lambda m: m.__init__(m.in_channels + 16, m.out_channels, m.kernel_size, m.stride),
    "an Identity": lambda m: setattr(m, "__class__", nn.Identity),
}


def mostly(usual, others):
    return st.one_of(st.just(usual), st.just(usual), st.sampled_from(list(others)))


CASES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from([None, *KINDS]),
        "channels": st.sampled_from([(16, 16), (32, 16), (12, 16), (16, 12), (64, 144)]),
        "stride": st.integers(1, 2),
        "size": st.tuples(mostly(2, range(4)), st.integers(1, 5), st.integers(1, 5)),
        "x": mostly("as it is", LAYOUTS),
        "residual": mostly("none", RESIDUALS),
        "norm": mostly("as it is", NORMS),
        "conv": mostly("as it is", TAMPERING.keys() - {"pruned", "parametrized"}),
        "spatial": mostly("as it is", STAGES),
        "pointwise": mostly("as it is", STAGES),
        "training": st.booleans(),
        "gradients": st.booleans(),
        "autocast": mostly(False, [True]),
    }
)


def computed(case):
    """Output, statistics and gradients of a case, or the type of the error that it ends in."""
    torch.manual_seed(0)
    (in_channels, out_channels), (batch, height, width), stride = case["channels"], case["size"], case["stride"]
    norm, conv = random_norm(out_channels), nn.Identity()
    if case["kind"]:
        conv = CheapConv2d(in_channels, out_channels, 3, stride, case["kind"])
        STAGES[case["pointwise"]](conv.pointwise)
        if case["kind"] != "shift":
            STAGES[case["spatial"]](conv.spatial)
        TAMPERING[case["conv"]](conv)
    else:
        in_channels, stride = out_channels, 1
    NORMS[case["norm"]](norm)
    modules = nn.ModuleList([conv, norm]).train(case["training"])
    x = LAYOUTS[case["x"]](channels_last(batch, in_channels, height, width)).detach().requires_grad_(case["gradients"])
    size = batch, out_channels, -(-height // stride), -(-width // stride)
    residual = RESIDUALS[case["residual"]](channels_last(*size, seed=1))
    try:
        with torch.set_grad_enabled(case["gradients"]), torch.autocast("cpu", torch.bfloat16, enabled=case["autocast"]):
            out = fused.conv_norm_relu(conv, norm, x, residual)
        if case["gradients"]:
            out.backward(torch.randn(out.shape, dtype=out.dtype, device=out.device))
    except (RuntimeError, ValueError, NotImplementedError, IndexError) as error:
        return type(error)
    gradients = {f"gradient of {name}": p.grad for name, p in [("x", x), *modules.named_parameters()]}
    return {"output": out} | dict(modules.named_buffers()) | gradients


@settings(
    max_examples=int(60 * BUDGET),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(CASES)
def test_whatever_comes_is_computed_or_refused_as_pytorch_does(case):
    check_against_pytorch(case)


USUAL = {
    "kind": "depthwise", "channels": (16, 16), "stride": 1, "size": (2, 3, 4), "x": "as it is", "residual": "as it is",
    "norm": "as it is", "conv": "as it is", "spatial": "as it is", "pointwise": "as it is", "gradients": True,
    "autocast": False,
}  # fmt: skip
KINDS_OF = {
    "x": LAYOUTS, "residual": RESIDUALS, "norm": NORMS, "conv": TAMPERING.keys() - {"pruned", "parametrized"},
    "spatial": STAGES, "pointwise": STAGES,
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("part", "kind"), [(part, kind) for part, kinds in KINDS_OF.items() for kind in sorted(kinds)])
def test_each_odd_part_alone_is_computed_or_refused_as_pytorch_does(part, kind, training):
    """Without gradients, too, in evaluation, where they would leave the work to PyTorch."""
    check_against_pytorch(USUAL | {part: kind, "training": training, "gradients": training})


def check_against_pytorch(case):
    fused.enable()
    result = computed(case)
    fused.disable()
    expected = computed(case)
    if isinstance(expected, type):
        assert result is expected
        return
    assert result.keys() == expected.keys()
    rough = case["autocast"] or "bfloat16" in case.values()
    for name, wanted in expected.items():
        value = result[name]
        assert (value is None) == (wanted is None), name
        if wanted is None:
            continue
        assert (value.shape, value.dtype, value.device) == (wanted.shape, wanted.dtype, wanted.device), name
        # PyTorch's own gradients in bfloat16 are garbage for a depthwise filter with a stride and maps one pixel wide.
        if not wanted.is_meta and (name == "output" or not rough):
            error = (value.double() - wanted.double()).norm()
            assert torch.equal(value.isnan(), wanted.isnan()), name
            assert not error > (0.3 if rough else 1e-3) * (1 + wanted.double().norm()), name


def test_what_follows_pytorchs_operators_sees_them():
    conv, norm, x = CheapConv2d(16, 16), random_norm(16).eval(), channels_last(2, 16, 4, 4)
    network = FusedSequential(conv, norm, nn.ReLU()).eval().requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(network, x)
        torch.testing.assert_close(traced(x + 1), network(x + 1))
        with FlopCounterMode(display=False) as counter:
            network(x)
        assert counter.get_total_flops() == 2 * 2 * 16 * 16 * (9 + 16)
        torch.testing.assert_close(torch.func.vmap(network)(x[None])[0], network(x))
        tangents = [torch.func.jvp(network, (x,), (torch.ones_like(x),))[1]]
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(network(forward_ad.make_dual(x, torch.ones_like(x)))).tangent)
    torch.testing.assert_close(*tangents)
    assert tangents[0].any()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_fused_relu_runs_its_hooks(enabled):
    if not enabled:
        fused.disable()
    network, seen = FusedSequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU()), []
    hook = network[2].register_forward_hook(lambda module, args, out: seen.append(out))
    out = network(channels_last(2, 3, 4, 4))
    assert seen[0] is out
    hook.remove()
    with torch.no_grad():
        torch.testing.assert_close(network(channels_last(2, 3, 4, 4)), out)
