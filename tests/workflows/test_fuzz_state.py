"""Files that a run leaves for the next one, with anything in them: made again, passed over, or refused in one sentence.

`pytest -m fuzz` runs all inputs; the ordinary run a share, drawn by a fixed seed.
"""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import save
from ignite.engine import Engine
from monai.data import MetaTensor

from scripts.data.datasets import Dataset
from scripts.data.labels import Labels
from scripts.evaluation import comparison
from scripts.evaluation.cross_validation import pool_folds
from scripts.evaluation.tables import read_summary, write_tables
from scripts.inference.export import MaskLayout
from scripts.inference.mask_record import MaskRecord
from scripts.inference.out_of_distribution import UNLIKE, InferenceReport
from scripts.inference.postprocessing import postprocessing_file, read_steps
from scripts.inference.probabilities import ProbabilityFile, write_probabilities
from scripts.kernels import autotune_file, native, precision
from scripts.kernels.trial import Result
from scripts.planning import planner
from scripts.planning.fingerprint_file import fingerprint_cases
from scripts.preprocessing.cache import CachedDataset
from scripts.preprocessing.loading import LoadScand
from scripts.training.checkpointing import TrainingRun, resumes
from scripts.training.history import TrainingLog
from scripts.training.optim import polynomial
from scripts.training.settings_checks import check_settings
from scripts.utils import ownership
from scripts.utils.errors import UserError
from scripts.weights.model_settings import ModelSettings, load_model_settings

from .test_fuzz import JUNK, mutated

INPUTS = 130  # of each kind
SHARE = 65  # of which the ordinary run takes one
LABELS = Labels(["background", "a"], [0, 1])

Use = Callable[[], object]


class Kind:
    """A file that a run leaves, in a folder with others, and what reads it later.

    Args:
        folder: to make it in.
        patch: pytest's monkeypatch.
    """

    again = True  # whether its content is found or made again; else it may be refused

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.file = self.make()

    def make(self) -> Path:
        raise NotImplementedError

    def use(self) -> object:
        """Read the file as the next run does; the same comes out where nothing is damaged."""
        raise NotImplementedError


class Cases(Kind):
    """Two cases of a data set."""

    def make(self) -> Path:
        data = self.folder / "data"
        for name in "pq":
            save(data / f"imagesTr/{name}.nii.gz", np.arange(18**3, dtype=np.int16).reshape(18, 18, 18) + ord(name))
            save(data / f"labelsTr/{name}.nii.gz", np.arange(18**3, dtype=np.uint8).reshape(18, 18, 18) % 2)
        listed = [{"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name in "pq"]
        description = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "a"}, "training": listed}
        (data / "dataset.json").write_text(json.dumps(description))
        self.data = Dataset(data)
        return self.left()

    def left(self) -> Path:
        raise NotImplementedError


class Checked(Cases):
    def left(self) -> Path:
        self.path = self.folder / "checked.json"
        self.use()
        return self.path

    def use(self) -> object:
        records = fingerprint_cases(self.data.cases, 1, self.data.labels, str(self.path))
        return json.dumps([{**record, "signature": None, "sum": None} for record in records])


class Splits(Cases):
    again = False

    def left(self) -> Path:
        path = self.folder / "data/splits_final.json"
        path.write_text(json.dumps([{"train": ["p"], "val": ["q"]}, {"train": ["q"], "val": ["p"]}]))
        return path

    def use(self) -> object:
        data = Dataset(self.folder / "data")
        return [[case["case"] for case in data.training_cases(fold)] for fold in range(len(data.folds))]


class Plan(Cases):
    """A plan that is there, for which another one was made; what it says is kept."""

    again = False

    def left(self) -> Path:
        for name, value in (("draw_fingerprint", None), ("compare_grids", []), ("alternatives", [])):
            self.patch.setattr(planner, name, lambda *_, value=value: value)
        self.patch.setattr(planner, "measure_speed", lambda _: SimpleNamespace(where="here"))
        self.path = self.folder / "plan.json"
        self.use()
        return self.path

    def use(self) -> object:
        before = self.path.read_bytes() if self.path.is_file() else b""
        try:
            planner.write_plan(
                str(self.data.folder), str(self.path), str(self.folder / "checked.json"), (1.0, 1.0, 1.0)
            )
        except UserError:
            assert not before or self.path.read_bytes() == before
            raise
        return json.loads(self.path.read_text())


class PlannedFor(Plan):
    """What a plan says it was made for, as a training reads it."""

    def use(self) -> object:
        if not self.path.exists():
            return super().use()
        try:
            planned = json.loads(self.path.read_bytes())
        except (ValueError, OSError, RecursionError):  # which MONAI refuses
            raise UserError("not JSON") from None
        about = planned.get("checks#planned_for") if isinstance(planned, dict) else None
        check_settings(self.data, ModelSettings(), about if isinstance(about, dict) else None)
        return planned


class Cached(Cases):
    part = "digests.json"

    def left(self) -> Path:
        self.use()
        return next((self.folder / "cache").rglob(self.part))

    def use(self) -> object:
        stages = [[LoadScand("image")]]
        cached = CachedDataset(self.data.cases[:1], stages, str(self.folder / "cache"), (1.0, 1.0, 1.0))
        cached.prepare()
        return cached.cached(0)["image"].as_tensor().tolist()


class Volume(Cached):
    part = "*.pt"


class Checkpoint(Kind):
    again = False

    def make(self) -> Path:
        run, engine = self.run(False)
        engine.state.epoch, engine.state.max_epochs = 1, 9
        for name in ("checkpoint_before.pt", "checkpoint.pt"):
            run.save_state(engine)
            run.saved = (1, 0)
            shutil.copy(run.checkpoint, run.checkpoint.with_name(name)) if name != "checkpoint.pt" else None
        return run.checkpoint

    def run(self, resume: bool):
        torch.manual_seed(0)
        network = torch.nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1.0)
        network(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        state = SimpleNamespace(metrics={}, key_metric_name="dice", epoch=0)
        engine = SimpleNamespace(
            state=SimpleNamespace(epoch=0, iteration=0, epoch_length=5, max_epochs=9), scaler=None,
            add_event_handler=lambda *_: SimpleNamespace(remove=lambda: None), fire_event=lambda _: None,
        )  # fmt: skip
        made = TrainingRun(
            self.folder / "m", network, optimizer, polynomial(optimizer, 9), SimpleNamespace(state=state), {},
            "best", resume and resumes(self.folder / "m", "auto"),
        )  # fmt: skip
        return made, engine

    def use(self) -> object:
        run, engine = self.run(True)
        run.start(engine)
        return run.network.weight.tolist()


class Progress(Kind):
    again = False

    def make(self) -> Path:
        log = TrainingLog(str(self.folder))
        for epoch in (1, 2, 3):
            log.add(epoch, {"train/loss": 0.5, "train/seconds": 1.0})
        log.write_files()
        log.writer.close()
        for events in self.folder.glob("events*"):
            events.unlink()
        return self.folder / "progress.csv"

    def use(self) -> object:
        log = TrainingLog(str(self.folder))
        self.patch.setattr("scripts.training.history.SummaryWriter", lambda *_, **__: SimpleNamespace(
            add_scalar=lambda *_: None, flush=lambda: None))  # fmt: skip
        before = self.file.read_bytes() if self.file.is_file() else b""
        log.add(4, {"train/loss": 0.25})
        kept = [path.read_bytes() for path in self.folder.glob("progress*.csv") if path.is_file()]
        assert not before or before in kept
        self.patch.setattr("scripts.training.history.draw_log", lambda rows, partial: partial.touch())
        log.write_files()
        return [row["epoch"] for row in log.rows]


class Masks(Kind):
    again = False

    def make(self) -> Path:
        self.scan = save(self.folder / "scans/a.nii.gz", np.ones((4, 4, 4), np.int16))
        (self.folder / "model.pt").write_bytes(b"weights")
        self.segment()
        return self.folder / "masks/masks.json"

    def record(self) -> MaskRecord:
        layout = MaskLayout(str(self.folder / "masks"))
        return MaskRecord(layout, [str(self.folder / "model.pt")], ModelSettings(), {"overlap": 0.5}, ())

    def segment(self) -> list[str]:
        record = self.record()
        left = record.remaining([{"case": "a", "image": str(self.scan)}], True)
        record.forget(None)
        for _ in left:
            save(self.folder / "masks/a_seg.nii.gz", np.ones((4, 4, 4), np.uint8))
            mask = SimpleNamespace(meta={"case": "a", "filename_or_obj": str(self.scan)})
            record.note(SimpleNamespace(state=SimpleNamespace(output=[{"pred": mask}])))
        return [case["case"] for case in left]

    def use(self) -> object:
        self.segment()
        assert self.segment() == []
        record = self.record()
        return record.remaining([{"case": "a", "image": str(self.scan)}], True)


class Report(Kind):
    again = False

    def make(self) -> Path:
        for name in "ab":
            self.add(name)
        return self.folder / "report.csv"

    def add(self, name: str) -> None:
        meta = {"filename_or_obj": f"{name}.nii.gz", "measured": {"x": 1.0}, UNLIKE: []}
        engine = Engine(lambda *_: [{"pred": MetaTensor(torch.zeros(1, 2, 2, 2), meta=meta)}])
        InferenceReport(str(self.folder), 1, "float32").attach(engine)
        engine.run([0])

    def use(self) -> object:
        before = self.file.read_bytes() if self.file.is_file() else b""
        try:
            self.add("c")
        except UserError:
            assert not before or self.file.read_bytes() == before
            raise
        return None


class Tuned(Kind):
    def make(self) -> Path:
        self.patch.setenv("XDG_CACHE_HOME", str(self.folder))
        self.facts = {"gpu": "none"}
        path = autotune_file.add(self.facts, "a use", {"a": Result(0.5, 0.1, 1.0, 2.0)})
        assert path is not None
        return path

    def use(self) -> object:
        autotune_file.add(self.facts, "another", {"b": Result(left_out="slow")})
        found = autotune_file.read(self.facts)
        assert all(isinstance(result, Result) for of_use in found.values() for result in of_use.values())
        return None


class Halves(Kind):
    def make(self) -> Path:
        self.patch.setenv("XDG_CACHE_HOME", str(self.folder))
        self.patch.setattr(native, "processor", lambda: b"aarch64")
        self.patch.setattr(precision, "_pairs", lambda: lambda: 0.5)
        self.use()
        return next((self.folder / "mednext").glob("bfloat16-*.json"))

    def use(self) -> object:
        return precision._measured()[0]


class Lock(Kind):
    again = False

    def make(self) -> Path:
        (self.folder / "training.lock").write_text("process 1 on another computer, since then\n")
        return self.folder / "training.lock"

    def use(self) -> object:
        with ownership.owned(self.folder, "training"):
            pass
        with ownership.alone(self.folder / "training"):
            return None


class Model(Kind):
    again = False

    def make(self) -> Path:
        settings = {**ModelSettings(labels=["background", "a"], label_values=[0, 1], out_channels=2).as_dict()}
        (self.folder / "model.json").write_text(json.dumps({**settings, "sha256": "0" * 64}))
        return self.folder / "model.json"

    def use(self) -> object:
        load_model_settings(self.folder / "model.pt")
        return None


class Decision(Kind):
    again = False

    def make(self) -> Path:
        content = {"labels": ["background", "a"], "cases": 2, "steps": {"a": [1]}, "gain": {}}
        (self.folder / "postprocessing.json").write_text(json.dumps(content))
        return self.folder / "postprocessing.json"

    def use(self) -> object:
        return [
            list(map(int, step))
            for step in read_steps(postprocessing_file(self.folder / "model.pt"), ["background", "a"])
        ]


class Summary(Kind):
    again = False
    name = "summary.json"

    def make(self) -> Path:
        for fold in (0, 1):
            row = {
                "case": f"c{fold}", "label": "a", "dice": 0.5, "nsd": float("nan"), "hd95_mm": float("inf"),
                "predicted_voxels": 1, "reference_voxels": 2,
            }  # fmt: skip
            write_tables(self.folder / f"fold_{fold}", [row], ["a"], 1.0)
            save(self.folder / f"fold_{fold}/predictions/c{fold}_seg.nii.gz", np.ones((2, 2, 2), np.uint8))
        return self.folder / "fold_0" / self.name

    def use(self) -> object:
        pool_folds(str(self.folder), ["a"], 1.0)
        return json.dumps(read_summary(self.folder, "cases")) if self.file.is_file() else None


class Scores(Summary):
    name = "cases.csv"

    def use(self) -> object:
        comparison._scores(str(self.folder / "fold_0"))
        return None


class Probabilities(Kind):
    again = False

    def make(self) -> Path:
        about = {"scan": "a.nii.gz", "labels": {"names": ["background", "a"], "values": [0, 1]}}
        path = self.folder / "a.npz"
        write_probabilities(path, (2, 3, 4, 5), np.eye(4), about, iter([torch.ones(2, 3, 4, 5).half()]))
        return path

    def use(self) -> object:
        return [volume.tolist() for volume in ProbabilityFile(self.file).volumes()]


KINDS = (
    Checked, Splits, Plan, PlannedFor, Cached, Volume, Checkpoint, Progress, Masks, Report, Tuned, Halves, Lock, Model,
    Decision, Summary, Scores, Probabilities,
)  # fmt: skip


def other_table(content: bytes, rng: random.Random) -> bytes:
    """Change cells, lines and columns of a table."""
    rows = list(csv.reader(io.StringIO(content.decode())))
    for _ in range(rng.randint(1, 3)):
        row = rng.choice(rows)
        if rng.random() < 0.6:
            cells = [*map(str, JUNK[:20]), "nan", "-inf", "1e400", '"', "a,b", "=1", "\udce9"]
            row[rng.randrange(len(row))] = rng.choice(cells)
        else:
            place = rows.index(row)
            rows[place : place + 1] = rng.choice(([row[:-1]], [[*row, "x"]], [row, rows[0]], []))
        rows = [row for row in rows if row] or [["x"]]
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def other_tensors(content: bytes, rng: random.Random) -> bytes:
    """Change parts of what torch saved, and save it whole again."""
    found = torch.load(io.BytesIO(content), weights_only=True)
    part, path = found, []
    while isinstance(part, dict) and part and (not path or rng.random() < 0.5):
        path.append((part, key := rng.choice(sorted(part, key=str))))
        part = part[key]
    inner, key = path[-1]
    if rng.random() < 0.3:
        del inner[key]
    else:
        inner[key] = rng.choice([*JUNK, torch.zeros(3, 3), torch.full((1, 2), float("nan"))])
    buffer = io.BytesIO()
    torch.save(rng.choice([found, found, found, rng.choice(JUNK)]), buffer)
    return buffer.getvalue()


def other_object(content: bytes, rng: random.Random) -> bytes:
    """Save something else by torch; of a cached case other numbers could not be told from its own."""
    parts = (
        (0, {}, {}),
        (1, 3, {}),
        (1, {"image": "a"}, {"image": {}}),
        (1, {}, {"image": {}}),
        (1, {"image": {}}, {0: 1}),
    )
    lists = [{"files": ["x"] * count, "values": values, "meta": meta} for count, values, meta in parts]
    buffer = io.BytesIO()
    torch.save(rng.choice([*JUNK, *lists]), buffer)
    return buffer.getvalue()


def other_bytes(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return rng.choice((
        b"", content[:at], content[at:], content + content, rng.randbytes(rng.randrange(1, 2000)),
        content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :], bytes(len(content)), content[:at] + b"\x00",
    ))  # fmt: skip


def damage(file: Path, content: bytes, rng: random.Random, elsewhere: Path) -> str:
    """Put something else in the place of a file; return what."""
    if rng.random() < 0.12:
        where = rng.choice(("an empty folder", "a folder", "a link to nothing", "a link to another's file"))
        if "folder" in where:
            file.mkdir()
            if where == "a folder":
                (file / "own").write_text("kept")
        else:
            file.symlink_to(elsewhere if "another" in where else file.with_name("nothing"))
        return where
    changes = {".csv": other_table, ".json": lambda c, r: mutated(json.loads(c), r)}
    tensors = other_tensors if file.name == "checkpoint.pt" else other_object
    change = changes.get(file.suffix, tensors if file.suffix == ".pt" else other_bytes)
    change = change if rng.random() < 0.7 else other_bytes
    file.write_bytes(change(content, rng))
    return f"{change.__name__} {file.read_bytes()[:300]!r}"


def emptied(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)


def attempt(kind: Kind, said: str) -> object:
    """Use a file; return what comes out, or the one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return kind.use()
    except UserError as e:
        return e
    except BaseException as e:
        raise AssertionError(said) from e


def trial(kind: Kind, before: Path, expected: object, seed: int, elsewhere: Path) -> str:
    """Damage a file, use it, and look that nothing else was lost; return what became of it."""
    shutil.rmtree(kind.folder)
    shutil.copytree(before, kind.folder)
    rng = random.Random(seed)
    content = kind.file.read_bytes()
    kind.file.unlink()
    what = damage(kind.file, content, rng, elsewhere)
    said = f"seed {seed}, {what}"
    found = attempt(kind, said)
    if isinstance(found, UserError):
        assert 0 < len(str(found).strip()) < 20_000, said
        str(found).encode()
        assert not kind.again or "folder" in what, said
    elif kind.again:
        assert found == expected, said
    assert elsewhere.read_text() == "of another", said
    if what == "a folder":
        assert (kind.file / "own").is_file() or kind.file.is_file() or not kind.file.exists(), said
    assert not list(kind.folder.rglob("*.part")), said
    return "refused" if isinstance(found, UserError) else "used"


def run(kind: type[Kind], seeds: list[int], folder: Path, patch: pytest.MonkeyPatch) -> Counter:
    (folder / "work").mkdir()
    (elsewhere := folder / "elsewhere").write_text("of another")
    made = kind(folder / "work", patch)
    shutil.copytree(folder / "work", folder / "before")
    expected = made.use()
    return Counter(trial(made, folder / "before", expected, seed, elsewhere) for seed in seeds)


def inputs(ordinary: bool) -> list[int]:
    return [seed for seed in range(INPUTS) if (seed % SHARE == 0) == ordinary]


def of_torch(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


FOUND: dict[str, tuple[type[Kind], Callable[[bytes], bytes]]] = {  # once ended in tracebacks or in other results
    "records of another kind": (Checked, lambda old: json.dumps(dict.fromkeys(json.loads(old), 7)).encode()),
    "a record with other voxels": (Checked, lambda old: old.replace(b"[18, 18, 18]", b"[18, 18, 19]")),
    "digests that are none": (Cached, lambda old: json.dumps(dict.fromkeys(json.loads(old), 3)).encode()),
    "digests cut": (Cached, lambda old: json.dumps({k: v[:2] for k, v in json.loads(old).items()}).encode()),
    "a list as a cached case": (Volume, lambda _: of_torch([1, 2])),
    "a plan that is no text": (Plan, lambda _: b"\xff\x00"),
    "weights of text in a checkpoint": (
        Checkpoint,
        lambda old: of_torch(torch.load(io.BytesIO(old)) | {"model": {"weight": "a", "bias": "b"}}),
    ),
    "a number as optimizer": (Checkpoint, lambda old: of_torch(torch.load(io.BytesIO(old)) | {"optimizer": 1})),
    "an epoch that is no number": (Progress, lambda _: b"epoch,train/loss\r\nnan,1\r\n"),
    "a log that is no text": (Progress, lambda _: b"\xff\xfe\x00"),
    "a lock that is no text": (Lock, lambda _: b"\xff\xfe"),
    "a summary without rows": (Summary, lambda _: b'{"cases": [{"case": 1}], "summary": []}'),
    "a summary of another class": (Summary, lambda old: old.replace(b'"a"', b'"x"')),
    "a summary without voxels": (Summary, lambda old: old.replace(b"predicted_voxels", b"voxels")),
    "steps that are no labels": (Decision, lambda old: old.replace(b"[1]", b'["x"]')),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_made_again_or_refused(name, tmp_path, monkeypatch):
    kind, change = FOUND[name]
    made = kind(tmp_path, monkeypatch)
    content, expected = made.file.read_bytes(), made.use()
    made.file.unlink(missing_ok=True)  # which the mapped voxels of a cached case keep
    made.file.write_bytes(change(content))
    found = attempt(made, name)
    assert found == expected if made.again or kind is Checkpoint else True


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_or_a_link_in_its_place_is_kept(kind, tmp_path, monkeypatch):
    (elsewhere := tmp_path / "elsewhere").write_text("of another")
    (tmp_path / "work").mkdir()
    made = kind(tmp_path / "work", monkeypatch)
    made.file.unlink()
    made.file.symlink_to(elsewhere)
    attempt(made, "a link")
    assert elsewhere.read_text() == "of another"
    emptied(made.file)
    (made.file / "own").mkdir(parents=True)
    attempt(made, "a folder")
    assert [*made.file.parent.glob("**/own")]


@pytest.mark.parametrize("kind", [Splits, Model, Decision])
def test_a_link_to_nothing_is_not_taken_for_no_file(kind, tmp_path, monkeypatch):
    made = kind(tmp_path, monkeypatch)
    made.file.unlink()
    made.file.symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=str(made.file)):
        made.use()


@pytest.fixture(autouse=True)
def quiet(monkeypatch, caplog):
    """Say nothing, and sync nothing to the disk."""
    caplog.set_level("CRITICAL", "mednext")
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_damaged_files_is_made_again_or_refused(kind, tmp_path, monkeypatch):
    assert run(kind, inputs(ordinary=True), tmp_path, monkeypatch).total() == INPUTS / SHARE


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_every_other_damaged_file_is_made_again_or_refused(kind, tmp_path, monkeypatch):
    print(kind.__name__, dict(run(kind, inputs(ordinary=False), tmp_path, monkeypatch)))
