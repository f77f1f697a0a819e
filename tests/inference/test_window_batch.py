"""How many windows are computed at once, with the memory of a GPU of these tests."""

import logging
from functools import partial

import pytest
import torch

from scripts.inference import window_batch
from scripts.inference.sliding_window import SlidingWindowInferer
from scripts.inference.window_batch import MOST, WindowBatches

CUDA = torch.device("cuda:0")
NO_MEMORY = {
    "PyTorch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "the driver": RuntimeError("CUDA error: out of memory"),
}


class FakeGPU:
    """A GPU of so many bytes, of which others have some, and on which a window needs 100."""

    KEPT = 40  # by PyTorch, for tensors to come

    def __init__(self, monkeypatch, size=10_000):
        self.size, self.others, self.peak, self.error = size, 0, 0, NO_MEMORY["PyTorch"]
        self.tries = 0
        functions = {
            "mem_get_info": lambda device: (self.size - self.others - self.KEPT, self.size),
            "memory_reserved": lambda device: 70,
            "memory_allocated": lambda device: 70 - self.KEPT,
            "max_memory_allocated": lambda device: 70 - self.KEPT + self.peak,
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", 0),
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def take(self, windows):
        self.tries += 1
        assert self.tries < 200, "it goes on for ever"
        if self.others + 100 * windows > self.size:
            raise self.error
        self.peak = max(self.peak, 100 * windows)


@pytest.fixture
def gpu(monkeypatch):
    return FakeGPU(monkeypatch)


def sizes(batches, count, gpu=None, device=CUDA):
    """Return the sizes of the batches; every window comes back once, in order, with its own scores."""
    found = []

    def predict(some):
        if gpu is not None:
            gpu.take(len(some))
        found.append(len(some))
        return torch.tensor(some)[:, None].float()

    made = [*batches.compute(range(count), predict, device)]
    assert [(window, score.tolist()) for window, score in made] == [(n, [float(n)]) for n in range(count)]
    return found


@pytest.mark.parametrize(
    ("size", "others", "expected"),
    [
        (10_000, 0, [1, 8, 8, 3]),  # at most so many
        (500, 0, [1, 4, 4, 4, 4, 3]),  # 0.8 of the free memory
        (500, 200, [1, *[2] * 9, 1]),
        (240, 0, [1] * 20),
        (100, 0, [1] * 20),
    ],
)
def test_as_many_as_fit_into_the_free_memory(gpu, size, others, expected):
    gpu.size, gpu.others = size, others
    assert sizes(WindowBatches(), 20, gpu) == expected
    assert MOST == 8


def test_what_one_needs_and_what_is_free_is_looked_at_every_time(gpu):
    batches = WindowBatches()
    assert [sizes(batches, 5, gpu) for _ in range(3)] == [[1, 4], [5], [5]]
    assert sizes(batches, 0, gpu) == []
    gpu.others = 9_700  # somebody came
    assert sizes(batches, 5, gpu) == [2, 2, 1]
    gpu.others, batches.need = 0, 4_000  # the first window also measured kernels, say
    assert sizes(batches, 9, gpu) == [2, 7]


@pytest.mark.parametrize("said_by", NO_MEMORY)
def test_a_batch_that_runs_out_of_memory_is_halved_and_no_larger_one_tried_again(gpu, monkeypatch, caplog, said_by):
    gpu.error, gpu.size = NO_MEMORY[said_by], 520
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 10_000))  # in pieces
    batches = WindowBatches()
    with caplog.at_level(logging.WARNING, "mednext"):
        assert sizes(batches, 12, gpu) == [1, 4, 4, 3]
        gpu.size = 10_000
        assert sizes(batches, 12, gpu) == [4, 4, 4]
    assert caplog.messages == ["cuda:0: no memory for 8 windows at once, now 4 at most"]


@pytest.mark.parametrize("said_by", NO_MEMORY)
def test_one_window_that_is_too_much_is_an_error(gpu, said_by):
    gpu.error, gpu.size = NO_MEMORY[said_by], 50
    with pytest.raises(RuntimeError) as raised:
        sizes(WindowBatches(), 2, gpu)
    assert raised.value is gpu.error


@pytest.mark.parametrize("error", [RuntimeError("an illegal memory access"), ValueError("out of memory")], ids=repr)
def test_any_other_error_is_raised_at_once(gpu, caplog, error):
    batches = WindowBatches()
    assert sizes(batches, 2, gpu) == [1, 1]
    gpu.error, gpu.size, batches.need = error, 700, 1
    with pytest.raises(type(error)) as raised:
        sizes(batches, 8, gpu)
    assert raised.value is error
    assert (batches.most, caplog.messages) == (MOST, [])


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_elsewhere_windows_are_computed_one_by_one_and_no_gpu_is_asked(device):
    assert sizes(WindowBatches(), 3, device=torch.device(device)) == [1, 1, 1]


class TestInferer:
    """The sliding window on a GPU of these tests, which computes on the CPU in truth."""

    OPTIONS = (
        {},
        {"activation": "softmax", "mirror_axes": [0, 2]},
        {"window_scheme": "nnunet", "full_precision_gb": 0},
    )

    @staticmethod
    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x * 2, x.square() + torch.linspace(0, 1, x.shape[-1]), x.cumsum(dim=2)], dim=1)

    @pytest.fixture
    def gpu(self, monkeypatch):
        monkeypatch.setattr(window_batch, "GPU", "cpu")
        return FakeGPU(monkeypatch)

    def run(self, gpu, monkeypatch, options, roi=(16, 16, 16), size=(40, 33, 21), most=MOST, full=()):
        """Return the sizes of batches; memory runs out for over `most` at once, and in the calls `full`."""
        image = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))
        found = []

        def network(x):
            found.append(len(x))
            if len(x) > most or len(found) in full:
                raise gpu.error
            gpu.take(len(x))
            return self.network(x)

        with monkeypatch.context() as patch:
            patch.setattr(window_batch, "GPU", "cuda")
            expected = SlidingWindowInferer(roi, **options)(image, self.network)
        made = SlidingWindowInferer(roi, **options)(image, network)
        assert torch.equal(made, expected)  # nothing of this network depends on the windows beside
        return found

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_several_windows_at_once_give_what_they_give_one_by_one(self, gpu, monkeypatch, caplog, options):
        passes = 4 if "mirror_axes" in options else 1
        found = self.run(gpu, monkeypatch, options)
        assert found[::passes][:3] == [1, 8, 8]
        assert {*found} > {1, 8}
        assert caplog.messages == []

    def test_slices_are_computed_at_once_too(self, gpu, monkeypatch):
        assert self.run(gpu, monkeypatch, {}, (16, 16, 1), (20, 20, 20))[:3] == [1, 8, 8]

    @pytest.mark.parametrize("said_by", NO_MEMORY)
    def test_smaller_batches_where_memory_runs_out(self, gpu, monkeypatch, caplog, said_by):
        gpu.error = NO_MEMORY[said_by]
        assert self.run(gpu, monkeypatch, {}, most=3)[:6] == [1, 8, 4, 2, 2, 2]
        assert caplog.messages == [
            "cpu: no memory for 8 windows at once, now 4 at most",
            "cpu: no memory for 4 windows at once, now 2 at most",
        ]

    @pytest.mark.parametrize("said_by", NO_MEMORY)
    def test_sums_are_kept_in_ram_where_one_window_beside_them_is_too_much(self, gpu, monkeypatch, caplog, said_by):
        gpu.error = NO_MEMORY[said_by]
        found = self.run(gpu, monkeypatch, {}, full=(2, 3, 4, 5))
        assert found[:6] == [1, 8, 4, 2, 1, 1]
        assert caplog.messages == [
            "cpu: no memory for 8 windows at once, now 4 at most",
            "cpu: no memory for 4 windows at once, now 2 at most",
            "cpu: no memory for 2 windows at once, now 1 at most",
            "cpu: no memory for a scan and the sums of its windows; they are kept in RAM",
        ]

    def test_what_is_too_much_even_so_is_raised_and_other_errors_at_once(self, gpu, caplog):
        def network(x):
            raise error

        image = torch.zeros(1, 1, 16, 16, 16)
        for error, warnings in ((gpu.error, 1), (RuntimeError("illegal memory access"), 0), (ValueError("a"), 0)):
            caplog.clear()
            with pytest.raises(type(error)) as raised:
                SlidingWindowInferer((16, 16, 16))(image, network)
            assert raised.value is error
            assert len(caplog.messages) == warnings

    def test_sums_in_ram_are_of_windows_that_the_device_computed(self):
        image, devices = torch.randn(1, 1, 20, 16, 16), []

        def network(x):
            devices.append(x.device.type)
            return torch.zeros(1, 2, 16, 16, 16)

        inferer = SlidingWindowInferer((16, 16, 16))
        made = inferer._one(image, network, partial(inferer._result, image), torch.device("meta"))
        assert (made.device.type, devices) == ("cpu", ["meta"] * 2)

    def test_a_cpu_runs_out_of_memory_once(self, gpu, monkeypatch, caplog):
        monkeypatch.setattr(window_batch, "GPU", "cuda")
        calls = []

        def network(x):
            calls.append(x)
            raise gpu.error

        with pytest.raises(torch.OutOfMemoryError):
            SlidingWindowInferer((16, 16, 16))(torch.zeros(1, 1, 16, 16, 16), network)
        assert (len(calls), caplog.messages) == (1, [])
