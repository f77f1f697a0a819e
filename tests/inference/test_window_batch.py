"""How many windows are computed at once, with the memory of a GPU of these tests."""

import pytest
import torch

from scripts.inference.window_batch import MOST, WindowBatches

CUDA = torch.device("cuda:0")


class FakeMemory:
    """A GPU of so many bytes, on which a window needs 100."""

    def __init__(self, size, has=0):
        self.size, self.has, self.most = size, has, 0

    def free(self, device):
        assert device == CUDA
        return self.size - self.has

    def watch(self, device):
        self.most = self.has
        return self.has

    def peak(self, device):
        return self.most


def run(batches, count, memory=None, need=100):
    """The sizes of the batches that were computed; every window comes back once, in order, with its own scores."""
    sizes = []

    def scores(some):
        if memory is not None:
            if memory.has + need * len(some) > memory.size:
                raise torch.OutOfMemoryError("CUDA out of memory")
            memory.most = memory.has + need * len(some)
        sizes.append(len(some))
        return torch.tensor(some)[:, None].float()

    made = [*batches.compute(range(count), scores)]
    assert [window for window, _ in made] == [*range(count)]
    assert [score.tolist() for _, score in made] == [[float(n)] for n in range(count)]
    return sizes


@pytest.mark.parametrize(
    ("size", "has", "sizes"),
    [
        (10_000, 0, [1, 8, 8, 3]),  # at most so many
        (500, 0, [1, 4, 4, 4, 4, 3]),  # 0.8 of the free memory
        (500, 200, [1, *[2] * 9, 1]),
        (260, 0, [1, *[2] * 9, 1]),
        (240, 0, [1] * 20),
        (100, 0, [1] * 20),
    ],
)
def test_as_many_as_fit_into_the_free_memory(size, has, sizes):
    memory = FakeMemory(size, has)
    assert run(WindowBatches(CUDA, memory=memory), 20, memory) == sizes
    assert MOST == 8


def test_what_one_needs_is_known_in_the_next_rows():
    memory = FakeMemory(10_000)
    batches = WindowBatches(CUDA, memory=memory)
    assert [run(batches, 5, memory) for _ in range(3)] == [[1, 4], [5], [5]]
    assert run(batches, 0, memory) == []
    memory.has = 9_700  # somebody else came
    assert run(batches, 5, memory) == [2, 2, 1]


def test_a_batch_that_runs_out_of_memory_is_halved_and_no_larger_one_tried_again():
    memory = FakeMemory(520)
    batches = WindowBatches(CUDA, memory=memory)
    memory.free = lambda device: 10_000  # in pieces
    assert run(batches, 12, memory) == [1, 4, 4, 3]
    assert run(batches, 12, memory) == [4, 4, 4]


def test_one_window_that_is_too_much_is_an_error():
    memory = FakeMemory(50)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        run(WindowBatches(CUDA, memory=memory), 2, memory)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_elsewhere_windows_are_computed_one_by_one_and_no_gpu_is_asked(device):
    assert run(WindowBatches(torch.device(device)), 3) == [1, 1, 1]


def test_the_memory_of_a_gpu_is_what_nobody_has_and_what_pytorch_keeps(monkeypatch):
    for name, value in {
        "mem_get_info": (1000, 5000),
        "memory_reserved": 300,
        "memory_allocated": 200,
        "max_memory_allocated": 250,
        "reset_peak_memory_stats": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    batches = WindowBatches(CUDA)
    assert run(batches, 3) == [1, 2]
    assert (batches.need, batches.memory.free(CUDA)) == (50, 1100)
