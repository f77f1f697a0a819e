"""Patches are drawn by nnU-Net's rule, and cut where they were drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scripts.data.labels import Labels
from scripts.training import sampling
from scripts.training.sampling import PatchSampler, RandPatchd, case_weights, crop_size, each_once
from scripts.utils.errors import UserError


class TestSampler:
    """Which cases, and which of their patches must show foreground."""

    def drawn(self, batch_size, iterations=500, cases=7, seed=0):
        torch.manual_seed(seed)
        return list(PatchSampler(range(cases), batch_size, iterations))

    @pytest.mark.parametrize(("batch_size", "forced"), [(2, [0, 1]), (3, [0, 0, 1]), (9, [0] * 6 + [1] * 3)])
    def test_the_last_third_of_a_batch_is_forced_as_in_nnunet(self, batch_size, forced):
        assert [f for _, f in self.drawn(batch_size, iterations=3)] == [bool(f) for f in forced] * 3

    def test_a_third_of_single_patches_is_forced(self):
        share = np.mean([f for _, f in self.drawn(1, iterations=3000)])
        assert abs(share - 1 / 3) < 4 * np.sqrt(2 / 9 / 3000)

    def test_cases_are_drawn_evenly_and_with_replacement(self):
        counts = np.bincount([case for case, _ in self.drawn(2)], minlength=7)
        assert counts.sum() == 1000
        assert abs(counts - 1000 / 7).max() < 4 * np.sqrt(1000 / 7)

    def test_the_same_seed_draws_the_same_cases(self):
        assert self.drawn(2) == self.drawn(2)
        assert self.drawn(2) != self.drawn(2, seed=1)

    def test_a_rare_label_is_in_about_its_share_of_the_drawn_cases(self):
        cases = [{"case": str(n), "image": f"{n}.nii.gz"} for n in range(100)]
        records = [{"file": f"{n}.nii.gz", "labels": [9, 5, int(n == 7), 0, int(n == 3)]} for n in reversed(range(100))]
        labels = Labels(["background", "liver", "cyst", "absent"], [0, 1, 2, 3], ignore_value=4)
        assert case_weights(records, cases, labels, 0.0) is None
        weights = case_weights(records, cases, labels, 0.1)
        assert weights == [1.0] * 7 + [10.0] + [1.0] * 92
        torch.manual_seed(0)
        drawn = [case for case, _ in PatchSampler(cases, 2, 2000, weights)]
        assert drawn.count(7) / 4000 == pytest.approx(10 / 109, abs=0.02)
        assert len(set(drawn)) == 100
        assert (
            case_weights([{"file": c["image"], "labels": [9, 5, 5, 5, 0]} for c in cases], cases, labels, 0.1)
            == [1] * 100
        )


def test_crop_of_the_paper():
    assert crop_size([128, 128, 128]) == [205, 205, 205]


class TestRandPatch:
    """nnU-Net's sampling rule."""

    def draw(self, count, forced=False, indices=None, ignore=None, label=None, shape=(20, 30, 40)):
        cut = RandPatchd(["image"], (16, 16, 16), (8, 8, 8), ignore=ignore)
        cut.set_random_state(seed=1)
        data = {"image": torch.arange(np.prod(shape)).reshape(1, *shape), "label_cls_indices": indices or [[], []]}
        data["foreground"], data["label"] = forced, label
        return np.array([cut.first_voxel(data) for _ in range(count)]), cut(data)["image"], data

    def test_random_patches_reach_half_the_overhang_on_both_sides(self):
        starts, _, _ = self.draw(4000)
        assert starts.min(axis=0).tolist() == [-4, -4, -4]
        assert starts.max(axis=0).tolist() == [8, 18, 28]  # shape + 4 - 16

    def test_forced_patches_have_the_voxel_in_the_middle(self):
        voxel = np.ravel_multi_index((19, 29, 39), (20, 30, 40))  # the last corner: hangs over
        starts, _, _ = self.draw(10, forced=True, indices=[[0], [voxel]])
        assert (starts == (11, 21, 31)).all()

    def test_classes_are_drawn_evenly_whatever_their_size(self):
        many = [np.ravel_multi_index((10, 15, z), (20, 30, 40)) for z in range(10, 20)]
        one = [np.ravel_multi_index((15, 15, 15), (20, 30, 40))]
        starts, _, _ = self.draw(2000, forced=True, indices=[[], many, one, []])
        share = (starts[:, 0] == 7).mean()
        assert abs(share - 0.5) < 4 * np.sqrt(0.25 / 2000)  # four standard errors

    def test_without_foreground_a_forced_patch_lies_anywhere(self):
        starts, _, _ = self.draw(200, forced=True, indices=[[5], [], []])
        assert len(np.unique(starts[:, 2])) > 10

    def test_where_voxels_are_to_be_ignored_every_patch_shows_an_annotated_one_drawn_evenly(self):
        cut = RandPatchd(["image"], (16, 16, 16), (8, 8, 8), ignore=2)
        cut.set_random_state(seed=1)
        label = torch.full((1, 20, 30, 40), 2)
        label[:, 10, 10:20, 15:25] = 0  # 100 voxels of background
        label[:, 11, 10:20, 20] = 1  # 10 voxels of a label
        one = [int(np.ravel_multi_index((11, 12, 20), (20, 30, 40)))]  # what a cap on the indices would leave of each
        far = [int(np.ravel_multi_index((19, 12, 20), (20, 30, 40)))]
        data = {"image": label.float(), "label": label, "label_cls_indices": [one, one, far], "foreground": False}
        starts = np.array([cut.first_voxel(data) for _ in range(1000)])
        assert set(starts[:, 0]) == {2, 3}
        share = (starts[:, 0] == 3).mean()
        assert abs(share - 1 / 11) < 4 * np.sqrt(10 / 121 / 1000)
        forced = np.array([cut.first_voxel({**data, "foreground": True}) for _ in range(50)])
        assert set(forced[:, 0]) == {3}

    def test_a_scan_that_nobody_annotated_is_drawn_from_anywhere(self):
        starts, _, _ = self.draw(20, indices=[[], [], [5]], ignore=2, label=torch.full((1, 20, 30, 40), 2))
        assert len(np.unique(starts[:, 2])) > 5

    def test_what_hangs_over_is_zero_and_the_rest_is_the_scan(self):
        voxel = np.ravel_multi_index((0, 0, 39), (20, 30, 40))
        _, patch, data = self.draw(1, forced=True, indices=[[], [voxel]])
        assert patch.shape == (1, 16, 16, 16)
        assert (patch[0, :4] == 0).all()  # pads end at half the overhang: 4 voxels before the first
        assert torch.equal(patch[0, 4:, 4:, :9], data["image"][0, :12, :12, 31:])
        assert (patch[0, :, :, 9:] == 0).all()

    def test_a_scan_smaller_than_the_patch_is_padded(self):
        _, patch, data = self.draw(1, shape=(5, 6, 7))
        assert patch.shape == (1, 16, 16, 16)
        assert set(patch.unique().tolist()) == set(data["image"].unique().tolist())


@pytest.mark.parametrize(("cases", "processes"), [(0, 2), (2, 2), (5, 2), (7, 3)])
def test_every_case_is_dealt_to_one_process(cases, processes, monkeypatch):
    monkeypatch.setattr(sampling.dist, "get_world_size", lambda: processes)
    dealt = []
    for rank in range(processes if cases else 1):
        monkeypatch.setattr(sampling.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(sampling.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(sampling.dist, "is_available", lambda: True)
        dealt += each_once(range(cases))
    assert sorted(dealt) == [*range(cases)]


def test_fewer_cases_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(sampling.dist, "get_world_size", lambda: 4)
    with pytest.raises(UserError, match="3 cases are held out for 4 processes; expected one for each: start"):
        each_once(range(3))
