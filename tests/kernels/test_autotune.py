"""What `kernels="auto"` measures on a GPU, with candidates and a clock of these tests, on the CPU."""

import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from scripts.kernels import REFERENCE, TRITON, TUNER, autotune, choose_kernels, trial, triton_ops
from scripts.kernels.autotune import Tuner
from scripts.kernels.backend import BlockKind
from scripts.mednext import create_mednext

ROOT = Path(__file__).parents[2]
BLOCK = BlockKind(3, 1, False, 8, 16, False)
KINDS = [
    BLOCK,
    BLOCK._replace(made=4),
    BLOCK._replace(stride=2, made=16),
    BLOCK._replace(stride=2, transposed=True, made=4),
    BLOCK._replace(kernel_size=5, grn=True),
]


def image(edge=4, channels=8, cases=1, dtype=torch.float32):
    return torch.zeros(cases, channels, edge, edge, edge, dtype=dtype)


class Fake:
    """Stock operators by another name, which a clock says take so many seconds; `fault` spoils what they do."""

    def __init__(self, name="fake", seconds=0.5, fault=None):
        self.name, self.seconds, self.fault = name, seconds, fault or (lambda y, _: y)
        self.runs, self.saw = 0, []

    def unsuitable(self, x, kernel_size=None):
        return triton_ops.Triton().unsuitable(x, kernel_size)

    def incomplete(self, x):
        return None

    def depthwise(self, x, *rest):
        self.runs += 1
        return self.fault(REFERENCE.depthwise(x, *rest)[0], x), None

    def mlp(self, *arguments):
        return REFERENCE.mlp(*arguments)

    def pointwise(self, *arguments):
        return REFERENCE.pointwise(*arguments)


class FakeClock:
    """Says that stock operators take a second, and candidates what they say; time passes only while it measures."""

    def __init__(self, candidates, jumps=0.0):
        self.candidates, self.moment, self.jumps, self.measured = candidates, 0.0, jumps, 0

    def now(self):
        self.moment += self.jumps
        return self.moment

    def seconds(self, run, device):
        before = [c.runs for c in self.candidates]
        run()
        ran = [c.seconds for c, runs in zip(self.candidates, before, strict=True) if c.runs > runs]
        self.moment += (taken := ran[0] if ran else 1.0)
        self.measured += 1
        return taken

    def settle(self, device):
        pass


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton_ops, "_missing", lambda device: None)
    return tmp_path / "mednext"


def tuner(*candidates, **options):
    return Tuner(candidates, FakeClock(candidates, options.pop("jumps", 0.0)), **options)


def chosen(tuned, x=None, block=BLOCK):
    found = tuned.choose(image() if x is None else x, block)
    return found and found.name


def said(tuned, caplog):
    caplog.clear()
    with caplog.at_level(logging.INFO, "mednext"):
        tuned.say()
    assert len(caplog.messages) <= 1
    return caplog.messages[0] if caplog.messages else None


class TestChoice:
    @pytest.mark.parametrize(
        ("seconds", "expected"),
        [([0.5], "0"), ([1.2], None), ([0.97], None), ([0.94], "0"), ([0.8, 0.4], "1"), ([0.4, 0.8], "0"), ([], None)],
    )
    def test_the_fastest_is_taken_where_it_is_clearly_faster_than_stock(self, seconds, expected):
        assert chosen(tuner(*(Fake(str(n), s) for n, s in enumerate(seconds)))) == expected

    @pytest.mark.parametrize("block", KINDS, ids=str)
    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("trains", [False, True])
    def test_every_kind_of_block_is_tried(self, block, autocast, trains):
        tuned = tuner(Fake())
        with torch.set_grad_enabled(trains), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert chosen(tuned, image(8), block) == "fake", tuned.news
        (name,) = tuned.news
        assert ("bfloat16 autocast, k" in name) == autocast
        assert ("training" in name) == trains

    def test_it_is_by_kind_width_precision_gradients_and_size(self):
        fake = Fake()
        tuned = tuner(fake)
        uses = [(image(), b) for b in KINDS]
        uses += [(image(8), BLOCK), (image(channels=4), BLOCK), (image(dtype=torch.bfloat16), BLOCK)]
        for number, (x, block) in enumerate(uses, start=1):
            for x_again in (x, x.clone(), torch.cat([x, x[..., :1]], -1)):  # a little larger
                assert chosen(tuned, x_again, block) == "fake"
            assert len(tuned.news) == number
        with torch.no_grad():
            chosen(tuned)
        assert len(tuned.news) == len(uses) + 1

    def test_a_candidate_is_not_tried_where_it_is_unsuitable(self):
        fake = Fake()
        tuned = tuner(fake)
        assert chosen(tuned, torch.zeros(1, 8, 4, 4)) is None
        assert chosen(tuned, image(dtype=torch.float64)) is None
        assert chosen(tuned, block=BLOCK._replace(kernel_size=9)) is None
        assert (fake.runs, tuned.news) == (0, {})

    def test_pairs_are_repeated_while_they_differ(self):
        steady, wild = Fake("steady"), Fake("wild")
        of_steady, of_wild = tuner(steady), tuner(wild)
        times, counted = itertools.cycle([1, 0.5, 1, 0.7]), itertools.count()
        of_wild.clock.seconds = lambda run, device: (next(counted), next(times))[1]
        chosen(of_steady), chosen(of_wild)
        (of_use,), (of_other,) = (t.news.values() for t in (of_steady, of_wild))
        result, other = of_use["steady"], of_other["wild"]
        assert (result.ratio, result.spread, result.milliseconds, result.stock_milliseconds) == (0.5, 0, 500, 1000)
        assert 0.5 <= other.ratio <= 0.7 < 1 < 1 + other.spread
        assert (of_steady.clock.measured, next(counted)) == (2 * trial.FEWEST, 2 * trial.MOST)


def fails_in_backward(y, x):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("out of resources: shared memory")

    return Fails.apply(y)


def raises(error):
    def fault(y, x):
        raise error

    return fault


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling .."),
]


class TestLeftOut:
    FAULTS = {  # noqa: RUF012 (constant)
        "does not compile": (raises(SyntaxError("at 12:3:\n  a += b\n  ^\nno such type")), "SyntaxError: no such type"),
        "does not launch": (raises(RuntimeError("bad argument\nsee the manual")), "RuntimeError: bad argument"),
        "says nothing": (raises(AssertionError()), "AssertionError: no message"),
        "fails in backward": (fails_in_backward, "RuntimeError: out of resources: shared memory"),
        "inaccurate": (lambda y, _: y * 1.00001, "inaccurate: the convolution: the output has an error"),
        "inaccurate gradient": (
            lambda y, _: y.detach() + 1.00001 * (y - y.detach()),
            "inaccurate: the convolution: gr",
        ),
        "no number": (lambda y, _: y * torch.nan, "inaccurate: the convolution: the output has an error of nan"),
        "infinite": (lambda y, _: y + torch.inf, "inaccurate: the convolution: the output has an error"),
        "other precision": (lambda y, _: y.bfloat16(), "the output is torch.bfloat16 of"),
        "other shape": (lambda y, _: y[:, :, 1:], "expected torch.float32 of"),
        "wrong in large": (lambda y, x: y.roll(int(x.shape[2] > trial.SIDE), 2), "at the size in use"),
    }

    @pytest.mark.parametrize("what", FAULTS)
    def test_what_fails_or_is_inaccurate_is_left_out_with_its_reason(self, what, cache, caplog):
        fault, reason = self.FAULTS[what]
        x = torch.zeros(1, 8, trial.SIDE + 4, 4, 4)
        bad, good = Fake("bad", 0.1, fault), Fake("good", 0.9)
        tuned = tuner(bad, good)
        assert chosen(tuned, x) == "good"
        (file,) = cache.iterdir()
        ((_, found),) = json.loads(file.read_text())["blocks"].items()
        assert reason in found["bad"]["left_out"]
        assert found["good"]["ratio"] == 0.9
        assert "1 times bad: " in (line := said(tuned, caplog))
        assert reason in line
        runs = bad.runs
        assert chosen(tuner(bad, good), x) == "good"
        assert bad.runs == runs  # nor tried again

    @pytest.mark.parametrize("error", NO_MEMORY, ids=repr)
    def test_what_runs_out_of_memory_is_left_out_for_now(self, error):
        fake = Fake(fault=raises(error))
        tuned = tuner(fake)
        assert chosen(tuned) is None
        assert chosen(tuned) is None
        fake.fault = lambda y, _: y
        assert chosen(tuner(fake)) == "fake"

    @pytest.mark.parametrize(("error", "expected"), [*[(e, "fake") for e in NO_MEMORY], (RuntimeError("no"), None)])
    def test_where_only_stock_runs_out_of_memory_the_kernel_is_taken_for_now(self, error, expected, monkeypatch):
        fake = Fake(seconds=2)
        monkeypatch.setattr(trial, "_inexact", lambda *_: None)
        with torch.no_grad():
            with monkeypatch.context() as patch:
                patch.setattr("scripts.kernels.reference.Reference.mlp", lambda *a, **b: raises(error)(None, None))
                fake.mlp = lambda y, *_: y
                assert chosen(tuner(fake)) == expected
            del fake.mlp
            assert chosen(tuner(fake)) is None

    def test_a_kernel_that_breaks_the_gpu_is_left_out_from_then_on(self):
        fake = Fake(fault=raises(RuntimeError("an illegal memory access was encountered")))
        tuned = tuner(fake)
        tuned.clock.settle = lambda device: raises(RuntimeError("an illegal memory access"))(None, None)
        with pytest.raises(RuntimeError, match=r"cpu does not answer any more .* fake was tried on .* start again"):
            chosen(tuned)
        fake.fault = None
        assert chosen(tuner(fake)) is None

    @pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles here")
    def test_triton_itself_is_left_out_in_bfloat16_which_its_interpreter_cannot_multiply(self):
        pytest.importorskip("triton")
        tuned = Tuner([TRITON], limit=600)
        with torch.no_grad():
            assert chosen(tuned, image(2, dtype=torch.bfloat16)) is None
        ((found,),) = (of_use.values() for of_use in tuned.news.values())
        assert found.left_out.startswith("inaccurate: what follows the convolution: the output has an error of ")


class TestLimit:
    def test_what_is_not_measured_in_time_stays_stock_is_said_and_measured_by_the_next_process(self, caplog):
        fake = Fake()
        tuned = tuner(fake, limit=20.0)  # two measurements take 15 s
        assert [chosen(tuned, block=kind) for kind in KINDS] == ["fake"] * 3 + [None] * 2
        line = said(tuned, caplog)
        assert "fake for 3, stock operators for 2 of 5 kinds of block" in line
        assert "2 not measured within 20 s, which the next process will do; measured in 22 s, remembered in" in line
        assert [chosen(tuned, block=kind) for kind in KINDS] == ["fake"] * 3 + [None] * 2
        assert said(tuned, caplog) is None
        later = tuner(fake, limit=20.0)
        assert [chosen(later, block=kind) for kind in KINDS] == ["fake"] * 5
        assert len(later.news) == 2

    def test_a_compiler_that_does_not_come_back_is_left_alone(self, cache, caplog):
        goes_on = threading.Event()
        slow = Fake("slow", 0.5, lambda y, _: (goes_on.wait(60), y)[1])
        fast = Fake("fast")
        tuned = Tuner([fast, slow], limit=0.7)
        tuned.clock.seconds = lambda run, device: (run(), 0.5)[1]
        assert chosen(tuned) is None
        assert chosen(tuned, block=KINDS[1]) is None  # at once
        assert 0.7 <= tuned.spent < 2.5
        assert fast.runs == (runs := fast.runs)
        goes_on.set()
        (thread,) = [t for t in threading.enumerate() if t.name == "mednext measures kernels"] or [None]
        if thread:
            thread.join(10)
        assert slow.runs <= 1  # it gives up when it comes back
        assert "slow" not in next(iter(json.loads(next(cache.iterdir()).read_text())["blocks"].values()))
        assert "1 not measured within 1 s" in said(tuned, caplog)
        assert fast.runs == runs


class TestSurroundings:
    def test_nothing_of_the_caller_changes(self):
        states = [torch.get_rng_state(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")]
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            assert chosen(tuner(Fake())) == "fake"
        with torch.no_grad():
            assert chosen(tuner(Fake())) == "fake"
        with torch.inference_mode():
            assert chosen(tuner(Fake())) == "fake"
        assert saved == []
        assert torch.equal(torch.get_rng_state(), states[0])
        assert [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")] == states[1:]

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_checkpointed_block_may_measure_and_its_backward_pass_does_not(self, reentrant):
        tuned = tuner(Fake())
        measured = []

        def part(x):
            chosen(tuned, x.detach())
            measured.append(len(tuned.decided))
            return x.square().exp()

        x = image().requires_grad_()
        checkpoint(part, x, use_reentrant=reentrant).sum().backward()
        assert measured == [1, 1]
        assert x.grad is not None

    def test_nothing_is_measured_while_a_graph_is_made(self, monkeypatch):
        fake = Fake()
        tuned = tuner(fake)

        class Net(torch.nn.Module):
            def forward(self, x):
                return x + float(tuned.choose(x, BLOCK) is not None)

        assert torch.equal(torch.compile(Net(), backend="eager", fullgraph=True)(image()), image())
        assert torch.equal(torch.jit.trace(Net(), image(), check_trace=False)(image()), image())
        for strict in (True, False):
            torch.export.export(Net(), (image(),), strict=strict)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            assert chosen(tuned) is None
        assert (fake.runs, tuned.news) == (0, {})
        assert chosen(tuned) == "fake"  # afterwards
        torch.compiler.reset()
        for dynamic in (False, True):
            compiled = torch.compile(Net(), backend="eager", fullgraph=True, dynamic=dynamic)
            assert torch.equal(compiled(image(6)), image(6) + 1)  # what is remembered, of any size
        with torch.no_grad():
            assert torch.equal(torch.compile(Net(), backend="eager", fullgraph=True)(image()), image())

    def test_threads_measure_once(self):
        fake = Fake()
        tuned = tuner(fake)
        found = []
        threads = [threading.Thread(target=lambda: found.append(chosen(tuned))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == ["fake"] * 4
        assert tuned.clock.measured == 2 * trial.FEWEST

    RANK = """
import os, sys, torch, torch.distributed as dist
folder, rank = sys.argv[1], int(sys.argv[2])
sys.path.insert(0, "tests/kernels")
os.environ["XDG_CACHE_HOME"] = os.path.join(folder, str(rank))
from scripts.kernels import triton_ops
triton_ops._missing = lambda device: None
from test_autotune import BLOCK, KINDS, Fake, chosen, tuner
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
if rank == 0:
    chosen(tuner(Fake()))  # is known to one of them
total = torch.zeros(1)
tuned = tuner(Fake(seconds=0.5 + rank), limit=[60, 10][rank])
for kind in KINDS:
    total += chosen(tuned, block=kind) is not None
    dist.all_reduce(total)
assert len(tuned.news) == [4, 5][rank]
dist.destroy_process_group()
"""

    def test_each_process_measures_its_own_device_and_waits_for_nobody(self, tmp_path):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        commands = [[sys.executable, "-c", self.RANK, str(tmp_path), str(rank)] for rank in range(2)]
        options = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
        for process in [subprocess.Popen(command, **options) for command in commands]:
            _, error = process.communicate(timeout=120)
            assert process.returncode == 0, error[-2000:]
        assert len([*tmp_path.glob("?/mednext/kernels-cpu-*.json")]) == 2


def test_a_network_says_in_one_line_what_a_pass_measured(caplog):
    tuned = tuner(Fake("a", 0.5), Fake("b", 0.25, lambda y, _: y * 1.1))
    assert chosen(tuned, block=KINDS[1]) == chosen(tuned) == "a"
    line = said(tuned, caplog)
    assert line.startswith(
        "kernels on cpu: a for 2, stock operators for 0 of 2 kinds of block (0.50 to 0.50 of the time"
    )
    assert "; left out: 2 times b: inaccurate: the convolution: the output has an error of" in line
    assert line.endswith(f"remembered in {tuned.where}")
    assert said(tuned, caplog) is None
    TUNER.news, TUNER.machines = {"x": {}}, {torch.device("cpu"): {"gpu": "Some GPU"}}
    caplog.clear()
    try:
        with caplog.at_level(logging.INFO, "mednext"), torch.no_grad():
            network = create_mednext(1, 2, "S", kernels="reference").eval()
            network(torch.zeros(1, 1, 17, 1, 1))
            network(torch.zeros(1, 1, 17, 1, 1))
    finally:
        TUNER.forget()
    assert [m.partition(":")[0] for m in caplog.messages] == ["kernels on Some GPU"]


def test_auto_asks_on_a_gpu_alone_and_for_whole_blocks(monkeypatch):
    class OnGPU(torch.Tensor):
        is_cuda = True

    fake = Fake()
    monkeypatch.setattr(TUNER, "choose", lambda x, block: fake if block is BLOCK else None)
    x = image().as_subclass(OnGPU)
    assert choose_kernels("auto", x, block=BLOCK) is fake
    assert choose_kernels("auto", x, "a layer has hooks", block=BLOCK) is REFERENCE
    assert choose_kernels("auto", x) is REFERENCE
    assert choose_kernels("auto", x, block=KINDS[1]) is REFERENCE
    assert choose_kernels("reference", x, block=BLOCK) is REFERENCE
    assert choose_kernels("auto", image(), block=BLOCK).name == "cpu"
    assert TUNER.candidates == [TRITON]
    assert TUNER.limit == autotune.SECONDS == 60


def test_a_gpu_is_timed_by_its_own_events(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("idle"))
    assert trial.Clock().seconds(lambda: done.append("run"), torch.device("cuda:0")) == 0.25
    assert done == ["idle", "record", "run", "record", "wait"]
    assert trial.Clock().seconds(lambda: None, torch.device("cpu")) < 0.25
