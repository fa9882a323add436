"""The models that come with the fabric: functions of the shape of a sample and the number of classes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from icrf.errors import ConfigError

_GROUPS = 8


def logistic(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """Multinomial logistic regression on the flattened input; weights start at zero, as its loss is convex."""
    output = nn.Linear(math.prod(input_shape), num_classes)
    nn.init.zeros_(output.weight)
    nn.init.zeros_(output.bias)
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), output=output))


def mlp(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """One hidden layer of 128 rectified units on the flattened input."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden=nn.Linear(math.prod(input_shape), 128),
            relu=nn.ReLU(),
            output=nn.Linear(128, num_classes),
        )
    )


def two_nn(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """The "2NN" of McMahan et al. 2017 (arXiv 1602.05629): twice 200 units; 199,210 parameters on MNIST."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden1=nn.Linear(math.prod(input_shape), 200),
            relu1=nn.ReLU(),
            hidden2=nn.Linear(200, 200),
            relu2=nn.ReLU(),
            output=nn.Linear(200, num_classes),
        )
    )


def cnn(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """The CNN of McMahan et al. 2017 (arXiv 1602.05629); 1,663,370 parameters on MNIST.

    Two 5 x 5 convolutions of 32 and 64 channels that keep the size, each with 2 x 2 max pooling; 512 units.
    """
    channels, height, width = _image("cnn", input_shape, least=4)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 32, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            hidden=nn.Linear(64 * (height // 4) * (width // 4), 512),
            relu3=nn.ReLU(),
            output=nn.Linear(512, num_classes),
        )
    )


def lenet(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with rectified units and max pooling: 6 and 16 channels, 120 and 84 units."""
    channels, height, width = _image("lenet", input_shape, least=12)
    rows, columns = ((size // 2 - 4) // 2 for size in (height, width))
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 6, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            hidden1=nn.Linear(16 * rows * columns, 120),
            relu3=nn.ReLU(),
            hidden2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            output=nn.Linear(84, num_classes),
        )
    )


def resnet8(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """A residual network of 8 layers (He et al. 2015, arXiv 1512.03385) with group norm (8 groups).

    Group norm has no statistics of batches, which differ between nodes of differing data (Hsieh et al. 2020,
    arXiv 1910.00189).
    """
    return _ResNet8(_image("resnet8", input_shape, least=4)[0], num_classes, lambda size: nn.GroupNorm(_GROUPS, size))


def resnet8_bn(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """The same network with batch norm; its running statistics are averaged like parameters."""
    return _ResNet8(_image("resnet8_bn", input_shape, least=4)[0], num_classes, nn.BatchNorm2d)


BUILT_IN: dict[str, Callable[..., Any]] = {
    "logistic": logistic,
    "mlp": mlp,
    "2nn": two_nn,
    "cnn": cnn,
    "lenet": lenet,
    "resnet8": resnet8,
    "resnet8_bn": resnet8_bn,
}


class _Block(nn.Module):  # type: ignore[misc]
    """Two 3 x 3 convolutions around a shortcut, which is a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class _ResNet8(nn.Module):  # type: ignore[misc]
    """A convolution, three blocks of 16, 32 and 64 channels, the mean over the image, a linear layer."""

    def __init__(self, channels: int, num_classes: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm = norm(16)
        self.block1 = _Block(16, 16, 1, norm)
        self.block2 = _Block(16, 32, 2, norm)
        self.block3 = _Block(32, 64, 2, norm)
        self.output = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.relu(self.norm(self.conv(x)))
        hidden = self.block3(self.block2(self.block1(hidden)))
        return self.output(hidden.mean(dim=(2, 3)))


def _image(model: str, input_shape: Sequence[int], least: int) -> tuple[int, int, int]:
    """Channels, height and width; C018 unless samples are images of a size that the model can take."""
    if len(input_shape) == 3 and min(input_shape[1:]) >= least:
        return input_shape[0], input_shape[1], input_shape[2]
    raise ConfigError(
        "C018",
        f"model '{model}' takes images, and a sample has the shape {tuple(input_shape)}",
        place="model_type",
        value=tuple(input_shape),
        allowed=f"(channels, height, width) of at least {least} x {least} pixels",
        hint="Use mlp, 2nn or logistic, or a data set of images (mnist, fmnist, cifar10)",
    )
