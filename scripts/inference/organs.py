"""What a mask says of each label or region: its volume, its voxels, and the scan's mean intensity there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ignite.engine import Engine
from monai.engines.utils import IterationEvents

from ..data.images import read_image
from ..data.scans import case_of, image_files
from ..data.statistics import VOLUME, class_sums, label_sums, rounded
from .export import LABELS

VOXELS = "voxels"  # of a mask's metadata: how many each class has
ORGANS = "organs"  # of a mask's metadata, and of masks.json


class MeasureOrgans:
    """Measures each label or region of a mask in its scan, which is read again for that, and has both drawn if wanted.

    The measures are in the mask's metadata then, as "organs": name -> ml, voxels, mean intensity of each channel.

    Args:
        cases: with "case" and "image".
        classes: label values of each label or region, by its name.
        preview: draws a case, see preview.py; None for no picture.
    """

    def __init__(
        self, cases: Sequence[dict], classes: Mapping[str, Sequence[int]], preview: Callable[..., None] | None = None
    ) -> None:
        self.files = {case["case"]: image_files(case) for case in cases}
        self.classes, self.preview = classes, preview

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)  # a scan that fails here is one that failed

    def __call__(self, engine: Engine) -> None:
        """Measure the mask that was made last."""
        assert isinstance(engine.state.output, list), "the batch is taken apart"
        mask = engine.state.output[0]["pred"]
        case, labels = case_of(mask.meta), mask[0].cpu().numpy()
        files = self.files.get(case, [mask.meta["filename_or_obj"]])
        channels = [channel for file in files for channel in read_image(file).channels()]
        sums = [class_sums(label_sums(labels, channel.voxels), self.classes) for channel in channels]
        found = mask.meta[ORGANS] = {
            name: {
                "ml": rounded(mask.meta["measured"][VOLUME.format(name)]),
                "voxels": int(n),
                "mean_intensity": [
                    rounded(of[name] / n * channel.slope + channel.intercept) if n else None
                    for of, channel in zip(sums, channels, strict=True)
                ],
            }
            for name, n in mask.meta[VOXELS].items()
        }
        if self.preview is not None:
            names = mask.meta.get(LABELS, {})
            self.preview(case, channels[0], labels, names, {name: organ["ml"] for name, organ in found.items()})


def organ_columns(organs: Mapping[str, Mapping]) -> dict[str, object]:
    """Name the measures for a row of a table; volumes are there by the names that training ranges have."""
    voxels = {f"voxels of {name}": found["voxels"] for name, found in organs.items()}
    return voxels | {
        f"mean intensity of {name} in channel {i}": mean
        for name, found in organs.items()
        for i, mean in enumerate(found["mean_intensity"])
    }
