"""Prepared cases are what the transforms make of them, once: by content, shared, whole, and read crop by crop."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, files_end_at, save
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor
from monai.data.utils import set_rnd
from monai.transforms import ClassesToIndicesd, Compose, LoadImaged, MapTransform, RandFlipd, SaveImaged, SpatialCropd

from scripts.data.datasets import Dataset as Folder
from scripts.data.images import read_header
from scripts.inference.export import LabelWriter
from scripts.preprocessing.cache import CachedDataset, thread_count
from scripts.preprocessing.resampling import GridSpacingd, LabelOnImageGridd, LabelsOnScanGridd
from scripts.preprocessing.scan_check import CheckScand
from scripts.utils.errors import UserError

SPACING = (1.0, 1.0, 1.0)
CHILD = """
import sys, time
from pathlib import Path
sys.path[:0] = ["tests", "."]
from preprocessing.test_cache import dataset
scans, prepared, ready, other = map(Path, sys.argv[1:])
ready.touch()
while not other.exists():
    time.sleep(0.001)
dataset(scans, prepared).prepare()
"""


def stages(spacing: tuple = SPACING) -> list[list]:
    """Make an image's stage and its label's."""
    load = {"reader": "NibabelReader", "ensure_channel_first": True}
    grid = {"pixdim": spacing, "mode": 3, "padding_mode": "nearest", "scale_extent": True, "align_corners": False}
    return [
        [LoadImaged("image", **load), CheckScand("image", 1), GridSpacingd("image", **grid, dtype="float32")],
        [LoadImaged("label", **load), LabelOnImageGridd("label", 3), ClassesToIndicesd("label", num_classes=3)],
    ]


class Countingd(MapTransform):
    """Appends how often it was called."""

    calls = 0

    def __call__(self, data: dict) -> dict:
        self.calls += 1
        return data | {key: f"{data[key]} {self.calls}" for key in self.keys}


class Threadsd(MapTransform):
    """Says how many threads torch computes with."""

    def __call__(self, data: dict) -> dict:
        return data | {key: torch.get_num_threads() for key in self.keys}


def folder_of_cases(folder: Path, count: int = 1, shape: tuple = (20, 18, 12)) -> Path:
    """Save scans of 1.2 x 1 x 2 mm in `folder`."""
    for index in range(count):
        random = np.random.default_rng(index)
        image = random.normal(size=shape).astype(np.float32)
        save(folder / "images" / f"{index}.nii", image, np.diag([1.2, 1, 2, 1]))
        save(folder / "labels" / f"{index}.nii", random.integers(0, 3, shape).astype(np.uint8), np.diag([1.2, 1, 2, 1]))
    return folder


def dataset(scans: Path, folder: object, spacing: tuple = SPACING, transform: tuple = ()) -> CachedDataset:
    files = sorted((scans / "images").iterdir())
    data = [{"case": p.stem, "image": str(p), "label": str(scans / "labels" / p.name)} for p in files]
    return CachedDataset(data, stages(spacing), str(folder), spacing, transform)


def made(folder: Path) -> dict[Path, int]:
    """All entries and when each was made."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")}


def resident() -> int:
    """Bytes of RAM that this process has, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture
def scans(tmp_path) -> Path:
    return folder_of_cases(tmp_path / "scans")


@pytest.fixture
def prepared(scans, tmp_path) -> Path:
    """Cache the case of `scans`, an entry for its image and one for its label, and return the folder."""
    dataset(scans, tmp_path / "prepared").prepare()
    assert len(made(tmp_path / "prepared")) == 2
    return tmp_path / "prepared"


@pytest.fixture
def one_thread():
    """Sum in one order, as is done while cases are prepared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config(phantom_dir) -> ConfigParser:
    """configs/train.json on the phantom."""
    parser = ConfigParser()
    parser.read_config(str(ROOT / "configs" / "train.json"))
    parser.update({"dataset_dir": str(phantom_dir), "patch_size": [32] * 3})
    parser.parse()
    return parser


def parts(config: ConfigParser) -> tuple[list, list, list, Compose]:
    """For the image, for its label, for the label in training, and what is random."""
    return tuple(
        config.get_parsed_content(name)
        for name in ("transforms#image", "transforms#label", "train#on_grid", "train#preprocessing")
    )


class TestTransformsOfTheBundle:
    """configs/train.json draws the same samples from prepared cases as from the files."""

    def test_training_samples_are_the_same_bit_for_bit(self, config, phantom_dir, tmp_path, one_thread):
        fixed, label, on_grid, random = parts(config)
        data = Folder(phantom_dir).cases
        ours = CachedDataset(data, [fixed, label + on_grid], str(tmp_path), SPACING, random)
        theirs = Dataset(data, fixed + label + on_grid)
        for draw, index in enumerate([0, 1, 2, 3, 4, 1]):
            foreground = draw % 2 == 0
            set_rnd(ours, draw)
            found = ours[index, foreground]
            set_rnd(random, draw)
            expected = random(theirs[index] | {"foreground": foreground})
            assert set(found) == set(expected) >= {"image", "label"}
            for key in ("image", "label"):
                assert type(found[key]) is type(expected[key])
                assert torch.equal(found[key], expected[key])

    def test_validation_cases_go_back_to_the_scan_as_from_the_files(self, config, phantom_dir, tmp_path, one_thread):
        fixed, label, *_ = parts(config)
        data = Folder(phantom_dir).cases[:2]
        ours = CachedDataset(data, [fixed], str(tmp_path / "prepared"), SPACING, label)
        written = []
        for name, source in (("ours", ours), ("theirs", Dataset(data, fixed + label))):
            save_mask = SaveImaged(
                "pred", output_dir=tmp_path / name, resample=False, separate_folder=False, writer=LabelWriter,
                print_log=False,
            )  # fmt: skip
            for item in DataLoader(source, batch_size=1):
                item = {key: item[key][0] for key in ("image", "label")}
                logits = torch.cat([-item["image"], item["image"]])
                save_mask(LabelsOnScanGridd("pred")({**item, "pred": logits}))
            written.append([nib.load(path) for path in sorted((tmp_path / name).iterdir())])
        assert len(written[0]) == 2
        for our, their in zip(*written, strict=True):
            assert Path(our.get_filename()).name == Path(their.get_filename()).name
            np.testing.assert_array_equal(our.get_fdata(), their.get_fdata())
            np.testing.assert_array_equal(our.affine, their.affine)
        for index in range(2):
            found, expected = ours[index], Dataset(data, fixed + label)[index]
            for key in ("image", "label"):
                assert torch.equal(found[key], expected[key])
                for name in ("affine", "original_affine", "spatial_shape", "filename_or_obj", "space"):
                    np.testing.assert_array_equal(found[key].meta[name], expected[key].meta[name])

    def test_training_and_validation_share_the_images(self, config, phantom_dir, tmp_path):
        fixed, label, on_grid, _ = parts(config)
        data = Folder(phantom_dir).cases[:2]
        CachedDataset(data, [fixed, label + on_grid], str(tmp_path), SPACING).prepare()
        before = made(tmp_path)
        CachedDataset(data, [fixed], str(tmp_path), SPACING, label).prepare()
        assert len(before) == 4
        assert made(tmp_path) == before


class TestKey:
    """An entry belongs to a content and to transforms, not to a path or a day."""

    def test_a_touched_file_is_the_same(self, scans, prepared):
        before = made(prepared)
        for path in scans.rglob("*.nii"):
            os.utime(path, (1, 1))
        dataset(scans, prepared).prepare()
        assert made(prepared) == before

    def test_a_copy_elsewhere_is_the_same_and_keeps_its_own_name(self, scans, prepared, tmp_path):
        before = made(prepared)
        shutil.copytree(scans, tmp_path / "copy")
        (tmp_path / "copy/images/0.nii").rename(tmp_path / "copy/images/moved.nii")
        (tmp_path / "copy/labels/0.nii").rename(tmp_path / "copy/labels/moved.nii")
        item = dataset(tmp_path / "copy", prepared)[0]
        assert made(prepared) == before
        assert item["case"] == "moved"
        assert item["image"].meta["filename_or_obj"] == str(tmp_path / "copy/images/moved.nii")
        assert item["label"].meta["filename_or_obj"] == str(tmp_path / "copy/labels/moved.nii")

    @pytest.mark.parametrize("change", ["voxel", "spacing"])
    def test_a_changed_image_is_another_one(self, change, scans, prepared):
        path = scans / "images/0.nii"
        image = nib.load(path)
        voxels, affine = np.array(image.dataobj), image.affine.copy()
        if change == "voxel":
            voxels[3, 4, 5] += 1
        else:
            affine[2, 2] *= 1.01
        save(path, voxels, affine)
        changed = dataset(scans, prepared)
        found = changed[0]["image"]
        assert len(made(prepared)) == 4
        assert torch.equal(found, Compose(stages()[0])(changed.data[0])["image"])

    def test_a_changed_label_leaves_the_image_alone(self, scans, prepared):
        before = made(prepared)
        path = scans / "labels/0.nii"
        save(path, 2 - np.array(nib.load(path).dataobj), nib.load(path).affine)
        dataset(scans, prepared).prepare()
        after = made(prepared)
        new = set(after) - set(before)
        assert before.items() <= after.items()
        assert len(new) == 1
        assert "LabelOnImageGridd" in (new.pop().parent / "parameters.json").read_text()

    def test_other_transforms_have_a_folder_of_their_own_that_names_them(self, scans, prepared):
        dataset(scans, prepared, spacing=(2.0, 2.0, 2.0)).prepare()
        texts = [path.read_text() for path in prepared.glob("*/parameters.json")]
        assert len(texts) == len(made(prepared)) == 4
        assert all(json.loads(text)["versions"]["torch"] == torch.__version__.split("+")[0] for text in texts)
        assert len([text for text in texts if re.search(r"2\.0,\s+2\.0,\s+2\.0", text)]) == 2

    def test_a_transform_that_notes_things_down_in_itself_stays_the_same(self, scans, tmp_path):
        counting, data = [Countingd("case")], dataset(scans, tmp_path).data
        for _ in range(2):
            assert CachedDataset(data, [counting], str(tmp_path), SPACING)[0]["case"] == "0 1"
        assert len(made(tmp_path)) == 1

    def test_an_entry_holds_what_its_stage_made_and_no_more(self, scans, prepared):
        entries = dataset(scans, prepared)
        entries.prepare()
        stored = [set(torch.load(entry.path, weights_only=True)["values"]) for entry in entries.entries[0]]
        assert stored == [{"image"}, {"label", "label_cls_indices"}]

    def test_random_transforms_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="RandFlipd is random; it belongs into `transform`"):
            CachedDataset([], [[RandFlipd("image")]], str(tmp_path), SPACING)


class TestSharing:
    """Several runs, interrupted ones and damaged files."""

    def test_two_processes_may_prepare_one_folder_at_once(self, tmp_path):
        scans = folder_of_cases(tmp_path / "scans", count=12)
        command, one, other = (
            [sys.executable, "-c", CHILD, scans, tmp_path / "prepared"],
            tmp_path / "1",
            tmp_path / "2",
        )
        both = [subprocess.Popen([*command, *ready], cwd=ROOT) for ready in ((one, other), (other, one))]
        assert [process.wait() for process in both] == [0, 0]
        before = made(tmp_path / "prepared")
        assert len(before) == 24  # the same names in both processes
        assert sorted({path.suffix for path in (tmp_path / "prepared").rglob("*.*")}) == [".json", ".pt"]
        dataset(scans, tmp_path / "prepared").prepare()
        assert made(tmp_path / "prepared") == before  # and in this one

    def test_a_killed_preparation_goes_on(self, tmp_path):
        scans = folder_of_cases(tmp_path / "scans", count=8, shape=(50, 50, 30))
        process = multiprocessing.get_context("fork").Process(target=dataset(scans, tmp_path / "prepared").prepare)
        process.start()
        while len(made(tmp_path / "prepared")) < 2:
            time.sleep(0.005)
        process.kill()
        process.join()
        before = made(tmp_path / "prepared")
        assert 2 <= len(before) < 16
        dataset(scans, tmp_path / "prepared").prepare()
        after = made(tmp_path / "prepared")
        assert len(after) == 16
        assert before.items() <= after.items()

    @pytest.mark.parametrize("kept", [0, 1, 1000, -1])
    def test_a_truncated_entry_is_made_again(self, kept, scans, prepared):
        used = dataset(scans, prepared)
        expected = used[0]["image"].clone()
        entry = used.entries[0][0].path
        whole = entry.read_bytes()
        entry.unlink()
        entry.write_bytes(whole[:kept])
        with pytest.raises(UserError, match=f"{entry} was there and is missing or damaged now; start again"):
            used[0]
        assert torch.equal(dataset(scans, prepared)[0]["image"], expected)
        assert entry.stat().st_size == len(whole)

    @pytest.mark.parametrize("at", [0, 200, 0.3, 0.6, -30], ids=["first", "header", "voxel", "later", "directory"])
    def test_an_entry_with_a_flipped_bit_is_made_again_with_a_line_in_the_log(
        self, at, scans, prepared, caplog, monkeypatch
    ):
        monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
        used = dataset(scans, prepared)
        expected = used[0]["image"].clone()
        entry = used.entries[0][0].path
        whole = entry.read_bytes()
        flipped = bytearray(whole)
        flipped[int(at * len(whole)) if 0 < at < 1 else at] ^= 4
        entry.unlink()
        entry.write_bytes(flipped)
        assert torch.equal(dataset(scans, prepared)[0]["image"], expected)
        said = [record.message for record in caplog.records if record.name == "mednext"]  # not MONAI's of its readers
        assert said == [f"{entry} is damaged and made again."]
        assert entry.stat().st_size == len(whole)
        dataset(scans, prepared).prepare()
        assert sum(record.name == "mednext" for record in caplog.records) == 1

    def test_damaged_digests_are_made_again(self, scans, prepared):
        before, digests = made(prepared), (prepared / "digests.json").read_text()
        (prepared / "digests.json").write_text(digests[:30])
        dataset(scans, prepared).prepare()
        assert made(prepared) == before
        assert (prepared / "digests.json").read_text() == digests

    def test_headers_are_read_only_of_what_is_to_be_made(self, scans, prepared, monkeypatch):
        asked = []
        monkeypatch.setattr(
            "scripts.preprocessing.cache.read_header", lambda path: (asked.append(path), read_header(path))[1]
        )
        used = dataset(scans, prepared)
        used.prepare()
        assert not asked
        used.entries[0][0].path.unlink()
        dataset(scans, prepared).prepare()
        assert asked == [case["image"] for case in used.data[:1]]

    def test_a_folder_that_takes_no_more_is_named(self, scans, tmp_path):
        refused = pytest.raises(UserError, match=f"{tmp_path}/prepared/.* could not be written .* another folder")
        with files_end_at(20_000), refused:
            dataset(scans, tmp_path / "prepared").prepare()
        assert not [path for path in (tmp_path / "prepared").rglob("*") if path.suffix in (".pt", ".part")]

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (lambda path: path.write_bytes(path.read_bytes()[:2000]), "0.nii cannot be prepared .* mend or remove"),
            (lambda path: save(path, np.full((9, 9, 9), np.nan, np.float32)), "images/0.nii has 729 NaN"),
        ],
        ids=["truncated", "nan"],
    )  # fmt: skip
    def test_a_case_that_fails_is_named_with_the_cause(self, fault, message, scans, tmp_path):
        fault(scans / "images/0.nii")
        with pytest.raises(UserError, match=message):
            dataset(scans, tmp_path / "prepared").prepare()


class TestReading:
    """What a sample costs, and who may ask for it."""

    def test_workers_read_what_was_prepared_and_never_prepare(self, scans, tmp_path):
        source = dataset(scans, tmp_path / "prepared")
        with pytest.raises(RuntimeError, match=r"call prepare\(\) before the loader starts"):
            next(iter(DataLoader(source, num_workers=1)))
        assert not (tmp_path / "prepared").exists()
        source.prepare()
        item = next(iter(DataLoader(source, num_workers=1)))
        assert torch.equal(item["image"][0], source[0]["image"])

    def test_changes_in_place_stay_in_memory(self, scans, prepared):
        item = dataset(scans, prepared)[0]
        item["image"].zero_()
        assert dataset(scans, prepared)[0]["image"].any()

    def test_tensors_keep_their_kind_and_lists_of_indices_point_at_their_labels(self, scans, prepared):
        item = dataset(scans, prepared)[0]
        assert isinstance(item["image"], MetaTensor)
        assert isinstance(item["label"], MetaTensor)
        assert (item["image"].dtype, item["label"].dtype) == (torch.float32, torch.uint8)
        assert not item["image"].applied_operations
        for value, indices in enumerate(item["label_cls_indices"]):
            assert type(indices) is torch.Tensor
            assert len(indices) > 100
            assert (item["label"].flatten()[indices] == value).all()

    def test_a_part_of_an_array_is_stored_without_the_rest(self, scans, tmp_path):
        crop = [
            LoadImaged("image", ensure_channel_first=True),
            SpatialCropd("image", roi_start=[0] * 3, roi_end=[2] * 3),
        ]
        part = CachedDataset(dataset(scans, tmp_path).data, [crop], str(tmp_path), SPACING)
        assert part[0]["image"].shape == (1, 2, 2, 2)
        assert part[0]["image"].untyped_storage().nbytes() == 4 * 8

    def test_nothing_is_written_where_all_is_there(self, scans, prepared):
        for path in (*prepared.rglob("*"), prepared):
            path.chmod(0o555)
        before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
        try:
            assert dataset(scans, prepared)[0]["image"].any()
            assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before
        finally:
            for path in (prepared, *prepared.rglob("*")):
                path.chmod(0o755)

    def test_a_crop_does_not_bring_the_volume_into_memory(self, tmp_path):
        save(tmp_path / "large.nii", np.ones((256, 256, 256), np.float32))
        data = [{"case": "a", "image": str(tmp_path / "large.nii")}]
        load = [LoadImaged("image", ensure_channel_first=True)]
        source = CachedDataset(data, [load], str(tmp_path / "prepared"), SPACING)
        source.prepare()
        before = resident()
        image = source[0]["image"]
        crop = image[:, 100:148, 100:148, 100:148].clone()
        grown = resident() - before
        assert crop.sum() == 48**3
        assert image.sum() == 256**3  # now all of it was read
        assert resident() - before > 60e6  # it has 67 MB, which the measure does not miss
        assert grown < 16e6

    def test_each_case_is_computed_by_one_thread_and_torch_has_its_own_back(self, scans, tmp_path, one_thread):
        torch.set_num_threads(3)
        assert (
            CachedDataset(dataset(scans, tmp_path).data, [[Threadsd("case")]], str(tmp_path), SPACING)[0]["case"] == 1
        )
        assert torch.get_num_threads() == 3

    def test_as_many_cases_at_once_as_cores_and_memory_allow(self, scans, tmp_path):
        data = dataset(scans, tmp_path).data
        assert thread_count(data, SPACING) == len(os.sched_getaffinity(0))
        assert thread_count(data, (1e-3, 1e-3, 1e-3)) == 1  # a grid that nothing could hold
