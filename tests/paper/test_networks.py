"""The pretrained extractors give the features that were published with the photographs, and are what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from upweight import datasets, errors

ROOT = Path(__file__).parents[2]
SQUEEZENET = pytest.mark.skipif(
    datasets.local("squeezenet1_1") is None or datasets.local("dogfish_imagenette") is None,
    reason="UPWEIGHT_DATA has no squeezenet1_1 or dogfish_imagenette folder",
)
INCEPTION = pytest.mark.skipif(datasets.local("inception_v3_nsfwjs") is None, reason="UPWEIGHT_DATA has no inception")
PUBLISHED = {"squeezenet": "squeezenet1_1", "efficientnet_lite0": "efficientnet_lite0"}
RIGHT = {"squeezenet": 595, "efficientnet_lite0": 600}


def load(name):
    from paper import networks

    try:
        return networks.NETWORKS[name]()
    except errors.PathNotFound as error:
        pytest.skip(str(error))


def published(name):
    """The features of our training and test rows, as they came with the photographs."""
    place = datasets.local("dogfish_imagenette")
    assert place is not None
    with np.load(place / "features.npz") as file:
        names, table = file["names"].tolist(), file[PUBLISHED[name]].astype(np.float64)
    parts = []
    for split, count in (("train", 900), ("val", 300)):
        rows = []
        for kind in ("n02102040", "n01440764"):
            of_kind = sorted((n, i) for i, n in enumerate(names) if n.startswith(f"{split}/{kind}/"))
            rows += [i for _, i in of_kind[:count]]
        parts.append(table[rows])
    return parts


@pytest.mark.data
@SQUEEZENET
@pytest.mark.parametrize("name", PUBLISHED)
def test_features_are_those_published_with_the_photographs(name):
    from paper import networks

    network, data = load(name), datasets.dogfish()
    expected, rows = published(name)[1], [0, 150, 299, 300, 450, 599]
    found = networks.features(network, data.test_images[rows])
    np.testing.assert_allclose(found, expected[rows], rtol=2e-3, atol=2e-3 * expected.max() / 10)


@pytest.mark.data
@SQUEEZENET
@pytest.mark.parametrize("name", PUBLISHED)
def test_logistic_regression_on_them_is_right_as_often_as_published(name):
    from sklearn.linear_model import LogisticRegression

    train, test = published(name)
    y, labels = np.repeat([0, 1], 900), np.repeat([0, 1], 300)
    model = LogisticRegression(C=1 / (1800 * 0.001), fit_intercept=False, tol=1e-8, max_iter=5000).fit(train, y)
    assert (model.predict(test) == labels).sum() == RIGHT[name]


@pytest.mark.data
@SQUEEZENET
@pytest.mark.parametrize("name", ["squeezenet", "efficientnet_lite0", "inception_v3_nsfwjs"])
def test_an_example_does_not_see_its_batch_and_pixels_have_a_gradient(name):
    network = load(name)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in network.modules())
    x = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 255
    together, alone = network(x), network(x[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)
    x = x[:1].requires_grad_(True)
    network(x).sum().backward()
    step = 0.02 * x.grad.sign()  # along which the sum rises by the L1 norm, far above rounding
    with torch.no_grad():
        rise = float((network(x + step).double() - network(x - step).double()).sum()) / 0.04
    assert rise == pytest.approx(float(x.grad.abs().sum()), rel=0.05)


@pytest.mark.data
@INCEPTION
def test_inception_is_the_one_that_came_with_the_weights():
    place = datasets.local("inception_v3_nsfwjs")
    assert place is not None
    spec = importlib.util.spec_from_file_location("reference_inception", place / "load_inception_v3.py")
    assert spec is not None
    assert spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    theirs = reference.load(place / "inception_v3_nsfwjs_uint8.npz")
    x = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad():
        torch.testing.assert_close(load("inception_v3_nsfwjs")(x), theirs(x / 255), rtol=1e-3, atol=1e-4)


def test_a_missing_torchvision_is_named(monkeypatch):
    from paper import networks

    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(errors.MissingExtra, match="pip install torchvision"):
        networks.inception_v3_torchvision()


def test_where_torchvision_is_its_pixels_are_normalised(monkeypatch):
    import types

    from paper import networks

    class Fake(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)

    fake = types.ModuleType("torchvision.models")
    fake.inception_v3 = lambda weights: Fake()
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", fake)
    network = networks.inception_v3_torchvision()
    white = network(torch.full((1, 3, 299, 299), 255.0)).reshape(3, 299, 299)
    assert white[:, 5, 5].tolist() == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    assert networks.resized(torch.rand(2, 3, 224, 224), 299).shape == (2, 3, 299, 299)


def test_a_weight_file_that_is_missing_or_damaged_is_named(tmp_path, monkeypatch):
    from paper import networks

    monkeypatch.setenv("UPWEIGHT_DATA", str(tmp_path))
    with pytest.raises(errors.PathNotFound, match=r"squeezenet1_1_imagenet\.npz.*ndf"):
        networks.squeezenet()
    folder = tmp_path / "squeezenet1_1"
    folder.mkdir()
    (folder / "squeezenet1_1_imagenet.npz").write_bytes(b"nothing")
    with pytest.raises(errors.InvalidInput, match="sha256"):
        networks.squeezenet()
