"""Real data by the ordinary public route, checked against known digests; a folder in UPWEIGHT_DATA is used first."""

from __future__ import annotations

import csv
import gzip
import hashlib
import http.client
import io
import os
import re
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from upweight.errors import InvalidInput, PathNotFound, first_line, require
from upweight.runs.files import write_file

__all__ = [
    "Diabetes",
    "DogFish",
    "Mail",
    "Mnist",
    "diabetes130",
    "dogfish",
    "enron1",
    "fashion_mnist",
    "local",
    "mnist",
]

_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_SHA256 = {  # of the uncompressed idx files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # the package dataset-fashion-mnist
_FASHION_SHA256 = {  # of the uncompressed idx files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_DOGFISH_FILE = "imagenette_tench_springer_224.tar"
_DOGFISH_SHA256 = "d2c6b3a3a756225c49902993276e8ae8255530bb1ebc69b51a22ab7bed251ee3"
_IMAGENETTE_URL = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"
_IMAGENETTE_MD5 = "3df6f0d01a2c9592104656642f5e78a3"  # as torchvision publishes it
_DOG, _FISH = "n02102040", "n01440764"  # English springer, tench
_WANTED = re.compile(rf"(?:^|/)(train|val)/({_DOG}|{_FISH})/[^/]+\.JPEG$")
_PIXELS = 224
_TRAIN_PER_CLASS, _TEST_PER_CLASS = 900, 300
_ENRON1_URL = "http://nlp.cs.aueb.gr/software_and_datasets/Enron-Spam/preprocessed/enron1.tar.gz"
_ENRON1_SHA256 = "f8efac706ca461a82106a6e6ee521673315771f7c6289c81f0e9f14d6ab0cfcc"  # of names and texts, see _mail
_UCI = "https://archive.ics.uci.edu/static/public"
_DIABETES_URL = f"{_UCI}/296/diabetes+130-us+hospitals+for+years+1999-2008.zip"
_DIABETES_FILE = "dataset_diabetes.zip"
_DIABETES_SHA256 = "0689e7ec031237dc63031b938805c48377748761a3b26acab621567afa24df97"  # of diabetic_data.csv
_COUNTS = (
    "time_in_hospital", "num_lab_procedures", "num_procedures", "num_medications", "number_outpatient",
    "number_emergency", "number_inpatient", "number_diagnoses",
)  # fmt: skip
_PATIENT = ("gender", "race", "age", "discharge_disposition_id", "max_glu_serum", "A1Cresult")
_FIRST_DRUG = "metformin"  # the columns from here on are drugs, then `change` and `diabetesMed`, then the outcome


@dataclass(frozen=True)
class Mnist:
    """60,000 training and 10,000 test pictures of ten classes: images (n, 784), pixels 0 … 255, and labels (n,)."""

    images: UInt8[NDArray[np.uint8], "n 784"]
    labels: UInt8[NDArray[np.uint8], " n"]
    test_images: UInt8[NDArray[np.uint8], "m 784"]
    test_labels: UInt8[NDArray[np.uint8], " m"]


def mnist(folder: str | os.PathLike[str] | None = None) -> Mnist:
    """MNIST (LeCun, Cortes and Burges, 1998), from `folder`, $UPWEIGHT_DATA/mnist, the cache, or the public mirror.

    Args:
        folder: where the four `*.gz` files are; None looks in $UPWEIGHT_DATA/mnist, then in ~/.cache/upweight/mnist,
            and downloads into the latter (11 MB) what is not there.

    Raises:
        PathNotFound: if a named folder lacks a file.
        InvalidInput: if a file's content is not the published one.
    """
    place = Path(folder) if folder is not None else local("mnist")
    return _four_files("mnist", place, _MNIST_URL, _MNIST_SHA256)


def fashion_mnist(folder: str | os.PathLike[str] | None = None) -> Mnist:
    """Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): clothes in the form of MNIST, from `folder` or a public copy.

    Args:
        folder: where the four `*.gz` files are; None looks in $UPWEIGHT_DATA/fashion-mnist, in the folder of the
            Debian package dataset-fashion-mnist, then in ~/.cache/upweight/fashion-mnist, and downloads into the
            latter (31 MB) what is not there.

    Raises:
        PathNotFound: if a named folder lacks a file.
        InvalidInput: if a file's content is not the published one.

    >>> fashion_mnist("nowhere")
    Traceback (most recent call last):
        ...
    upweight.errors.PathNotFound: There is no train-images-idx3-ubyte.gz in nowhere, which should hold four files
        such as those of fashion-mnist. Name the folder that holds it, or leave folder out and unset UPWEIGHT_DATA
        to download.
    """
    place = Path(folder) if folder is not None else local("fashion-mnist")
    if place is None and _FASHION_DEBIAN.is_dir():
        place = _FASHION_DEBIAN
    return _four_files("fashion-mnist", place, _FASHION_URL, _FASHION_SHA256)


@dataclass(frozen=True)
class DogFish:
    """1,800 training and 600 test photographs of 224 × 224 pixels 0 … 255; labels 0 dog, 1 fish; dogs come first."""

    images: UInt8[NDArray[np.uint8], "n 224 224 3"]
    labels: UInt8[NDArray[np.uint8], " n"]
    test_images: UInt8[NDArray[np.uint8], "m 224 224 3"]
    test_labels: UInt8[NDArray[np.uint8], " m"]


def dogfish(folder: str | os.PathLike[str] | None = None) -> DogFish:
    """Dogs against fish, as in the paper's section 5.1 but from Imagenette: English springers and tenches.

    Of each class the first 900 training and the first 300 validation photographs, in the order of their file names.
    Local copies are 224 × 224 already; the public archive's photographs (320 pixels on the shorter side) are resized to
    that, so the pixels of the two differ a little. The photographs are ImageNet's: for research, not to be passed on.

    Args:
        folder: where `imagenette_tench_springer_224.tar` is; None looks in $UPWEIGHT_DATA/dogfish_imagenette, then in
            ~/.cache/upweight/dogfish_imagenette, and downloads Imagenette (326 MB) into the latter.

    Raises:
        PathNotFound: if a named folder lacks the archive.
        InvalidInput: if its content is not the published one.
        MissingExtra: if Pillow is not installed.

    >>> dogfish("nowhere")
    Traceback (most recent call last):
        ...
    upweight.errors.PathNotFound: There is no imagenette_tench_springer_224.tar in nowhere. Name the folder that
        holds it, or leave folder out and unset UPWEIGHT_DATA to download.
    """
    place = Path(folder) if folder is not None else local("dogfish_imagenette")
    if place is not None:
        archive = _checked(_present(place, _DOGFISH_FILE), "sha256", _DOGFISH_SHA256)
    else:
        archive = _checked(_downloaded("dogfish_imagenette", _IMAGENETTE_URL), "md5", _IMAGENETTE_MD5)
    with tarfile.open(archive) as tar:
        found = {name: match for name in tar.getnames() if (match := _WANTED.search(name))}
        train = _photographs(tar, found, "train", _TRAIN_PER_CLASS)
        test = _photographs(tar, found, "val", _TEST_PER_CLASS)
    return DogFish(*train, *test)


@dataclass(frozen=True)
class Mail:
    """5,172 e-mails in the order of their numbers: texts, file names, labels (n,) with 1 for spam."""

    texts: list[str]
    labels: UInt8[NDArray[np.uint8], " n"]
    names: list[str]


def enron1(folder: str | os.PathLike[str] | None = None) -> Mail:
    """Enron1 (Metsis, Androutsopoulos and Paliouras, 2006): 3,672 ham and 1,500 spam, the paper's section 5.4.

    Texts are decoded as latin-1, with Unix line ends. The order is that of the numbers 0001 … 5172 in the file names.

    Args:
        folder: where `enron1.tar.gz` is; None looks in $UPWEIGHT_DATA/enron1, then in ~/.cache/upweight/enron1, and
            downloads (2 MB) into the latter.

    Raises:
        PathNotFound: if a named folder lacks the archive.
        InvalidInput: if its content is not the published one.
    """
    place = Path(folder) if folder is not None else local("enron1")
    file = _present(place, "enron1.tar.gz") if place is not None else _downloaded("enron1", _ENRON1_URL)
    mails, digest = _mail(file)
    if digest != _ENRON1_SHA256:
        message = (
            f"The {len(mails)} e-mails of {file} have SHA-256 {digest[:16]}…, not that of Enron1. Delete it and load "
            "again."
        )
        raise InvalidInput(message)
    names = sorted(mails)
    labels = np.array([name.endswith(".spam.txt") for name in names], dtype=np.uint8)
    return Mail([mails[name].decode("latin-1") for name in names], labels, names)


@dataclass(frozen=True)
class Diabetes:
    """101,766 hospital stays of diabetic patients, in the order of the file.

    Args:
        columns: the 50 columns of the file by name, (n,) strings each, "?" where a value is missing.
        inputs: (n, 127) the paper's features: 8 counts, then 0 and 1 for the categories of 31 columns.
        names: (127) of them, such as age_[0-10).
        readmitted: (n,) 1 if the patient came back within 30 days.
    """

    columns: dict[str, NDArray[np.str_]]
    inputs: UInt8[NDArray[np.uint8], "n 127"]
    names: list[str]
    readmitted: UInt8[NDArray[np.uint8], " n"]


def diabetes130(folder: str | os.PathLike[str] | None = None) -> Diabetes:
    """Diabetes-130 (Strack and others, 2014): hospital stays of ten years, the paper's section 5.3.

    A column of two categories gives one feature (that of the second), one of more gives one for each.

    Args:
        folder: where `dataset_diabetes.zip` is; None looks in $UPWEIGHT_DATA/diabetes130, then in
            ~/.cache/upweight/diabetes130, and downloads (3 MB) into the latter.

    Raises:
        PathNotFound: if a named folder lacks the archive.
        InvalidInput: if its content is not the published one.
    """
    place = Path(folder) if folder is not None else local("diabetes130")
    file = _downloaded("diabetes130", _DIABETES_URL) if place is None else _present(place, _DIABETES_FILE)
    content = _zipped(file, "diabetic_data.csv")
    digest = hashlib.sha256(content).hexdigest()
    if digest != _DIABETES_SHA256:
        message = (
            f"diabetic_data.csv in {file} has SHA-256 {digest[:16]}…, not that of UCI's. Delete it and load again."
        )
        raise InvalidInput(message)
    head, *lines = csv.reader(io.StringIO(content.decode("ascii")))
    columns = {name: np.array(column) for name, column in zip(head, zip(*lines, strict=True), strict=True)}
    coded = [*_PATIENT, *head[head.index(_FIRST_DRUG) : -1]]
    inputs, names = _one_hot(columns, _COUNTS, coded)
    return Diabetes(columns, inputs, names, (columns[head[-1]] == "<30").astype(np.uint8))


def local(name: str) -> Path | None:
    """The folder of a data set under $UPWEIGHT_DATA, if there is one.

    >>> import tempfile
    >>> from unittest import mock
    >>> with tempfile.TemporaryDirectory() as root, mock.patch.dict(os.environ, UPWEIGHT_DATA=root):
    ...     (Path(root) / "mnist").mkdir()
    ...     local("mnist").name, local("enron1")
    ('mnist', None)
    """
    root = os.environ.get("UPWEIGHT_DATA")
    folder = Path(root) / name if root else None
    return folder if folder is not None and folder.is_dir() else None


def _four_files(name: str, place: Path | None, url: str, digests: dict[str, str]) -> Mnist:
    """Four idx files from a folder that was named or found, or by `url` through the cache."""
    hint = f", which should hold four files such as those of {name}"
    parts = []
    for file, published in digests.items():
        path = _downloaded(name, f"{url}{file}.gz") if place is None else _present(place, f"{file}.gz", hint)
        parts.append(_idx(path, file, published))
    return Mnist(parts[0].reshape(-1, 784), parts[1], parts[2].reshape(-1, 784), parts[3])


def _present(place: Path, name: str, hint: str = "") -> Path:
    """The file in a folder that was named.

    Raises:
        PathNotFound: if it is not there.
    """
    file = place / name
    if not file.is_file():
        message = (
            f"There is no {name} in {place}{hint}. Name the folder that holds it, or leave folder out and unset "
            "UPWEIGHT_DATA to download."
        )
        raise PathNotFound(message)
    return file


def _downloaded(name: str, url: str) -> Path:
    """The file behind `url` in the cache folder of a data set, fetched if it is not there.

    Raises:
        PathNotFound: if it cannot be fetched.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "upweight" / name
    file = cache / url.rpartition("/")[2]
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            root = os.environ.get("UPWEIGHT_DATA")
            message = (
                f"{name} is not in {Path(root) / name if root else 'the folder of UPWEIGHT_DATA, which is not set,'} "
                f"nor in {cache}, and {url} could not be fetched: {first_line(error)}. Without a network, put the file "
                f"into {cache}, or set UPWEIGHT_DATA to a folder that holds '{name}'."
            )
            raise PathNotFound(message) from error
        write_file(file, content)
    return file


def _checked(file: Path, kind: str, published: str) -> Path:
    """The same file.

    Raises:
        InvalidInput: if its digest is not the published one.
    """
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, kind).hexdigest()
    if digest != published:
        message = f"{file} has {kind} {digest[:16]}…, not the published {published[:16]}…. Delete it and load again."
        raise InvalidInput(message)
    return file


def _photographs(
    tar: tarfile.TarFile, found: dict[str, re.Match[str]], split: str, count: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The first `count` photographs of each class of a split, in RGB, and their labels."""
    image = require("PIL.Image", "plot")
    chosen = []
    for kind in (_DOG, _FISH):
        chosen += sorted(name for name, match in found.items() if match.groups() == (split, kind))[:count]
    pixels = np.empty((len(chosen), _PIXELS, _PIXELS, 3), dtype=np.uint8)
    for place, name in enumerate(chosen):
        with image.open(io.BytesIO(tar.extractfile(name).read())) as picture:  # type: ignore[union-attr]
            pixels[place] = np.asarray(picture.convert("RGB").resize((_PIXELS, _PIXELS), image.Resampling.BILINEAR))
    return pixels, np.array([found[name].group(2) == _FISH for name in chosen], dtype=np.uint8)


def _mail(file: Path) -> tuple[dict[str, bytes], str]:
    """The e-mails of Enron1 by file name, and the digest of all names and texts.

    Raises:
        InvalidInput: if the file is no archive.
    """
    mails: dict[str, bytes] = {}
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if member.isfile() and re.fullmatch(r"\d{4}\..*\.(ham|spam)\.txt", name):
                    mails[name] = tar.extractfile(member).read().replace(b"\r\n", b"\n")  # type: ignore[union-attr]
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        message = f"{file} is no tar archive, or is damaged ({first_line(error)}). Delete it and load again."
        raise InvalidInput(message) from error
    digest = hashlib.sha256()
    for name in sorted(mails):
        digest.update(name.encode() + b"\n" + mails[name] + b"\n")
    return mails, digest.hexdigest()


def _zipped(file: Path, name: str) -> bytes:
    """The content of the first file of this name in a zip archive.

    Raises:
        InvalidInput: if there is none, or the file is no archive.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            inside = [path for path in archive.namelist() if path.rpartition("/")[2] == name]
            if inside:
                return archive.read(inside[0])
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        message = f"{file} is no zip archive, or is damaged ({first_line(error)}). Delete it and load again."
        raise InvalidInput(message) from error
    message = f"There is no {name} in {file}. Delete it and load again."
    raise InvalidInput(message)


def _one_hot(
    columns: dict[str, NDArray[np.str_]], counts: Sequence[str], coded: Sequence[str]
) -> tuple[NDArray[np.uint8], list[str]]:
    """Counts as they are, then 0 and 1 for every category in its order (of numbers where a name ends in _id)."""
    features = {name: columns[name].astype(np.uint8) for name in counts}
    for name in coded:
        kinds = sorted(set(columns[name].tolist()), key=int if name.endswith("_id") else None)
        for kind in kinds[1:] if len(kinds) == 2 else kinds:
            features[f"{name}_{kind}"] = (columns[name] == kind).astype(np.uint8)
    return np.stack(list(features.values()), 1), list(features)


def _idx(file: Path, name: str, published: str) -> NDArray[np.uint8]:
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        message = f"{file} is no gzip archive, or is damaged ({first_line(error)}). Delete it and load again."
        raise InvalidInput(message) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != published:
        message = f"{file} has SHA-256 {digest[:16]}…, not that of the published {name}. Delete it and load again."
        raise InvalidInput(message)
    axes = content[3]
    shape = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes)]
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)
