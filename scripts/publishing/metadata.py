"""What `configs/metadata.json` of a bundle says of the weights in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data.datasets import GivenCases
from ..data.labels import Labels
from ..utils.settings import plain_text
from ..weights.model_settings import BUNDLE_ROOT, ModelSettings

KEPT = ("schema", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "references")


def make_metadata(
    model: ModelSettings,
    name: str,
    version: str,
    data_source: str,
    authors: str,
    licence: str,
    scores: Mapping[str, float],
) -> dict:
    """Describe weights by MONAI's schema.

    Args:
        model: the settings of the weights.
        name: of the bundle.
        version: of the bundle.
        data_source: what the weights were trained on, in a sentence.
        authors: of the weights.
        licence: of the weights, in a sentence.
        scores: name of a metric -> its mean.
    """
    code = json.loads(Path(BUNDLE_ROOT, "configs", "metadata.json").read_text())
    channels, classes = GivenCases(model).channels, mask_classes(model)
    spatial_shape = ["32*n"] * (2 if model.dim == "2d" else 3)
    tensor = {"type": "image", "spatial_shape": spatial_shape, "dtype": "float32", "value_range": []}
    image = {"format": "magnitude", "modality": ", ".join(channels), "num_channels": model.in_channels}
    pred = {"format": "labels", "num_channels": model.out_channels}
    foreground = [f"{value} {label}" for value, label in classes.items() if value]
    return {
        **{key: code[key] for key in KEPT},
        "version": version,
        "changelog": {version: f"packaged by {code['name']} {code['version']}"},
        "supported_apps": {},
        "name": name,
        "task": f"{model.dim.upper()} segmentation: {', '.join(classes[value] for value in classes if value)}",
        "description": f"MedNeXt-{model.size}, kernel {model.kernel_size}, for {', '.join(foreground)}",
        "authors": authors,
        "copyright": licence,
        "data_source": data_source,
        "data_type": "nibabel",
        "image_classes": f"{', '.join(channels)}; {preprocessing(model)}",
        "label_classes": f"one integer a voxel: 0 background, {', '.join(foreground)}",
        "pred_classes": "one channel of logits a " + ("region" if model.regions else "label, background first"),
        "eval_metrics": dict(scores),
        "intended_use": "Research only, on scans like those of the training. Not for diagnosis or treatment.",
        "network_data_format": {
            "inputs": {"image": {**tensor, **image, "is_patch_data": True, "channel_def": _numbered(channels)}},
            "outputs": {
                "pred": {
                    **tensor,
                    **pred,
                    "is_patch_data": True,
                    "channel_def": {str(value): plain_text(label) for value, label in classes.items()},
                }
            },
        },
    }


def mask_classes(model: ModelSettings) -> dict[int, str]:
    """Name the values that a mask of these weights has; hosts name the segments in a viewer by them."""
    labels = Labels.from_settings(model)
    if labels.regions_class_order is None:
        return dict(zip(labels.values, labels.names, strict=True))
    return {0: "background", **dict(sorted(zip(labels.regions_class_order, labels.names, strict=True)))}


def preprocessing(model: ModelSettings) -> str:
    """Say what is done to a scan before the network has it."""
    schemes = model.intensity if isinstance(model.intensity, list) else [model.intensity]
    spelled = ", ".join(s if isinstance(s, str) else f"CT scheme {json.dumps(s)}" for s in schemes)
    crop = "cropped to non-zero voxels, " if model.crop_to_nonzero else ""
    return f"{crop}resampled to {' x '.join(f'{edge:g}' for edge in model.spacing)} mm, intensities: {spelled}"


def _numbered(names: Sequence[str]) -> dict[str, str]:
    return {str(number): plain_text(name) for number, name in enumerate(names)}
