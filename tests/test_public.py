"""Checkpoints of public projects: the network that loads one computes what the project's own network does.

The networks here are plain PyTorch under the names of each project's modules, and use nothing of this program's.
"""

from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn

from utils.teacher import load_teacher

CPU = torch.device("cpu")


def conv(in_channels, channels, size, stride=1, bias=False):
    return nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, bias=bias)


def residual(in_channels, channels, stride, bottleneck):
    """Convolutions of a residual block, and its projection if there is one."""
    if bottleneck:
        out = 4 * channels
        convs = [conv(in_channels, channels, 1), conv(channels, channels, 3, stride), conv(channels, out, 1)]
    else:
        out = channels
        convs = [conv(in_channels, channels, 3, stride), conv(channels, channels, 3)]
    same = stride == 1 and in_channels == out
    shortcut = nn.Sequential() if same else nn.Sequential(conv(in_channels, out, 1, stride), nn.BatchNorm2d(out))
    return convs, shortcut


class KuangliuBlock(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        convs, self.shortcut = residual(*shape)
        self.count = len(convs)
        for i, layer in enumerate(convs, 1):
            self.add_module(f"conv{i}", layer)
            self.add_module(f"bn{i}", nn.BatchNorm2d(layer.out_channels))

    def forward(self, x):
        out = x
        for i in range(1, self.count + 1):
            out = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(out))
            out = out.relu() if i < self.count else out
        return (out + self.shortcut(x)).relu()


class WeiaicunzaiBlock(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        convs, self.shortcut = residual(*shape)
        layers = [layer for c in convs for layer in (c, nn.BatchNorm2d(c.out_channels), nn.ReLU())]
        self.residual_function = nn.Sequential(*layers[:-1])

    def forward(self, x):
        return (self.residual_function(x) + self.shortcut(x)).relu()


def stages(block, depths, bottleneck):
    in_channels = 64
    for i, depth in enumerate(depths):
        blocks = []
        for j in range(depth):
            blocks.append(block(in_channels, 64 * 2**i, 2 if i and not j else 1, bottleneck))
            in_channels = 64 * 2**i * (4 if bottleneck else 1)
        yield nn.Sequential(*blocks)


class KuangliuResNet(nn.Module):
    def __init__(self, depths, bottleneck=False):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 3), nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(KuangliuBlock, depths, bottleneck)
        self.linear = nn.Linear(2048 if bottleneck else 512, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


class WeiaicunzaiResNet(nn.Module):
    def __init__(self, depths, bottleneck=False):
        super().__init__()
        self.conv1 = nn.Sequential(conv(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        self.conv2_x, self.conv3_x, self.conv4_x, self.conv5_x = stages(WeiaicunzaiBlock, depths, bottleneck)
        self.fc = nn.Linear(2048 if bottleneck else 512, 10)

    def forward(self, x):
        x = self.conv5_x(self.conv4_x(self.conv3_x(self.conv2_x(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


VGG_16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
VGG_19 = [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"]


class VGG(nn.Module):
    """Of kuangliu, chenyaofo and weiaicunzai, who differ in the classifier."""

    def __init__(self, plan, classifier):
        super().__init__()
        layers, in_channels = [], 3
        for channels in plan:
            if channels == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [conv(in_channels, channels, 3, bias=True), nn.BatchNorm2d(channels), nn.ReLU()]
                in_channels = channels
        self.features, self.classifier = nn.Sequential(*layers), classifier

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def mlp(hidden):
    first = nn.Linear(512, hidden), nn.ReLU(), nn.Dropout()
    return nn.Sequential(*first, nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, 10))


class GALVGG(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, in_channels = nn.Sequential(), 3
        for i, channels in enumerate(VGG_16[:-1]):  # an average takes the place of the last pool
            if channels == "M":
                self.features.add_module(f"pool{i}", nn.MaxPool2d(2))
            else:
                self.features.add_module(f"conv{i}", conv(in_channels, channels, 3, bias=True))
                self.features.add_module(f"norm{i}", nn.BatchNorm2d(channels))
                self.features.add_module(f"relu{i}", nn.ReLU())
                in_channels = channels
        layers = {"linear1": nn.Linear(512, 512), "norm1": nn.BatchNorm1d(512), "relu1": nn.ReLU()}
        self.classifier = nn.Sequential(OrderedDict(layers, linear2=nn.Linear(512, 10)))

    def forward(self, x):
        return self.classifier(nn.functional.avg_pool2d(self.features(x), 2).flatten(1))


class GALDenseLayer(nn.Module):
    def __init__(self, in_channels, channels, size):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_channels), conv(in_channels, channels, size)

    def forward(self, x):
        out = self.conv1(self.bn1(x).relu())
        return torch.cat([x, out], 1) if self.conv1.kernel_size == (3, 3) else nn.functional.avg_pool2d(out, 2)


class GALDenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 24, 3)
        self.dense1, self.trans1 = self.dense(24), GALDenseLayer(168, 168, 1)
        self.dense2, self.trans2 = self.dense(168), GALDenseLayer(312, 312, 1)
        self.dense3, self.bn, self.fc = self.dense(312), nn.BatchNorm2d(456), nn.Linear(456, 10)

    @staticmethod
    def dense(in_channels):
        return nn.Sequential(*(GALDenseLayer(in_channels + 12 * i, 12, 3) for i in range(12)))

    def forward(self, x):
        x = self.trans2(self.dense2(self.trans1(self.dense1(self.conv1(x)))))
        return self.fc(self.bn(self.dense3(x)).relu().mean((2, 3)))


def chain(*shapes):
    """Convolutions (in_channels, channels, size) with BatchNorm and ReLU."""
    return [layer for s in shapes for layer in (conv(*s, bias=True), nn.BatchNorm2d(s[1]), nn.ReLU())]


class PlainInception(nn.Module):
    def __init__(self, names, inputs, n1, reduce3, n3, reduce5, n5, pool):
        super().__init__()
        self.names = names
        branches = [
            chain((inputs, n1, 1)),
            chain((inputs, reduce3, 1), (reduce3, n3, 3)),
            chain((inputs, reduce5, 1), (reduce5, n5, 3), (n5, n5, 3)),
            [nn.MaxPool2d(3, stride=1, padding=1), *chain((inputs, pool, 1))],
        ]
        for name, branch in zip(names, branches, strict=True):
            self.add_module(name, nn.Sequential(*branch))

    def forward(self, x):
        return torch.cat([self.get_submodule(name)(x) for name in self.names], 1)


class GoogLeNet(nn.Module):
    """Of kuangliu and GAL, who differ in the names."""

    def __init__(self, prefix, branches):
        super().__init__()
        self.pre_layers = nn.Sequential(*chain((3, 192, 3)))
        self.prefix = prefix
        for name, shape in {
            "a3": (192, 64, 96, 128, 16, 32, 32),
            "b3": (256, 128, 128, 192, 32, 96, 64),
            "a4": (480, 192, 96, 208, 16, 48, 64),
            "b4": (512, 160, 112, 224, 24, 64, 64),
            "c4": (512, 128, 128, 256, 24, 64, 64),
            "d4": (512, 112, 144, 288, 32, 64, 64),
            "e4": (528, 256, 160, 320, 32, 128, 128),
            "a5": (832, 256, 160, 320, 32, 128, 128),
            "b5": (832, 384, 192, 384, 48, 128, 128),
        }.items():
            self.add_module(prefix + name, PlainInception(branches, *shape))
        self.linear = nn.Linear(1024, 10)

    def forward(self, x):
        x = self.pre_layers(x)
        for stage in ("a3 b3", "a4 b4 c4 d4 e4", "a5 b5"):
            x = x if stage == "a3 b3" else nn.functional.max_pool2d(x, 3, stride=2, padding=1)
            for name in stage.split():
                x = self.get_submodule(self.prefix + name)(x)
        return self.linear(x.mean((2, 3)))


def randomize(network):
    """Weights that keep the scale of the signal, and everything else away from what it starts at."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(module.weight, 1, 0.1)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def parallel(weights):
    return {f"module.{key}": value for key, value in weights.items()}


WRAPPINGS = {
    "torchvision": lambda w: w,
    "chenyaofo": lambda w: w,
    "weiaicunzai": lambda w: w,
    "kuangliu": lambda w: {"net": parallel(w), "acc": 95.1, "epoch": 199},
    "GAL": lambda w: {"state_dict": w, "best_prec1": 93.6, "epoch": 30},
}
FILES = [
    ("torchvision", "resnet_18", lambda: torchvision.models.resnet18(num_classes=10)),
    ("torchvision", "resnet_34", lambda: torchvision.models.resnet34(num_classes=10)),
    ("torchvision", "resnet_50", lambda: torchvision.models.resnet50(num_classes=10)),
    ("kuangliu", "resnet_18", lambda: KuangliuResNet((2, 2, 2, 2))),
    ("kuangliu", "resnet_50", lambda: KuangliuResNet((3, 4, 6, 3), bottleneck=True)),
    ("weiaicunzai", "resnet_34", lambda: WeiaicunzaiResNet((3, 4, 6, 3))),
    ("weiaicunzai", "resnet_50", lambda: WeiaicunzaiResNet((3, 4, 6, 3), bottleneck=True)),
    ("kuangliu", "vgg_16_bn", lambda: VGG(VGG_16, nn.Linear(512, 10))),
    ("chenyaofo", "vgg_19_bn", lambda: VGG(VGG_19, mlp(512))),
    ("weiaicunzai", "vgg_16_bn", lambda: VGG(VGG_16, mlp(4096))),
    ("GAL", "vgg_16_bn", GALVGG),
    ("GAL", "densenet_40", GALDenseNet),
    ("kuangliu", "googlenet", lambda: GoogLeNet("", ("b1", "b2", "b3", "b4"))),
    ("GAL", "googlenet", lambda: GoogLeNet("inception_", ("branch1x1", "branch3x3", "branch5x5", "branch_pool"))),
]


@pytest.mark.parametrize(("project", "name", "build"), FILES, ids=[f"{name}-{project}" for project, name, _ in FILES])
def test_public_checkpoints_compute_what_they_did(tmp_path, project, name, build):
    plain = randomize(build())
    torch.save(WRAPPINGS[project](plain.state_dict()), tmp_path / "teacher.pth")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = load_teacher(tmp_path / "teacher.pth", name, 10, CPU)[0](images)
        expected = plain(images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


STRAY_KEYS = [
    *("conv1.weight", "conv1.0.weight", "linear.weight", "layer4.0.downsample.0.weight", "conv5_x.0.shortcut.1.bias"),
    *("features.conv0.weight", "features.0.bias", "features.1.running_mean", "features.norm3.weight"),
    *("classifier.0.bias", "classifier.linear1.bias", "inception_a3.branch1x1.0.bias", "a3.b1.1.running_mean"),
]


@pytest.mark.parametrize("name", ["resnet_20", "resnet_18", "vgg_16_bn", "densenet_40", "googlenet"])
@pytest.mark.parametrize("shape", [(), (4,), (8, 3, 7, 7)])
def test_files_of_something_else_are_refused_in_one_line(tmp_path, name, shape):
    torch.save({key: torch.zeros(shape) for key in STRAY_KEYS}, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=rf"as {name} with 10 classes does not match: \d+ missing") as error:
        load_teacher(tmp_path / "teacher.pth", name, 10, CPU)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["resnet_20", "resnet_50", "vgg_19_bn", "densenet_40", "googlenet"])
def test_a_whole_network_of_another_architecture_is_refused(tmp_path, name):
    torch.save({"net": parallel(KuangliuResNet((2, 2, 2, 2)).state_dict())}, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=rf"as {name} with 10 classes does not match") as error:
        load_teacher(tmp_path / "teacher.pth", name, 10, CPU)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("key", "size"), [("features.2.bias", 64), ("features.0.bias", 3)])
def test_biases_that_belong_to_no_norm_are_not_dropped(tmp_path, key, size):
    weights = VGG(VGG_16, nn.Linear(512, 10)).state_dict()
    torch.save(weights | {key: torch.ones(size)}, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=rf"1 unexpected, first {key}"):
        load_teacher(tmp_path / "teacher.pth", "vgg_16_bn", 10, CPU)
