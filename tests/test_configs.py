"""The configs keep their contract: MONAI's properties, equal text for equal meaning, short expressions, metadata."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import monai
import numpy as np
import pytest
import torch
from conftest import CACHE, ROOT, SHARED
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import ID_SEP_KEY

from scripts.data.labels import Labels
from scripts.weights.model_settings import ModelSettings

CONFIGS = sorted((ROOT / "configs").rglob("*.json"))
OVERLAYS = {
    "training": ["train"],
    "demo training": ["train", "demo"],
    "hippocampus training": ["train", "recipes/hippocampus"],
    "2D training": ["train", "recipes/2d"],
    **{f"{name} training": ["train", f"recipes/{name}"] for name in ("btcv", "amos22", "kits19", "brats21")},
    "evaluating": ["train", "evaluate"],
    "pooling": ["train", "pool"],
    "training of both networks": ["train", "fast"],
    "distributed training of both": ["train", "multi_gpu_train", "fast"],
    "distributed training": ["train", "multi_gpu_train"],
    "distributed evaluating": ["train", "evaluate", "multi_gpu_evaluate"],
    "inference": ["inference"],
}


def read(name: str) -> dict:
    return json.loads((ROOT / "configs" / f"{name}.json").read_text())


def strings(value):
    """Yield every string of a config."""
    if isinstance(value, dict):
        for entry in value.values():
            yield from strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from strings(entry)
    elif isinstance(value, str):
        yield value


def workflow(names: list[str], kind: str | None, **overrides) -> ConfigWorkflow:
    files = [str(ROOT / "configs" / f"{name}.json") for name in names]
    made = ConfigWorkflow(
        config_file=files,
        workflow_type=kind,
        logging_file=False,
        meta_file=str(ROOT / "configs/metadata.json"),
        **({"cache_dir": CACHE.name} if "train" in names else {}),
        **overrides,
    )
    made.initialize()
    return made


@pytest.mark.parametrize(
    ("names", "kind"),
    [(["train"], "train"), (["train", "evaluate"], "train"), (["inference"], "infer")],
    ids=["train", "evaluate", "inference"],
)
def test_every_property_that_monai_asks_for_is_there(names, kind, phantom_dir, tmp_path):
    made = workflow(names, kind, dataset_dir=str(phantom_dir), output_dir=str(tmp_path), ckpt_dir=str(tmp_path))
    assert not made.check_properties()
    assert made.bundle_root == str(ROOT)


def test_shared_settings_and_definitions_have_the_same_text():
    train, inference = read("train"), read("inference")
    for key in ("network_def", "network", "device", "amp", "compile", "window_scheme"):
        assert json.dumps(train[key]) == json.dumps(inference[key]), key
    for key in ("overlap", "tta"):  # options in MONAI Label
        assert train[key] == inference["displayable_configs"][key], key
    for part in ("native", "resampled", "image"):
        assert train["transforms"][part] == inference["transforms"][part], part
    assert train["validate"]["inferer"] == inference["inferer"]
    (to_labels,) = train["validate"]["postprocessing"]["transforms"]
    assert to_labels in inference["postprocessing"]["transforms"]
    assert to_labels in read("evaluate")["validate#postprocessing#transforms"]


def test_training_has_at_most_45_keys():
    assert len(read("train")) <= 45


def test_compiling_is_off_and_one_switch_away(phantom_dir, tmp_path):
    options = {"dataset_dir": str(phantom_dir), "output_dir": str(tmp_path), "ckpt_dir": str(tmp_path)}
    for switch in (False, True):
        network = workflow(["inference"], "infer", compile=switch, **options).parser.get_parsed_content("network_def")
        assert (network._compiled_call_impl is not None) == switch
        assert "stem.weight" in network.state_dict()


def test_defaults_for_weights_without_settings_are_those_of_training():
    train, weights = read("train"), ModelSettings().as_dict()
    for name in ("size", "kernel_size", "spacing", "patch_size", "intensity", "crop_to_nonzero", "mirror_axes", "fold"):
        assert json.dumps(weights[name]) == json.dumps(train[name]), name
    assert (weights["dim"], weights["deep_supervision"]) == (
        train["model"]["dim"], train["model"]["deep_supervision"]
    )  # fmt: skip


def test_everything_about_the_weights_is_written_beside_them():
    written = read("train")["model"].keys() - {"_target_", "_desc_"}
    assert written == ModelSettings().as_dict().keys() - {"training_ranges"}  # which are added when they are known


def test_scoring_takes_the_fold_that_the_weights_were_not_trained_on():
    assert read("evaluate")["fold"] == "$@model.fold"
    assert read("train")["model"]["fold"] == "@fold"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_expressions_are_short_and_files_are_self_contained(path):
    for text in strings(json.loads(path.read_text())):
        assert len(text) <= 80 or not text.startswith("$"), text
        assert not text.startswith("%"), f"{text}: a macro over files depends on the working directory"
        assert "_meta_" not in text, f"{text}: MONAI Label reads inference.json without the metadata"


def test_several_processes_begin_as_one_does_once_they_are_connected():
    steps, start = read("train")["initialize"], "$devices.start_distributed(@patience_minutes)"
    prepared = 1 + next(n for n, step in enumerate(steps) if "scripts.utils.settings.prepare" in str(step))
    assert read("multi_gpu_train")["initialize"] == [*steps[:prepared], start, *steps[prepared:]]


FIRST = [  # the path, or a sentence, then the settings
    "$sys.path.insert(1, str(@bundle_root))",
    "$find_spec('scripts') or sys.exit('error: give the bundle as --bundle_root')",
]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_beginning_finds_the_bundle_first(path):
    steps = json.loads(path.read_text()).get("initialize")
    assert steps is None or (steps[:2] == FIRST and steps[2]["_target_"] == "scripts.utils.settings.prepare")


ELSEWHERE = """
import sys
from monai.bundle import ConfigWorkflow
root, output = sys.argv[1:]
def begin(**given):
    made = ConfigWorkflow(config_file=f"{root}/configs/inference.json", workflow_type="inference", **given)
    made.initialize()
    return made
try:
    begin()
except SystemExit as e:
    print(e)
made = begin(bundle_root=root, output_dir=output)
print("labels", made.parser.get_parsed_content("labels").names)
made.finalize()
"""


def test_a_command_from_elsewhere_asks_for_the_bundle_s_place_and_runs_with_it(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(ROOT), str(tmp_path / "eval")],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if line.startswith(("error", "labels"))]
    assert said == ["error: give the bundle as --bundle_root", "labels ['background', 'Anterior', 'Posterior']"]


def test_aliases_are_references_so_that_nothing_runs_twice():
    assert read("train")["training"] == read("evaluate")["evaluating"] == "@run"


@pytest.mark.parametrize("names", OVERLAYS.values(), ids=OVERLAYS)
def test_overlays_only_touch_what_exists(names):
    base = read(names[0])
    for name in names[1:]:
        for key in read(name):
            assert key.lstrip("+").split("#")[0] in {
                *base,
                "ensemble",
                "model_file",
                "postprocessing_file",
                "save_predictions",
                "save_probabilities",
                "nsd_tolerance_mm",
                "patience_minutes",
                "lesion_scores",
                "coarse",
                "report",
                "evaluating",
                "decide",
                "pooling",
                "finalize",
            }
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / f"{name}.json") for name in names])
    parser.parse()
    references = re.findall(r"@([\w:#]+)", json.dumps(parser.config))
    for reference in set(references):
        assert reference.replace("#", ID_SEP_KEY) in parser, f"@{reference} leads nowhere"


def test_metric_that_decides_is_defined_where_it_is_used():
    assert list(read("train")["validate"]["key_metric"]) == ["dice"]


def test_recipe_is_the_papers():
    train = read("train")
    assert (train["epochs"], train["iterations"], train["batch_size"], train["learning_rate"]) == (1000, 250, 2, 1e-3)
    assert (train["patch_size"], train["spacing"], train["overlap"]) == ([128] * 3, [1.0] * 3, 0.5)
    parser = ConfigParser({"w": train["train"]["loss"]["weights"], "imports": ["$import torch"]})
    np.testing.assert_allclose(parser.get_parsed_content("w"), np.array([16, 8, 4, 2, 1]) / 31, rtol=1e-6)


def test_loss_is_the_mean_of_five_resolutions_with_the_published_weights():
    train = read("train")
    labels = Labels(["background", "a", "b"], [0, 1, 2])
    parser = ConfigParser({"train": train["train"], "imports": train["imports"], "labels": labels})
    loss = parser.get_parsed_content("train#loss")
    torch.manual_seed(0)
    label = torch.randint(0, 3, (2, 1, 32, 32, 32)).float()
    logits = [torch.randn(2, 3, *(32 // 2**i,) * 3) for i in range(5)]
    expected = 0.0
    for level, (output, weight) in enumerate(zip(logits, (16, 8, 4, 2, 1), strict=True)):
        half = 2**level // 2  # nnU-Net's order-0 resize takes the voxel after the middle
        target = label[:, 0, half :: 2**level, half :: 2**level, half :: 2**level].long()
        probability, truth = output.softmax(1), torch.nn.functional.one_hot(target, 3).movedim(-1, 1)
        overlap = (probability * truth).sum((2, 3, 4))
        dice = (2 * overlap + 1e-5) / (probability.sum((2, 3, 4)) + truth.sum((2, 3, 4)) + 1e-5)
        expected += weight / 31 * (torch.nn.functional.cross_entropy(output, target) + 1 - dice[:, 1:].mean())
    assert loss(logits, label).item() == pytest.approx(expected.item(), rel=1e-5)  # float32


class TestMetadata:
    """metadata.json says what is true."""

    def test_versions_are_those_of_the_requirements(self):
        pinned = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
        metadata = read("metadata")
        named = {
            "monai": metadata["monai_version"],
            "torch": metadata["pytorch_version"],
            "numpy": metadata["numpy_version"],
            **metadata["required_packages_version"],
        }
        assert named == pinned
        assert (monai.__version__, torch.__version__.split("+")[0], np.__version__) == (
            named["monai"], named["torch"], named["numpy"]
        )  # fmt: skip

    def test_changelog_has_the_version(self):
        metadata = read("metadata")
        assert metadata["version"] in metadata["changelog"]

    def test_it_follows_its_schema(self):
        jsonschema = pytest.importorskip("jsonschema")
        schema = next(
            (p for p in (ROOT / "eval/schema.json", SHARED / "schema/meta_schema_20240725.json") if p.is_file()), None
        )
        if schema is None:
            pytest.skip("the schema is not part of MONAI; put it at eval/schema.json to check against it")
        jsonschema.validate(read("metadata"), json.loads(schema.read_text()))


SETTINGS = {  # a section of docs/reference/settings.md -> its configuration, and the key behind its last setting
    "configs/train.json": (["train"], "data"),
    "configs/evaluate.json": (["train", "evaluate"], "model"),
    "configs/multi_gpu_train.json": (["train", "multi_gpu_train"], "device"),
    "configs/inference.json": (["inference"], "model"),
    "configs/plan.json": (["plan"], "initialize"),
    "configs/fetch.json": (["fetch"], "initialize"),
}


def documented(config: str) -> dict[str, str]:
    """Setting -> default, as the page has them."""
    page = (ROOT / "docs/reference/settings.md").read_text()
    table = page[page.index(f"`{config}`") :].split("|---|---|---|---|\n", 1)[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()]
    assert all(len(row) == 4 for row in rows)
    return {row[0].strip("|` "): row[1] for row in rows}


@pytest.mark.parametrize("config", SETTINGS)
def test_the_page_of_settings_names_them_all_with_their_defaults(config):
    names, end = SETTINGS[config]
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / f"{name}.json") for name in names])
    page, own = documented(config), list(read(names[-1]))
    if names[-1] != "evaluate":  # an overlay sets settings of the file below it, which its section has
        no_settings = ("imports", "+imports", "fine_tuning", "displayable_configs")
        wanted = {name for name in own[: own.index(end)] if name not in no_settings}
        assert wanted <= set(page), wanted - set(page)
    for name, default in page.items():
        if name == "network_def#checkpoint_style":  # the table of sizes has its default
            continue
        value = parser[name]
        if isinstance(value, dict) or str(value).startswith("$"):
            assert not default.startswith(("`[", '`"')), f"{name} is worked out; its default is said in words"
        else:
            assert default == f"`{json.dumps(value)}`", name


def test_large_files_name_their_hash():
    text = (ROOT / "large_files.yml").read_text()
    assert text.count("url:") == text.count("hash_type:") == text.count("hash_val:")
