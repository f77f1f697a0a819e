"""A place that takes no files is named in one sentence, before there is any work, and nothing is left there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TINY, overlays, python_m

COMMANDS = {  # what stands for the place, the data, weights and another folder
    "training, output_dir": ("training", "train", "--output_dir", "PLACE/a", "--ckpt_dir", "OTHER"),
    "training, ckpt_dir": ("training", "train", "--ckpt_dir", "PLACE/a", "--output_dir", "OTHER"),
    "training, cache_dir": ("training", "train", "--cache_dir", "PLACE/a", "--output_dir", "OTHER"),
    "evaluating": ("evaluating", "train evaluate", "--output_dir", "PLACE/a", "--ckpt_dir", "WEIGHTS"),
    "pooling": ("pooling", "train pool", "--output_dir", "PLACE/a", "--ckpt_dir", "OTHER"),
    "inference": ("run", "inference", "--output_dir", "PLACE/a", "--ckpt_dir", "WEIGHTS"),
    "checking": ("checking", "plan", "--output_dir", "PLACE/a"),
    "planning": ("planning", "plan", "--output", "PLACE/a/plan.json", "--output_dir", "OTHER"),
    "fetching": ("fetching", "fetch", "--folder", "PLACE/a", "--task", "Task04_Hippocampus"),
    "cross_validate": ("cross_validate", "", "--dataset_dir", "DATA", "--output_dir", "PLACE/a", "--ckpt_dir", "OTHER"),
    "score_masks": ("score_masks", "", "DATA/labelsTr", "DATA/labelsTr", "--output_dir", "PLACE/a"),
    "compare_scores": ("compare_scores", "", "OTHER", "OTHER", "--output_dir", "PLACE/a"),
    "find_best_configuration": ("find_best_configuration", "", "DATA", "OTHER", "--output_dir", "PLACE/a"),
    "convert_weights": ("convert_weights", "", "WEIGHTS/model.pt", "PLACE/a/model.pt", "--to", "monai"),
    "convert_dataset": ("convert_dataset", "", "DATA", "PLACE/a/data"),
}  # fmt: skip
WORK = (  # what would come first
    "scripts.planning.fingerprint_file.fingerprint_case",
    "scripts.preprocessing.cache.CachedDataset.prepare",
    "scripts.weights.checkpoints.check_weights",
    "scripts.weights.convert.read_weights",
    "scripts.evaluation.mask_scores.score_case",
    "scripts.evaluation.comparison.read_table",
    "scripts.evaluation.best_configuration.read_cross_validated",
    "scripts.data.download.download_url",
    "scripts.data.convert.read_image",
)
PLACES = {
    "a file": "",
    "a full disk": "mount -t tmpfs -o size=64k none {0} && ! head -c 100k /dev/zero 2>/dev/null > {0}/filled",
    "a disk for reading": "mount -t tmpfs -o ro,size=64k none {0}",
    "a folder that is closed": "chattr +i {0}",
}


@pytest.fixture(params=PLACES)
def place(request, tmp_path) -> Iterator[Path]:
    """Make a place where no file can be written; only root can make some of them."""
    folder = tmp_path / "place"
    if request.param == "a file":
        folder.touch()
        yield folder
        return
    folder.mkdir()
    done = subprocess.run(["sh", "-c", PLACES[request.param].format(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs to be root: {done.stderr.strip()}")
    yield folder
    subprocess.run(["sh", "-c", f"umount {folder} || chattr -i {folder}"], check=True, capture_output=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_takes_no_files_is_named_before_there_is_work(
    command, place, phantom_dir, shipped, tmp_path, monkeypatch
):
    name, configs, *arguments = COMMANDS[command]
    given = {"PLACE": place, "DATA": phantom_dir, "WEIGHTS": shipped, "OTHER": tmp_path / "other"}
    arguments = [re.sub("|".join(given), lambda found: str(given[found[0]]), part) for part in arguments]
    if configs:
        data = ("--dataset_dir", phantom_dir) if name != "fetching" else ()
        module = ("monai.bundle", "run", name, *overlays(*configs.split()), *data)
    else:
        module = ("scripts", name)
    for work in WORK:
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("there was work"))
    tiny = TINY if name == "training" else ()
    before = sorted(place.rglob("*"))
    done = python_m(*module, *arguments, *tiny, cwd=ROOT, fails=True)
    assert re.search(
        rf"^error: {place}.* could not be written \(.*\); make room there or mend its permissions, or give another",
        done.stderr, flags=re.MULTILINE,
    ), done.stderr  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "fold 0: training" not in done.stdout
    assert [path for path in sorted(place.rglob("*")) if path.is_file()] == [path for path in before if path.is_file()]
