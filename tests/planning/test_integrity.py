"""Each check of a whole data set fires where it should, and only there."""

from __future__ import annotations

import json
import logging
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import bundle

from scripts.data.datasets import Dataset
from scripts.planning import integrity
from scripts.planning.fingerprint_file import fingerprint_cases
from scripts.utils.settings_table import kind_of


def record(number: int, **changes) -> dict:
    usual = {
        "case": f"case_{number}",
        "file": f"imagesTr/case_{number}.nii.gz",
        "shape": [40, 50, 60],
        "spacing": [1.0, 1.0, 2.0],
        "orientation": "RAS",
        "labels": [100, 10, 5],
        "channels": [{"mean": 100.0 + number % 5, "std": 10.0}],
        "digest": str(number),
    }
    return usual | changes


@pytest.mark.parametrize(
    ("check", "changes", "message"),
    [
        (integrity.duplicates, {"digest": "3"}, "has the voxels of imagesTr/case_3.nii.gz; remove one"),
        (integrity.orientations, {"orientation": "LPI"}, "is stored as LPI, 19 of 20 cases as RAS"),
        (integrity.tilts, {"tilt": 40.0}, "is tilted by 40 degrees off the patient's axes, beyond the 30 that"),
        (integrity.without_foreground, {"labels": [115, 0, 0]}, "has no labelled voxel"),
        (integrity.spacings, {"spacing": [1.0, 1.0, 7.0]}, "has 1 x 1 x 7 mm voxels, the median case 1 x 1 x 2 mm"),
        (integrity.spacings, {"spacing": [0.1, 0.1, 0.2]}, "has 0.1 x 0.1 x 0.2 mm voxels"),  # cm for mm
        (integrity.single_slices, {"shape": [40, 50, 1]}, r"is a single slice of \[40, 50, 1\] voxels"),
        (
            integrity.intensities,
            {"channels": [{"mean": 9000.0, "std": 1.0}]},
            "mean intensity of 9000 in channel 0, the median",
        ),
        (integrity.constant_channels, {"channels": [None]}, "is zero everywhere in channel 0"),
        (
            integrity.constant_channels,
            {"channels": [{"mean": 0.1, "std": 1e-17}]},
            "is 0.1 wherever it is not 0 in channel 0; export it again",
        ),
        (integrity.constant_channels, {"channels": [{"mean": -7.0, "std": 0.0}]}, "is -7 wherever it is not 0"),
    ],
)
def test_the_odd_one_out_is_found_alone(check, changes, message):
    usual = [record(number) for number in range(20)]
    assert list(check(usual, ["background", "a", "b"])) == []
    found = list(check([*usual[:-1], record(19, **changes)], ["background", "a", "b"]))
    assert [(f.severity, f.case) for f in found] == [("warning", "case_19")]
    assert re.search(message, found[0].message)


def test_a_label_that_no_case_has_is_named():
    found = list(integrity.absent_labels([record(0), record(1)], ["background", "a", "b"]))
    assert found == []
    found = list(integrity.absent_labels([record(0, labels=[9, 1, 0])], ["background", "a", "b"]))
    assert "label 2 (b) is in none of the 1 cases" in found[0].message


def test_headers_that_differ_by_rounding_are_no_finding(phantom_dir, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(phantom_dir, folder)
    path = folder / "labelsTr/phantom_00.nii.gz"
    image = nib.load(path)
    noise = np.zeros((4, 4))
    noise[:3, :3] = 9e-4
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine + noise), path)
    assert integrity.inspect_dataset(Dataset(folder), str(tmp_path / "memory.json")) == []


def test_the_command_lists_everything_and_fails_on_errors(phantom_dir, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(phantom_dir, folder)
    bad = folder / "imagesTr/phantom_01.nii.gz"
    bad.write_bytes(bad.read_bytes()[:100])
    (folder / "labelsTr/phantom_00.nii.gz").unlink()
    shutil.copy(folder / "imagesTr/phantom_02.nii.gz", folder / "imagesTr/stray.nii.gz")
    for kind in ("imagesTr", "labelsTr"):
        shutil.copy(folder / kind / "phantom_03.nii.gz", folder / kind / "phantom_04.nii.gz")
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**description, "numTraining": 9}))
    done = bundle(
        "checking", "--config_file", "configs/plan.json", "--dataset_dir", folder, "--output_dir", tmp_path, fails=True
    )
    assert "Traceback" not in done.stderr
    said = f"error: 2 errors in {folder} keep it from being trained on; mend them as said above."
    assert done.stderr.strip().endswith(said)
    findings = json.loads((tmp_path / "check.json").read_text())
    assert [finding["severity"] for finding in findings] == ["error"] * 2 + ["warning"] * 3
    for finding, words in zip(
        findings,
        (
            "phantom_00.nii.gz not found; add it or remove case phantom_00",
            "not a complete NIfTI",
            "stray.nii.gz belongs to no case",
            '"numTraining" 9',
            "voxels of",
        ),
        strict=True,
    ):
        assert words in finding["message"]
        assert f"{finding['severity']}: {finding['message']}" in done.stdout
    assert "2 errors, 3 warnings" in done.stdout


def test_a_clean_data_set_passes(phantom_dir, tmp_path):
    done = bundle(
        "checking", "--config_file", "configs/plan.json", "--dataset_dir", phantom_dir, "--output_dir", tmp_path
    )
    assert "0 errors, 0 warnings" in done.stdout
    assert json.loads((tmp_path / "check.json").read_text()) == []


def test_a_data_set_of_one_case_is_an_error(phantom_dir):
    data = Dataset(phantom_dir)
    data.listed_cases = data.cases[:1]
    found = list(integrity.case_counts(data))
    assert [f.severity for f in found if "1 labelled cases; expected at least 2" in f.message] == ["error"]


def test_training_warns_of_what_checking_finds(phantom_dir, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
    for kind in ("imagesTr", "labelsTr"):
        (tmp_path / kind).mkdir()
        for number, source in enumerate((0, 1, 1)):
            shutil.copy(phantom_dir / kind / f"phantom_0{source}.nii.gz", tmp_path / kind / f"{number}.nii.gz")
    items = [
        {
            "case": str(n),
            "image": str(tmp_path / f"imagesTr/{n}.nii.gz"),
            "label": str(tmp_path / f"labelsTr/{n}.nii.gz"),
        }
        for n in range(3)
    ]
    data = Dataset(phantom_dir)
    records = fingerprint_cases(items + items, 1, data.labels, str(tmp_path / "checked.json"))  # as fold "all" has it
    assert len(records) == len(items)
    with caplog.at_level(logging.WARNING, "mednext"):
        integrity.check_cases(records, [32] * 3, [1.0] * 3, data.labels.index_names)
        assert sum("has the voxels of" in message for message in caplog.messages) == 1
        caplog.clear()
        integrity.check_cases(records, [32] * 3, [1.0] * 3)
        assert not any("has the voxels of" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("shape", "patch", "advice"),
    [
        ([33, 33, 33], [48, 48, 48], None),  # the patch that would be advised
        ([40, 30, 30], [64, 64, 64], [48, 32, 32]),
        ([10, 10, 10], [64, 64, 64], [32, 16, 16]),
        ([10, 10, 10], [32, 16, 16], None),
        ([60, 10, 10], [32, 32, 32], [32, 16, 16]),
        ([100, 100, 1], [512, 512, 1], [112, 112, 1]),
        ([10, 10, 5], [32, 32, 1], [32, 16, 1]),
        ([64, 64, 64], [64, 64, 64], ""),  # nothing is padded
    ],
)
def test_a_smaller_patch_is_advised_only_where_there_is_one(shape, patch, advice, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
    integrity.warn_of_small_scans([{"shape": shape, "spacing": [1.0] * 3}], patch, [1.0] * 3)
    if advice == "":
        assert not caplog.messages
    elif advice is None:
        assert caplog.messages[0].endswith("the rest is padding.")
    else:
        assert caplog.messages[0].endswith(f'padding: consider a smaller --patch_size, for example "{advice}".')
        kind_of("patch_size").of(advice, "patch_size")
