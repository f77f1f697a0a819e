"""Every case is read once, measured as it is, and remembered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import grid, save
from dicom_maker import save_slices, slices

from scripts.data.datasets import Dataset
from scripts.data.labels import Labels
from scripts.planning.fingerprint import QUANTILES, fingerprint_case
from scripts.planning.fingerprint_file import fingerprint_cases
from scripts.utils.errors import UserError


def read_all(folder: Path, file: Path) -> list[dict]:
    data = Dataset(folder)
    return fingerprint_cases(data.cases, len(data.channels), data.labels, str(file))


def labels(*values: int, ignore: int | None = None) -> Labels:
    return Labels([f"label {value}" for value in values], list(values), ignore_value=ignore)


@pytest.fixture
def case(tmp_path) -> dict:
    """Two channels, the second of them stored with slope and intercept, x from right to left, anisotropic."""
    generator = np.random.default_rng(0)
    label = np.zeros((10, 8, 6), np.uint8)
    label[3:6, 2:5, 1:4] = 1
    label[6, 6, 4] = 2
    affine = np.diag([-1.5, 2.0, 3.0, 1.0])
    first = generator.integers(1, 200, label.shape).astype(np.int16)
    first[:2], first[:, :, 5] = 0, 0
    save(tmp_path / "c_0000.nii.gz", first, affine)
    image = nib.Nifti1Image(first, affine)
    image.header.set_slope_inter(2.0, 5.0)
    nib.save(image, tmp_path / "c_0001.nii.gz")
    save(tmp_path / "label.nii.gz", label, affine)
    return {
        "case": "c",
        "image": [str(tmp_path / f"c_000{i}.nii.gz") for i in range(2)],
        "label": str(tmp_path / "label.nii.gz"),
    }


def test_measures_are_those_of_the_files(case):
    record = fingerprint_case(case, 2, labels(0, 1, 2))
    label = np.asarray(nib.load(case["label"]).dataobj)
    assert (record["shape"], record["orientation"]) == ([10, 8, 6], "LAS")
    assert record["spacing"] == [1.5, 2.0, 3.0]
    assert record["labels"] == [10 * 8 * 6 - 28, 27, 1]
    for channel, path in enumerate(case["image"]):
        values = nib.load(path).get_fdata()
        found, inside = record["foreground"][channel], values[label > 0]
        assert found["mean"] == pytest.approx(inside.mean(), rel=1e-6)
        assert found["std"] == pytest.approx(inside.std(), rel=1e-6)
        assert (found["min"], found["max"]) == (inside.min(), inside.max())
        np.testing.assert_allclose(found["quantiles"], np.quantile(inside, QUANTILES), rtol=1e-5)
        assert record["channels"][channel]["mean"] == pytest.approx(values[values != 0].mean(), rel=1e-6)
    assert record["cropped"] == [10, 8, 6]  # stored zeros are 5 in the second channel
    del case["image"][1]
    assert fingerprint_case(case, 1, labels(0, 1, 2))["cropped"] == [8, 8, 5]


def test_voxels_to_ignore_are_counted_last_and_measured_nowhere(case):
    record = fingerprint_case(case, 2, labels(0, 1, ignore=2))
    assert record["labels"] == [10 * 8 * 6 - 28, 27, 1]
    label, first = (np.asarray(nib.load(path).dataobj) for path in (case["label"], case["image"][0]))
    assert record["foreground"][0]["mean"] == pytest.approx(first[label == 1].mean(), rel=1e-6)


def test_a_label_that_becomes_one_to_ignore_is_read_again(case, tmp_path):
    file = str(tmp_path / "memory.json")
    (label,) = fingerprint_cases([case], 2, labels(0, 1, 2), file)
    (ignored,) = fingerprint_cases([case], 2, labels(0, 1, ignore=2), file)
    assert label["foreground"] != ignored["foreground"]


def test_gaps_in_label_values_are_closed(case):
    path = case["label"]
    label = np.asarray(nib.load(path).dataobj)
    save(Path(path), np.array([0, 2, 300], np.int16)[label], nib.load(path).affine)
    record = fingerprint_case(case, 2, labels(0, 2, 300))
    assert record["labels"] == [10 * 8 * 6 - 28, 27, 1]
    with pytest.raises(UserError, match="label.nii.gz has the label value 300; dataset.json names 0, 2, 4: correct"):
        fingerprint_case(case, 2, labels(0, 2, 4))


def test_a_fault_is_looked_at_again_though_the_files_are_the_same(phantom_dir, tmp_path, monkeypatch):
    def unplugged(case, *arguments):
        raise UserError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr("scripts.planning.fingerprint_file.fingerprint_case", unplugged)
        assert all(record["error"] == "the disk is gone" for record in read_all(phantom_dir, tmp_path / "memory.json"))
    assert not any("error" in record for record in read_all(phantom_dir, tmp_path / "memory.json"))


def test_axes_are_in_the_order_of_the_networks_grid(tmp_path):
    affine = np.array([[0, 0, 4.0, 0], [1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]])  # stored as A, S, R
    voxels = np.ones((5, 6, 7), np.int16)
    save(tmp_path / "image.nii.gz", voxels, affine)
    save(tmp_path / "label.nii.gz", voxels.astype(np.uint8), affine)
    case = {"case": "c", "image": str(tmp_path / "image.nii.gz"), "label": str(tmp_path / "label.nii.gz")}
    record = fingerprint_case(case, 1, labels(0, 1))
    assert (record["shape"], record["spacing"]) == ([7, 5, 6], [4.0, 1.0, 2.0])


def test_what_was_read_is_not_read_again_until_it_changes(phantom_dir, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    shutil.copytree(phantom_dir, folder)
    first = read_all(folder, tmp_path / "memory.json")
    read = []
    monkeypatch.setattr(
        "scripts.planning.fingerprint_file.fingerprint_case",
        lambda case, *a: read.append(case["case"]) or {"shape": [1]},
    )
    assert read_all(folder, tmp_path / "memory.json") == first
    assert read == []
    path = folder / "labelsTr/phantom_02.nii.gz"
    path.write_bytes(path.read_bytes() + b"\0")  # another size
    read_all(folder, tmp_path / "memory.json")
    assert read == ["phantom_02"]
    (tmp_path / "memory.json").write_text("{ cut short")
    read_all(folder, tmp_path / "memory.json")
    assert len(read) == 1 + len(first)


def test_an_interrupted_reading_goes_on(phantom_dir, tmp_path, monkeypatch):
    def broken(case, *arguments):
        if case["case"] == "phantom_03":
            raise KeyboardInterrupt
        return fingerprint_case(case, *arguments)

    monkeypatch.setattr("scripts.planning.fingerprint_file.fingerprint_case", broken)
    with pytest.raises(KeyboardInterrupt):
        read_all(phantom_dir, tmp_path / "memory.json")
    known = json.loads((tmp_path / "memory.json").read_text())
    assert 1 <= len(known) < len(Dataset(phantom_dir).cases)


def test_a_bad_case_is_recorded_and_the_others_are_read(phantom_dir, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(phantom_dir, folder)
    bad = folder / "imagesTr/phantom_01.nii.gz"
    bad.write_bytes(bad.read_bytes()[:100])
    records = read_all(folder, tmp_path / "memory.json")
    assert ["error" in record for record in records] == [False, True, False, False, False]
    shutil.copy(phantom_dir / "imagesTr/phantom_01.nii.gz", bad)
    assert not any("error" in record for record in read_all(folder, tmp_path / "memory.json"))


def test_a_damaged_series_is_the_fault_of_its_case_alone(tmp_path):
    shape, affine = grid("straight")
    label = np.zeros(shape, np.uint8)
    label[2:5, 2:5, 2:5] = 1
    cases = []
    for name in "ab":
        voxels = np.random.default_rng(0).integers(0, 99, shape).astype(np.int16)
        folder = save_slices(tmp_path / name, slices(voxels, affine))
        save(tmp_path / f"{name}.nii.gz", label, affine)
        cases.append({"case": name, "image": str(folder), "label": str(tmp_path / f"{name}.nii.gz")})
    slice_ = tmp_path / "b/IM0003"
    slice_.write_bytes(slice_.read_bytes()[:300])
    one, other = fingerprint_cases(cases, 1, labels(0, 1), str(tmp_path / "fingerprint.json"))
    assert "error" not in one
    assert "IM0003 (300 bytes) is not a complete DICOM file" in other["error"]
