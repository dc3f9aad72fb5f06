"""Every source gives a table, and every broken file an error that names it."""

import gzip
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from securefl.config import ConfigurationError, Data, Sites
from securefl.data import Table, load, partition, split

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
HEART, MNIST = SHARED / "heart_disease", SHARED / "mnist"


def table(path, **keys):
    return load(Data(source="table", path=path, label=keys.pop("label", "sick"), **keys))


def write(folder, text, name="a.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_breast_cancer_is_569_patients_of_two_classes():
    made = load(Data(source="breast-cancer"))
    assert (len(made), made.shape, made.classes) == (569, (30,), ("malignant", "benign"))
    assert np.bincount(made.target).tolist() == [212, 357]


def test_digits_are_images_of_one_channel():
    made = load(Data(source="digits", default_range=(0, 16)))
    assert (len(made), made.shape, made.outputs) == (1797, (1, 8, 8), 10)
    assert (made.features.min(), made.features.max()) == (-1, 1)


def test_diabetes_is_in_the_units_it_was_measured_in():
    """scikit-learn's own scaling would be fitted on the pooled rows."""
    made = load(Data(source="diabetes"))
    assert (made.task, len(made), made.outputs) == ("regression", 442, 1)
    age = made.features[:, made.names.index("age")]
    assert 18 < age.min() < age.max() < 100
    one = load(Data(source="diabetes", drop=tuple(n for n in made.names if n != "bmi")))
    assert one.names == ("bmi",)


def test_keys_that_a_bundled_set_would_ignore_are_refused():
    with pytest.raises(ConfigurationError, match=r"data\.label is read only"):
        load(Data(source="digits", label="digit"))
    with pytest.raises(ConfigurationError, match=r"data\.path is read only"):
        load(Data(source="digits", path="a.csv"))
    with pytest.raises(ConfigurationError, match="hole in an image"):
        load(Data(source="digits", drop=("pixel_0_0",)))


def test_a_csv_file_with_a_label_column_is_a_table(tmp_path):
    made = table(write(tmp_path, "\ufeffage, dose ,sick\r\n30, 1,yes\r\n40,2.5,no\r\n"))
    assert made.features.tolist() == [[30, 1], [40, 2.5]]
    assert (made.names, made.classes) == (("age", "dose"), ("no", "yes"))


def test_csv_and_parquet_give_the_same_table(tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet needs the extra securefl[parquet]")
    frame = pd.DataFrame(
        {
            "ward": ["007", "7", "8"],
            "age": [1.5, 2, 3],
            "old": [True, False, True],
            "sick": [1, 0, 1],
        }
    )
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    one, other = (table(tmp_path / name, drop=("ward",)) for name in ("a.csv", "a.parquet"))
    assert one.features.tolist() == other.features.tolist()
    assert one.target.tolist() == other.target.tolist()
    assert one.names == other.names
    assert one.classes == other.classes == ("0", "1")
    assert one.groups["ward"].tolist() == other.groups["ward"].tolist() == ["007", "7", "8"]


def test_labels_written_as_floats_are_the_same_classes(tmp_path):
    made = table(write(tmp_path, "age,sick\n30,1.0\n40,0.0\n"), classes=("0", "1"))
    assert made.target.tolist() == [1, 0]


def test_a_folder_of_files_tells_its_files_apart_as_sites(tmp_path):
    write(tmp_path, "age,sick\n1,0\n2,1\n", "north.csv")
    write(tmp_path, "sick\tage\n1\t3\n0\t4\n1\t5\n", "south.tsv")
    write(tmp_path, "not a table", "notes.txt")
    made = table(tmp_path)
    assert made.features[:, 0].tolist() == [1, 2, 3, 4, 5]
    sites = partition(made, Sites(partition="column", column="file"), seed=0)
    assert {name: len(part) for name, part in sites.items()} == {"north": 2, "south": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.csv is empty: it needs a header and records"),
        ("\n\n", "a.csv is empty"),
        ("age,sick\n", "a.csv has a header but no records"),
        ("age,age,sick\n1,2,0\n", "a.csv: column 'age' comes twice"),
        (",age,sick\n0,1,0\n1,2,1\n", "a.csv: column 1 has no name"),
        ("age,sick\n0,1,9\n1,0,9\n", "a.csv: row 1 has more fields than the header"),
        ("age,sick\n1,0\n2,1,9\n", "Expected 2 fields in line 3, saw 3"),
        ('age,sick\n1,"0\n', "EOF inside string"),
        ("age,sick\n1\n2,1\n", "a.csv: column 'sick', row 1: no value"),
        ("age,sick\n1,0\nNA,1\n", "a.csv: column 'age', row 2: 'NA' is not a number"),
        ("age,sick\n1,0\n,1\n", "a.csv: column 'age', row 2: no value"),
        ("age;sick\n1;0\n2;1\n", "separate the columns with commas"),
    ],
)
def test_a_broken_csv_file_is_named_with_the_mend(tmp_path, text, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)) as caught:
        table(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match="no such file or folder"):
        table(tmp_path / "gone.csv")
    with pytest.raises(ConfigurationError, match=r"a\.xls is none of"):
        table(write(tmp_path, "", "a.xls"))
    (tmp_path / "b.csv").write_bytes(b"age,sick\n\xff\xfe,1\n")
    with pytest.raises(ConfigurationError, match=r"b\.csv is not UTF-8"):
        table(tmp_path / "b.csv")
    empty = tmp_path / "folder"
    empty.mkdir()
    with pytest.raises(ConfigurationError, match="the folder holds no"):
        table(empty)
    (empty / "c.csv").mkdir()
    with pytest.raises(ConfigurationError, match=r"cannot read .*c\.csv"):
        table(empty)


def test_a_broken_parquet_file_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs the extra securefl[parquet]")
    with pytest.raises(ConfigurationError, match=r"cannot read .*a\.parquet"):
        table(write(tmp_path, "no parquet", "a.parquet"))
    from pyarrow import parquet

    twice = pyarrow.table([[1, 2], [3, 4], [0, 1]], names=["age", "age", "sick"])
    parquet.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(ConfigurationError, match=r"b\.parquet: column 'age' comes twice"):
        table(tmp_path / "b.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'securefl\[parquet\]'"):
        table(write(tmp_path, "", "a.parquet"))


def test_a_folder_whose_files_cannot_be_told_apart_is_refused(tmp_path):
    write(tmp_path, "age,file,sick\n1,2,0\n2,3,1\n", "a.csv")
    with pytest.raises(ConfigurationError, match="column 'file' would hide"):
        table(tmp_path)
    write(tmp_path, "age,sick\n1,0\n2,1\n", "a.csv")
    write(tmp_path, "age\tsick\n1\t0\n2\t1\n", "a.tsv")
    with pytest.raises(ConfigurationError, match="two files are called 'a'"):
        table(tmp_path)


def test_a_callable_gives_its_own_table(tmp_path, monkeypatch):
    write(
        tmp_path,
        "import numpy as np\n"
        "from securefl.data import Table\n"
        "def ours(data):\n"
        "    return Table(np.ones((2, 1), np.float32), np.array([0, 1]), ('a',),\n"
        "                 'classification', data.classes)\n"
        "def wrong(data):\n"
        "    return [1, 2]\n",
        "own_records.py",
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = load(Data(source="own_records:ours", classes=("no", "yes")))
    assert isinstance(made, Table)
    assert made.classes == ("no", "yes")
    with pytest.raises(ConfigurationError, match=r"returned list: return a securefl\.data\.Table"):
        load(Data(source="own_records:wrong"))


needs_heart = pytest.mark.skipif(
    not HEART.is_dir(), reason="needs the UCI heart disease files at ../shared/data/heart_disease"
)


@needs_heart
def test_heart_disease_is_prepared_as_flamby_prepares_it():
    made = load(Data(source="heart-disease", path=HEART))
    assert made.names == (
        *("age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak"),
        *("cp_2", "cp_3", "cp_4", "restecg_1", "restecg_2"),
    )
    assert made.classes == ("absent", "present")
    sites = {
        hospital: made.take(made.groups["hospital"] == hospital)
        for hospital in ("cleveland", "hungarian", "switzerland", "va")
    }
    assert [len(site) for site in sites.values()] == [303, 261, 46, 130]
    assert [int(site.target.sum()) for site in sites.values()] == [139, 98, 45, 101]


@needs_heart
@pytest.mark.parametrize("seed", range(5))
def test_each_hospital_keeps_both_classes_when_split_by_hospital(seed):
    """Switzerland has one healthy patient: held out, the hospital could train nothing."""
    made = load(Data(source="heart-disease", path=HEART))
    train, test = split(made, 0.34, seed, by="hospital")
    sites = partition(train, Sites(partition="column", column="hospital"), seed)
    assert list(sites) == ["cleveland", "hungarian", "switzerland", "va"]
    assert len(train) + len(test) == len(made)


def test_a_missing_hospital_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"cannot read .*processed\.cleveland\.data"):
        load(Data(source="heart-disease", path=tmp_path))


def test_a_hospital_file_of_another_shape_is_refused(tmp_path):
    write(tmp_path, "1,2,3\n", "processed.cleveland.data")
    with pytest.raises(ConfigurationError, match="has 3 columns: the original has 14"):
        load(Data(source="heart-disease", path=tmp_path))
    write(tmp_path, "63,1,9,145,233,1,2,150,0,2.3,3,0,6,0\n", "processed.cleveland.data")
    with pytest.raises(ConfigurationError, match="column 'cp' holds"):
        load(Data(source="heart-disease", path=tmp_path))


# --- MNIST ---------------------------------------------------------------------------------------

needs_mnist = pytest.mark.skipif(
    not MNIST.is_dir(), reason="needs MNIST's four files at ../shared/data/mnist"
)


def idx(array: np.ndarray) -> bytes:
    """The array of bytes as an idx file."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def images(folder: Path, compress=gzip.compress, suffix: str = ".gz") -> np.ndarray:
    """Writes a set of three training and two test images; their pixels, uint8[5, 4, 3]."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    labels = np.array([7, 0, 9, 1, 1], np.uint8)
    for stem, part in (("train", slice(0, 3)), ("t10k", slice(3, 5))):
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            (folder / f"{stem}-{name}-ubyte{suffix}").write_bytes(compress(idx(array[part])))
    return pixels


@pytest.mark.parametrize(("compress", "suffix"), [(gzip.compress, ".gz"), (bytes, "")])
def test_mnist_files_become_scaled_images_that_know_their_part(tmp_path, compress, suffix):
    pixels = images(tmp_path, compress, suffix)
    made = load(Data(source="mnist", path=tmp_path, default_range=(0, 255), test_column="mnist"))
    np.testing.assert_allclose(made.features[:, 0], pixels / 255 * 2 - 1, atol=1e-6)
    assert made.target.tolist() == [7, 0, 9, 1, 1]
    assert made.classes == tuple("0123456789")
    assert made.groups["mnist"].tolist() == ["train"] * 3 + ["test"] * 2


def test_broken_mnist_files_are_named_with_the_mend(tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(ConfigurationError, match=message) as caught:
            load(Data(source="mnist", path=tmp_path))
        assert "\n" not in str(caught.value)

    refused("cannot read .*train-images-idx3-ubyte: No such file")
    images(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-9])
    refused("cannot read .*train-labels-idx1-ubyte.gz")
    labels.write_bytes(b"no gzip")
    refused("cannot read .*train-labels-idx1-ubyte.gz")
    for wrong in (b"", idx(np.zeros((3, 1), np.uint8)), idx(np.zeros(3, np.uint8))[:-1]):
        labels.write_bytes(gzip.compress(wrong))
        refused("train-labels-idx1-ubyte.gz is not a whole idx file of bytes in 1 dimensions")
    labels.write_bytes(gzip.compress(idx(np.zeros(4, np.uint8))))
    refused("holds 3 images, .* 4 labels")
    labels.write_bytes(gzip.compress(idx(np.full(3, 10, np.uint8))))
    refused(r"column 'digit', row 1: '10' is not in data.classes")
    labels.write_bytes(whole)
    other = np.zeros((2, 3, 3), np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(other)))
    refused("training and test images differ in size")


@needs_mnist
def test_mnist_has_its_published_records():
    made = load(Data(source="mnist", path=MNIST, default_range=(-255, 255)))
    assert made.features.shape == (70_000, 1, 28, 28)
    assert (made.groups["mnist"] == "test").sum() == 10_000
    assert np.bincount(made.target).tolist() == [
        *(6903, 7877, 6990, 7141, 6824, 6313, 6876, 7293, 6825, 6958)
    ]
    assert made.features.min() == 0
    assert made.features.mean() == pytest.approx(0.1309, abs=1e-3)
