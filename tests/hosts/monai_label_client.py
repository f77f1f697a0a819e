"""What 3D Slicer and OHIF ask of a MONAI Label server, by REST; the masks are compared with the command's.

Arguments: the server's address, the model's name, the data set, and the bundle that the server has.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import requests


def main(server: str, name: str, dataset: str, bundle: str) -> None:
    """Infer, train and infer again; end with an assertion where anything is not as it should be."""
    print(", ".join(f"{package} {version(package)}" for package in ("monailabel", "monai", "torch", "numpy")))
    info = when_ready(server)
    model, settings = info["models"][name], written(bundle)
    print(f"/info: labels {model['labels']}, options {sorted(model['config'])}")
    classes = zip(settings["labels"], settings["label_values"], strict=True)
    assert model["labels"] == {label.lower(): value for label, value in classes if value}
    scans = sorted(Path(dataset, "imagesTr").glob("*.nii.gz"))
    compare(server, name, bundle, scans[0])
    compare(server, name, bundle, scans[0], tta=True, overlap=0.25)
    for scan in scans:
        with open(Path(dataset, "labelsTr", scan.name), "rb") as label:
            sent = requests.put(
                f"{server}/datastore/label", {"image": scan.name[:-7], "tag": "final"}, files={"label": label},
                params={"image": scan.name[:-7], "tag": "final"}, timeout=60,
            )  # fmt: skip
        sent.raise_for_status()
    started = time.monotonic()
    request = {"device": "cpu", "max_epochs": 2, "run_id": "run"}
    done = requests.post(f"{server}/train/{name}", json=request, params={"run_sync": True}, timeout=3600)
    print(f"/train: {done.status_code}, {time.monotonic() - started:.0f} s")
    done.raise_for_status()
    now = written(bundle)
    kept = ("labels", "label_values", "in_channels", "channels", "patch_size", "spacing", "iterations", "batch_size")
    assert {key: now[key] for key in kept} == {key: settings[key] for key in kept}
    assert now["sha256"] != settings["sha256"]
    assert not Path(bundle, "phantom").exists()
    with open(Path(bundle, "models/training/progress.csv"), newline="") as file:
        rates = [float(row["train/learning_rate"]) for row in csv.DictReader(file)]
    assert np.allclose(rates, [1e-3, 1e-3 * 0.5**0.9])
    print(f"trained {len(rates)} epochs, learning rates {rates}, validation Dice {now.get('dice')}")
    compare(server, name, bundle, scans[0])


def when_ready(server: str) -> dict:
    """Wait for the server, up to five minutes, and return what it says of itself."""
    for _ in range(300):
        try:
            return requests.get(f"{server}/info/", timeout=60).json()
        except requests.ConnectionError:
            time.sleep(1)
    raise SystemExit("the server does not answer")


def written(bundle: str) -> dict:
    """Read what is written beside the weights that the server has."""
    return json.loads(Path(bundle, "models/model.json").read_text())


def compare(server: str, name: str, bundle: str, scan: Path, **options: object) -> None:
    """Count the voxels in which the server's mask of a scan differs from the command's."""
    request = {"params": json.dumps({"device": "cpu", **options})}
    started = time.monotonic()
    answer = requests.post(
        f"{server}/infer/{name}", request, params={"image": scan.name[:-7], "output": "image"}, timeout=600
    )
    seconds = time.monotonic() - started
    answer.raise_for_status()
    with tempfile.TemporaryDirectory() as folder:
        served = Path(folder, "served.nii.gz")
        served.write_bytes(answer.content)
        settings = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        command = ["run", "inferring", "--config_file", "configs/inference.json", "--dataset_dir", str(scan)]
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "monai.bundle", *command, "--output_dir", folder, *settings],
            cwd=bundle, check=True, capture_output=True,
        )  # fmt: skip
        one, other = (nib.load(path) for path in (served, next(Path(folder).glob("*_seg.nii.gz"))))
        masks = [np.asarray(image.dataobj) for image in (one, other)]
    different = int((masks[0] != masks[1]).sum())
    print(f"/infer {options or ''}: {seconds:.1f} s, values {np.unique(masks[0])}, {different} voxels differ")
    assert not different
    assert np.allclose(one.affine, other.affine)


if __name__ == "__main__":
    main(*sys.argv[1:])
