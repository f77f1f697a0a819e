"""All folds in one command, pooled without a case twice, and going on where it stopped."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CACHE, COARSE, ROOT, TINY, bundle, overlays, python_m, save

from scripts.evaluation import cross_validation
from scripts.evaluation.cross_validation import cross_validate, pool_folds
from scripts.utils.errors import UserError
from scripts.utils.files import read_table


def scored(folder: Path, fold: int, cases: dict[str, float | None]) -> None:
    """Write what scoring leaves of a fold: Dice of one class by case, and a mask each."""
    rows = [
        {"case": case, "label": "organ", "dice": dice, "nsd": dice, "hd95_mm": "inf" if dice == 0 else 1.0,
         "predicted_voxels": 0 if dice is None else 5, "reference_voxels": 0 if dice is None else 5}
        for case, dice in cases.items()
    ]  # fmt: skip
    (folder / f"fold_{fold}").mkdir(parents=True)
    (folder / f"fold_{fold}" / "summary.json").write_text(json.dumps({"cases": rows}))
    for case in cases:
        save(folder / f"fold_{fold}" / "predictions" / f"{case}_seg.nii.gz", np.full((2, 2, 2), fold, np.uint8))


def rows(path: Path) -> list[dict]:
    with open(path) as file:
        return list(csv.DictReader(file))


def test_pooled_scores_are_those_of_all_folds_as_one_table(tmp_path):
    scored(tmp_path, 1, {"a": 0.9, "d": 0.0})
    scored(tmp_path, 0, {"c": 0.6, "b": None})
    for _ in range(2):  # pooling again replaces
        pool_folds(str(tmp_path), ["organ"], 1.0)
        assert [(r["case"], r["dice"], r["hd95_mm"]) for r in rows(tmp_path / "cases.csv")] == [
            ("a", "0.9", "1.0"), ("b", "nan", "1.0"), ("c", "0.6", "1.0"), ("d", "0.0", "inf")
        ]  # fmt: skip
        assert float(rows(tmp_path / "summary.csv")[0]["dice"]) == pytest.approx(0.5)
        masks = sorted(path.name for path in (tmp_path / "predictions").iterdir())
        assert masks == [f"{case}_seg.nii.gz" for case in "abcd"]


def test_a_case_in_two_folds_is_refused(tmp_path):
    scored(tmp_path, 0, {"a": 0.9, "b": 0.8})
    scored(tmp_path, 1, {"b": 0.7})
    with pytest.raises(UserError, match="fold_0 and .*fold_1 both scored case b"):
        pool_folds(str(tmp_path), ["organ"], 1.0)
    assert not (tmp_path / "cases.csv").exists()


@pytest.mark.parametrize(
    ("held_out", "message"),
    [(["ab", "bcde"], "holds out case phantom_01 in 2 folds"), (["ab", "cd"], "never holds out case phantom_04 .1 in")],
)
def test_folds_that_share_or_leave_out_cases_are_refused_before_anything_is_trained(
    held_out, message, phantom_dir, tmp_path
):
    shutil.copytree(phantom_dir, tmp_path / "data")
    names = {letter: f"phantom_0{number}" for number, letter in enumerate("abcde")}
    folds = [
        {"val": [names[c] for c in group], "train": [n for c, n in names.items() if c not in group]}
        for group in held_out
    ]
    (tmp_path / "data/splits_final.json").write_text(json.dumps(folds))
    with pytest.raises(UserError, match=message):
        cross_validate(str(tmp_path / "data"), ckpt_dir=str(tmp_path / "models"), output_dir=str(tmp_path / "eval"))
    assert not (tmp_path / "models").exists()


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """Collect the commands that cross-validation would start; those with an argument "fail" do so."""
    commands = []

    def run(command: list[str], environment: dict) -> int:
        commands.append(command)
        return 1 if "fail" in command else 0

    monkeypatch.setattr(cross_validation, "run_child", run)
    return commands


def value(command: list[str], name: str) -> str:
    """Return what follows `--name` in a command."""
    return command[command.index(f"--{name}") + 1]


def test_every_fold_gets_its_number_and_folders_of_its_own(started, phantom_dir, tmp_path, capsys):
    models, scores = tmp_path / "models", tmp_path / "eval"
    cross_validate(str(phantom_dir), ckpt_dir=str(models), output_dir=str(scores), folds=[1, 3], seed="7{fold}")
    assert [command[4] for command in started] == ["training", "evaluating"] * 2
    for command, fold in zip(started, (1, 1, 3, 3), strict=True):
        assert (value(command, "ckpt_dir"), value(command, "output_dir")) == (
            f"{models}/fold_{fold}", f"{scores}/fold_{fold}"
        )  # fmt: skip
        assert value(command, "seed") == f"7{fold}"
        assert ("--fold" in command) == ("training" in command)  # scoring takes it from the weights
        assert "--fold" not in command or value(command, "fold") == str(fold)
        assert "training" not in command or value(command, "resume") == "auto"
    assert "folds 0, 1, 2, 3, 4 are still to be run" in capsys.readouterr().out


def test_a_fold_that_another_cross_validation_works_on_is_refused_and_the_others_are_not(
    started, phantom_dir, tmp_path
):
    hold = "from scripts.utils.ownership import own; own({!r}, 'cross_validation'); print(flush=True); input()"
    code = hold.format(str(tmp_path / "fold_1"))
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        common = {"ckpt_dir": str(tmp_path), "output_dir": str(tmp_path)}
        with pytest.raises(UserError, match=f"fold_1 belongs to another cross_validation .process {other.pid} on"):
            cross_validate(str(phantom_dir), folds=[1, 0], **common)
        assert not started
        cross_validate(str(phantom_dir), folds=[0, 2], **common)
        assert [value(command, "ckpt_dir")[-1] for command in started] == ["0", "0", "2", "2"]
        other.communicate(b"\n")


def test_half_a_table_of_scores_is_made_again(started, phantom_dir, tmp_path):
    scored(tmp_path, 0, {"a": 0.9})
    table = tmp_path / "fold_0/summary.json"
    table.write_text(table.read_text()[:40])
    cross_validate(str(phantom_dir), ckpt_dir=str(tmp_path), output_dir=str(tmp_path), folds=0)
    assert [command[4] for command in started] == ["training", "evaluating"]


def test_the_first_fold_that_fails_ends_the_command(started, phantom_dir, tmp_path):
    with pytest.raises(UserError, match="training failed, as said above; mend it and start the same command again"):
        cross_validate(str(phantom_dir), ckpt_dir=str(tmp_path), output_dir=str(tmp_path), init_weights="fail")
    assert len(started) == 1


class TestCommand:
    """Two folds of the phantom through the real command line."""

    def run(self, *arguments: object, fails: bool = False) -> subprocess.CompletedProcess:
        return python_m("scripts", "cross_validate", *arguments, "--cache_dir", CACHE.name, fails=fails)

    def test_folds_are_trained_scored_pooled_and_not_twice(self, phantom_dir, tmp_path):
        folder = tmp_path / "data"
        shutil.copytree(phantom_dir, folder)
        names = [f"phantom_0{i}" for i in range(5)]
        folds = [{"train": names[2:], "val": names[:2]}, {"train": names[:2], "val": names[2:]}]
        (folder / "splits_final.json").write_text(json.dumps(folds))
        common = ("--dataset_dir", folder, "--ckpt_dir", tmp_path / "models", "--output_dir", tmp_path / "eval")
        common += (*TINY, *COARSE, "--epochs", 2)

        first = self.run(*common, "--folds", 0)
        assert "folds 1 are still to be run" in first.stdout
        weights = tmp_path / "models/fold_1"  # killed after its first epoch
        half = ("training", *overlays("train"), *common, "--fold", 1, "--ckpt_dir", weights, "--output_dir", tmp_path)
        bundle(*half, "--checkpoint_selection", "last", "--train#trainer#max_epochs", 1)
        rest = self.run(*common)
        assert "fold 0: training" not in rest.stdout
        assert "fold 0: scoring" not in rest.stdout
        assert "resuming after epoch 1 of 2" in rest.stdout
        assert [row["case"] for row in rows(tmp_path / "eval/cases.csv")] == [n for n in names for _ in range(3)]
        assert (tmp_path / "eval/report.html").is_file()
        before = read_table(tmp_path / "eval/cases.csv")
        decision = json.loads((tmp_path / "eval/postprocessing.json").read_text())
        assert (tmp_path / "models/fold_0/postprocessing.json").is_file()
        assert "largest component of" in (tmp_path / "eval/report.html").read_text()
        assert decision["cases"] == 5
        assert decision["labels"] == ["background", "low", "middle", "high"]

        ensemble = f"{tmp_path}/models/fold_*/model.pt"
        bundle(
            *overlays("inference"), "--dataset_dir", folder / "imagesTs", "--ckpt_dir", tmp_path / "models",
            "--ensemble", ensemble, "--tta", "True", "--output_dir", tmp_path / "masks", "--num_workers", 0,
        )  # fmt: skip
        assert len(list((tmp_path / "masks").glob("*_seg.nii.gz"))) == 2

        again = self.run(*common, "--save_probabilities", "True")
        assert [f"fold {n}: {what}" in again.stdout for what in ("scoring", "training") for n in (0, 1)] == [1, 1, 0, 0]
        assert "scoring" not in self.run(*common, "--save_probabilities", "True").stdout
        assert read_table(tmp_path / "eval/cases.csv") == before
        assert len(list((tmp_path / "eval").glob("fold_*/predictions/phantom_*.npz"))) == 5
        shutil.copytree(tmp_path / "eval", tmp_path / "eval_tta")
        both = [str(tmp_path / name) for name in ("eval", "eval_tta")]
        found = python_m(
            "scripts", "find_best_configuration", "--dataset_dir", folder, "--folders", str(both),
            "--output_dir", tmp_path / "best",
        )  # fmt: skip
        ranking = {r["configuration"]: float(r["dice"]) for r in read_table(tmp_path / "best/ranking.csv")}
        mean = ranking.pop(" + ".join(both))
        alone = float(read_table(tmp_path / "eval/summary.csv")[-1]["dice"])
        assert ranking == dict.fromkeys(both, pytest.approx(alone))
        assert mean == pytest.approx(alone, abs=0.01)  # but for ties in half precision
        assert found.stdout.count("\npython -m") == 1
        command = next(line for line in found.stdout.splitlines() if line.startswith("python -m"))
        command = command.replace("SCANS", str(folder / "imagesTs")).replace("MASKS", str(tmp_path / "best_masks"))
        python_m(*shlex.split(command)[2:], "--num_workers", 0)
        assert len(list((tmp_path / "best_masks").glob("*_seg.nii.gz"))) == 2

        other = self.run(*common, "--kernel_size", 5, fails=True)
        assert (
            "fold_0 was trained with kernel_size 3, this cross-validation has 5; give another --ckpt_dir"
            in other.stderr
        )
        slip = self.run(*common, "--fold", 1, fails=True)
        assert "error: --fold is set by cross-validation itself" in slip.stderr

    def test_a_fold_that_is_not_there_is_named(self, phantom_dir):
        done = self.run("--dataset_dir", phantom_dir, "--folds", 7, fails=True)
        assert done.stderr.strip().endswith(f"error: {phantom_dir} has no fold 7; expected 0 to 4.")
