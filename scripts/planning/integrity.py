"""A data set as a whole: what nobody sees in one case. One function a check; `run checking` prints what they find."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from ..data.checks import warn_of_small_scans
from ..data.datasets import channel_names, dataset_json, image_files, listed_cases, missing_files, scan_files
from ..data.labels import index_names
from ..data.labels import read as read_labels
from ..utils.errors import UserError
from .fingerprint import survey

logger = logging.getLogger("mednext")

FAR = 6.0  # robust standard deviations; a normal distribution passes it once in a billion
SPACING_RATIO = 3.0  # of a case to the median, where a wrong header is likelier than another protocol


class Finding(NamedTuple):
    """Something a person should know: "error" stops a training, "warning" does not."""

    severity: str
    case: str
    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}"


def _warning(record: dict, message: str) -> Finding:
    return Finding("warning", record["case"], record["file"], f"{record['file']} {message}")


def duplicates(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """The same voxels under two names end up on both sides of a fold."""
    seen = {}
    for record in records:
        first = seen.setdefault(record["digest"], record)
        if first is not record:
            yield _warning(record, f"has the voxels of {first['file']}; remove one of the two cases.")


def orientations(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """Orientations are handled, but a rare one is often a wrong header."""
    counts = Counter(record["orientation"] for record in records)
    usual = counts.most_common(1)[0][0] if counts else ""
    for record in records:
        if record["orientation"] != usual and counts[record["orientation"]] < 0.1 * len(records):
            yield _warning(
                record,
                f"is stored as {record['orientation']}, {counts[usual]} of {len(records)} cases as {usual};"
                " look whether its header is right.",
            )


def without_foreground(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """A case without any label teaches background only; often its label file is the wrong one."""
    for record in records:
        if not sum(record["labels"][1 : len(labels)]):
            yield _warning(record, "has no labelled voxel; look whether that is meant.")


def absent_labels(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """A label that dataset.json names and no case has cannot be learnt."""
    for value, name in enumerate(labels):
        if records and not any(record["labels"][value] for record in records):
            message = (
                f"label {value} ({name}) is in none of the {len(records)} cases; correct dataset.json or the labels."
            )
            yield Finding("warning", "", "dataset.json", message)


def spacings(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """Voxels a multiple larger or smaller than usual."""
    if not records:
        return
    usual = np.median([sorted(record["spacing"]) for record in records], axis=0)
    for record in records:
        ratio = np.array(sorted(record["spacing"])) / usual
        if ratio.max() > SPACING_RATIO or ratio.min() < 1 / SPACING_RATIO:
            yield _warning(
                record,
                f"has {_mm(record['spacing'])} voxels, the median case {_mm(usual)}; look whether its header is right.",
            )


def single_slices(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """2D images in 3D files train a 3D network on one plane."""
    for record in records:
        if min(record["shape"]) == 1:
            yield _warning(record, f"is a single slice of {record['shape']} voxels; a 3D network sees one plane of it.")


def intensities(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """Means far from those of the other cases: another unit, another modality, an empty scan."""
    for channel in range(len(records[0]["channels"]) if records else 0):
        found = [(record, record["channels"][channel]) for record in records]
        for record, moments in found:
            if moments is None:
                yield _warning(record, f"is zero everywhere in channel {channel}; export it again.")
        means = np.array([moments["mean"] for _, moments in found if moments])
        if len(means) < 5:
            continue
        usual = np.median(means)
        spread = 1.4826 * np.median(np.abs(means - usual))  # the standard deviation of a normal distribution
        for record, moments in found:
            if moments and spread and abs(moments["mean"] - usual) > FAR * spread:
                yield _warning(
                    record,
                    f"has a mean intensity of {moments['mean']:.4g} in channel {channel}, the median case {usual:.4g};"
                    " look whether it has the unit and the modality of the others.",
                )


REVIEWS: tuple[Callable[[Sequence[dict], Sequence[str]], Iterator[Finding]], ...] = (
    duplicates,
    orientations,
    without_foreground,
    absent_labels,
    spacings,
    single_slices,
    intensities,
)


def absent_files(items: Sequence[dict]) -> Iterator[Finding]:
    """Every file that a case lacks, not the first one alone."""
    for case in items:
        for path in missing_files(case):
            yield Finding("error", case["case"], path, f"{path} not found; add it or remove case {case['case']}.")


def unlisted(dataset_dir: str, items: Sequence[dict]) -> Iterator[Finding]:
    """Files in the training folders that no case uses, and another number of cases than dataset.json says."""
    folder = Path(dataset_dir)
    used = {Path(file).resolve() for case in items for file in (*image_files(case), case["label"])}
    for file in [file for name in ("imagesTr", "labelsTr") for file in scan_files(folder / name)]:
        if file.resolve() not in used:
            yield Finding(
                "warning", "", str(file), f"{file} belongs to no case of dataset.json; add it there or remove it."
            )
    said = dataset_json(dataset_dir).get("numTraining")
    if said not in (None, len(items)):
        message = f'{folder / "dataset.json"} says "numTraining" {said}, the folder has {len(items)} cases; correct it.'
        yield Finding("warning", "", "dataset.json", message)
    if len(items) < 2:
        message = f"{folder} has {len(items)} labelled cases; expected at least 2, to train and to validate."
        yield Finding("error", "", "dataset.json", message)


def review(dataset_dir: str, memory: str) -> list[Finding]:
    """All findings about a data set, errors first.

    Args:
        dataset_dir: a Decathlon or nnU-Net v2 folder.
        memory: JSON file that remembers what was read, see survey.py.

    Raises:
        UserError: the folder or its dataset.json cannot be used at all.
    """
    items, labels = listed_cases(dataset_dir), read_labels(dataset_dir)
    absent = list(absent_files(items))
    lacking = {finding.case for finding in absent}
    complete = [case for case in items if case["case"] not in lacking]
    records = survey(complete, len(channel_names(dataset_dir)), labels.values, memory, labels.ignore)
    faults = [Finding("error", r["case"], r["file"], r["error"]) for r in records if "error" in r]
    usable, names = [record for record in records if "error" not in record], index_names(labels)
    noted = [*unlisted(dataset_dir, items), *(finding for check in REVIEWS for finding in check(usable, names))]
    return sorted([*absent, *faults, *noted], key=lambda finding: finding.severity)


def checking(dataset_dir: str, output_dir: str, memory: str) -> None:
    """Prints all findings and writes them to `check.json` in `output_dir`.

    Raises:
        UserError: a training could not use the data set as it is.
    """
    findings = review(dataset_dir, memory)
    for finding in findings:
        print(finding)
    path = Path(output_dir) / "check.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([finding._asdict() for finding in findings], indent=2) + "\n")
    errors = sum(finding.severity == "error" for finding in findings)
    print(f"{errors} errors, {len(findings) - errors} warnings; also in {path}")
    if errors:
        raise UserError(f"{errors} errors in {dataset_dir} keep it from being trained on; mend them as said above.")


def check_cases(
    items: Sequence[dict],
    channels: int,
    values: Sequence[int],
    patch_size: Sequence[int],
    spacing: Sequence[float],
    memory: str,
    ignore: int | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Stops a training that cannot end well, and warns of what is odd; cases that are known are not read again.

    On the first process alone.

    Args:
        items: cases with "image" and "label"; with fold "all" each comes twice, and counts once.
        channels: image channels that dataset.json names.
        values: of the labels that dataset.json names, background first.
        patch_size: training patch in voxels; scans smaller than it are padded, which a warning mentions.
        spacing: training grid in mm.
        memory: JSON file that remembers what was read.
        ignore: value of voxels that nobody annotated, or None.
        names: of the labels by index, to review the cases as a whole; None leaves that out.

    Raises:
        UserError: one sentence for each bad case.
    """
    if not dist.is_initialized() or dist.get_rank() == 0:
        items = list({case["case"]: case for case in items}.values())
        records = survey(items, channels, values, memory, ignore)
        faults = [record["error"] for record in records if "error" in record]
        if len(faults) == 1:
            raise UserError(faults[0])
        if faults:
            raise UserError(f"{len(faults)} of {len(items)} cases cannot be used:\n  " + "\n  ".join(faults))
        for finding in [f for check in REVIEWS for f in check(records, names)] if names else ():
            logger.warning("%s", finding.message)
        warn_of_small_scans(records, patch_size, spacing)
    if dist.is_initialized():
        dist.barrier()


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{s:.3g}" for s in spacing) + " mm"
