"""A folder half done is gone on with: what is done stays, what is not is made, and masks of others are refused."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import bundle, save
from monai.transforms import Compose, Flip, SaveImage

from scripts.inference.export import MaskLayout
from scripts.inference.mask_record import MaskRecord
from scripts.utils.errors import UserError
from scripts.utils.files import read_table
from scripts.weights.model_settings import ModelSettings

NAMES = ("a.T1", "-b", "=c d")


@pytest.fixture
def folder(tmp_path):
    """Three scans, the weights, and a folder for masks."""
    for number, name in enumerate(NAMES):
        save(tmp_path / "scans" / f"{name}.nii.gz", np.full((4, 4, 4), number, np.int16))
    (tmp_path / "model.pt").write_bytes(b"weights")
    return tmp_path


def record(folder, weights=("model.pt",), model=None, steps=(), **settings) -> MaskRecord:
    files = [str(folder / name) for name in weights]
    return MaskRecord(
        MaskLayout(str(folder / "masks")), files, model or ModelSettings(), {"overlap": 0.5, **settings}, steps
    )


def cases(folder) -> list[dict]:
    return [{"case": name, "image": str(folder / "scans" / f"{name}.nii.gz")} for name in NAMES]


def make(folder, names=NAMES, maker: MaskRecord | None = None, **options) -> None:
    """Make masks as the evaluator does."""
    maker = maker or record(folder, **options)
    maker.remaining([case for case in cases(folder) if case["case"] in names], False)
    maker.forget(None)
    for name in names:
        save(folder / "masks" / f"{name}_seg.nii.gz", np.ones((4, 4, 4), np.uint8))
        mask = SimpleNamespace(meta={"case": name, "filename_or_obj": "unused"})
        maker.note(SimpleNamespace(state=SimpleNamespace(output=[{"pred": mask}])))


def left(folder, **options) -> list[str]:
    return [case["case"] for case in record(folder, **options).remaining(cases(folder), True)]


def test_what_is_done_is_left_out_and_said(folder, caplog):
    make(folder, NAMES[:2])
    with caplog.at_level("INFO", "mednext"):
        assert left(folder) == ["=c d"]
    assert caplog.messages == [f"2 of 3 scans have masks in {folder / 'masks'} and are left out"]
    assert [case["case"] for case in record(folder).remaining(cases(folder), False)] == [*NAMES]


def damage_truncated(mask, scan):
    mask.write_bytes(mask.read_bytes()[:-9])


def damage_bit(mask, scan):
    content = bytearray(mask.read_bytes())
    content[-6] ^= 1  # of the checksum
    mask.write_bytes(bytes(content))


def damage_empty(mask, scan):
    mask.write_bytes(b"")


def damage_other_grid(mask, scan):
    save(mask, np.ones((4, 4, 5), np.uint8))


def damage_missing(mask, scan):
    mask.unlink()


def damage_scan_changed(mask, scan):
    save(scan, np.full((4, 4, 4), 9, np.int16))


def damage_header_changed(mask, scan):
    save(scan, np.asanyarray(nib.load(scan).dataobj), np.diag([1, 1, 2.0, 1]))


def damage_folder(mask, scan):
    mask.unlink()
    mask.mkdir()


@pytest.mark.parametrize("damage", [value for name, value in list(globals().items()) if name.startswith("damage_")])
def test_a_damaged_mask_and_that_of_a_changed_scan_are_made_again(damage, folder, caplog):
    make(folder)
    damage(folder / "masks/-b_seg.nii.gz", folder / "scans/-b.nii.gz")
    with caplog.at_level("INFO", "mednext"):
        assert left(folder) == ["-b"]
    assert ("1 masks are damaged, of another scan or not on record" in caplog.text) == (damage != damage_missing)


def test_a_scan_that_was_copied_anew_and_a_mask_corrected_by_hand_are_kept(folder):
    make(folder)
    scan = folder / "scans/-b.nii.gz"
    scan.write_bytes(scan.read_bytes())  # another time
    save(folder / "masks/-b_seg.nii.gz", np.zeros((4, 4, 4), np.uint8))
    assert left(folder) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"masks": []}', '{"masks": {"-b": 1}, "files": {"x": 2}}'])
def test_masks_that_are_on_no_record_are_made_again(content, folder):
    make(folder)
    (folder / "masks/masks.json").write_text(content)
    assert left(folder) == [*NAMES]


def test_a_mask_that_is_being_made_is_on_no_record(folder):
    make(folder)
    other = record(folder, overlap=0.75)
    other.remaining(cases(folder)[1:2], False)
    other.forget(None)  # and the run ends here, with the mask written or not
    assert left(folder) == ["-b"]


def test_two_inferences_at_once_lose_no_entry(folder):
    one, other = record(folder), record(folder, overlap=0.75)
    for maker, names in ((one, NAMES[:1]), (other, NAMES[1:])):
        maker.remaining([case for case in cases(folder) if case["case"] in names], False)
    one.forget(None)
    other.forget(None)
    for maker, names in ((one, NAMES[:1]), (other, NAMES[1:])):
        for name in names:
            mask = SimpleNamespace(meta={"case": name, "filename_or_obj": "unused"})
            maker.note(SimpleNamespace(state=SimpleNamespace(output=[{"pred": mask}])))
    found = json.loads((folder / "masks/masks.json").read_text())
    assert {case: entry["made_by"] for case, entry in found["masks"].items()} == {
        NAMES[0]: one.maker[0], NAMES[1]: other.maker[0], NAMES[2]: other.maker[0]
    }  # fmt: skip
    assert {*found["made_by"]} == {one.maker[0], other.maker[0]}
    assert len(found["files"]) == 3


class Shift:
    """A step of somebody's own."""

    def __init__(self, by: int) -> None:
        self.by = by


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"overlap": 0.75}, "with overlap 0.5; this run has .*with overlap 0.75. Give another --output_dir, or"),
        ({"tta": True}, "with tta null; this run has .*with tta true"),
        ({"model": ModelSettings(spacing=[2.0, 2.0, 2.0])}, r"spacing \[1.0, 1.0, 1.0\]; .*spacing \[2.0, 2.0, 2.0\]"),
        ({"model": ModelSettings(crop_to_nonzero=True)}, "crop_to_nonzero false; .*crop_to_nonzero true"),
        ({"steps": [Compose([Flip(0)])]}, 'steps "[0-9a-f]{12}"; .*steps "[0-9a-f]{12}"'),
        ({"steps": [Shift(2)]}, "steps"),
        ({"weights": ("other.pt",)}, r"model.pt \(SHA-256 [0-9a-f]{12}\); this run has .*other.pt \(SHA-256"),
        ({"weights": ("model.pt", "other.pt")}, "model.pt .*; this run has .* and "),
    ],
)
def test_masks_of_other_weights_or_settings_are_refused(options, said, folder):
    (folder / "other.pt").write_bytes(b"others")
    make(folder, NAMES[:2])
    with pytest.raises(UserError, match=f"-b_seg.nii.gz and 1 more there: made by .*{said}"):
        left(folder, **options)
    for mask in (folder / "masks").glob("*.nii.gz"):
        mask.unlink()
    assert left(folder, **options) == [*NAMES]


def test_what_decides_no_voxel_is_no_other_maker(folder):
    shutil.copy(folder / "model.pt", folder / "moved.pt")
    make(folder, steps=[Compose([Flip(0), SaveImage(folder / "one")])])
    step = Compose([Flip(0), SaveImage(folder / "two")])
    model = ModelSettings(eval_classes={"all": [1]}, fold=3, patch_size=(32, 32, 32))
    assert left(folder, weights=("moved.pt",), model=model, steps=[step]) == []


def test_a_step_that_cannot_be_described_is_known_by_its_name(folder):
    step = Shift(torch.Generator())
    make(folder, steps=[step])
    assert left(folder, steps=[step]) == []


def test_the_command_goes_on_where_it_stopped(trained, phantom_dir, tmp_path):
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    source = sorted((phantom_dir / "imagesTs").iterdir())[0]

    def segment(*options, fails=False):
        return bundle(
            "inferring", "--config_file", "configs/inference.json", "--dataset_dir", scans, "--ckpt_dir", trained,
            "--output_dir", masks, "--num_workers", 0, *options, fails=fails,
        )  # fmt: skip

    shutil.copy(source, scans / "-a.nii.gz")
    segment()
    first = (masks / "-a_seg.nii.gz").stat().st_mtime_ns
    for name in ("=b", "c.d"):
        shutil.copy(source, scans / f"{name}.NII.GZ")
    refused = segment("--skip_existing", "True", "--overlap", 0.25, fails=True)
    assert "-a_seg.nii.gz: made by" in refused.stderr
    assert "with overlap 0.5; this run has" in refused.stderr
    done = segment("--skip_existing", "True")
    assert "1 of 3 scans have masks in" in done.stdout + done.stderr
    assert (masks / "-a_seg.nii.gz").stat().st_mtime_ns == first
    assert [row["case"] for row in read_table(masks / "report.csv")] == ["-a", "=b", "c.d"]
    voxels = [np.asanyarray(nib.load(masks / f"{name}_seg.nii.gz").dataobj) for name in ("-a", "=b", "c.d")]
    assert (voxels[0] == voxels[1]).all()
    assert (voxels[0] == voxels[2]).all()
    before = {path.name: path.read_bytes() for path in masks.iterdir()}
    assert "3 of 3 scans have masks in" in (done := segment("--skip_existing", True)).stdout + done.stderr
    assert {path.name: path.read_bytes() for path in masks.iterdir()} == before
    assert "skip the `run`" not in done.stderr
    segment("--overlap", 0.25)  # as ever: all masks are made anew
    assert len(json.loads((masks / "masks.json").read_text())["made_by"]) == 1
    assert (masks / "-a_seg.nii.gz").stat().st_mtime_ns > first
