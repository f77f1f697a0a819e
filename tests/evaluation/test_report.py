"""The page of an evaluation: one file, true numbers, pictures as a radiologist sees them, and columns that sort."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import shlex
import shutil
import sys
from html import escape
from pathlib import Path

import numpy as np
import pytest
from conftest import grid, save, world
from matplotlib.image import imread

from scripts.data.visualization import COLOURS
from scripts.evaluation import report
from scripts.evaluation.metrics import CaseScores
from scripts.evaluation.tables import METRICS

pytestmark = pytest.mark.filterwarnings("error:constrained_layout not applied")

CLASSES = {"organ": [1, 2], 'a <b>"tumour"</b> & $^$': [2]}
TUMOUR = list(CLASSES)[1]
NAN = math.nan
SCORES = {  # case: Dice, HD95 of organ and tumour
    "case_2": (0.5, 8.0, 0.5, 12.0),
    "case_10": (0.9, 2.0, NAN, NAN),
    "case_1": (0.75, 4.0, 0.25, 100.0),
    "case_<i>": (0.8, 3.0, 0.0, math.inf),
    "absent": (NAN, NAN, NAN, NAN),
}


def tables(folder: Path, scores: dict) -> Path:
    """Lets CaseScores write the tables of `scores`."""
    handler = CaseScores(str(folder), CLASSES)
    for case, values in scores.items():
        for name, dice, hd95 in zip(CLASSES, values[::2], values[1::2], strict=True):
            found = {**dict.fromkeys(METRICS, dice), "hd95_mm": hd95, "predicted_voxels": 1, "reference_voxels": 1}
            handler.rows.append({"case": case, "label": name, **found})
    handler.write(None)
    return folder


def write(folder: Path, items=(), save_predictions=False, label_values=(0, 1, 2), **settings) -> str:
    (folder / "model.pt").write_bytes(b"weights")
    report.write_report(
        str(folder), items, CLASSES, label_values, 1.5, save_predictions, "/data/Dataset001_<Liver>",
        str(folder / "model.pt"), "cpu", settings,
    )  # fmt: skip
    return (folder / "report.html").read_text(encoding="utf-8")


def pictures(page: str) -> dict[str, np.ndarray]:
    """Caption -> picture."""
    figures = re.findall(r'<figure class="case"><img src="data:image/png;base64,([^"]*)".*?<b>(.*?)</b>', page)
    return {caption: imread(io.BytesIO(base64.b64decode(content)))[..., :3] for content, caption in figures}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tables(tmp_path_factory.mktemp("scored"), SCORES)
    write(folder)
    return folder / "report.html"


class TestPage:
    """What it says."""

    def test_it_needs_no_other_file(self, page):
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r'(?:src|href)="([^:"]*:[^,"]*)', text)) == {"data:image/png;base64", "data:"}
        assert "http" not in text.replace(shlex.join(sys.orig_argv), "")

    def test_what_users_name_is_shown_as_it_is(self, page):
        text = page.read_text(encoding="utf-8")
        for name in (TUMOUR, "case_<i>", "Dataset001_<Liver>: segmentation scores"):
            assert escape(name) in text
            assert name not in text

    def test_the_summary_has_the_numbers_of_the_table(self, page):
        text = page.read_text(encoding="utf-8")
        organ = re.search(r'<tr><th scope="row">organ</th>(.*?)</tr>', text)[1]
        values = [0.5, 0.9, 0.75, 0.8]
        said = f"{np.mean(values):.3f} ± {np.std(values):.3f}"
        assert re.findall("<td>(.*?)</td>", organ)[:3] == ["5", said, said]
        assert f"Mean Dice <b>{np.mean([np.mean(values), 0.25]):.3f}</b>, cases: 5, classes: 2." in text
        assert "within 1.5 mm of" in text

    def test_it_says_exactly_what_made_it(self, tmp_path):
        (tmp_path / "model.json").write_text(json.dumps({"size": "B", "overlap": 0.25, "epoch": 7}))
        text = write(tables(tmp_path, SCORES), overlap=0.5)
        facts = dict(re.findall(r'<th scope="row">([^<]*)</th><td>([^<]*)</td></tr>', text))
        assert f"<pre>{escape(shlex.join(sys.orig_argv))}</pre>" in text
        assert facts["their SHA-256"] == hashlib.sha256(b"weights").hexdigest()
        assert (facts["size"], facts["epoch"]) == ("B", "7")
        assert facts["overlap"] == "0.5"  # what it ran with, not what lies beside the weights
        assert {"Python", "PyTorch", "MONAI", "MedNeXt segmentation", "device"} <= set(facts)

    def test_without_masks_it_says_why_there_are_no_pictures(self, page):
        text = page.read_text(encoding="utf-8")
        assert "<code>save_predictions</code> is off" in text
        assert not pictures(text)


class TestPictures:
    """Best, median and worst case."""

    def scored(self, folder: Path, dice: list[float], kind="straight", label_values=(0, 1, 2), extra=0) -> dict:
        """Captions and pictures of cases whose label 1 and masks are a ball at the upper front right of the patient."""
        shape, affine = grid(kind)
        away = world(shape, affine) - world(shape, affine).mean(axis=(0, 1, 2))
        label = np.where(np.linalg.norm(away - (9, 9, 9), axis=-1) < 7, label_values[1], 0).astype(np.uint8)
        label[away[..., 0] < -12] = extra
        items, scan = [], save(folder / "scan.nii.gz", np.zeros((*shape, 2), np.float32), affine)  # two channels
        for number in range(len(dice)):
            file = save(folder / "labels" / f"{number}.nii.gz", label.astype(np.float32), affine)
            (folder / "predictions").mkdir(exist_ok=True)
            shutil.copy(file, folder / "predictions" / f"{number}_seg.nii.gz")
            items.append({"case": str(number), "image": str(scan), "label": str(file)})
        tables(folder, {str(number): (value, 1.0, NAN, NAN) for number, value in enumerate(dice)})
        return pictures(write(folder, items, True, label_values))

    @pytest.mark.parametrize(
        ("dice", "captions"),
        [
            ([0.2, 0.9, 0.5, NAN, 0.7, 0.1], ["Best: 1", "Median: 2", "Worst: 5"]),
            ([0.2, 0.9], ["Best: 1", "Median, worst: 0"]),
            ([0.2], ["Best, median, worst: 0"]),
            ([NAN], []),
        ],
        ids=["many", "two", "one", "none"],
    )
    def test_cases_are_those_of_the_mean_dice(self, dice, captions, tmp_path):
        assert list(self.scored(tmp_path, dice)) == captions

    @pytest.mark.parametrize("kind", ["straight", "flipped", "permuted"])
    def test_the_patient_is_seen_as_a_radiologist_does(self, kind, tmp_path):
        [picture] = self.scored(tmp_path, [0.5], kind).values()
        scan, *others = np.split(picture, 3, axis=1)
        assert not scan.any()
        sagittal = kind == "permuted"  # its slices are 2 mm thick from left to right
        assert ("sagittal slice" if sagittal else "axial slice") in (tmp_path / "report.html").read_text()
        for panel in others:
            rows, columns = np.nonzero(panel.any(axis=-1))
            height, width = panel.shape[:2]
            assert rows.max() < height / 2  # front or top
            assert columns.min() > width / 2 if sagittal else columns.max() < width / 2  # front or the patient's right

    def test_labels_have_the_colours_of_the_legend_whatever_their_values(self, tmp_path):
        [picture] = self.scored(tmp_path, [0.5], label_values=(0, 41, 200)).values()
        assert (np.round(picture * 255) == COLOURS[0]).all(axis=-1).any()
        legend = re.search('<ul class="legend">.*?</ul>', (tmp_path / "report.html").read_text(encoding="utf-8"))[0]
        first, second = (f"rgb{tuple(map(int, colour))}" for colour in COLOURS[:2])
        assert re.findall('rgb[^"]*', legend) == [first, second, second]  # the organ consists of both labels

    def test_voxels_to_ignore_are_not_painted(self, tmp_path):
        plain, ignoring = tmp_path / "plain", tmp_path / "ignoring"
        [one], [other] = (self.scored(f, [0.5], extra=e).values() for f, e in ((plain, 0), (ignoring, 3)))
        assert (one == other).all()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found[0])
        yield browser
        browser.close()


WORST_FIRST = ["case_<i>", "case_1", "case_2", "case_10", "absent"]


class TestBrowser:
    """In Chromium."""

    @pytest.fixture
    def tab(self, browser, page):
        """Open the page, and fail if it asks for anything else or a script fails."""
        tab = browser.new_page()
        asked, failures = [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda failure: failures.append(failure))
        tab.goto(page.as_uri())
        yield tab
        assert not failures
        assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
        tab.close()

    def cases(self, tab) -> list[str]:
        return tab.locator("#cases tbody th").all_inner_texts()

    def sorted_by(self, tab) -> list[tuple[int, str]]:
        """(column, direction) of every heading that says it is sorted."""
        states = tab.locator("#cases th[aria-sort]").evaluate_all("all => all.map(th => th.ariaSort)")
        return [(column, state) for column, state in enumerate(states) if state != "none"]

    def press(self, tab, column: int) -> None:
        tab.locator("#cases th[aria-sort] button").nth(column).click()

    def test_a_click_turns_the_order_by_dice_round_and_cases_without_one_stay_last(self, tab):
        assert self.cases(tab) == WORST_FIRST
        assert self.sorted_by(tab) == [(1, "ascending")]
        self.press(tab, 1)
        assert self.cases(tab) == ["case_10", "case_1", "case_2", "case_<i>", "absent"]  # ties keep their order
        assert self.sorted_by(tab) == [(1, "descending")]
        self.press(tab, 1)
        assert self.cases(tab)[-2:] == ["case_10", "absent"]

    def test_distances_sort_as_numbers_and_infinity_is_the_largest(self, tab):
        self.press(tab, 0)  # brings a case without a score to the top
        self.press(tab, 7)  # HD95 of the tumour
        assert self.cases(tab) == ["case_2", "case_1", "case_<i>", "absent", "case_10"]
        self.press(tab, 7)
        assert self.cases(tab) == ["case_<i>", "case_1", "case_2", "absent", "case_10"]
        assert self.sorted_by(tab) == [(7, "descending")]

    def test_names_sort_as_a_person_counts(self, tab):
        self.press(tab, 0)
        assert [name for name in self.cases(tab) if name[-1].isdigit()] == ["case_1", "case_2", "case_10"]

    def test_the_keyboard_sorts_too(self, tab):
        tab.locator("#cases th[aria-sort] button").first.focus()
        tab.keyboard.press("Tab")
        tab.keyboard.press("Enter")
        assert self.sorted_by(tab) == [(1, "descending")]

    def test_a_narrow_window_shows_every_word(self, browser, page):
        tab = browser.new_page(viewport={"width": 420, "height": 900})
        tab.goto(page.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") == 420
        edges = tab.locator("caption div").evaluate_all("all => all.map(div => div.getBoundingClientRect().right)")
        assert len(edges) == 2
        assert max(edges) <= 420
        assert tab.locator("figure.boxes img").evaluate("img => img.getBoundingClientRect().width") > 600  # it scrolls
        tab.close()

    def test_without_javascript_it_is_a_plain_table(self, browser, page):
        tab = browser.new_page(java_script_enabled=False)
        tab.goto(page.as_uri())
        assert self.cases(tab) == WORST_FIRST
        assert tab.locator("#cases button").count() == 0
        assert not tab.get_by_text("A click on a heading").is_visible()
        tab.close()
