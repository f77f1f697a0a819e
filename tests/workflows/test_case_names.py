"""A case has one name, its id, from training to the tables, whatever characters the names of its files have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import CACHE, COARSE, TINY, bundle, python_m, save

from scripts.data.datasets import Dataset
from scripts.data.images import read_image
from scripts.utils.files import read_table

NAMES = [
    "p1.T1",
    "p1.T2",
    "p2",  # of p2_0000.NII.GZ
    "p3_0001",
    "1.2.840.113619.2.55.3",
    "a case  of blanks ",
    "schädel-頭-e\u0301",
    "$1 @train %x",
    "@home",
    "%configs",
    'a,"b";c',
    "=cmd|' !A1",
    "-5",
    "--help",
    "'=x",
    "a.nii",
    "null",
    "~",
    "line\nbreak",
    "{case}*?[x]",
    "case_seg",
    "CASE_SEG",
]
ENDINGS = (".nii.gz", ".NII.GZ", ".nii", ".Nii.Gz", ".NII")


@pytest.fixture(scope="module")
def data(phantom_dir, tmp_path_factory) -> Path:
    """Make a Decathlon folder of small parts of the phantom, and two folds of it."""
    folder = tmp_path_factory.mktemp("names") / "data"
    image, label = (nib.load(next((phantom_dir / part).glob("*_00*"))) for part in ("imagesTr", "labelsTr"))
    listed = []
    for number, name in enumerate(NAMES):
        ending, entry = ENDINGS[number % len(ENDINGS)], {}
        for part, source in (("image", image), ("label", label)):
            voxels = np.asanyarray(source.dataobj)
            voxels = voxels + voxels.dtype.type(number) if part == "image" else voxels
            path = save(folder / f"{part}sTr" / "made.nii.gz", voxels, source.affine)
            if not ending.lower().endswith(".gz"):
                nib.save(nib.load(path), path := path.with_suffix(""))
            target = path.with_name(f"{name}_0000{ending}" if name == "p2" else f"{name}{ending}")
            shutil.move(path, target)
            entry[part] = str(target.relative_to(folder))
        (folder / "imagesTr" / "made.nii.gz").unlink(missing_ok=True)
        (folder / "labelsTr" / "made.nii.gz").unlink(missing_ok=True)
        listed.append(entry)
    description = json.loads((phantom_dir / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(description | {"training": listed}))
    halves = NAMES[::2], NAMES[1::2]
    folds = [{"train": halves[1 - fold], "val": halves[fold]} for fold in range(2)]
    (folder / "splits_final.json").write_text(json.dumps(folds))
    return folder


@pytest.fixture(scope="module")
def validated(data) -> Path:
    """Cross-validate: the folder of the weights and of the scores."""
    out = data.parent / "out"
    python_m(
        "scripts", "cross_validate", "--dataset_dir", data, "--ckpt_dir", out / "models", "--output_dir", out / "eval",
        "--cache_dir", CACHE.name, *TINY, *COARSE, "--epochs", 1, "--iterations", 1,
    )  # fmt: skip
    return out


def masks(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*_seg.nii.gz")}


def test_cross_validation_scores_each_case_under_its_id(validated):
    wanted = {f"{name}_seg.nii.gz" for name in NAMES}
    assert masks(validated / "eval/predictions") == wanted
    rows = read_table(validated / "eval/cases.csv")
    assert sorted(row["case"] for row in rows) == sorted(NAMES * 3)
    found = json.loads((validated / "eval/summary.json").read_text())["cases"]
    assert {row["case"] for row in found} == set(NAMES)
    assert json.loads((validated / "eval/postprocessing.json").read_text())["cases"] == len(NAMES)
    assert (validated / "models/fold_1/postprocessing.json").is_file()


def test_inference_makes_a_mask_and_a_row_of_each_and_goes_on(validated, data):
    out = validated / "masks"
    common = ("--config_file", "configs/inference.json", "--dataset_dir", data / "imagesTr", "--output_dir", out)
    common += ("--ckpt_dir", validated / "models/fold_0", "--num_workers", 0)
    bundle("inferring", *common)
    (out / "-5_seg.nii.gz").unlink()
    done = bundle("inferring", *common, "--skip_existing", "True")
    assert f"{len(NAMES) - 1} of {len(NAMES)} scans have masks in" in done.stdout + done.stderr
    assert masks(out) == {f"{name}_seg.nii.gz" for name in NAMES}
    assert sorted(row["case"] for row in read_table(out / "report.csv")) == sorted(NAMES)


def test_a_layout_and_back_keep_the_ids(data, tmp_path):
    for source, target in ((data, tmp_path / "nnunet"), (tmp_path / "nnunet", tmp_path / "decathlon")):
        python_m("scripts", "convert_dataset", "--source", source, "--target", target)
    for case, there, back in zip(
        *(Dataset(folder).cases for folder in (data, tmp_path / "nnunet", tmp_path / "decathlon")), strict=True
    ):
        assert case["case"] == there["case"] == back["case"]
        for part in ("image", "label"):
            voxels = [read_image(found[part]).voxels for found in (case, there, back)]
            np.testing.assert_array_equal(voxels[0], voxels[1])
            np.testing.assert_array_equal(voxels[0], voxels[2])
    assert Dataset(tmp_path / "decathlon").folds == Dataset(data).folds
