"""The published data sets: their files as docs/how-to/datasets.md lays them out, with their recipes, end to end."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, bundle, overlays, save
from monai.bundle import ConfigParser

from scripts.data.datasets import Dataset
from scripts.data.scans import image_files, list_scans

PAGE = (ROOT / "docs/how-to/datasets.md").read_text()
RECIPES = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "configs/recipes").glob("*.json"))}
PUBLISHED = ("btcv", "amos22", "kits19", "brats21")
REGIONS = "brats21 regions"  # the same files with another dataset.json, without a recipe
PATCH = ("--patch_size", "[32,32,32]")
SMALL = ("--spacing", "[2,2,2]", "--epochs", 1, "--iterations", 1, "--batch_size", 1)
QUICK = ("--num_workers", 0, "--overlap", 0)


def block(kind: str, name: str) -> str:
    """Return the fenced text below `<!-- kind: name -->`."""
    return re.search(rf"^<!-- {kind}: {name} -->\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]


# ---- downloads


def voxels(values: list[int], outside: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Make an image of 32 x 32 x 32 voxels with `outside` around a box, and its label: a cube for each value."""
    label, random = np.zeros((32, 32, 32), np.uint8), np.random.RandomState(seed)
    for index, value in enumerate(values[1:]):
        i, j, k = np.unravel_index(index, (4, 4, 4))
        label[8 * i + 2 : 8 * i + 6, 8 * j + 2 : 8 * j + 6, 8 * k + 2 : 8 * k + 6] = value
    image = np.full(label.shape, outside, np.int16)
    inside = (slice(2, 30),) * 3
    image[inside] = (100 + 10 * label + random.randint(-20, 20, label.shape))[inside]
    return image, label


def btcv(raw: Path) -> None:
    for number in (1, 2, 10, 21):
        image, label = voxels(list(range(14)), -1000, number)
        save(raw / f"Training/img/img{number:04d}.nii.gz", image, np.diag([-2.0, 2, 2, 1]))
        save(raw / f"Training/label/label{number:04d}.nii.gz", label, np.diag([-2.0, 2, 2, 1]))


def amos22(raw: Path) -> None:
    """Make four CT, one of them in another orientation; one MR among them; one CT of the validation part."""
    for part, number in (("Tr", 1), ("Tr", 4), ("Tr", 89), ("Tr", 500), ("Tr", 507), ("Va", 8)):
        image, label = voxels(list(range(16)), 0 if number > 500 else -1000, number)
        affine = np.diag([2.0, 2, 2, 1])[[1, 0, 2, 3]] if number == 4 else np.diag([2.0, 2, 2, 1])
        save(raw / f"images{part}/amos_{number:04d}.nii.gz", image.astype(np.float32), affine)
        save(raw / f"labels{part}/amos_{number:04d}.nii.gz", label, affine)


def kits19(raw: Path) -> None:
    """Make CT whose first axis goes from head to foot; the last case is without a label."""
    affine = np.diag([-2.0, -2, -2, 1])[[2, 1, 0, 3]]
    for number in (0, 1, 2, 209, 210):
        image, label = voxels([0, 1, 2], -1000, number)
        save(raw / f"case_{number:05d}/imaging.nii.gz", image.astype(np.float32), affine)
        if number < 210:
            save(raw / f"case_{number:05d}/segmentation.nii.gz", label, affine)


def brats21(raw: Path) -> None:
    """Make four channels a case, with zeros around the brain."""
    for number in (0, 2, 3, 1666):
        case = raw / f"BraTS2021_{number:05d}/BraTS2021_{number:05d}"
        for channel, name in enumerate(("t1", "t1ce", "t2", "flair")):
            image, label = voxels([0, 1, 2, 4], 0, 10 * number + channel)
            save(Path(f"{case}_{name}.nii.gz"), image, np.diag([-2.0, -2, 2, 1]))
        save(Path(f"{case}_seg.nii.gz"), label, np.diag([-2.0, -2, 2, 1]))


def hippocampus(folder: Path) -> None:
    """Make a Decathlon folder, which is used as it is: small scans with float labels."""
    names = [f"hippocampus_{number:03d}.nii.gz" for number in (1, 3, 4, 6)]
    for number, name in enumerate(names):
        image, label = voxels([0, 1, 2], 0, number)
        save(folder / "imagesTr" / name, image.astype(np.float32), np.diag([2.0, 2, 2, 1]))
        save(folder / "labelsTr" / name, label.astype(np.float32), np.diag([2.0, 2, 2, 1]))
    described = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
    }
    (folder / "dataset.json").write_text(json.dumps(described))


DOWNLOADS = {"btcv": btcv, "amos22": amos22, "kits19": kits19, "brats21": brats21}
CASES = {
    "btcv": ["BTCV_0001", "BTCV_0002", "BTCV_0010", "BTCV_0021"],
    "amos22": ["amos_0001", "amos_0004", "amos_0089", "amos_0500"],
    "kits19": ["case_00000", "case_00001", "case_00002", "case_00209"],
    "brats21": ["BraTS2021_00000", "BraTS2021_00002", "BraTS2021_00003", "BraTS2021_01666"],
}
ORIGINALS = {  # of the first case: image files by channel, and the label
    "btcv": ["Training/img/img0001.nii.gz", "Training/label/label0001.nii.gz"],
    "amos22": ["imagesTr/amos_0001.nii.gz", "labelsTr/amos_0001.nii.gz"],
    "kits19": ["case_00000/imaging.nii.gz", "case_00000/segmentation.nii.gz"],
    "brats21": [f"BraTS2021_00000/BraTS2021_00000_{n}.nii.gz" for n in ("t1", "t1ce", "t2", "flair", "seg")],
}


def lay_out(name: str, folder: Path) -> SimpleNamespace:
    """Make a download of `name` (or of a variant of it) in `folder`, and lay it out by the commands of the page."""
    files, raw, laid_out = name.split()[0], folder / "the download", folder / "Dataset001"
    if name == "hippocampus":
        hippocampus(laid_out)
    else:
        DOWNLOADS[files](raw)
        where = {**os.environ, "RAW": str(raw), "D": str(laid_out)}
        subprocess.run(["bash", "-euc", block("layout", files)], env=where, check=True)
        (laid_out / "dataset.json").write_text(block("dataset", name))
    return SimpleNamespace(name=name, raw=raw, dataset_dir=laid_out)


# ---- tables and layout


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipe_and_the_page_have_one_table(name):
    recipe, described = RECIPES[name]["checks#recipe"], json.loads(block("dataset", name))
    assert recipe["channels"] == list(described["channel_names"].values())
    assert dict(zip(recipe["labels"], recipe["label_values"], strict=True)) == described["labels"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_commands_of_the_page_lay_a_download_out(name, tmp_path):
    made = lay_out(name, tmp_path)
    cases = Dataset(made.dataset_dir).cases
    assert [case["case"] for case in cases] == CASES[name]
    files = [*image_files(cases[0]), cases[0]["label"]]
    assert [Path(file).resolve() for file in files] == [(made.raw / original).resolve() for original in ORIGINALS[name]]
    waiting = list_scans(made.dataset_dir / "imagesTs")
    assert [path.name for path in waiting] == (["case_00210_0000.nii.gz"] if name == "kits19" else [])


def test_regions_and_exclusive_labels_of_brats_are_scored_and_stored_alike(tmp_path):
    found = Dataset(lay_out(REGIONS, tmp_path).dataset_dir).labels
    assert found.values == RECIPES["brats21"]["checks#recipe"]["label_values"]
    assert found.eval_classes == RECIPES["brats21"]["model#eval_classes"]
    written_as = list(zip(found.regions.values(), found.regions_class_order, strict=True))
    for value in found.values[1:]:  # a voxel in its regions and no others gets its value back
        painted = [paint for region, paint in written_as if value in region]
        assert painted[-1] == value


# ---- published choices


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_choices_win_over_a_plan(name, kernel_size, tmp_path):
    plan = tmp_path / "plan.json"
    planned = {"spacing": [2, 2, 5], "patch_size": [16, 16, 32], "batch_size": 7, "train#rotate_range": [0, 0, 0.5]}
    planned |= {"mirror_axes": [1, 2], "train#rare_label_share": 0.1}
    plan.write_text(json.dumps(planned))
    parser = ConfigParser()
    parser.read_config([ROOT / "configs/train.json", plan, ROOT / f"configs/recipes/{name}.json"])
    parser["kernel_size"] = kernel_size
    described = ("checks#recipe", "model#eval_classes")
    found = {key: parser.get_parsed_content(key) for key in RECIPES[name] if key not in described}
    slow = (name, kernel_size) == ("kits19", 5)
    published = {
        "train#rotate_range": [0.5236] * 3,
        "train#rare_label_share": 0.0,
        "mirror_axes": [0, 1, 2],
        "spacing": [1.0] * 3,
        "patch_size": [128] * 3,
        "batch_size": 2,
        "learning_rate": 1e-4 if slow else 1e-3,
        "train#batch_dice": name != "brats21",
    }
    masked = {"crop_to_nonzero": True, "intensity": "zscore_nonzero"}
    assert found == (published | masked if name == "brats21" else published)


# ---- end to end


@pytest.fixture(scope="module", params=[*PUBLISHED, REGIONS, "hippocampus"])
def run(request, tmp_path_factory) -> SimpleNamespace:
    """Plan a data set where it must be, train with its recipe, score, and segment its held-out case."""
    made = lay_out(request.param, tmp_path_factory.mktemp("published"))
    made.folder, made.recipe = made.dataset_dir.parent, RECIPES.get(made.name, {})
    made.common = ("--dataset_dir", made.dataset_dir, "--ckpt_dir", made.folder, "--output_dir", made.folder, *QUICK)
    configs = ["configs/train.json"]
    if made.name == REGIONS or made.recipe.get("checks#recipe", {}).get("needs_plan"):
        configs.append(str(made.folder / "plan.json"))
        bundle(
            "planning", "--config_file", "configs/plan.json", "--dataset_dir", made.dataset_dir,
            "--output", configs[-1], "--fingerprint_file", made.folder / "checked.json",
        )  # fmt: skip
    if made.recipe:
        configs.append(f"configs/recipes/{made.name}.json")
    patch = () if made.name == "hippocampus" else PATCH  # the one thing that its recipe says
    bundle("training", "--config_file", str(configs), *made.common, *SMALL, *patch)
    made.settings = json.loads((made.folder / "model.json").read_text())
    bundle("evaluating", *overlays("train", "evaluate"), *made.common)
    (made.case,) = Dataset(made.dataset_dir).validation_cases(0)
    bundle(*overlays("inference"), *made.common[2:], "--dataset_dir", image_files(made.case)[0])
    return made


def described(made: SimpleNamespace) -> dict[str, list[int]]:
    """Return the values of every label or region of its dataset.json."""
    found = json.loads((made.dataset_dir / "dataset.json").read_text())["labels"]
    if all(key.isdigit() for key in found):  # Decathlon's
        found = {name: int(value) for value, name in found.items()}
    return {name: value if isinstance(value, list) else [value] for name, value in found.items()}


def scores(made: SimpleNamespace) -> dict[str, float]:
    """Return the Dice by class."""
    with open(made.folder / "cases.csv") as file:
        return {row["label"]: float(row["dice"]) for row in csv.DictReader(file)}


def dice(made: SimpleNamespace, values: list[int]) -> float:
    """Compute the Dice of the saved mask and the downloaded label, for the voxels with one of `values`."""
    mask = nib.load(made.folder / "predictions" / f"{made.case['case']}_seg.nii.gz")
    one, other = (np.isin(np.asarray(image.dataobj), values) for image in (mask, nib.load(made.case["label"])))
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def test_training_keeps_the_labels_and_the_intensities_of_the_data_set(run):
    names, settings = list(described(run)), run.settings
    assert settings["labels"] == (names[1:] if run.name == REGIONS else names)
    if run.name.startswith("brats21"):
        assert (settings["intensity"], settings["crop_to_nonzero"]) == ("zscore_nonzero", True)
    elif run.name == "hippocampus":
        assert (settings["intensity"], settings["patch_size"]) == ("zscore", [48, 64, 48])
    else:
        assert settings["intensity"].keys() == {"clip", "mean", "std"}
        low, high = settings["intensity"]["clip"]
        assert 80 < low < settings["intensity"]["mean"] < high < 280  # of the labelled voxels alone, not of the air


def test_published_classes_are_scored_on_the_stored_labels(run):
    foreground = {name: values for name, values in described(run).items() if values != [0]}
    classes = run.recipe.get("model#eval_classes", foreground)
    assert list(scores(run)) == list(classes)
    assert scores(run) == pytest.approx({name: dice(run, values) for name, values in classes.items()}, abs=1e-6)


def test_masks_have_the_values_and_the_grid_of_the_files(run):
    mask, label = nib.load(run.folder / f"{run.case['case']}_seg.nii.gz"), nib.load(run.case["label"])
    assert {0} < set(np.unique(mask.dataobj)) <= set(np.unique(label.dataobj))
    np.testing.assert_allclose(mask.affine, label.affine, atol=1e-4)  # float32 in the header


@pytest.mark.parametrize("run", ["kits19"], indirect=True)
def test_kits19_is_scored_as_its_challenge_does_with_the_option_of_the_page(run):
    option = re.search(r'--model#eval_classes "(.*?)"', PAGE)[1]
    bundle("evaluating", *overlays("train", "evaluate"), *run.common, "--model#eval_classes", option)
    assert scores(run) == pytest.approx({"kidney and tumor": dice(run, [1, 2]), "tumor": dice(run, [2])}, abs=1e-6)


# ---- what does not fit together


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("kits19", ["KiTS19", "run planning --config_file configs/plan.json"]),  # without the plan that it needs
        ("brats21", ["BraTS21", "'T1ce'", "['CT']", "docs/how-to/datasets.md"]),  # of another data set
    ],
)
def test_a_recipe_that_does_not_fit_says_what_to_do(recipe, said, tmp_path):
    made = lay_out("kits19", tmp_path)
    done = bundle(
        "training", *overlays("train", f"recipes/{recipe}"), "--dataset_dir", made.dataset_dir, "--ckpt_dir", tmp_path,
        "--output_dir", tmp_path, fails=True,
    )  # fmt: skip
    for text in said:
        assert text in done.stderr
