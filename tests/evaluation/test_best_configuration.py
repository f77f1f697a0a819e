"""Cross-validations and their means are ranked by held-out Dice, and the best one comes with its command."""

from __future__ import annotations

import glob
import json
import math
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save

from scripts.data.datasets import Dataset
from scripts.evaluation.best_configuration import find_best_configuration
from scripts.evaluation.metrics import score_case
from scripts.evaluation.tables import without_nan
from scripts.inference.probabilities import write_probabilities
from scripts.utils.errors import UserError
from scripts.utils.files import read_table

CASES = ("a", "b.c", "d", "e")
AFFINE = np.diag([1.5, -1.0, 2.0, 1.0])
LABELS = {"background": 0, "organ": 1, "tumour": 4}
REGIONS = {"background": 0, "whole": [1, 4], "core": [4]}


def planes(text: str) -> np.ndarray:
    """One label a plane of 2 x 2 voxels, by the values of the files: "1140" is two planes of 1, one of 4, one of 0."""
    return np.repeat([int(c) for c in text], 4).astype(np.uint8).reshape(-1, 2, 2)


TRUTH = {case: planes("0011114400") for case in CASES}


@pytest.fixture
def data(tmp_path) -> Path:
    return make_data(tmp_path / "data")


def make_data(folder: Path, truth=None, **description) -> Path:
    for case, label in (truth or TRUTH).items():
        save(folder / f"imagesTr/{case}_0000.nii.gz", label.astype(np.float32), AFFINE)
        save(folder / f"labelsTr/{case}.nii.gz", label, AFFINE)
    told = {"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".nii.gz", "numTraining": 4, **description}
    (folder / "dataset.json").write_text(json.dumps(told))
    return folder


def cross_validated(data: Path, folder: Path, masks: dict[str, str], sure=0.9, saved=True, folds=None, **settings):
    """Write what a cross-validation of two folds leaves.

    Args:
        data: the data set.
        folder: for scores; the weights are in `folder/models`.
        masks: the label of each plane, by case.
        sure: probability of a voxel's label; the others share the rest.
        saved: whether probabilities were saved, or the cases of which they were.
        folds: case -> fold.
        settings: of inference; `model`: of the network.
    """
    known = Dataset(data)
    labels = known.labels
    model = {"spacing": [1, 1, 1], "eval_classes": labels.eval_classes, **settings.pop("model", {})}
    classes = labels.indices_of(model["eval_classes"])
    folds = folds or {case: int(case > "c") for case in masks}
    for fold in set(folds.values()):
        where = folder / f"fold_{fold}"
        rows = []
        for case in (case for case in masks if folds[case] == fold):
            mask = planes(masks[case])
            save(where / f"predictions/{case}_seg.nii.gz", mask, AFFINE)
            save(folder / f"predictions/{case}_seg.nii.gz", mask, AFFINE)
            truth = np.asanyarray(known_label(known, case))
            indices = [torch.from_numpy(np.searchsorted(labels.file_values, m))[None] for m in (mask, truth)]
            rows += [
                {"case": case, **row} for row in score_case(*indices, (1, 1, 1), classes, ignore=labels.ignore_index)
            ]
            if saved is True or (saved and case in saved):
                write_npz(where / f"predictions/{case}.npz", mask, labels, sure)
        (where / "summary.json").write_text(json.dumps(without_nan({"cases": rows})))
        (folder / f"models/fold_{fold}").mkdir(parents=True, exist_ok=True)
        (folder / f"models/fold_{fold}/model.pt").touch()
        (folder / f"models/fold_{fold}/model.json").write_text(json.dumps(model))
    inference = {"tta": False, "overlap": 0.5, "window_scheme": "nnunet", **settings}
    (folder / "cross_validation.json").write_text(
        json.dumps({"ckpt_dir": str(folder / "models"), "inference": inference})
    )
    return str(folder)


def known_label(known: Dataset, case: str) -> np.ndarray:
    import nibabel as nib

    return np.asanyarray(nib.load(next(c["label"] for c in known.cases if c["case"] == case)).dataobj)


def write_npz(path, mask, labels, sure):
    if labels.regions:
        inside = np.stack([np.isin(mask, values) for values in labels.regions.values()])
        values = np.where(inside, sure, 1 - sure)
    else:
        inside = np.stack([mask == value for value in labels.values])
        values = np.where(inside, sure, (1 - sure) / (len(inside) - 1))
    about = {"scan": f"{path.stem}.nii.gz", "labels": asdict(labels)}
    groups = iter([torch.from_numpy(values.astype(np.float16))])
    write_probabilities(path, values.shape, AFFINE, about, groups)


def ranking(tmp_path) -> list[tuple[str, str, float]]:
    rows = read_table(tmp_path / "best/ranking.csv")
    return [
        (row["rank"], row["configuration"].replace(f"{tmp_path}/", ""), round(float(row["dice"]), 4)) for row in rows
    ]


def find(data, tmp_path, *folders) -> str:
    find_best_configuration(str(data), list(folders), str(tmp_path / "best"))
    return (tmp_path / "best/best.txt").read_text()


RIGHT, HALF = "0011114400", "0011004400"
LEFT_OUT = "0011110000"


def test_a_mean_of_two_that_err_elsewhere_is_the_best(data, tmp_path, capsys):
    # where one is sure and the other is not, the sure one decides
    one = cross_validated(data, tmp_path / "one", {**dict.fromkeys(CASES, RIGHT), "a": HALF, "d": LEFT_OUT}, sure=0.6)
    two = cross_validated(data, tmp_path / "two", {**dict.fromkeys(CASES, RIGHT), "e": HALF, "a": RIGHT}, sure=0.9)
    three = cross_validated(data, tmp_path / "three", dict.fromkeys(CASES, LEFT_OUT), sure=0.5)
    said = find(data, tmp_path, one, two, three)
    found = ranking(tmp_path)
    assert [name for _, name, _ in found] == ["two", "one + two", "two + three", "one", "one + three", "three"]
    assert {name: dice for _, name, dice in found}["two"] == round((1 + (3 + 2 / 3) / 4) / 2, 4)
    assert "held-out cases" in said
    assert said in capsys.readouterr().out


def test_the_winning_mean_has_masks_post_processing_and_a_command_of_one_inference(data, tmp_path):
    noise = "1011114400"  # a lone voxel plane that the largest component leaves out
    one = cross_validated(data, tmp_path / "one", {**dict.fromkeys(CASES, noise), "a": LEFT_OUT}, sure=0.9)
    two = cross_validated(data, tmp_path / "two", {**dict.fromkeys(CASES, noise), "e": LEFT_OUT}, sure=0.9)
    weak = {case: 0.55 if mask == LEFT_OUT else 0.9 for case, mask in [("a", LEFT_OUT), ("e", LEFT_OUT)]}
    for folder, case in ((one, "a"), (two, "e")):  # not sure where it is wrong
        fold = int(case > "c")
        write_npz(
            Path(folder, f"fold_{fold}/predictions/{case}.npz"), planes(LEFT_OUT), Dataset(data).labels, weak[case]
        )
    said = find(data, tmp_path, one, two)
    assert ranking(tmp_path)[0][:2] == ("1", "one + two")
    assert len(list((tmp_path / "best/predictions").glob("*_seg.nii.gz"))) == 4
    decision = json.loads((tmp_path / "best/postprocessing.json").read_text())
    assert decision["steps"] == {"all foreground": [1, 2]}
    assert decision["gain"]["organ"]["with"] == 1.0
    (command,) = commands(said)
    assert option(command, "ensemble") == str([f"{one}/models/fold_*/model.pt", f"{two}/models/fold_*/model.pt"])
    assert option(command, "postprocessing_file") == str(tmp_path / "best/postprocessing.json")
    assert "better in 4 and worse in 0" not in said  # in three cases nothing differs
    assert "better in 1 and worse in 0 of 4 cases" in said


def commands(said: str) -> list[list[str]]:
    return [shlex.split(line) for line in said.splitlines() if line.startswith("python ")]


def option(command: list[str], name: str) -> str:
    return command[command.index(f"--{name}") + 1]


@pytest.mark.parametrize(
    "other",
    [{"model": {"spacing": [2, 2, 2]}}, {"tta": True}, {"overlap": 0.25}, {"model": {"patch_size": [32, 32, 1]}}],
)
def test_a_mean_of_other_grids_or_windows_is_made_of_saved_probabilities(other, data, tmp_path):
    one = cross_validated(
        data,
        tmp_path / "one",
        {**dict.fromkeys(CASES, RIGHT), "a": LEFT_OUT},
        sure=0.6,
        model={"patch_size": [32, 32, 32]},
    )
    two = cross_validated(data, tmp_path / "two", {**dict.fromkeys(CASES, RIGHT), "e": LEFT_OUT}, sure=0.6, **other)
    for folder, case in ((one, "a"), (two, "e")):
        write_npz(
            Path(folder, f"fold_{int(case > 'c')}/predictions/{case}.npz"), planes(LEFT_OUT), Dataset(data).labels, 0.5
        )
    said = find(data, tmp_path, one, two)
    assert "--folders \"['MASKS/part_0', 'MASKS/part_1']\"" in said
    first, second, last = commands(said)
    assert [option(c, "save_probabilities") for c in (first, second)] == ["True", "True"]
    assert [option(c, "postprocessing_file") for c in (first, second)] == ["none", "none"]
    assert option(second, "tta") == str(other.get("tta", False))
    assert option(second, "overlap") == str(other.get("overlap", 0.5))
    assert last[3] == "ensemble_probabilities"
    assert option(last, "folders") == str([option(first, "output_dir"), option(second, "output_dir")])
    assert option(last, "postprocessing_file") == str(tmp_path / "best/postprocessing.json")


def test_equals_share_a_rank_and_the_simpler_comes_first(data, tmp_path):
    folders = [cross_validated(data, tmp_path / name, dict.fromkeys(CASES, HALF)) for name in ("two", "one")]
    find(data, tmp_path, *folders)
    assert [(rank, name) for rank, name, _ in ranking(tmp_path)] == [("1", "two"), ("1", "one"), ("1", "two + one")]


@pytest.mark.parametrize("saved", [False, ("a", "d", "e")])
def test_without_probabilities_single_ones_are_ranked_and_what_to_pass_is_said(saved, data, tmp_path):
    one = cross_validated(data, tmp_path / "one", dict.fromkeys(CASES, HALF), saved=saved)
    two = cross_validated(data, tmp_path / "two", dict.fromkeys(CASES, RIGHT))
    three = cross_validated(data, tmp_path / "three", dict.fromkeys(CASES, RIGHT))
    said = find(data, tmp_path, one, two, three)
    assert {name for _, name, _ in ranking(tmp_path)} == {"one", "two", "three", "two + three"}
    assert f"{one} has no probabilities of {4 - len(saved or ())} of 4 cases" in said
    assert "cross_validate again with --save_probabilities True" in said
    assert "two has no" not in said


def test_a_single_cross_validation_has_a_command_too(data, tmp_path):
    one = cross_validated(data, tmp_path / "o[1]", dict.fromkeys(CASES, HALF), saved=False)
    said = find(data, tmp_path, one)
    (command,) = commands(said)
    assert "Nothing to compare" in said
    assert "--save_probabilities" not in said
    assert sorted(glob.glob(option(command, "ensemble"))) == [f"{one}/models/fold_{n}/model.pt" for n in (0, 1)]
    assert not (tmp_path / "best/predictions").exists()


def test_absent_labels_do_not_count(tmp_path):
    truth = {**TRUTH, "a": planes("0011110000"), "d": planes("0000000000")}
    data = make_data(tmp_path / "data", truth)
    exact = {"a": LEFT_OUT, "b.c": RIGHT, "d": "0" * 10, "e": RIGHT}
    one = cross_validated(data, tmp_path / "one", exact)
    two = cross_validated(data, tmp_path / "two", {**exact, "d": "0000000004"})  # what is not there is found
    said = find(data, tmp_path, one, two)
    rows = {row["configuration"].split("/")[-1]: row for row in read_table(tmp_path / "best/ranking.csv")}
    assert (rows["one"]["dice"], rows["one"]["scores"]) == ("1.0", "5")
    assert float(rows["two"]["dice_tumour"]) == pytest.approx(2 / 3)
    assert rows["two"]["scores"] == "6"
    assert "nan" not in said


def test_a_class_that_never_occurs_counts_nowhere(tmp_path):
    data = make_data(tmp_path / "data", {case: planes("0011110000") for case in CASES})
    one = cross_validated(data, tmp_path / "one", dict.fromkeys(CASES, LEFT_OUT))
    said = find(data, tmp_path, one)
    (row,) = read_table(tmp_path / "best/ranking.csv")
    assert (float(row["dice"]), row["dice_tumour"]) == (1.0, "nan")
    assert "nan" in said


def test_where_no_class_occurs_nothing_is_ranked(tmp_path):
    data = make_data(tmp_path / "data", {case: planes("0" * 10) for case in CASES})
    one = cross_validated(data, tmp_path / "one", dict.fromkeys(CASES, "0" * 10))
    with pytest.raises(UserError, match="no class of .*data has a Dice in .*one; expected cases with labels"):
        find(data, tmp_path, one)


def test_regions_and_voxels_to_ignore(tmp_path):
    truth = {case: planes("0011114409") for case in CASES}
    data = make_data(tmp_path / "data", truth, labels={**REGIONS, "ignore": 9}, regions_class_order=[1, 4])
    one = cross_validated(data, tmp_path / "one", {**dict.fromkeys(CASES, "0011114404"), "a": "0011111101"}, sure=0.6)
    two = cross_validated(data, tmp_path / "two", {**dict.fromkeys(CASES, "0011114404"), "e": "0011110000"}, sure=0.9)
    find(data, tmp_path, one, two)
    rows = {name: dice for _, name, dice in ranking(tmp_path)}
    assert rows["one"] == round((1 + 0.75) / 2, 4)
    assert rows["one + two"] == rows["two"]  # which is surer
    assert math.isclose(rows["two"], (3 + 0.8) / 4 / 2 + 0.75 / 2, abs_tol=1e-4)


def test_the_classes_are_those_that_were_scored(data, tmp_path):
    model = {"eval_classes": {"both": [1, 4]}}
    folders = [cross_validated(data, tmp_path / name, dict.fromkeys(CASES, "0011441100"), model=model) for name in "ab"]
    find(data, tmp_path, *folders)
    assert {dice for _, _, dice in ranking(tmp_path)} == {1.0}


# ---- what cannot be compared


def refused_fold(data, tmp_path):
    cross_validated(data, tmp_path / "two", dict.fromkeys(CASES, HALF), folds={"a": 0, "b.c": 1, "d": 1, "e": 0})
    return "one held out b.c in fold 0, .*two in fold 1 .2 cases differ.; expected the same folds"


def refused_missing_case(data, tmp_path):
    cross_validated(data, tmp_path / "two", dict.fromkeys(CASES[:3], HALF))
    return "one has case e, .*two has not .1 cases"


def refused_case_of_another(data, tmp_path):
    summary = tmp_path / "two/fold_0/summary.json"
    summary.write_text(summary.read_text().replace('"a"', '"aa"'))
    return "one has case a, .*two has not .2 cases"


def refused_grown_data_set(data, tmp_path):
    save(data / "imagesTr/f_0000.nii.gz", TRUTH["a"].astype(np.float32), AFFINE)
    save(data / "labelsTr/f.nii.gz", TRUTH["a"], AFFINE)
    return "data has case f, .*one has not"


def refused_classes(data, tmp_path):
    cross_validated(
        data, tmp_path / "two", dict.fromkeys(CASES, HALF), model={"eval_classes": {"organ": [1, 4], "tumour": [4]}}
    )
    return r"one scored the class organ as \[1\], .*two as \[1, 4\]"


def refused_two_folds(data, tmp_path):
    cross_validated(data, tmp_path / "two", {"a": HALF}, folds={"a": 1})
    return "fold_1 and fold_0 both scored case a"


def refused_unfinished(data, tmp_path):
    (tmp_path / "two/cross_validation.json").unlink()
    return "two/cross_validation.json is missing or damaged; .*run cross_validate again"


def refused_record(data, tmp_path):
    (tmp_path / "two/cross_validation.json").write_text("[]")
    return "two/cross_validation.json is missing or damaged"


def refused_weights(data, tmp_path):
    (tmp_path / "two/models/fold_0/model.pt").unlink()
    return "two/models/fold_0/model.pt, whose scores are in .*two, is not there"


def refused_labels(data, tmp_path):
    labels = {"background": 0, "organ": 1, "tumour": 3}
    other = make_data(tmp_path / "other", {case: planes(RIGHT.replace("4", "3")) for case in CASES}, labels=labels)
    for name in ("one", "two"):
        for case in CASES:
            write_npz(
                tmp_path / f"{name}/fold_{int(case > 'c')}/predictions/{case}.npz",
                TRUTH[case],
                Dataset(other).labels,
                0.9,
            )
    return "a.npz has the labels .*3.* expected the same"


def refused_grid(data, tmp_path):
    save(data / "labelsTr/a.nii.gz", TRUTH["a"], np.diag([1.5, -1.0, 2.5, 1.0]))
    return "a.npz lies elsewhere than .*labelsTr/a.nii.gz"


@pytest.mark.parametrize("fault", [value for name, value in list(globals().items()) if name.startswith("refused_")])
def test_what_cannot_be_compared_is_named(fault, data, tmp_path):
    folders = [cross_validated(data, tmp_path / name, dict.fromkeys(CASES, HALF)) for name in ("one", "two")]
    said = fault(data, tmp_path)
    with pytest.raises(UserError, match=said):
        find(data, tmp_path, *folders)
    assert not (tmp_path / "best/ranking.csv").exists()


@pytest.mark.parametrize("folders", [[], ["one", "one"], ["one", "./one"]])
def test_folders_are_named_once(folders, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="folders is .*; expected"):
        find_best_configuration(str(data), folders)
