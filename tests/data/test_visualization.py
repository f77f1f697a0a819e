"""Pictures to judge a segmentation by: three panels, true proportions, the slice and the contrast that matter."""

from __future__ import annotations

import numpy as np

from scripts.data.visualization import COLOURS, draw_overlay, fullest_slice

IMAGE = np.linspace(0, 1, 20 * 10 * 6).reshape(20, 10, 6)


def box(z: int) -> np.ndarray:
    """Label 1 in part of slice `z` of IMAGE's grid."""
    label = np.zeros(IMAGE.shape)
    label[4:12, 2:8, z] = 1
    return label


def test_panels_show_scan_label_and_prediction():
    picture = draw_overlay(IMAGE, box(3), np.zeros_like(IMAGE), (1, 1, 4))
    scan, with_label, with_prediction = np.split(picture, 3, axis=1)
    assert (scan == with_prediction).all()
    assert (with_label == COLOURS[0]).all(axis=-1).any()  # the outline has the full colour
    assert not (scan == COLOURS[0]).all(axis=-1).any()


def test_thick_slices_are_shown_in_plane_and_thin_ones_in_proportion():
    empty = np.zeros_like(IMAGE)
    height, width, _ = draw_overlay(IMAGE, empty, empty, (1, 1, 4)).shape
    assert (height * 20, height) == (width // 3 * 10, height)
    height, width, _ = draw_overlay(IMAGE, empty, empty, (1, 2, 2)).shape  # slices along z: 20 x 1 mm by 10 x 2 mm
    assert height == width // 3


def test_constant_images_and_many_labels_are_drawn():
    label = np.arange(IMAGE.size).reshape(IMAGE.shape) % 20
    assert draw_overlay(np.zeros(IMAGE.shape), label, label, (1, 1, 1)).dtype == np.uint8


def test_the_slice_has_most_labelled_voxels_or_else_most_predicted_ones():
    assert fullest_slice(box(3), box(5), (1, 1, 4)) == (2, 3)
    assert fullest_slice(np.zeros_like(IMAGE), box(5), (1, 1, 4)) == (2, 5)


def test_soft_tissue_has_contrast_though_there_are_air_and_bone():
    scan = np.full((40, 40, 1), -1000.0)
    scan[8:32, 8:32] = 40
    scan[10:14, 10:30] = 1500
    label = np.zeros_like(scan)
    label[20:26, 20:26] = 1
    scan[label > 0] = 100  # 60 HU brighter than around it, of 2500
    grey = np.split(draw_overlay(scan, label, label, (1, 1, 5), height=40), 3, axis=1)[0][..., 0].astype(int)
    tissue, lesion = grey[40 - 1 - 17, 28], grey[40 - 1 - 22, 22]
    assert lesion - tissue > 2 * 255 * 60 / 2500
    assert (grey.min(), grey.max()) == (0, 255)
