"""A training of one's own as a bundle of its own: the code, its weights, and what is true of these."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

from ..data.datasets import Dataset
from ..evaluation.tables import read_summary
from ..mednext import create_mednext
from ..utils.errors import UserError
from ..utils.files import check_writable, remembered, sha256, write_folder_whole, write_whole
from ..weights.checkpoints import check_weights
from ..weights.model_settings import (
    BUNDLE_ROOT,
    ModelSettings,
    load_model_settings,
    read_model_settings,
    settings_file,
)
from .metadata import make_metadata
from .model_card import write_card

CODE = ("configs", "scripts", "LICENSE", "requirements.txt", "large_files.yml")
SETTINGS = "docs/reference/settings.md"
LINK = re.compile(r"\[([^\]]*)\]\(\.\./[^)]*\)")  # to a page that stays behind
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
VERSION = re.compile(r"\d+\.\d+\.\d+")
UNKNOWN = "Not stated; whoever passes this bundle on says it here."
STATEMENT = ("name", "description", "reference", "licence", "license", "release")  # of dataset.json


def package(
    output_dir: str,
    ckpt_dir: str = "models",
    scores: str | None = None,
    dataset_dir: str | None = None,
    name: str | None = None,
    version: str = "0.1.0",
    authors: str = UNKNOWN,
    data_source: str | None = None,
    licence: str = f"The licence of the weights: {UNKNOWN[0].lower()}{UNKNOWN[1:]}",
) -> None:
    """Make a bundle of weights and of this bundle's code, as the folder NAME and as NAME_vVERSION.zip in `output_dir`.

    Args:
        output_dir: folder to make both in.
        ckpt_dir: folder of the training, with `model.pt` and `model.json`; `postprocessing.json` and the training's
            picture are taken, too, where they are there.
        scores: folder of an evaluation of these weights, its `output_dir`, for the tables of the model card.
        dataset_dir: what the weights were trained on, for the data statement, the name, and pictures of the cases that
            the evaluation scored.
        name: of the bundle.
        version: of the bundle.
        authors: of the weights.
        data_source: says what the weights were trained on; by default dataset.json's own words.
        licence: of the weights, in a sentence.

    Raises:
        UserError: no weights with settings, an evaluation of others, a name or version that no bundle can have, or one
            that is there already.
    """
    check_writable(output_dir)
    weights = Path(ckpt_dir, "model.pt")
    model = _checked(weights)
    data = Dataset(dataset_dir) if dataset_dir else None
    name = str(name or _default_name(data))
    target, archive = _places(Path(output_dir), name, str(version), weights)
    _check_scores(scores, weights)
    trained = {k: v for k, v in read_model_settings(weights).items() if k not in model.as_dict()}
    metadata = make_metadata(
        model, name, str(version), data_source or _statement(data), authors, licence, _means(scores, trained)
    )

    def fill(folder: Path) -> None:
        _copy_code(folder)
        _copy_weights(weights, folder / "models")
        _copy_documents(Path(ckpt_dir), scores, folder / "docs")
        text = json.dumps(metadata, indent=4, ensure_ascii=False) + "\n"
        (folder / "configs/metadata.json").write_text(text, encoding="utf-8")
        (folder / "docs/data_license.txt").write_text(f"{licence}\n{metadata['data_source']}\n", encoding="utf-8")
        write_card(folder / "docs/README.md", metadata, model, trained, scores, dataset_dir)

    if not target.exists():
        write_folder_whole(target, fill)
    write_whole(archive, lambda partial: _zip(target, partial))
    print(f"made {target} and {archive}")
    print(f"its page is {target / 'docs/README.md'}; whose it is, its data and its licence are yours to say there")


def _zip(folder: Path, partial: Path) -> None:
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (folder, *sorted(folder.rglob("*"))):
            archive.write(path, path.relative_to(folder.parent))


def _checked(weights: Path) -> ModelSettings:
    """Read the settings of weights whose network can be built by them."""
    if not settings_file(weights).is_file():
        raise UserError(
            f"{settings_file(weights)} not found; give the --ckpt_dir of a training, with model.pt and model.json."
        )
    model = load_model_settings(weights)
    check_weights(
        weights,
        create_mednext(
            num_input_channels=model.in_channels,
            num_classes=model.out_channels,
            model_id=model.size,
            kernel_size=model.kernel_size,
            dim=model.dim,
            deep_supervision=model.deep_supervision,
        ),
    )
    return model


def _default_name(data: Dataset | None) -> str:
    """Name a bundle by its data set, as the model zoo does: lower case, and what it is for."""
    about = re.sub(r"[^a-z0-9]+", "_", data.folder.resolve().name.lower()).strip("_") if data else ""
    return f"mednext_{about}_segmentation" if about else "mednext_segmentation"


def _places(folder: Path, name: str, version: str, weights: Path) -> tuple[Path, Path]:
    """Name the folder and the archive; a killed run may have left a folder of these weights without its archive.

    Raises:
        UserError: they cannot have that name or version, or are there already.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"name is {name!r}; expected letters, digits, - and _, for example mednext_liver_segmentation.")
    if not VERSION.fullmatch(version):
        raise UserError(f"version is {version!r}; expected three numbers, for example 0.1.0.")
    target, archive = folder / name, folder / f"{name}_v{version}.zip"
    packed, same = target / "models/model.pt", remembered(target / "configs/metadata.json").get("version") == version
    begun = same and not archive.exists() and packed.is_file() and sha256(packed) == sha256(weights)
    for path in (target, archive):
        if path.exists() and not begun:
            raise UserError(f"{path} is there already; remove it, or give another --name, --version or --output_dir.")
    return target, archive


def _check_scores(scores: str | None, weights: Path) -> None:
    """Refuse the evaluation of other weights; its report names those that it scored."""
    if scores is None:
        return
    report = Path(scores, "report.html")
    if not report.is_file():
        raise UserError(f"{report} not found; give the --output_dir of an evaluation of {weights}.")
    if sha256(weights) not in report.read_text(encoding="utf-8"):
        raise UserError(f"{report} is of other weights than {weights}; evaluate these, and give that --output_dir.")


def _means(scores: str | None, trained: dict) -> dict[str, float]:
    """Give the mean scores of an evaluation, or the Dice that the training measured."""
    if scores is None:
        return {"mean_dice": trained["dice"]} if "dice" in trained else {}
    mean = read_summary(scores, "summary")[-1]
    return {f"mean_{k}": round(mean[k], 4) for k in ("dice", "nsd", "hd95_mm") if isinstance(mean[k], int | float)}


def _statement(data: Dataset | None) -> str:
    """Say what dataset.json says of the data."""
    if data is None:
        return f"Data: {UNKNOWN}"
    said = [f"{key}: {data.description[key]}" for key in STATEMENT if str(data.description.get(key, "")).strip()]
    return f"Data set of {len(data.cases)} labelled cases; {'; '.join(said) or UNKNOWN}"


def _copy_code(target: Path) -> None:
    passing = shutil.ignore_patterns("__pycache__", "monailabel_train.json")
    for part in CODE:
        source, copy = Path(BUNDLE_ROOT, part), target / part
        if source.is_dir():
            shutil.copytree(source, copy, ignore=passing)
        elif source.is_file():
            shutil.copyfile(source, copy)


def _copy_weights(weights: Path, models: Path) -> None:
    models.mkdir(parents=True)
    files = [weights, settings_file(weights), weights.with_name("postprocessing.json")]
    copies = [Path(shutil.copyfile(file, models / file.name)) for file in files if file.is_file()]
    if (coarse := weights.with_name("coarse") / weights.name).is_file():  # which --fast takes
        _copy_weights(coarse, models / "coarse")
    (models / "SHA256SUMS").write_text("".join(f"{sha256(copy)}  {copy.name}\n" for copy in copies))


def _copy_documents(trained: Path, scores: str | None, docs: Path) -> None:
    settings = docs.parent / SETTINGS
    settings.parent.mkdir(parents=True)
    settings.write_text(LINK.sub(r"\1", Path(BUNDLE_ROOT, SETTINGS).read_text(encoding="utf-8")), encoding="utf-8")
    found = {trained / "training/progress.png": "training.png"}
    if scores is not None:
        found |= {Path(scores, "cases.csv"): "cases.csv"}
    for source, name in found.items():
        if source.is_file():
            shutil.copyfile(source, docs / name)
