"""The network: size, names of the weights, numbers against the original and MONAI, shapes, refusals."""

import re

import pytest
import torch
from monai.networks.nets.mednext import MedNeXt as MonaiMedNeXt
from monai.networks.nets.mednext import create_mednext as monai_mednext

from scripts.blocks import MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock
from scripts.mednext import LAYOUTS, SIZES, MedNeXt, create_mednext, create_mednext_v1, create_mednext_v2
from scripts.weights.checkpoints import to_monai

# What two orders of summation in float64 may differ by, at gradients up to 1e3: measured, 2e-11 at most. The absolute
# part is for conv1.bias: the norm after it takes the mean away, so its gradient is zero, and the computed one rounding.
ROUNDING = {"rtol": 1e-9, "atol": 1e-9}


def meta_net(size: str, **options) -> MedNeXt:
    with torch.device("meta"):
        return create_mednext(1, 3, size, **options)


def small_net(**options) -> MedNeXt:
    torch.manual_seed(0)
    small = {"exp_r": 2, "kernel_size": 3, "block_counts": [1] * 9, "do_res": True, "do_res_up_down": True}
    return perturbed(MedNeXt(1, 4, 3, **{**small, **options}))


def perturbed(net: MedNeXt) -> MedNeXt:
    """In float64, with no norm or GRN left at its initial zeros and ones, where an error would not show."""
    for name, parameter in net.double().named_parameters():
        if "norm" in name or "grn" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return net


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def blocks(net: MedNeXt) -> dict[str, torch.nn.Module]:
    kinds = (MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock)
    return {name: module for name, module in net.named_modules() if isinstance(module, kinds)}


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def results(net: torch.nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs of a training step, and the gradients of all parameters for random gradients of the outputs."""
    outputs = list(net.train()(x))
    torch.autograd.backward(outputs, [image(*y.shape) for y in outputs])
    return outputs, {name: parameter.grad for name, parameter in net.named_parameters()}


def assert_same_as_monai(net: MedNeXt, twin: torch.nn.Module, *shape: int) -> None:
    twin.double().load_state_dict(to_monai(net.state_dict()), strict=True)
    outputs, gradients = results(net, image(*shape))
    expected, expected_gradients = results(twin, image(*shape))
    torch.testing.assert_close(outputs, expected, **ROUNDING)
    torch.testing.assert_close(to_monai(gradients), expected_gradients, **ROUNDING)


@pytest.mark.parametrize(
    ("size", "kernel_3", "kernel_5"),  # counted on the original, less the one parameter of its dummy_tensor
    [
        ("S", 5_550_947, 5_980_579),  # one ratio and one block count for all stages
        ("B", 10_526_339, 10_955_971),  # a ratio for each stage: the count shows whose the down blocks take
        ("M", 17_548_995, 18_260_867),  # a block count for each stage
        ("L", 61_779_299, 62_992_931),  # other ratios, other block counts
    ],
)
def test_parameter_counts_are_those_of_the_original(size, kernel_3, kernel_5):
    assert (count(meta_net(size, kernel_size=3)), count(meta_net(size, kernel_size=5))) == (kernel_3, kernel_5)
    assert count(meta_net(size, kernel_size=7)) > kernel_5  # the original lists none; it builds


def test_deep_supervision_adds_2892_parameters_at_three_classes():
    assert count(meta_net("S", deep_supervision=True)) - count(meta_net("S")) == 2892


@pytest.mark.parametrize(
    ("dim", "kernel_size", "shape"),
    [
        ("3d", 3, (1, 1, 32, 16, 48)),  # sides differ, so that swapped axes show
        ("3d", 5, (1, 1, 16, 16, 32)),  # the smallest size: convolutions in float64 are slow
        ("2d", 5, (2, 1, 48, 64)),  # two samples, so that a mixed-up batch shows
    ],
)
def test_size_s_equals_monai_in_outputs_and_gradients(dim, kernel_size, shape):
    torch.manual_seed(0)
    net = perturbed(create_mednext_v1(1, 3, "S", kernel_size, deep_supervision=True, dim=dim))
    twin = monai_mednext("S", int(dim[0]), 1, 3, kernel_size=kernel_size, deep_supervision=True)
    assert_same_as_monai(net, twin, *shape)


@pytest.mark.parametrize("grn", [False, True], ids=["plain", "GRN, of which MONAI's down blocks have none"])
def test_the_monai_layout_equals_monai_where_ratios_change_between_stages(grn):
    ratios = SIZES["B"].exp_r
    net = small_net(exp_r=ratios, grn=grn, deep_supervision=True, layout="monai")
    twin = MonaiMedNeXt(3, 4, 1, 3, ratios[:4], ratios[5:], ratios[4], 3, True, True, [1] * 4, 1, [1] * 4, "group", grn)
    assert_same_as_monai(net, twin, 2, 1, 32, 16, 48)


@pytest.mark.parametrize("size", ["B", "M", "L"])
def test_monai_sizes_have_monais_tensors_and_the_papers_differ_in_the_first_two_down_blocks(size):
    with torch.device("meta"):
        twin = monai_mednext(size, 3, 1, 3, deep_supervision=True)
    theirs = {key: value.shape for key, value in twin.state_dict().items()}
    ours, papers = (
        {key: value.shape for key, value in to_monai(meta_net(name, deep_supervision=True).state_dict()).items()}
        for name in (f"monai-{size}", size)
    )
    assert ours == theirs
    tensors = ("conv2.weight", "conv2.bias", "conv3.weight")
    changes = [i for i in range(4) if SIZES[size].exp_r[i] != SIZES[size].exp_r[i + 1]]
    different = {f"down_blocks.{i}.{name}" for i in changes for name in tensors}
    assert {key for key in papers if papers[key] != theirs[key]} == different
    assert len(different) == 6


# Mean squares of the five outputs and the norm of all gradients (conv1.bias aside, which are zero but for rounding) of
# sum(mean squares), computed once by MIC-DKFZ/MedNeXt 0b78ed8 in float64 on the weights and images below.
GOLDEN = [
    ({}, (1, 1, 32, 16, 16),
     [0.195944614621, 12.3096711828, 23.5771042881, 21.4326777674, 5.26366532557, 849.744129654]),
    ({"kernel_size": 5, "grn": True}, (1, 1, 16, 32, 16),
     [0.316265299714, 3.27942543582, 26.9803978311, 285.525936453, 228.371354883, 5070.03624349]),
    ({"kernel_size": None, "enc_kernel_size": 3, "dec_kernel_size": 5}, (1, 1, 16, 16, 32),
     [0.165542113016, 8.21462044609, 20.9105511494, 16.4157818689, 6.52163492616, 578.830539055]),
    ({"norm_type": "layer"}, (1, 1, 32, 16, 16),
     [0.178873971734, 9.64360343658, 35.6462364158, 17.3740136933, 10.0651211614, 990.338579042]),
    ({"dim": "2d", "grn": True}, (2, 1, 32, 48),
     [1.03316680116, 11.2588647836, 181.993649087, 422.613380903, 252.884826476, 7980.0093535]),
    ({"do_res": False, "do_res_up_down": False}, (1, 1, 32, 16, 16),
     [0.0173871775669, 0.0740801809271, 0.761087918043, 0.546610431538, 7.62025282714, 491.181440955]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "shape", "expected"),
    GOLDEN,
    ids=["as published", "kernel 5, GRN", "kernels 3 and 5", "layer norm", "2D, GRN", "no residuals"],
)
def test_outputs_and_gradients_are_those_of_the_original(options, shape, expected):
    b = {"exp_r": SIZES["B"].exp_r, "block_counts": [1] * 9, "kernel_size": 3, "do_res": True, "do_res_up_down": True}
    net = MedNeXt(1, 2, 3, deep_supervision=True, **{**b, **options}).double()
    for n, (name, parameter) in enumerate(sorted(net.named_parameters())):
        wave = 0.4 * torch.cos(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + n)
        parameter.data = (wave + name.endswith("norm.weight")).reshape(parameter.shape)
    x = torch.sin(0.37 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) ** 1.1).reshape(shape)
    squares = [y.square().mean() for y in net(x)]
    sum(squares).backward()
    gradients = [p.grad.flatten() for name, p in net.named_parameters() if not name.endswith("conv1.bias")]
    found = [*(v.item() for v in squares), torch.cat(gradients).norm().item()]
    assert found == pytest.approx(expected, rel=1e-11)  # twelve digits are written down


@pytest.mark.parametrize("grn", [False, True], ids=["plain", "grn, two tensors more in a block"])
def test_state_dict_keys_are_those_of_the_original_with_grn_everywhere_but_in_down_0(grn):
    block = r"(conv1|norm|conv2|conv3)\.(weight|bias)" + (r"|grn_(beta|gamma)" if grn else "")
    stage, move = r"(enc_block_[0-3]|bottleneck|dec_block_[0-3])\.\d", r"(down|up)_[0-3]"
    head = r"out_[0-4]\.conv_out\.(weight|bias)"
    grammar = rf"stem\.(weight|bias)|{stage}\.({block})|{move}\.({block}|res_conv\.(weight|bias))|{head}"
    keys = list(meta_net("M", grn=grn, deep_supervision=True).state_dict())
    assert [key for key in keys if not re.fullmatch(grammar, key) or key.startswith("down_0.grn")] == []
    tensors = 10 if grn else 8  # of a block
    moves = 8 * (tensors + 2) - (2 if grn else 0)
    assert len(keys) == 2 + sum(SIZES["M"].block_counts) * tensors + moves + 5 * 2  # stem, stages, moves, heads


@pytest.mark.parametrize(("both", "enc", "dec"), [(None, 3, 5), (7, 7, 7)], ids=["the other two decide", "both wins"])
def test_each_half_has_its_kernel_and_the_bottleneck_that_of_the_decoder(both, enc, dec):
    net = MedNeXt(1, 2, 3, kernel_size=both, enc_kernel_size=3, dec_kernel_size=5)
    for name, block in blocks(net).items():
        assert block.conv1.kernel_size == (enc if name.startswith(("enc", "down")) else dec,) * 3, name


@pytest.mark.parametrize("size", [(32, 16, 16), (40, 33, 20), (16, 16, 17), (9, 50)], ids=["fits", "odd", "min", "2d"])
def test_any_size_equals_zero_padding_on_the_high_side_and_cropping(size):
    net = small_net(dim=f"{len(size)}d", deep_supervision=True)
    x, seen = image(2, 1, *size), []
    net.stem.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    padded = torch.zeros(2, 1, *(-(-n // 16) * 16 for n in size), dtype=torch.float64)
    padded[(..., *(slice(n) for n in size))] = x
    outputs = net.train()(x)
    assert (seen[0] is x) == (x.shape == padded.shape)  # what fits is not even copied
    assert isinstance(outputs, list)
    assert [y.shape for y in outputs] == [(2, 3, *(-(-n // 2**level) for n in size)) for level in range(5)]
    for y, full in zip(outputs, net(padded), strict=True):
        assert torch.equal(y, full[(..., *(slice(n) for n in y.shape[2:]))])
    assert torch.equal(net.eval()(x), outputs[0])  # a tensor alone


def test_training_without_deep_supervision_returns_one_tensor():
    assert small_net(dim="2d").train()(image(1, 1, 32, 32)).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 16), (5, 9, 1)], ids=["3d", "2d", "one that is padded"])
def test_a_single_voxel_at_the_coarsest_level_is_refused(size):
    with pytest.raises(ValueError, match=re.escape(str(list(size)))):
        small_net(dim=f"{len(size)}d")(image(1, 1, *size))


def test_layer_norm_takes_a_single_voxel_at_the_coarsest_level():
    assert small_net(norm_type="layer").eval()(image(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)


@pytest.mark.parametrize(
    ("style", "whole", "wide"),  # the resolutions at which blocks, or only their wide layers, run twice
    [
        ("block", {0, 1, 2, 3, 4}, set()),
        ("outside_block", {0, 1, 2, 3, 4}, set()),  # the original's name
        ("expansion", set(), {0, 1, 2, 3, 4}),
        (("block", "expansion", None, None, "expansion"), {0}, {1, 4}),
    ],
    ids=["blocks", "the original's name", "wide layers", "a mixture"],
)
def test_recomputing_is_where_it_is_asked_for_and_changes_nothing(style, whole, wide):
    runs, plain = {}, small_net(deep_supervision=True, grn=True)
    net = small_net(deep_supervision=True, grn=True, checkpoint_style=style)
    for name, block in blocks(net).items():
        for part in ("conv1", "conv2"):  # torch stops before conv3, whose output nobody keeps
            getattr(block, part).register_forward_hook(lambda *_, key=(name, part): runs.update({key: runs[key] + 1}))
            runs[name, part] = 0
    found = results(net, image(2, 1, 32, 16, 16))
    torch.testing.assert_close(found, results(plain, image(2, 1, 32, 16, 16)), **ROUNDING)
    for (name, part), times in runs.items():
        number = re.search(r"_(\d)", name)
        level = 4 if number is None else int(number[1]) + name.startswith("down")
        twice = level in whole or (level in wide and part != "conv1")
        assert times == 1 + twice, (name, part)
    before = dict(runs)
    with torch.no_grad():
        net(image(2, 1, 32, 16, 16))
    assert all(runs[key] == before[key] + 1 for key in runs)  # nothing to recompute without gradients


@pytest.mark.parametrize(("model_id", "count_"), [("B", 61_969_507), ("W", 246_536_387)])  # as reported publicly
def test_v2_has_the_reported_size_and_grn_in_every_block(model_id, count_):
    with torch.device("meta"):
        net = create_mednext_v2(model_id, 1, 3)
    assert count(net) == count_
    assert all(block.grn_gamma is not None and block.grn_over_sum for block in blocks(net).values())


def test_layouts_have_grn_in_the_down_blocks_they_say():
    for layout, expected in {"paper": [1, 2, 3], "v2": [0, 1, 2, 3], "monai": []}.items():
        net = small_net(grn=True, layout=layout)
        assert [i for i in range(4) if net.get_submodule(f"down_{i}").grn_gamma is not None] == expected
    assert LAYOUTS.keys() == {"paper", "v2", "monai"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exp_r": [2] * 8}, "got 8 and 9"),  # one a stage
        ({"block_counts": [2] * 10}, "got 9 and 10"),
        ({"kernel_size": 4}, "encoder kernel size is 4"),  # an even kernel would shift the image
        ({"kernel_size": None, "enc_kernel_size": 3, "dec_kernel_size": 6}, "decoder kernel size is 6"),
        ({"kernel_size": None, "enc_kernel_size": 3}, "decoder kernel size is None"),  # one of two forgotten
        ({"dim": "4d"}, "dim is '4d'"),
        ({"norm_type": "batch"}, "norm_type is 'batch'"),
        ({"checkpoint_style": "inside_block"}, "checkpoint_style is 'inside_block'"),  # the original names it too
        ({"checkpoint_style": ["block"] * 4}, "expected None, .* or 5 of these"),  # one a resolution
        ({"layout": "MONAI"}, "layout is 'MONAI', expected one of paper, v2, monai"),
        ({"grn": "max"}, "grn is 'max'"),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        MedNeXt(1, 4, 3, **options)


@pytest.mark.parametrize(("size", "kernel_size"), [("s", 3), ("S", 4), ("S", 9)], ids=["case", "even", "too large"])
def test_an_unknown_size_or_kernel_is_named_with_its_alternatives(size, kernel_size):
    with pytest.raises(ValueError, match=r"is 's', expected one of S, B, M, L|is [49], expected one of 3, 5, 7"):
        create_mednext_v1(1, 3, size, kernel_size)


def test_each_factory_knows_its_own_sizes():
    with pytest.raises(ValueError, match="is 'v2-B', expected one of S, B, M, L"):
        create_mednext_v1(1, 3, "v2-B")
    with pytest.raises(ValueError, match="is 'L', expected B or W"):
        create_mednext_v2("L", 1, 3)
    with pytest.raises(ValueError, match="is 'XL', expected one of S, B, M, L, v2-B"):
        create_mednext(1, 3, "XL")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the layout is oneDNN's")
@pytest.mark.parametrize("norm_type", ["group", "layer"])  # layer norm moves the axes there and back
def test_activations_on_a_cpu_are_channels_last(norm_type):
    net, last = small_net(norm_type=norm_type).float(), []
    for block in blocks(net).values():
        block.register_forward_hook(lambda *a: last.append(a[-1].is_contiguous(memory_format=torch.channels_last_3d)))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # for float64, one thread, or batch 1 with few voxels, torch leaves oneDNN and its layout
    try:
        net(torch.randn(2, 1, 16, 16, 32))
    finally:
        torch.set_num_threads(threads)
    assert last == [True] * 17


def test_the_factory_passes_options_on_and_refuses_contradictions():
    network = create_mednext_v1(1, 2, "S", kernel_size=None, enc_kernel_size=3, dec_kernel_size=5, n_channels=4)
    assert network.enc_block_0[0].conv1.weight.shape == (4, 1, 3, 3, 3)
    assert network.bottleneck[0].conv1.weight.shape == (64, 1, 5, 5, 5)
    with pytest.raises(ValueError, match="kernel_size 3 would override"):
        create_mednext_v1(1, 2, "S", enc_kernel_size=5)


def test_an_image_in_a_volume_network_is_named():
    with pytest.raises(ValueError, match="2 spatial axes, the network 3"):
        create_mednext_v1(1, 2, "S", n_channels=4)(torch.zeros(1, 1, 32, 32))
