"""A training of one's own as a bundle of its own: MONAI's checks pass, it runs alone, and says what is true."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SHARED, bundle, overlays, python_m

from scripts.publishing.metadata import make_metadata, mask_classes
from scripts.publishing.model_card import plain_markdown
from scripts.publishing.package import _zip, package
from scripts.utils.errors import UserError
from scripts.utils.files import PARTIAL, write_whole
from scripts.weights.model_settings import ModelSettings

SCHEMA = SHARED / "schema/meta_schema_20240725.json"
NAME = "mednext_phantom_segmentation"


@pytest.fixture(scope="module")
def made(trained, phantom_dir, tmp_path_factory):
    """Evaluate and package the phantom's weights by the command; return the folder that holds both."""
    folder = tmp_path_factory.mktemp("packages")
    weights = shutil.copytree(trained, folder / "trained")
    shutil.copytree(trained, weights / "coarse")
    bundle(
        "evaluating", *overlays("train", "evaluate"), "--dataset_dir", phantom_dir, "--ckpt_dir", weights,
        "--output_dir", folder / "eval", "--num_workers", 0,
    )  # fmt: skip
    done = python_m(
        "scripts", "package", "--ckpt_dir", weights, "--scores", folder / "eval", "--dataset_dir", phantom_dir,
        "--output_dir", folder / "made",
    )  # fmt: skip
    assert str(folder / "made" / NAME) in done.stdout
    return folder


def test_coarse_weights_come_along(made):
    models = made / "made" / NAME / "models"
    assert sorted(path.name for path in (models / "coarse").iterdir()) == ["SHA256SUMS", "model.json", "model.pt"]
    assert (models / "coarse/model.pt").read_bytes() == (models / "model.pt").read_bytes()


def alone(*command: str, cwd) -> str:
    """Run Python without this clone on any path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_monai_s_checks_and_export_pass_with_nothing_else_on_the_path(made, tmp_path):
    root = shutil.copytree(made / "made" / NAME, tmp_path / NAME)
    code = """
import sys
from monai.bundle import ckpt_export, verify_net_in_out, verify_metadata
files = dict(meta_file="configs/metadata.json", config_file="configs/inference.json")
if sys.argv[1]:
    verify_metadata(meta_file="configs/metadata.json", filepath=sys.argv[1])
verify_net_in_out(net_id="network_def", device="cpu", **files)
ckpt_export("network_def", filepath="model.ts", ckpt_file="models/model.pt", **files)
import scripts
print(scripts.__file__)
"""
    if SCHEMA.is_file():
        shutil.copy(SCHEMA, tmp_path / "schema.json")
    said = alone("-c", code, str(tmp_path / "schema.json") if SCHEMA.is_file() else "", cwd=root)
    assert said.splitlines()[-1] == str(root / "scripts/__init__.py")
    assert torch.jit.load(root / "model.ts")(torch.zeros(1, 1, 32, 32, 32)).shape == (1, 4, 32, 32, 32)


def test_the_zip_is_what_monai_downloads_and_its_masks_are_those_of_the_training(made, trained, phantom_dir, tmp_path):
    scan = str(min((phantom_dir / "imagesTs").iterdir()))
    archive = made / "made" / f"{NAME}_v0.1.0.zip"
    code = f"""
import os, sys
from monai.bundle import download, run
download("{NAME}", url="file://{archive}", bundle_dir=".")
os.chdir("{NAME}")
sys.path.insert(0, "")
run("inferring", config_file="configs/inference.json", dataset_dir="{scan}", output_dir="../alone")
"""
    alone("-c", code, cwd=tmp_path)
    bundle(
        "inferring", *overlays("inference"), "--dataset_dir", scan, "--ckpt_dir", trained,
        "--output_dir", tmp_path / "here",
    )  # fmt: skip
    one, other = (np.asarray(nib.load(next((tmp_path / name).glob("*.nii.gz"))).dataobj) for name in ("alone", "here"))
    assert np.array_equal(one, other)


def test_a_folder_that_a_killed_run_left_without_its_archive_gets_it(made, trained, tmp_path):
    root = shutil.copytree(made / "made" / NAME, tmp_path / NAME)
    (root / "docs/README.md").write_text("mine")
    leftover = tmp_path / f"{NAME}_v0.1.0.zip.{'a' * 32}.part"
    leftover.write_text("half")
    with pytest.raises(UserError, match="there already"):
        package(str(tmp_path), str(trained), name=NAME, version="0.2.0")
    package(str(tmp_path), str(trained), name=NAME)
    assert {path.name for path in tmp_path.iterdir()} == {NAME, f"{NAME}_v0.1.0.zip"}
    with zipfile.ZipFile(tmp_path / f"{NAME}_v0.1.0.zip") as archive:
        assert archive.read(f"{NAME}/docs/README.md") == b"mine"
        assert {f"{NAME}/{path.relative_to(root)}" for path in root.rglob("*")} == {
            name.rstrip("/") for name in archive.namelist()
        } - {NAME}
    with pytest.raises(UserError, match="there already"):
        package(str(tmp_path), str(trained), name=NAME)


def test_an_archive_has_no_half_written_name_that_nobody_removes(made, tmp_path, monkeypatch):
    root = shutil.copytree(made / "made" / NAME, tmp_path / NAME)
    seen = set()
    write = zipfile.ZipFile.write
    monkeypatch.setattr(zipfile.ZipFile, "write", lambda *a: (seen.update(os.listdir(tmp_path)), write(*a)))
    write_whole(tmp_path / "a.zip", lambda partial: _zip(root, partial))
    assert len(seen) == 2
    assert all(name == NAME or PARTIAL.search(name) for name in seen)


def test_it_says_what_the_training_was(made, phantom_dir):
    root = made / "made" / NAME
    metadata = json.loads((root / "configs/metadata.json").read_text())
    output = metadata["network_data_format"]["outputs"]["pred"]
    assert output["channel_def"] == {"0": "background", "1": "low", "2": "middle", "3": "high"}
    assert metadata["network_data_format"]["inputs"]["image"]["channel_def"] == {"0": "phantom"}
    mean = json.loads((made / "eval/summary.json").read_text())["summary"][-1]
    assert metadata["eval_metrics"]["mean_dice"] == pytest.approx(mean["dice"], abs=1e-4)
    page = (root / "docs/README.md").read_text()
    assert metadata["data_source"].startswith("Data set of 5 labelled cases; name: Phantom")
    assert f"| mean | 1 | {mean['dice']:.3f} |" in page
    for text in (root / "docs").rglob("*.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text.read_text()):
            assert (text.parent / link).is_file(), link
    assert (root / "docs/training.png").is_file()
    assert (root / "docs/best_median_worst.png").is_file()
    assert str(phantom_dir) not in "".join(p.read_text() for p in (root / "docs").glob("*.*") if p.suffix != ".png")
    for line in (root / "models/SHA256SUMS").read_text().splitlines():
        found, name = line.split()
        assert hashlib.sha256((root / "models" / name).read_bytes()).hexdigest() == found
    with zipfile.ZipFile(made / "made" / f"{NAME}_v0.1.0.zip") as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {NAME}
        assert not [name for name in archive.namelist() if "__pycache__" in name]


def test_post_processing_belongs_to_the_weights(trained, tmp_path):
    weights = shutil.copytree(trained, tmp_path / "trained")
    (weights / "postprocessing.json").write_text("{}")
    package(str(tmp_path), str(weights), name="mine", version="1.2.3")
    assert (tmp_path / "mine/models/postprocessing.json").read_text() == "{}"
    assert (tmp_path / "mine_v1.2.3.zip").is_file()
    assert "whoever passes this bundle on says it here" in (tmp_path / "mine/docs/README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../out"}, "name is '../out'; expected letters"),
        ({"name": "a b"}, "expected letters"),
        ({"version": "1"}, "version is '1'; expected three numbers"),
        ({"ckpt_dir": "nowhere"}, "nowhere/model.json not found; give the --ckpt_dir of a training"),
        ({"scores": "nowhere"}, "nowhere/report.html not found; give the --output_dir of an evaluation"),
        ({"name": "there"}, "there is there already; remove it"),
        ({"dataset_dir": "nowhere"}, "dataset_dir nowhere does not exist"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_packaged_is_refused_in_one_sentence(options, message, trained, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=re.escape(message)):
        package(**{"output_dir": str(tmp_path), "ckpt_dir": str(trained), "name": "mine", **options})
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_evaluation_of_other_weights_is_refused(made, trained, tmp_path):
    weights = shutil.copytree(trained, tmp_path / "other")
    state = torch.load(weights / "model.pt", weights_only=True)
    torch.save({name: value * 2 for name, value in state.items()}, weights / "model.pt")
    settings = json.loads((weights / "model.json").read_text())
    settings["sha256"] = hashlib.sha256((weights / "model.pt").read_bytes()).hexdigest()
    (weights / "model.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"report.html is of other weights than .*/other/model.pt"):
        package(str(tmp_path), str(weights), scores=str(made / "eval"))


KINDS = {
    "labels with gaps": {"labels": ["background", "a", "b"], "label_values": [0, 1, 4], "out_channels": 3},
    "regions": {
        "labels": ["whole", "core"], "label_values": [0, 1, 2], "regions": {"whole": [1, 2], "core": [2]},
        "regions_class_order": [1, 2], "out_channels": 2,
    },
    "no names": {"out_channels": 3, "in_channels": 2},
    "names that MONAI would evaluate": {
        "labels": ["background", "$__import__('os')", "@network", "%x"], "label_values": [0, 1, 2, 3],
        "channels": ["$1/0"],
    },
    "2D and CT": {
        "dim": "2d", "patch_size": [64, 64, 1],
        "intensity": [{"clip": [-100, 200], "mean": 50.0, "std": 30.0}, "zscore"],
        "in_channels": 2, "channels": ["CT", "PET"], "fold": "all",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_of_every_kind_of_weights_follow_the_schema(kind):
    model = ModelSettings(**KINDS[kind])
    metadata = make_metadata(model, "name", "0.1.0", "data", "authors", "licence", {"mean_dice": 0.5})
    output = metadata["network_data_format"]["outputs"]["pred"]
    assert output["num_channels"] == model.out_channels
    assert [int(value) for value in output["channel_def"]] == list(mask_classes(model))
    assert not [text for text in output["channel_def"].values() if text[0] in "$@%"]
    if SCHEMA.is_file():
        jsonschema = pytest.importorskip("jsonschema")
        jsonschema.validate(metadata, json.loads(SCHEMA.read_text()))


def test_regions_are_named_by_the_values_that_are_written():
    assert mask_classes(ModelSettings(**KINDS["regions"])) == {0: "background", 1: "whole", 2: "core"}
    assert mask_classes(ModelSettings(**KINDS["labels with gaps"])) == {0: "background", 1: "a", 4: "b"}


@pytest.mark.parametrize("text", ["a|b", "x\n# head", "<b>", "[l](http://x)", "`code`", "**bold**", "a\r\n|b"])
def test_text_of_a_data_set_stays_text_in_the_card(text):
    found = plain_markdown(text)
    assert "\n" not in found
    assert not re.search(r"(?<!\\)[|<>*`\[\]]", found)
