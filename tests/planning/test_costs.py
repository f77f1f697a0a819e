"""What grids cost, and the commands of what may be trained beside the plan."""

from __future__ import annotations

from conftest import ROOT

from planning.test_planner import record
from planning.test_spacing import CARDIAC
from scripts.planning.costs import Speed, alternatives, compare_grids, measure_speed
from scripts.planning.memory import Network, cpu_step_bytes

SPEED = Speed(4.0, 1.0, "this CPU")
ISOTROPIC = [record((1.0, 1.0, 1.0), (35, 50, 35))]


def test_each_grid_has_a_line_with_its_voxels_patch_memory_and_time():
    found = compare_grids(CARDIAC, Network(1, 4), [1.0, 1.0, 1.0], SPEED)
    names = [line.split(":")[0] for line in found]
    assert names == ["planned, 1 mm", "median", "mixed"]
    assert "median case 384 x 324 x 80, 9.95 M voxels; patch 128 x 128 x 80 sees 13 % of it" in found[0]
    assert f"{cpu_step_bytes([128, 128, 80], Network(1, 4)) / 1e9:.1f} GB" in found[0]
    assert "44 min an epoch" in found[0]  # 250 x 2 patches of 1.31 M voxels, 4 s a million
    assert "33 s a scan" in found[0]  # 5 x 5 windows half over each other, one across


def test_equal_grids_share_a_line_and_impossible_ones_say_so():
    assert len(compare_grids(ISOTROPIC, Network(1, 3), [1.0, 1.0, 1.0], SPEED)) == 1
    found = compare_grids([record((5e-6, 5e-6, 5e-6), (256, 256, 90))], Network(1, 2), [5e-6, 5e-6, 5e-6], SPEED)
    assert found[0].startswith("planned, median, mixed: 5e-06 x 5e-06 x 5e-06 mm")
    assert found[1].startswith("1 mm: ")
    assert found[1].endswith("too few or too many for the network")
    assert len(found) == 2


def test_alternatives_are_whole_commands():
    assert alternatives(ISOTROPIC, [1.0, 1.0, 1.0], "D", "plan.json") == []
    planning = "python -m monai.bundle run planning --config_file configs/plan.json --dataset_dir"
    two_d = (
        "python -m monai.bundle run training --config_file"
        " \"['configs/train.json','a/plan_median.json','configs/recipes/2d.json']\" --dataset_dir D"
        ' --patch_size "[256,224,1]" --mirror_axes "[1]"'
    )
    assert alternatives(CARDIAC, [1.0, 1.0, 1.0], "D", "a/plan.json", [1, 2]) == [
        f"{planning} D --spacing mixed --output a/plan_mixed.json",
        f"{planning} D --spacing median --output a/plan_median.json",
        two_d,
    ]
    odd = alternatives(CARDIAC, [1.5, 1.5, 1.5], "my data", "my plan.json")
    assert odd[0] == f"{planning} 'my data' --spacing median --output 'my plan_median.json'"
    assert (ROOT / "configs/recipes/2d.json").is_file()
    thick_along_x = [record((4.0, 0.6, 0.6), (15, 320, 320))]
    assert not any("2d" in line for line in alternatives(thick_along_x, [1.0, 1.0, 1.0], "D", "p.json"))


def test_speed_is_measured_here():
    found = measure_speed(Network(1, 2))
    assert found.train > found.predict > 0
    assert found.where in ("this CPU", "this GPU")
