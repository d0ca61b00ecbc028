"""Data sets from a local folder; other content than the published is refused."""

from __future__ import annotations

import gzip
import http.client
import io
import shutil
import tarfile
import zipfile

import numpy as np
import pytest

from small import refuses
from upweight import datasets
from upweight.errors import PathNotFound

FOLDER = datasets.local("mnist")
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("no test downloads anything")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.data
@pytest.mark.skipif(FOLDER is None, reason="UPWEIGHT_DATA has no mnist folder")
def test_the_published_digits_are_read():
    for data in (datasets.mnist(), datasets.mnist(FOLDER)):
        assert data.images.shape == (60_000, 784)
        assert data.test_images.shape == (10_000, 784)
        assert data.labels[:5].tolist() == [5, 0, 4, 1, 9]
        assert data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
        assert data.images.dtype == data.labels.dtype == np.uint8
        assert np.bincount(data.labels).min() == 5421


CLOTHES = datasets.local("fashion-mnist") or datasets._FASHION_DEBIAN


@pytest.mark.data
@pytest.mark.skipif(not CLOTHES.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_the_published_clothes_are_read():
    data = datasets.fashion_mnist(CLOTHES)
    assert data.images.shape == (60_000, 784)
    assert data.labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert data.test_labels[:5].tolist() == [9, 2, 1, 1, 6]
    assert np.bincount(data.labels).tolist() == [6000] * 10


def test_clothes_are_looked_for_in_three_places(tmp_path, monkeypatch):
    """A folder that was named, $UPWEIGHT_DATA, the Debian package, and only then the cache."""
    digest = "374708ff"  # of the sixteen zeros that stand in every place
    places = [tmp_path / name for name in ("named", "variable/fashion-mnist", "debian", "cache/upweight/fashion-mnist")]
    monkeypatch.setenv("UPWEIGHT_DATA", str(tmp_path / "variable"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "_FASHION_DEBIAN", tmp_path / "debian")
    for place in reversed(places):
        place.mkdir(parents=True)
        (place / f"{NAMES[0]}.gz").write_bytes(gzip.compress(bytes(16)))
        folder = place if place.name == "named" else None
        refuses(lambda folder=folder: datasets.fashion_mnist(folder), ValueError, f"{place}/{NAMES[0]}.gz.*{digest}")


@pytest.mark.data
@pytest.mark.skipif(FOLDER is None, reason="UPWEIGHT_DATA has no mnist folder")
def test_a_missing_file_among_four_is_named(tmp_path):
    for name in NAMES[:3]:
        shutil.copy(FOLDER / f"{name}.gz", tmp_path)
    refuses(lambda: datasets.mnist(tmp_path), FileNotFoundError, f"no {NAMES[3]}.gz in {tmp_path}")


def test_an_empty_folder_is_refused(tmp_path):
    refuses(lambda: datasets.mnist(tmp_path), FileNotFoundError, f"no {NAMES[0]}.gz in {tmp_path}")


def test_other_content_is_refused(tmp_path):
    (tmp_path / f"{NAMES[0]}.gz").write_bytes(gzip.compress(bytes(16)))
    refuses(lambda: datasets.mnist(tmp_path), ValueError, f"{NAMES[0]}.gz has SHA-256 374708ff.*published")


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(bytes(1000))[:-4]], ids=["empty", "text", "cut"])
def test_a_damaged_archive_is_refused(tmp_path, content):
    (tmp_path / f"{NAMES[0]}.gz").write_bytes(content)
    refuses(lambda: datasets.mnist(tmp_path), ValueError, f"{NAMES[0]}.gz")


def test_a_local_folder_needs_the_variable_and_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("UPWEIGHT_DATA", str(tmp_path))
    assert datasets.local("mnist") is None
    (tmp_path / "mnist").mkdir()
    assert datasets.local("mnist") == tmp_path / "mnist"
    refuses(datasets.mnist, FileNotFoundError, "unset UPWEIGHT_DATA")
    monkeypatch.delenv("UPWEIGHT_DATA")
    assert datasets.local("mnist") is None


def test_the_cache_is_used_before_the_network(tmp_path, monkeypatch):
    monkeypatch.delenv("UPWEIGHT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "upweight" / "mnist").mkdir(parents=True)
    (tmp_path / "upweight" / "mnist" / f"{NAMES[0]}.gz").write_bytes(gzip.compress(bytes(16)))
    refuses(datasets.mnist, ValueError, "374708ff")


def archive(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def jpeg(shade, size=(40, 30), mode="RGB"):
    image = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    image.new(mode, size, shade).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.data
@pytest.mark.skipif(datasets.local("enron1") is None, reason="UPWEIGHT_DATA has no enron1 folder")
def test_the_mails_come_in_the_order_of_their_numbers():
    mail = datasets.enron1()
    assert len(mail.texts) == len(mail.names) == len(mail.labels) == 5172
    assert mail.labels.sum() == 1500
    assert [int(name[:4]) for name in mail.names] == list(range(1, 5173))
    assert all(text.startswith("Subject:") for text in mail.texts)
    assert mail.names[5] == "0006.2003-12-18.GP.spam.txt"
    assert mail.labels[:7].tolist() == [0, 0, 0, 0, 0, 1, 0]
    assert not any("\r\n" in text for text in mail.texts)


@pytest.mark.data
@pytest.mark.skipif(datasets.local("dogfish_imagenette") is None, reason="UPWEIGHT_DATA has no dogfish_imagenette")
def test_the_photographs_are_read():
    pytest.importorskip("PIL")
    data = datasets.dogfish()
    assert data.images.shape == (1800, 224, 224, 3)
    assert data.test_images.shape == (600, 224, 224, 3)
    assert data.labels.tolist() == [0] * 900 + [1] * 900
    assert data.test_labels.tolist() == [0] * 300 + [1] * 300
    assert data.images.dtype == np.uint8


def test_photographs_are_chosen_by_name_made_rgb_and_resized(tmp_path):
    names = {"val/n01440764/b": 250, "val/n01440764/a": 5, "val/n02102040/z": 90, "train/n01440764/y": 7, "val/n0/x": 8}
    files = {f"imagenette2-320/{name}.JPEG": jpeg(shade, mode="L") for name, shade in names.items()}
    with tarfile.open(archive(tmp_path / "some.tar", files)) as tar:
        found = {name: match for name in tar.getnames() if (match := datasets._WANTED.search(name))}
        assert len(found) == 4
        pixels, labels = datasets._photographs(tar, found, "val", 1)
    assert labels.tolist() == [0, 1]  # the dog, then the first fish
    assert pixels.shape == (2, 224, 224, 3)
    np.testing.assert_allclose(pixels.mean((1, 2)), [[90] * 3, [5] * 3], atol=2)


def test_line_ends_and_folders_do_not_change_what_the_mails_are(tmp_path):
    one = archive(
        tmp_path / "a.tgz", {"enron1/ham/0001.x.ham.txt": b"Subject: a\nb", "enron1/Summary.txt": b"."}, "w:gz"
    )
    two = archive(tmp_path / "b.tgz", {"spare/0001.x.ham.txt": b"Subject: a\r\nb"}, "w:gz")
    three = archive(tmp_path / "c.tgz", {"enron1/ham/0001.x.ham.txt": b"Subject: a\nc"}, "w:gz")
    assert datasets._mail(one) == datasets._mail(two)
    assert datasets._mail(one)[1] != datasets._mail(three)[1]


def test_other_photographs_and_mails_are_refused(tmp_path):
    archive(tmp_path / "imagenette_tench_springer_224.tar", {"val/n01440764/a.JPEG": b""})
    refuses(lambda: datasets.dogfish(tmp_path), ValueError, "springer_224.tar has sha256 .*published d2c6b3a3")
    archive(tmp_path / "enron1.tar.gz", {"0001.x.spam.txt": b"Subject: no"}, "w:gz")
    refuses(lambda: datasets.enron1(tmp_path), ValueError, "The 1 e-mails of .* not that of Enron1")
    (tmp_path / "enron1.tar.gz").write_bytes(b"no archive")
    refuses(lambda: datasets.enron1(tmp_path), ValueError, "is no tar archive")
    (tmp_path / "enron1.tar.gz").write_bytes(gzip.compress(bytes(20_000))[:-9])
    refuses(lambda: datasets.enron1(tmp_path), ValueError, "is no tar archive|The 0 e-mails")


@pytest.mark.data
@pytest.mark.skipif(datasets.local("diabetes130") is None, reason="UPWEIGHT_DATA has no diabetes130 folder")
def test_the_hospital_stays_are_read():
    data = datasets.diabetes130()
    assert data.inputs.shape == (101_766, 127)
    assert len(data.columns) == 50
    assert len(set(data.names)) == len(data.names) == 127
    assert data.readmitted.sum() == 11_357
    child = data.inputs[:, data.names.index("age_[0-10)")] == 1
    assert (child.sum(), data.readmitted[child].sum()) == (161, 3)
    assert data.names[:9] == [*datasets._COUNTS, "gender_Female"]
    assert data.names[-2:] == ["change_No", "diabetesMed_Yes"]
    ids = [int(name.rpartition("_")[2]) for name in data.names if name.startswith("discharge_disposition_id_")]
    assert ids == sorted(ids)
    assert (data.inputs[:, 0] == data.columns["time_in_hospital"].astype(int)).all()
    age = [name.startswith("age_") for name in data.names]
    assert (data.inputs[:, age].sum(1) == 1).all()
    assert (np.array(data.names)[age][data.inputs[:, age].argmax(1)] == np.char.add("age_", data.columns["age"])).all()


def test_two_categories_give_one_feature_and_numbers_are_sorted_as_numbers():
    columns = {
        "count": np.array(["3", "0", "200"]),
        "sex": np.array(["m", "f", "m"]),
        "place_id": np.array(["10", "9", "1"]),
        "same": np.array(["?", "?", "?"]),
    }
    inputs, names = datasets._one_hot(columns, ["count"], ["sex", "place_id", "same"])
    assert names == ["count", "sex_m", "place_id_1", "place_id_9", "place_id_10", "same_?"]
    assert inputs.tolist() == [[3, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 1], [200, 1, 1, 0, 0, 1]]


def test_another_table_of_hospital_stays_is_refused(tmp_path):
    file = tmp_path / "dataset_diabetes.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("inside/diabetic_data.csv", "a,b\n1,2\n")
    refuses(lambda: datasets.diabetes130(tmp_path), ValueError, "diabetic_data.csv in .* SHA-256 .* not that of UCI's")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("other.csv", "a,b\n1,2\n")
    refuses(lambda: datasets.diabetes130(tmp_path), ValueError, "There is no diabetic_data.csv in ")
    file.write_bytes(b"an error page")
    refuses(lambda: datasets.diabetes130(tmp_path), ValueError, "is no zip archive")


@pytest.mark.parametrize("load", [datasets.dogfish, datasets.enron1, datasets.diabetes130])
def test_a_folder_without_the_archive_is_refused(tmp_path, load):
    refuses(lambda: load(tmp_path), FileNotFoundError, f"There is no .* in {tmp_path}")


@pytest.mark.parametrize(
    ("load", "name", "file", "message"),
    [
        (datasets.enron1, "enron1", "enron1.tar.gz", "is no tar archive"),
        (datasets.diabetes130, "diabetes130", datasets._DIABETES_URL.rpartition("/")[2], "is no zip archive"),
        (datasets.dogfish, "dogfish_imagenette", "imagenette2-320.tgz", "has md5 .*published 3df6f0d01a2c9592"),
    ],
)
def test_a_damaged_download_is_refused(tmp_path, monkeypatch, load, name, file, message):
    monkeypatch.delenv("UPWEIGHT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    class Response(io.BytesIO):
        pass

    def answer(url, timeout):
        asked.append(url)
        return Response(b"an error page")

    monkeypatch.setattr("urllib.request.urlopen", answer)
    for _ in range(2):
        refuses(load, ValueError, message)
    assert len(asked) == 1
    assert asked[0].endswith(file)
    assert (tmp_path / "upweight" / name / file).read_bytes() == b"an error page"


@pytest.mark.parametrize("failure", [OSError("Name or service not known"), http.client.IncompleteRead(b"half")])
def test_without_a_network_the_error_says_where_the_file_would_go(failure, monkeypatch, tmp_path):
    def broken(url, timeout):
        raise failure

    monkeypatch.setattr("urllib.request.urlopen", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("UPWEIGHT_DATA", str(tmp_path / "mine"))
    with pytest.raises(PathNotFound, match=rf"mnist is not in .*mine/mnist nor in {tmp_path}/upweight/mnist, and http"):
        datasets.mnist()
    assert not list((tmp_path / "upweight" / "mnist").iterdir())
