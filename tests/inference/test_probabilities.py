"""Saved probabilities are on the scan's grid, read as nnU-Net's are, in bounded memory; their mean makes masks."""

from __future__ import annotations

import json
import shlex
import shutil
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import GRIDS, ROOT, bundle, files_end_at, grid, python_m, save, world
from monai.data import MetaTensor

from scripts.data.labels import Labels
from scripts.inference.ensemble_probabilities import ensemble_probabilities
from scripts.inference.export import MaskLayout
from scripts.inference.predictor import Predictor
from scripts.inference.probabilities import ProbabilityFile, SaveProbabilitiesd, on_scan_grid, write_probabilities
from scripts.inference.sliding_window import SlidingWindowInferer
from scripts.inference.window_results import Storage
from scripts.utils.errors import UserError

THREE = Labels(["background", "liver", "spleen"], [0, 1, 4])
REGIONS = Labels(["all", "core"], [0, 1, 2], {"all": [1, 2], "core": [2]}, [1, 2])


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for kind in GRIDS[:1] + GRIDS[3:]:
        shape, affine = grid(kind)
        save(folder / f"{kind}.nii.gz", (np.sin(world(shape, affine) / 4).sum(axis=-1) * 300).astype(np.int16), affine)
    return folder


def segment(trained, scans, output, *options):
    done = bundle(
        "--config_file", "configs/inference.json", "--dataset_dir", scans, "--ckpt_dir", trained,
        "--output_dir", output, "--num_workers", 0, "--spacing", [2.0, 2.0, 2.0],
        "--patch_size", [32, 16, 16], *options,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def saved(trained, scans, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    segment(trained, scans, folder, "--save_probabilities", True)
    return folder


def mask_of(folder, case):
    return np.asanyarray(nib.load(folder / f"{case}_seg.nii.gz").dataobj)


def test_masks_are_those_of_a_run_without_and_their_maker_the_same(trained, scans, saved, tmp_path):
    segment(trained, scans, tmp_path)
    makers = [json.loads((folder / "masks.json").read_text())["made_by"].keys() for folder in (saved, tmp_path)]
    assert makers[0] == makers[1]
    for scan in scans.iterdir():
        case = scan.name.removesuffix(".nii.gz")
        assert (mask_of(saved, case) == mask_of(tmp_path, case)).all()
    assert not list(tmp_path.glob("*.npz"))
    assert "3 of 3 scans have masks" in segment(trained, scans, saved, "--skip_existing", True)
    again = segment(trained, scans, tmp_path, "--skip_existing", True, "--save_probabilities", True)
    assert "0 of 3 scans have masks" in again  # the probabilities are missing
    assert len(list(tmp_path.glob("*.npz"))) == 3


def test_they_lie_on_the_scan_as_nnu_net_has_them(saved, scans):
    for scan in scans.iterdir():
        case = scan.name.removesuffix(".nii.gz")
        with np.load(saved / f"{case}.npz") as found:
            probabilities, affine = found["probabilities"], found["affine"]
        image = nib.load(scan)
        assert probabilities.dtype == np.float16
        assert probabilities.shape == (len(probabilities), *image.shape[::-1])
        np.testing.assert_allclose(affine, image.affine, atol=1e-6)
        np.testing.assert_allclose(probabilities.astype(float).sum(axis=0), 1, atol=3e-3)
        mask, best = mask_of(saved, case), probabilities.argmax(axis=0).T
        ordered = np.sort(probabilities, axis=0)
        sure = (ordered[-1] > ordered[-2]).T  # half precision cannot tell the others apart
        assert sure.mean() > 0.95
        assert (mask == best)[sure].all()


def test_python_gives_what_the_command_writes(trained, saved, scans):
    predictor = Predictor.load(trained / "model.pt", spacing=[2.0, 2.0, 2.0], patch_size=[32, 16, 16])
    scan = next(scans.glob("oblique*"))
    found = predictor.probabilities(scan)
    with np.load(saved / "oblique.npz") as written:
        np.testing.assert_array_equal(found, written["probabilities"].transpose(0, 3, 2, 1))
    assert found.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(predictor(scan), mask_of(saved, "oblique"))  # labels are kept as before


def image_of(shape, offset=0.0):
    """Return an image of a network's grid that is half as fine as its scan's, or shifted against it."""
    scan = np.diag([1.0, 1.0, 1.0, 1.0])
    affine = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64))
    affine[:3, 3] = 0.5 + offset
    meta = {"original_affine": scan, "spatial_shape": np.array([2 * n for n in shape]), "case": "a"}
    return MetaTensor(torch.zeros(1, *shape), affine=affine, meta={**meta, "filename_or_obj": "a.nii.gz"})


@pytest.mark.parametrize(("labels", "outside"), [(THREE, [1, 0, 0]), (REGIONS, [0, 0])])
def test_few_classes_at_a_time_are_those_of_all_at_once_and_background_is_outside(labels, outside):
    scores = torch.rand(len(labels.names), 5, 6, 7)
    image = image_of((5, 6, 7), offset=4.0)
    (whole,) = on_scan_grid(scores, image, labels)
    parts = list(on_scan_grid(scores, image, labels, at_once=1))
    assert len(parts) == len(scores)
    assert torch.equal(torch.cat(parts), whole)
    assert whole[:, 0, 0, 0].tolist() == outside  # 4 mm before the network's grid
    assert whole.shape == (len(scores), 10, 12, 14)


@pytest.mark.parametrize("classes", [2, 40])
def test_memory_does_not_grow_with_the_classes(classes, tmp_path, monkeypatch):
    """Large scores are in a file, and what is written was in RAM for a few classes."""
    monkeypatch.setattr("scripts.inference.probabilities.AT_ONCE", 2 * 64**3)
    made = []
    kept = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: made.append(shape) or kept(*shape, **options))
    labels = Labels([f"{i}" for i in range(classes)], list(range(classes)))
    scores = torch.rand(classes, 32, 32, 32)
    SaveProbabilitiesd("pred", MaskLayout(str(tmp_path)), labels)({"pred": scores, "image": image_of((32, 32, 32))})
    assert max(np.prod(shape[0]) for shape in made) <= 2 * 64**3
    found = ProbabilityFile(tmp_path / "a.npz")
    volumes = list(found.volumes())
    assert len(volumes) == classes
    assert found.scan.endswith("/a.nii.gz")
    assert found.labels == labels
    (whole,) = on_scan_grid(scores, image_of((32, 32, 32)), labels)
    np.testing.assert_array_equal(np.stack(volumes).transpose(0, 3, 2, 1), whole.numpy())


def test_large_scores_are_in_a_file_without_a_name_and_the_same(tmp_path):
    inferer = SlidingWindowInferer([16, 16, 16], activation="softmax", labels_early=True, full_precision_gb=0)
    network = torch.nn.Conv3d(1, 3, 3, padding=1)
    image = torch.rand(1, 1, 20, 24, 28)
    with torch.inference_mode():
        expected, found = inferer(image, network), inferer.keeping_scores(str(tmp_path))(image, network)
        assert torch.equal(found, inferer.keeping_scores()(image, network))
    assert torch.equal(found, expected)
    assert inferer.labels_early
    assert list(tmp_path.iterdir()) == []
    storage = Storage(image, (3, 20, 24, 28), 0, str(tmp_path)).empty((3, 20, 24, 28))
    assert (storage.dtype, float(storage.abs().max())) == (torch.float16, 0.0)


def test_no_room_for_them_is_said_before(tmp_path):
    with files_end_at(9_000), pytest.raises(UserError, match="could not be written"):
        Storage(torch.zeros(1), (3, 20, 24, 28), 0, str(tmp_path)).empty((3, 20, 24, 28))


def write(path, values, labels=THREE, affine=None, scan="gone.nii.gz"):
    """Write probabilities (classes, X, Y, Z) of a scan that is gone."""
    volumes = torch.as_tensor(values, dtype=torch.float16)
    about = {"scan": str(scan), "labels": json.loads(json.dumps(labels.__dict__))}
    write_probabilities(path, tuple(volumes.shape), np.eye(4) if affine is None else affine, about, iter([volumes]))


@pytest.mark.parametrize("labels", [THREE, REGIONS])
@pytest.mark.parametrize("count", [2, 3])
def test_an_ensemble_is_the_mean_of_probabilities(labels, count, tmp_path):
    rng = np.random.default_rng(0)
    members = rng.random((count, len(labels.names), 4, 5, 6)).astype(np.float16)
    for number, values in enumerate(members):
        for case in ("a", "b.c"):
            write(tmp_path / str(number) / f"{case}.npz", values, labels, np.diag([2, 1, 3, 1.0]))
    folders = [str(tmp_path / str(number)) for number in range(count)]
    ensemble_probabilities(folders, str(tmp_path / "out"))
    mean = members.astype(np.float32).mean(axis=0)
    expected = np.array(labels.values)[mean.argmax(axis=0)]
    if labels is REGIONS:
        expected = np.where(mean[1] > 0.5, 2, np.where(mean[0] > 0.5, 1, 0))
    for case in ("a", "b.c"):
        image = nib.load(tmp_path / f"out/{case}_seg.nii.gz")
        np.testing.assert_array_equal(np.asanyarray(image.dataobj), expected)
        np.testing.assert_allclose(image.affine, np.diag([2, 1, 3, 1.0]))
        assert image.get_data_dtype() == np.uint8


@pytest.mark.parametrize("labels", [THREE, REGIONS])
def test_a_decision_keeps_the_largest_component_of_the_mean(labels, tmp_path):
    values = np.zeros((len(labels.names), 8, 1, 1), np.float16)
    values[-1, [0, 1, 2, 5]] = 0.9  # the last label, in two parts
    for name in ("one", "other"):
        write(tmp_path / f"{name}/a.npz", values, labels)
    decision = {"labels": labels.names, "steps": {"last": [len(labels.values) - 1]}}
    (tmp_path / "postprocessing.json").write_text(json.dumps(decision))
    folders, last = [str(tmp_path / "one"), str(tmp_path / "other")], labels.values[-1]
    for file, kept in ((tmp_path / "postprocessing.json", [0, 1, 2]), ("none", [0, 1, 2, 5])):
        ensemble_probabilities(folders, str(tmp_path / "out"), postprocessing_file=str(file))
        assert np.flatnonzero(mask_of(tmp_path / "out", "a") == last).tolist() == kept
    (tmp_path / "postprocessing.json").write_text(json.dumps({**decision, "labels": ["other"]}))
    with pytest.raises(UserError, match="was decided for the labels .*other"):
        ensemble_probabilities(
            folders, str(tmp_path / "out"), postprocessing_file=str(tmp_path / "postprocessing.json")
        )


def test_the_command_makes_masks_with_their_scans_header(saved, scans, tmp_path):
    shutil.copytree(saved, tmp_path / "other")
    python_m(
        "scripts", "ensemble_probabilities", "--folders", str([str(saved), str(tmp_path / "other")]),
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert len(list((tmp_path / "out").iterdir())) == 3
    for scan in scans.iterdir():
        case = scan.name.removesuffix(".nii.gz")
        mask = nib.load(tmp_path / f"out/{case}_seg.nii.gz")
        assert (np.asanyarray(mask.dataobj) == mask_of(saved, case)).mean() > 0.95  # but for ties in half precision
        np.testing.assert_array_equal(mask.header.get_sform(), nib.load(scan).header.get_sform())


def test_the_commands_of_the_page_run(trained, scans, tmp_path):
    text = (ROOT / "docs/how-to/probabilities.md").read_text().replace("\\\n", " ").replace("/path/to", str(tmp_path))
    segmenting, averaging = (shlex.split(line)[2:] for line in text.splitlines() if line.startswith("python "))
    shutil.copytree(scans, tmp_path / "scans")
    for folder in ("one", "other"):
        words = [word.replace("/one", f"/{folder}") for word in segmenting]
        python_m(*words, "--ckpt_dir", trained, "--num_workers", 0, "--patch_size", [32, 32, 32])
    python_m(*averaging)
    assert len(list((tmp_path / "ensemble").glob("*_seg.nii.gz"))) == 3


def refused_missing(one, other):
    write(other / "b.npz", np.zeros((3, 2, 2, 2)))
    return f"{one} has no b.npz"


def refused_labels(one, other):
    write(other / "a.npz", np.zeros((3, 2, 2, 2)), Labels(["background", "liver", "tumor"], [0, 1, 4]))
    return "a.npz has the labels .*tumor.* expected probabilities of one scan"


def refused_shape(one, other):
    write(other / "a.npz", np.zeros((3, 2, 2, 3)))
    return r"a.npz has the shape \(3, 3, 2, 2\)"


def refused_affine(one, other):
    write(other / "a.npz", np.zeros((3, 2, 2, 2)), affine=np.diag([1, 1, 2.0, 1]))
    return "a.npz has the affine"


def refused_truncated(one, other):
    content = (other / "a.npz").read_bytes()
    (other / "a.npz").write_bytes(content[: len(content) // 2])
    return "a.npz is no whole file of probabilities"


def refused_flipped(one, other):
    write(other / "a.npz", np.random.default_rng(0).random((3, 16, 16, 16)))
    write(one / "a.npz", np.random.default_rng(0).random((3, 16, 16, 16)))
    with zipfile.ZipFile(other / "a.npz") as archive:
        at = archive.getinfo("probabilities.npy").header_offset + 2000
    content = bytearray((other / "a.npz").read_bytes())
    content[at] ^= 16
    (other / "a.npz").write_bytes(content)
    return "a.npz is no whole file of probabilities"


def refused_of_nnu_net(one, other):
    np.savez_compressed(other / "a.npz", probabilities=np.zeros((3, 2, 2, 2), np.float32))
    return "a.npz is no whole file of probabilities .*about"


def refused_no_zip(one, other):
    (other / "a.npz").write_bytes(b"")
    return "a.npz is no whole file of probabilities"


def refused_pickle(one, other):
    np.savez(other / "a.npz", probabilities=np.zeros(3), about=np.array([{}], dtype=object), affine=np.eye(4))
    return "a.npz is no whole file of probabilities"


@pytest.mark.parametrize("fault", [value for name, value in list(globals().items()) if name.startswith("refused_")])
def test_what_is_not_one_scan_by_one_kind_of_network_is_refused(fault, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        write(folder / "a.npz", np.zeros((3, 2, 2, 2)))
    said = fault(one, other)
    with pytest.raises(UserError, match=said):
        ensemble_probabilities([str(one), str(other)], str(tmp_path / "out"))


@pytest.mark.parametrize("folders", [[], ["one"], 3, "one"])
def test_fewer_than_two_folders_are_refused(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="folders is .*; expected"):
        ensemble_probabilities(folders)
