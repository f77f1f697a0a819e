"""A picture says what was found: the right planes, the right way up, in the labels' colours, with a fitting legend."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from conftest import GRIDS, bundle, grid, world
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image

from scripts.data.datasets import Dataset
from scripts.data.geometry import Geometry, StoredImage
from scripts.data.visualization import COLOURS, label_colour
from scripts.inference.export import MaskLayout
from scripts.inference.preview import DPI, Preview, draw_preview


def scan_of(mask, affine=None, path="scan.nii.gz", **stored):
    affine = np.eye(4) if affine is None else affine
    voxels = np.random.default_rng(0).integers(0, 500, mask.shape).astype(np.int16)
    return StoredImage(path, Geometry(mask.shape, affine), voxels, **{"slope": 1.0, "intercept": 0.0, **stored})


def panels(figure):
    """Return title and pixels of each panel."""
    return {axes.get_title().partition(",")[0]: axes.get_images()[0].get_array().data for axes in figure.axes}


@pytest.mark.parametrize("kind", GRIDS)
def test_sides_are_where_the_letters_say_on_any_grid(kind):
    shape, affine = grid(kind)
    at = world(shape, affine) @ np.diag([1, 1, 1]) - np.array(world(shape, affine).reshape(-1, 3).mean(axis=0))
    ahead = (np.abs(at).max(axis=-1) < 18) & (at.min(axis=-1) > 0)  # a box at the patient's right, front, top
    mask = np.where(ahead, 2, 0).astype(np.uint8)
    mask[np.abs(at).max(axis=-1) < 4] = 1
    figure = draw_preview(scan_of(mask, affine), mask, {1: "middle", 2: "corner"}, {})
    shown = panels(figure)
    assert list(shown) == ["axial", "coronal", "sagittal"]
    for name, pixels in shown.items():
        rows, columns = np.nonzero((pixels == label_colour(2)).all(axis=-1))
        sign = 1 if name == "sagittal" else -1  # the patient's right is on the left, the front on the right
        assert rows.mean() < pixels.shape[0] / 2
        assert sign * (columns.mean() - pixels.shape[1] / 2) > 0


def test_planes_go_through_the_middle_of_the_largest_label():
    mask = np.zeros((40, 30, 20), np.uint8)
    mask[4:8, 6:10, 2:6] = 1
    mask[20:30, 15:25, 10:17] = 2
    figure = draw_preview(scan_of(mask), mask, {1: "a", 2: "b"}, {"a": 0.064, "b": 0.7})
    assert [axes.get_title() for axes in figure.axes] == ["axial, 14 of 20", "coronal, 20 of 30", "sagittal, 15 of 40"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a  0.064 ml", "b  0.7 ml"]
    assert [to_hex(text.get_color()) for text in legend.get_texts()] == ["#999999", "#ffffff"]  # one is in no plane
    assert all((pixels == COLOURS[1]).all(axis=-1).any() for pixels in panels(figure).values())


def test_two_halves_of_one_label_are_met_though_their_middle_is_outside():
    mask = np.zeros((40, 12, 12), np.uint8)
    mask[2:8, 3:9, 3:9] = mask[32:38, 3:9, 3:9] = 1
    for pixels in panels(draw_preview(scan_of(mask), mask, {1: "lungs"}, {"lungs": 1.0})).values():
        assert (pixels == COLOURS[0]).all(axis=-1).any()


@pytest.mark.parametrize("count", [0, 1, 2, 15, 142, 300])
@pytest.mark.parametrize("name", ["spleen", "$\\frac{left}$ W_" + "W" * 60])
def test_the_legend_fits_any_number_of_labels(count, name):
    mask = (np.arange(20 * 20 * 20).reshape(20, 20, 20) % (count + 1)).astype(np.int16)
    names = {value: f"{name} {value}" for value in range(1, count + 1)}
    figure = draw_preview(scan_of(mask), mask, names, dict.fromkeys(names.values(), 1.0))
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert len(legend.get_texts()) == max(count, 1)
    assert -1 <= box.x0 < box.x1 <= page.x1 + 1
    assert -1 <= box.y0 < box.y1 <= min(axes.get_window_extent().y0 for axes in figure.axes) + 1
    assert page.height / DPI < 20


def test_colours_of_many_labels_differ_and_the_first_are_the_palette():
    found = label_colour(np.arange(1, 143))
    assert (found[: len(COLOURS)] == COLOURS).all()
    assert len(np.unique(found, axis=0)) == 142
    apart = np.abs(found[:, None].astype(int) - found[None]).sum(axis=-1)[~np.eye(142, dtype=bool)]
    assert apart.min() >= 10


def test_values_are_shown_not_what_is_stored():
    mask = np.zeros((16, 16, 16), np.uint8)
    plain, negative = (panels(draw_preview(scan_of(mask, slope=s), mask, {}, {}))["axial"] for s in (0.5, -0.5))
    assert np.corrcoef(plain.ravel(), negative.ravel())[0, 1] < -0.9


def test_a_picture_lies_as_it_was_stored(tmp_path):
    pixels = np.zeros((20, 30), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mask = np.zeros((30, 20, 1), np.uint8)
    mask[:10, :6] = 1  # the upper left corner
    figure = draw_preview(scan_of(mask, path=str(tmp_path / "a.png")), mask, {1: "a"}, {})
    (axes,) = figure.axes
    shown = axes.get_images()[0].get_array()
    rows, columns = np.nonzero((shown == COLOURS[0]).all(axis=-1))
    assert shown.shape[0] < shown.shape[1]
    assert rows.mean() < shown.shape[0] / 2
    assert columns.mean() < shown.shape[1] / 2
    assert not axes.texts


@pytest.mark.parametrize("thin", range(3))
def test_a_single_slice_is_one_panel(thin):
    shape = [1 if axis == thin else 20 for axis in range(3)]
    mask = np.ones(shape, np.uint8)
    assert list(panels(draw_preview(scan_of(mask), mask, {}, {}))) == [("sagittal", "coronal", "axial")[thin]]


def test_the_picture_is_whole_and_in_a_folder_of_its_own(tmp_path):
    mask = np.ones((8, 8, 8), np.uint8)
    Preview(MaskLayout(str(tmp_path)))("a.b", scan_of(mask), mask, {1: "a"}, {"a": 1.0})
    with Image.open(tmp_path / "previews/a.b.png") as image:
        image.load()
        assert image.size[0] == pytest.approx(11 * DPI, abs=1)


def test_the_command_draws_on_demand_and_again_what_is_missing(trained, phantom_dir, tmp_path):
    scan, masks = Dataset(phantom_dir).cases[0]["image"], tmp_path / "masks"

    def segment(*options):
        done = bundle(
            "--config_file", "configs/inference.json", "--dataset_dir", scan, "--ckpt_dir", trained,
            "--output_dir", masks, "--num_workers", 0, *options,
        )  # fmt: skip
        return done.stdout + done.stderr

    segment()
    assert not (masks / "previews").exists()
    (mask,) = masks.glob("*_seg.nii.gz")
    before = np.asanyarray(nib.load(mask).dataobj)
    segment("--preview", True, "--skip_existing", True)
    (picture,) = (masks / "previews").iterdir()
    assert picture.name == mask.name.replace("_seg.nii.gz", ".png")
    assert (np.asanyarray(nib.load(mask).dataobj) == before).all()
    assert "1 of 1 scans have masks" in segment("--preview", True, "--skip_existing", True)


def test_planes_have_one_scale_so_that_thick_slices_do_not_take_the_room():
    mask = np.zeros((40, 60, 5), np.uint8)
    mask[10:30, 20:40, 1:4] = 1
    figure = draw_preview(scan_of(mask, np.diag([1.0, 1.0, 4.0, 1.0])), mask, {1: "slab"}, {})
    inches = {
        axes.get_title().partition(",")[0]: axes.get_position().size * figure.get_size_inches() for axes in figure.axes
    }
    scale = inches["axial"][0] / 40  # of a mm
    for name, (wide, high) in {"axial": (40, 60), "coronal": (40, 20), "sagittal": (60, 20)}.items():
        assert inches[name] == pytest.approx((wide * scale, high * scale))
    assert 2.9 < inches["axial"][0] < 3.3
