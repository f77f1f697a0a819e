"""A network is recognised by the shapes of its tensors alone."""

from __future__ import annotations

import pytest
import torch

from scripts.mednext import SIZES, MedNeXt, create_mednext
from scripts.weights.architecture import Architecture, build, describe, shapes


def found(*arguments, **options) -> Architecture | None:
    with torch.device("meta"):
        return Architecture.of(shapes(create_mednext(*arguments, **options).state_dict()))


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_recognised_and_built_again(size):
    architecture = found(2, 5, size, 5, deep_supervision=True)
    assert (architecture.size, str(architecture)) == (size, f"MedNeXt {size}, kernel 5, 2 channel(s), 5 classes")
    with torch.device("meta"):
        twin = create_mednext(2, 5, size, 5, deep_supervision=True)
    assert shapes(build(architecture).state_dict()) == shapes(twin.state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"deep_supervision": False}, "no coarse heads"),
        ({"grn": True}, "GRN"),
        ({"dim": "2d"}, "2D"),
        ({"n_channels": 8}, "of a size of its own"),
        ({"do_res_up_down": False}, "no residuals in down and up blocks"),
        ({"kernel_size": None, "enc_kernel_size": 3, "dec_kernel_size": 5}, "encoder kernel 3, decoder kernel 5"),
    ],
)
def test_what_is_not_as_published_is_said_and_built_again(options, words):
    options = {"deep_supervision": True, **options}
    architecture = found(1, 3, "B", **options)
    assert words in str(architecture)
    assert (architecture.size == "B") == ("deep_supervision" in words or words == "no coarse heads")
    with torch.device("meta"):
        twin = create_mednext(1, 3, "B", **options)
    assert shapes(build(architecture).state_dict()) == shapes(twin.state_dict())


@pytest.mark.parametrize("layout", ["paper", "v2", "monai"])
def test_layouts_are_told_apart_by_their_grn_where_ratios_do_not_change(layout):
    assert found(1, 3, "S", grn=True, layout=layout).layouts == (layout,)
    assert found(1, 3, "S", layout=layout).layouts == ("paper", "v2", "monai")  # without GRN, S is one network


def test_blocks_that_follow_no_layout_are_not_built():
    with torch.device("meta"):
        network = MedNeXt(1, 4, 3, exp_r=(2, 3, 4, 4, 4, 4, 4, 3, 2), kernel_size=3)
    names = shapes(network.state_dict()) | {"down_1.conv2.weight": torch.Size([56, 8, 1, 1, 1])}  # ratio 7
    assert Architecture.of(names).layouts == ()
    with pytest.raises(ValueError, match="follow none of the layouts paper, v2, monai"):
        build(Architecture.of(names))


@pytest.mark.parametrize(
    "changes",
    [{"stem.weight": torch.Size([0, 1, 1, 1, 1])}, {"enc_block_0.0.conv2.weight": torch.Size([0, 0, 1, 1, 1])}],
    ids=["no width", "no channels"],
)
def test_shapes_that_cannot_be_are_no_mednext_of_the_table(changes):
    with torch.device("meta"):
        names = shapes(create_mednext(1, 3, "S").state_dict()) | changes
    architecture = Architecture.of(names)
    assert architecture is None or architecture.size is None


def test_a_kernel_beyond_the_table_has_no_size():
    with torch.device("meta"):
        network = MedNeXt(1, 32, 3, 2, 9, do_res=True, do_res_up_down=True)
    assert Architecture.of(shapes(network.state_dict())).size is None


def test_foreign_weights_are_called_foreign():
    assert describe({"conv.weight": torch.Size([1])}) == "another network than MedNeXt"
