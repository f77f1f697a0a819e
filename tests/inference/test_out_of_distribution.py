import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SHARED, bundle, save
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImaged, Orientationd

from scripts.data.datasets import Dataset
from scripts.inference.out_of_distribution import (
    UNLIKE,
    CompareWithTrainingd,
    InferenceReport,
    MeasureScand,
    out_of_range,
)
from scripts.inference.predictor import Predictor
from scripts.kernels.precision import bfloat16_pays
from scripts.planning.fingerprint_file import fingerprint_cases
from scripts.planning.training_ranges import learn_training_ranges
from scripts.utils.errors import UserError
from scripts.utils.files import read_table

RANGES = {
    "spacing x (mm)": [1.0, 1.5],
    "extent x (mm)": [40.0, 60.0],
    "contrast of channel 0 (degrees)": [20.0, 40.0],
    "volume of label 1 (ml)": [1.0, 3.0],
}


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("spacing x (mm)", [0.8, 1.87], [0.79, 1.9]),
        ("extent x (mm)", [32.0, 75.0], [31.9, 75.1]),
        ("contrast of channel 0 (degrees)", [10.1, 49.9], [9.0, 51.0, 150.0]),
        ("volume of label 1 (ml)", [0.5, 6.0], [0.0, 0.49, 6.1]),
    ],
)
def test_what_is_outside_the_range_of_training_and_its_margin_is_said(name, inside, outside):
    assert all(out_of_range({name: value}, RANGES) == [] for value in inside)
    for value in outside:
        (said,) = out_of_range({name: value}, RANGES)
        assert said == f"{name} is {value:.3g}, in training {RANGES[name][0]:.3g} to {RANGES[name][1]:.3g}"


def test_what_training_does_not_know_is_not_judged():
    assert out_of_range({"extent q (mm)": 1e9}, RANGES) == []


@pytest.fixture(scope="module")
def ranges(phantom_dir, tmp_path_factory):
    """Of the cases that fold 0 trains on."""
    data, file = Dataset(phantom_dir), str(tmp_path_factory.mktemp("fingerprint") / "fingerprint.json")
    records = fingerprint_cases(data.cases, 1, data.labels, file)
    return learn_training_ranges(records, data.training_cases(0), data.labels)


@pytest.fixture(scope="module")
def segmented(trained, phantom_dir, tmp_path_factory):
    """Segment three scans by the command: what it printed, and the report by scan."""
    folder = tmp_path_factory.mktemp("scans")
    image = nib.load(Dataset(phantom_dir).cases[0]["image"])
    voxels = np.asanyarray(image.dataobj).astype(np.float32)
    for name, values in {
        "as_trained": voxels,
        "like_ct": voxels - 2 * voxels.max(),
        "larger": np.pad(voxels, ((0, 0), (0, 0), (0, 2 * voxels.shape[2])), mode="edge"),
    }.items():
        save(folder / f"{name}.nii.gz", values, image.affine)
    done = bundle(
        "--config_file", "configs/inference.json", "--dataset_dir", folder, "--ckpt_dir", trained,
        "--output_dir", folder / "masks", "--num_workers", 0, "--amp", False,
    )  # fmt: skip
    return done.stdout + done.stderr, {row["case"]: row for row in read_table(folder / "masks/report.csv")}


class TestInference:
    """Through the command line, with the weights of a short training."""

    def test_training_leaves_the_ranges_of_its_cases(self, trained, ranges):
        assert json.loads((trained / "model.json").read_text())["training_ranges"] == ranges

    def test_a_scan_as_in_training_has_its_measures_in_the_report(self, segmented):
        row = segmented[1]["as_trained"]
        assert row["scan"].endswith("/as_trained.nii.gz")
        assert row["precision"] == ("bfloat16" if bfloat16_pays() else "float32")
        assert float(row["extent x (mm)"]) > 0
        assert "extent" not in row["unlike the training cases"]
        assert "contrast" not in row["unlike the training cases"]

    @pytest.mark.parametrize(("case", "measure"), [("like_ct", "contrast of channel 0"), ("larger", "extent")])
    def test_an_unlike_scan_is_in_the_report_and_said_aloud(self, segmented, case, measure):
        printed, report = segmented
        assert measure in report[case]["unlike the training cases"]
        said = f"{case}.nii.gz is unlike the scans this network was trained on, do not trust its mask unseen: "
        assert measure in printed.split(said)[1]


def test_a_scan_is_measured_on_its_own_grid_in_ras_order(tmp_path):
    rng = np.random.default_rng(0)
    voxels = rng.gamma(2, 100, (12, 10, 8)).astype(np.float32)
    voxels[:3] = 0
    affine = np.array([[0, 0, -3.0, 5], [-2.0, 0, 0, 6], [0, 1.5, 0, 7], [0, 0, 0, 1]])  # stored as (y, z, x), flipped
    path = save(tmp_path / "scan.nii.gz", voxels, affine)
    to_ras = [LoadImaged("image", ensure_channel_first=True), Orientationd("image", axcodes="RAS", labels=None)]
    found = Compose([*to_ras, MeasureScand("image")])({"image": str(path)})["image"].meta["measured"]
    kept = voxels[voxels != 0].astype(np.float64)
    assert found == pytest.approx({
        "spacing x (mm)": 3.0, "spacing y (mm)": 2.0, "spacing z (mm)": 1.5,
        "extent x (mm)": 24.0, "extent y (mm)": 24.0, "extent z (mm)": 15.0,
        "contrast of channel 0 (degrees)": np.degrees(np.arctan(kept.std() / kept.mean())),
        "tilt (degrees)": 0.0,
    })  # fmt: skip


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_scan_without_contrast_has_none(value):
    image = MetaTensor(torch.full((1, 4, 4, 4), value), affine=torch.eye(4))
    assert MeasureScand("image")({"image": image})["image"].meta["measured"][
        "contrast of channel 0 (degrees)"
    ] == pytest.approx(0.0)


def test_volumes_are_those_of_the_mask_in_millilitres():
    mask = torch.zeros(1, 10, 10, 10, dtype=torch.uint8)
    mask[:, :5] = 7
    mask = MetaTensor(mask, affine=torch.diag(torch.tensor([-2.0, 1.0, 0.5, 1.0])), meta={"measured": {}})
    for ranges in ({"volume of left lung (ml)": [1.1, 1.2]}, {"volume of label 7 (ml)": [1.1, 1.2]}):  # now, and of 0.6
        meta = CompareWithTrainingd("pred", ranges, {"left lung": [7]})({"pred": mask})["pred"].meta
        assert meta["measured"] == {"volume of left lung (ml)": 0.5}
        assert meta[UNLIKE] == ["volume of left lung (ml) is 0.5, in training 1.1 to 1.2"]


class TestReport:
    """What happens to the file of an earlier run."""

    def run(self, folder, scan, precision="float32", **measured):
        """Report one scan as the evaluator does."""
        mask = MetaTensor(torch.zeros(1, 2, 2, 2), meta={"filename_or_obj": scan, "measured": measured, UNLIKE: []})
        engine = Engine(lambda engine, batch: [{"pred": mask}])
        InferenceReport(str(folder), 2, precision).attach(engine)
        engine.run([0])
        return {row["case"]: row for row in read_table(folder / "report.csv")}

    def test_lines_of_other_scans_stay_and_that_of_the_same_is_new(self, tmp_path):
        self.run(tmp_path, "one.nii.gz", x=1.0)
        self.run(tmp_path, "two.nii.gz", x=2.0)
        rows = self.run(tmp_path, "one.nii.gz", x=3.0, y=4.0)
        assert {scan: (row["x"], row["y"]) for scan, row in rows.items()} == {
            "one": ("3.0", "4.0"),
            "two": ("2.0", ""),
        }

    def test_each_mask_has_the_precision_that_made_it(self, tmp_path):
        self.run(tmp_path, "one.nii.gz", "float32", x=1.0)
        self.run(tmp_path, "two.nii.gz", "bfloat16", y=1.0)
        rows = self.run(tmp_path, "three.nii.gz", "float32")
        assert {case: row["precision"] for case, row in rows.items()} == {
            "one": "float32",
            "two": "bfloat16",
            "three": "float32",
        }
        assert [*rows["one"]] == ["case", "scan", "x", "y", "precision", UNLIKE]

    @pytest.mark.parametrize("case", ["-5", "-a", "=cmd|' /C calc'!A0", "@x", "+1-2", "'=x", 'a,"b"', "1.2.840.1"])
    def test_a_case_has_one_row_under_any_name(self, case, tmp_path):
        for x in (1.0, -2.0):
            rows = self.run(tmp_path, f"{case}.nii.gz".replace("/", ":"), x=x)
        assert [row["x"] for row in rows.values()] == ["-2.0"]
        self.run(tmp_path, "other.nii.gz", x=3.0)
        assert [row["x"] for row in read_table(tmp_path / "report.csv")] == ["-2.0", "3.0"]

    def test_rows_of_0_6_which_name_a_file_stay_and_are_of_its_case(self, tmp_path):
        (tmp_path / "report.csv").write_text(f"scan,x,{UNLIKE}\na_0000.nii.gz,1.0,\nb_0000.nii.gz,2.0,\n")
        rows = self.run(tmp_path, "a.nii.gz", x=3.0)
        assert {case: (row["scan"], row["x"]) for case, row in rows.items()} == {
            "a": ("a.nii.gz", "3.0"),
            "b": ("b_0000.nii.gz", "2.0"),
        }
        assert {case: row["precision"] for case, row in rows.items()} == {"a": "float32", "b": ""}  # not known

    def test_two_inferences_at_once_lose_no_row(self, tmp_path):
        engines = []
        for name in ("one", "two"):
            scans = [{"filename_or_obj": f"{name}_{i}.nii.gz", "measured": {"x": float(i)}, UNLIKE: []} for i in (1, 2)]
            engine = Engine(lambda engine, meta: [{"pred": MetaTensor(torch.zeros(1, 2, 2, 2), meta=meta)}])
            InferenceReport(str(tmp_path)).attach(engine)
            engines.append((engine, scans))
        first, second = engines
        first[0].add_event_handler(Events.ITERATION_STARTED(once=2), lambda: second[0].run(second[1]))
        first[0].run(first[1])
        rows = read_table(tmp_path / "report.csv")
        assert [row["case"] for row in rows] == ["one_1", "two_1", "two_2", "one_2"]

    def test_a_file_that_is_no_such_report_is_not_overwritten(self, tmp_path):
        (tmp_path / "report.csv").write_text("patient,age\n1,60\n")
        with pytest.raises(UserError, match="report.csv is not a report of an inference"):
            self.run(tmp_path, "one.nii.gz")
        assert (tmp_path / "report.csv").read_text() == "patient,age\n1,60\n"


def test_python_is_warned_as_well(trained, phantom_dir, caplog):
    image = nib.load(Dataset(phantom_dir).cases[0]["image"])
    predictor = Predictor.load(trained / "model.pt")
    with caplog.at_level("WARNING", "mednext"):
        predictor(image.get_fdata() - 1e4, image.affine)
    (said,) = caplog.messages
    assert said.startswith("the image is unlike the scans this network was trained on")
    assert "contrast of channel 0" in said


@pytest.mark.skipif(not (SHARED / "Task04_Hippocampus").is_dir(), reason="needs the real hippocampus scans")
def test_real_scans_of_one_data_set_are_alike_and_another_s_are_not(tmp_path):
    def learned(name):
        data = Dataset(SHARED / name)
        records = fingerprint_cases(data.cases, len(data.channels), data.labels, str(tmp_path / f"{name}.json"))
        return learn_training_ranges(records, data.cases, data.labels)

    hippocampus, brains = learned("Task04_Hippocampus"), learned("Dataset902_FetalBrain")
    image = {name: limits[0] for name, limits in hippocampus.items()}
    assert out_of_range(image, hippocampus) == []
    other = {name: limits[1] for name, limits in brains.items()}
    assert any("extent" in said for said in out_of_range(other, hippocampus))


@pytest.mark.parametrize(("degrees", "trained", "said"), [(29, 0, 0), (31, 0, 1), (40, 38, 0), (54, 38, 1)])
def test_a_tilt_beyond_augmentation_and_training_is_said(degrees, trained, said):
    for ranges in ({"tilt (degrees)": [0.0, trained]}, *([{}] if not trained else [])):
        found = out_of_range({"tilt (degrees)": degrees}, ranges)
        assert len(found) == said
        assert all(f"it is tilted by {degrees} degrees off the patient's axes" in sentence for sentence in found)


def test_a_tilted_header_is_measured_and_said_of_weights_without_ranges():
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[0.766, -0.643], [0.643, 0.766]])  # 40 degrees
    image = MeasureScand("image")({"image": MetaTensor(torch.ones(1, 4, 4, 4), affine=turn)})["image"]
    mask = MetaTensor(torch.zeros(1, 4, 4, 4), affine=turn, meta={"measured": image.meta["measured"]})
    (said,) = CompareWithTrainingd("pred", None, {"a": [1]})({"pred": mask})["pred"].meta[UNLIKE]
    assert said.startswith("it is tilted by 40 degrees off the patient's axes, beyond the 30 that augmentation shows")


def test_ct_is_judged_by_more_than_its_unit():
    rng = np.random.default_rng(0)
    found = []
    for shift in (0, 0, 1024):
        voxels = np.where(rng.random((8, 8, 8)) < 0.5, -950.0, 60.0) + 30 * rng.standard_normal((8, 8, 8)) + shift
        image = MetaTensor(torch.from_numpy(voxels[None].astype(np.float32)), affine=torch.eye(4))
        found.append(
            MeasureScand("image")({"image": image})["image"].meta["measured"]["contrast of channel 0 (degrees)"]
        )
    assert abs(found[0] - found[1]) < 5 < abs(found[0] - found[2])
