"""NIfTI files with anything in their headers: each is read or ends in one UserError, never in a raw exception."""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import save

from scripts.data.labels import Labels
from scripts.planning.fingerprint import fingerprint_case
from scripts.preprocessing.loading import load_scan
from scripts.utils.errors import UserError

FILES = 1000
SHARE = 10  # of which the ordinary run takes one
TYPES = ("i2", "u1", "f4", "f8", "i4", ">i2")
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def damaged(rng: np.random.Generator) -> bytes:
    """Make a small NIfTI file and change some of its bytes, mostly of the header, or cut it."""
    voxels = (rng.random((6, 5, 4)) * 9).astype(rng.choice(TYPES))
    content = bytearray(nib.Nifti1Image(voxels, AFFINE).to_bytes())
    for _ in range(rng.integers(1, 6)):
        content[rng.integers(0, 352 if rng.random() < 0.8 else len(content))] = rng.integers(0, 256)
    return bytes(content[: rng.integers(0, len(content))] if rng.random() < 0.1 else content)


def ends_well(work: Callable[[], object]) -> bool:
    """Say whether the work was done; one sentence is the other way to end."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's of the values that a damaged header makes
            work()
    except UserError:
        return False
    return True


def read_all(seeds: range, folder: Path) -> int:
    """Read files as a scan, as a case's image and as its label; return how many worked."""
    other = save(folder / "other.nii", np.zeros((6, 5, 4), np.uint8), AFFINE)
    labels = Labels(["background", "a"], [0, 1])
    worked = 0
    for seed in seeds:
        content = damaged(np.random.default_rng(seed))
        path = folder / ("scan.nii.gz" if seed % 2 else "scan.nii")
        path.write_bytes(gzip.compress(content) if seed % 2 else content)
        image = {"case": "a", "image": str(path), "label": str(other)}
        label = {"case": "a", "image": str(other), "label": str(path)}
        worked += ends_well(lambda path=path: load_scan(path))
        worked += ends_well(lambda case=image: fingerprint_case(case, 1, labels))
        worked += ends_well(lambda case=label: fingerprint_case(case, 1, labels))
    return worked


def test_a_share_of_damaged_files_is_read_or_refused(tmp_path):
    assert 0 < read_all(range(0, FILES, SHARE), tmp_path) < 3 * FILES / SHARE


@pytest.mark.fuzz
def test_every_damaged_file_is_read_or_refused(tmp_path):
    assert 0 < read_all(range(FILES), tmp_path) < 3 * FILES
