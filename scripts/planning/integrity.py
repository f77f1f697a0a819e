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

from ..data.datasets import Dataset, missing_files
from ..data.folds import read_folds
from ..data.grid import record_faults
from ..data.scans import image_files, list_scans
from ..data.statistics import LARGEST_TILT
from ..utils.errors import UserError, told
from ..utils.files import check_writable, write_text
from .fingerprint_file import fingerprint_cases
from .spacing import PUBLISHED, training_grid

logger = logging.getLogger("mednext")

FAR = 6.0  # robust standard deviations; a normal distribution passes it once in a billion
CONSTANT = 1e-9  # of the mean: what rounding leaves of a standard deviation of 0
SPACING_RATIO = 3.0  # of a case to the median, where a wrong header is likelier than another protocol


class Finding(NamedTuple):
    """Say something that a person should know: "error" stops a training, "warning" does not."""

    severity: str
    case: str
    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}"


def _warning(record: dict, message: str) -> Finding:
    return Finding("warning", record["case"], record["file"], f"{record['file']} {message}")


def duplicates(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """Find the same voxels under two names, which end up on both sides of a fold."""
    seen: dict[str, dict] = {}
    for record in records:
        first = seen.setdefault(record["digest"], record)
        if first is not record:
            yield _warning(record, f"has the voxels of {first['file']}; remove one of the two cases.")


def orientations(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """Find rare orientations, which are handled but often a wrong header."""
    counts = Counter(record["orientation"] for record in records)
    usual = counts.most_common(1)[0][0] if counts else ""
    for record in records:
        if record["orientation"] != usual and counts[record["orientation"]] < 0.1 * len(records):
            yield _warning(
                record,
                f"is stored as {record['orientation']}, {counts[usual]} of {len(records)} cases as {usual};"
                " look whether its header is right.",
            )


def header_forms(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """Find headers whose forms contradict each other, so that tools lay the scan differently."""
    for record in records:
        if said := record.get("header"):
            yield _warning(record, f"has a header of two minds: {said}; look which is meant.")


def tilts(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """Find axes far off the patient's, which reorientation turns onto the nearest ones and no further."""
    for record in records:
        if (degrees := record.get("tilt", 0.0)) > LARGEST_TILT:
            yield _warning(
                record,
                f"is tilted by {degrees:.0f} degrees off the patient's axes, beyond the {LARGEST_TILT:.0f} that"
                " augmentation shows a network; look whether its header is right, or resample it straight.",
            )


def without_foreground(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """Find cases without any label, which teach background only; often the label file is the wrong one."""
    for record in records:
        if not sum(record["labels"][1 : len(labels)]):
            yield _warning(record, "has no labelled voxel; look whether that is meant.")


def absent_labels(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """Find labels that dataset.json names and no case has: they cannot be learnt."""
    for value, name in enumerate(labels):
        if records and not any(record["labels"][value] for record in records):
            message = (
                f"label {value} ({name}) is in none of the {len(records)} cases; correct dataset.json or the labels."
            )
            yield Finding("warning", "", "dataset.json", message)


def spacings(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """Find voxels that are a multiple larger or smaller than usual."""
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
    """Find 2D images in 3D files, which train a 3D network on one plane."""
    for record in records:
        if min(record["shape"]) == 1:
            yield _warning(record, f"is a single slice of {record['shape']} voxels; a 3D network sees one plane of it.")


def constant_channels(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """Find channels that are zero everywhere, or have one value wherever they are not: there is nothing to learn."""
    for record in records:
        for channel, moments in enumerate(record["channels"]):
            if moments is None:
                yield _warning(record, f"is zero everywhere in channel {channel}; export it again.")
            elif moments["std"] <= CONSTANT * abs(moments["mean"]):
                found = f"{moments['mean']:.6g} wherever it is not 0 in channel {channel}"
                yield _warning(record, f"is {found}; export it again.")


def intensities(records: Sequence[dict], labels: Sequence[str]) -> Iterator[Finding]:
    """Find means far from those of the other cases: another unit, another modality, an empty scan."""
    for channel in range(len(records[0]["channels"]) if records else 0):
        means = {index: m["mean"] for index, record in enumerate(records) if (m := record["channels"][channel])}
        if len(means) < 5:
            continue
        usual = np.median(list(means.values()))
        spread = 1.4826 * np.median(np.abs(list(means.values()) - usual))  # the standard deviation of a normal one
        for index, mean in means.items():
            if spread and abs(mean - usual) > FAR * spread:
                yield _warning(
                    records[index],
                    f"has a mean intensity of {mean:.4g} in channel {channel}, the median case {usual:.4g};"
                    " look whether it has the unit and the modality of the others.",
                )


CHECKS: tuple[Callable[[Sequence[dict], Sequence[str]], Iterator[Finding]], ...] = (
    duplicates,
    orientations,
    header_forms,
    tilts,
    without_foreground,
    absent_labels,
    spacings,
    single_slices,
    constant_channels,
    intensities,
)


def absent_files(items: Sequence[dict]) -> Iterator[Finding]:
    """Find every file that a case lacks, not the first one alone."""
    for case in items:
        for path in missing_files(case):
            yield Finding("error", case["case"], path, f"{path} not found; add it or remove case {case['case']}.")


def unlisted_files(data: Dataset) -> Iterator[Finding]:
    """Find files in the training folders that no case uses."""
    used = {Path(file).resolve() for case in data.listed_cases for file in (*image_files(case), case["label"])}
    for file in [file for name in ("imagesTr", "labelsTr") for file in list_scans(data.folder / name)]:
        if file.resolve() not in used:
            yield Finding(
                "warning", "", str(file), f"{file} belongs to no case of dataset.json; add it there or remove it."
            )


def case_counts(data: Dataset) -> Iterator[Finding]:
    """Find another number of cases than dataset.json says, and fewer than a training needs."""
    said, count = data.description.get("numTraining"), len(data.listed_cases)
    if said not in (None, count):
        message = f'{data.file} says "numTraining" {said}, the folder has {count} cases; correct it.'
        yield Finding("warning", "", "dataset.json", message)
    if count < 2:
        message = f"{data.folder} has {count} labelled cases; expected at least 2, to train and to validate."
        yield Finding("error", "", "dataset.json", message)


def unusable_splits(data: Dataset) -> Iterator[Finding]:
    """Find what is wrong with a split that the data set brings."""
    try:
        read_folds(data.folder, [case["case"] for case in data.listed_cases])
    except UserError as e:
        yield Finding("error", "", "splits_final.json", str(e))


def impossible_grids(records: Sequence[dict], spacing: str | Sequence[float]) -> Iterator[Finding]:
    """Find cases with too few voxels for the network, or more than memory holds, on the grid of a training."""
    for record, fault in record_faults(records, training_grid(records, spacing)) if records else ():
        yield Finding("error", record["case"], record["file"], fault)


def inspect_dataset(data: Dataset, fingerprint_file: str, spacing: str | Sequence[float] = PUBLISHED) -> list[Finding]:
    """List all findings about a data set, errors first.

    Args:
        data: the data set.
        fingerprint_file: JSON file that remembers what was read.
        spacing: of the training grid in mm, or "median", see planner.py.
    """
    absent = list(absent_files(data.listed_cases))
    lacking = {finding.case for finding in absent}
    complete = [case for case in data.listed_cases if case["case"] not in lacking]
    records = fingerprint_cases(complete, len(data.channels), data.labels, fingerprint_file)
    faults = [Finding("error", r["case"], r["file"], r["error"]) for r in records if "error" in r]
    usable = [record for record in records if "error" not in record]
    odd = [finding for check in CHECKS for finding in check(usable, data.labels.index_names)]
    whole = [*unlisted_files(data), *case_counts(data), *unusable_splits(data)]
    faults += impossible_grids(usable, spacing)
    found = [*absent, *faults, *whole, *odd]
    return sorted(found, key=lambda finding: finding.severity)


def check_dataset(
    dataset_dir: str, output_dir: str, fingerprint_file: str, spacing: str | Sequence[float] = PUBLISHED
) -> None:
    """Print all findings and writes them to `check.json` in `output_dir`.

    Raises:
        UserError: a training could not use the data set as it is.
    """
    check_writable(output_dir)
    findings = inspect_dataset(Dataset(dataset_dir), fingerprint_file, spacing)
    for finding in findings:
        print(finding)
    path = Path(output_dir) / "check.json"
    write_text(path, json.dumps([finding._asdict() for finding in findings], indent=2) + "\n")
    errors = sum(finding.severity == "error" for finding in findings)
    print(f"{errors} errors, {len(findings) - errors} warnings; also in {path}")
    if errors:
        raise UserError(f"{errors} errors in {dataset_dir} keep it from being trained on; mend them as said above.")


# ---- before a training


def check_cases(
    records: Sequence[dict],
    patch_size: Sequence[int],
    spacing: Sequence[float],
    names: Sequence[str] | None = None,
) -> None:
    """Stop a training that cannot end well, and warns of what is odd, on the first process alone.

    Args:
        records: of the cases that it trains and validates on, see fingerprint_file.py.
        patch_size: training patch in voxels; scans smaller than it are padded, which a warning mentions.
        spacing: training grid in mm.
        names: of the labels by index, to check the cases as a whole; None leaves that out.

    Raises:
        UserError: one sentence for each bad case.
    """
    if not dist.is_initialized() or dist.get_rank() == 0:
        faults = [record["error"] for record in records if "error" in record]
        faults += [fault for _, fault in record_faults([r for r in records if "error" not in r], spacing)]
        if faults:
            raise UserError(told(faults, len(records)))
        for finding in [f for check in CHECKS for f in check(records, names)] if names else ():
            logger.warning("%s", finding.message)
        warn_of_small_scans(records, patch_size, spacing)
    if dist.is_initialized():
        dist.barrier()


def warn_of_small_scans(records: Sequence[dict], patch_size: Sequence[int], spacing: Sequence[float]) -> None:
    """Warn how much of the training patch is padding where that is most of it."""
    extents = [np.multiply(record["shape"], record["spacing"]) for record in records]
    voxels = np.array(extents) / np.array(spacing)
    share = np.prod(np.minimum(voxels, patch_size), axis=1) / np.prod(patch_size)
    if len(share) and np.median(share) < 0.5:
        smaller = _fitting_patch(np.median(voxels, axis=0), patch_size)
        logger.warning(
            "scans fill only %.0f %% of the %s patch (median extent %s voxels at %s mm); the rest is padding%s.",
            100 * np.median(share),
            list(patch_size),
            np.median(voxels, axis=0).round().astype(int).tolist(),
            list(spacing),
            "" if smaller == list(patch_size) else f': consider a smaller --patch_size, for example "{smaller}"',
        )


def _fitting_patch(extent: Sequence[float], patch_size: Sequence[int]) -> list[int]:
    """Return the smallest patch that holds `extent` voxels, and that is no larger than `patch_size` on any axis."""
    found = np.minimum(np.maximum(np.ceil(np.array(extent) / 16), 1).astype(int) * 16, patch_size)
    if found.max() < 32:  # the coarsest level needs two voxels on one axis
        longest = int(np.argmax(patch_size))
        found[longest] = min(32, patch_size[longest])
    return found.tolist()


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{s:.3g}" for s in spacing) + " mm"
