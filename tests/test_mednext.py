"""The network: size, names of the weights, numbers against MONAI's implementation, shapes, refusals."""

import re

import pytest
import torch
from monai.networks.blocks.mednext_block import MedNeXtDownBlock as MonaiDownBlock
from monai.networks.nets.mednext import MedNeXt as MonaiMedNeXt
from monai.networks.nets.mednext import create_mednext

from scripts.blocks import MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock
from scripts.mednext import SIZES, MedNeXt, create_mednext_v1

# What two orders of summation in float64 may differ by, at gradients up to 1e3: measured, 2e-11 at most. The absolute
# part is for conv1.bias: the norm after it takes the mean away, so its gradient is zero, and the computed one rounding.
ROUNDING = {"rtol": 1e-9, "atol": 1e-9}


def monai_key(key: str) -> str:
    if (found := re.fullmatch(r"(enc_block|down|up|dec_block|out)_(\d)(.*)", key)) and not key.startswith("out_0"):
        name = {"enc_block": "enc_stages", "dec_block": "dec_stages"}.get(found[1], f"{found[1]}_blocks")
        first = {"up": 3, "dec_block": 3, "out": 4}.get(found[1], 0)  # which of ours is their number 0
        key = f"{name}.{abs(first - int(found[2]))}{found[3]}"
    return key.replace("grn_", "global_resp_")


def meta_net(size: str, **options) -> MedNeXt:
    with torch.device("meta"):
        return create_mednext_v1(1, 3, size, **options)


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


def blocks(net: MedNeXt) -> dict[str, MedNeXtBlock]:
    return {name: module for name, module in net.named_modules() if isinstance(module, MedNeXtBlock)}


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def results(net: torch.nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs of a training step, and the gradients of all parameters for random gradients of the outputs."""
    outputs = list(net.train()(x))
    torch.autograd.backward(outputs, [image(*y.shape) for y in outputs])
    return outputs, {name: parameter.grad for name, parameter in net.named_parameters()}


def assert_same_as_monai(net: MedNeXt, twin: torch.nn.Module, *shape: int) -> None:
    twin.double().load_state_dict({monai_key(key): value for key, value in net.state_dict().items()}, strict=True)
    outputs, gradients = results(net, image(*shape))
    expected, expected_gradients = results(twin, image(*shape))
    torch.testing.assert_close(outputs, expected, **ROUNDING)
    torch.testing.assert_close({monai_key(key): g for key, g in gradients.items()}, expected_gradients, **ROUNDING)


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
    twin = create_mednext("S", int(dim[0]), 1, 3, kernel_size=kernel_size, deep_supervision=True)
    assert_same_as_monai(net, twin, *shape)


@pytest.mark.parametrize("grn", [False, True], ids=["as in the paper", "GRN, of which MONAI's down blocks have none"])
def test_size_b_equals_monai_once_its_down_blocks_are_rebuilt(grn):
    ratios = SIZES["B"].exp_r
    net = small_net(exp_r=ratios, grn=grn, deep_supervision=True)
    twin = MonaiMedNeXt(3, 4, 1, 3, ratios[:4], ratios[5:], ratios[4], 3, True, True, [1] * 4, 1, [1] * 4, "group", grn)
    for i in range(4):
        widths = (4 * 2**i, 8 * 2**i)
        twin.down_blocks[i] = MonaiDownBlock(*widths, ratios[i + 1], 3, True, global_resp_norm=grn and i > 0)
    assert_same_as_monai(net, twin, 2, 1, 32, 16, 48)


def test_monai_b_differs_in_six_tensors_of_the_first_two_down_blocks():
    ours = {monai_key(key): value.shape for key, value in meta_net("B", deep_supervision=True).state_dict().items()}
    with torch.device("meta"):
        theirs = {k: v.shape for k, v in create_mednext("B", 3, 1, 3, deep_supervision=True).state_dict().items()}
    assert ours.keys() == theirs.keys()
    tensors = ("conv2.weight", "conv2.bias", "conv3.weight")
    assert {k for k in ours if ours[k] != theirs[k]} == {f"down_blocks.{i}.{name}" for i in (0, 1) for name in tensors}


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


def test_checkpointing_runs_each_block_twice_and_changes_nothing():
    found, calls = {}, []
    for style in (None, "outside_block"):
        net = small_net(checkpoint_style=style, deep_supervision=True, grn=True)
        for block in blocks(net).values():
            block.conv1.register_forward_hook(lambda *_, style=style: calls.append(style))
        found[style] = results(net, image(2, 1, 32, 16, 16))
    assert (calls.count(None), calls.count("outside_block")) == (17, 34)
    torch.testing.assert_close(found["outside_block"], found[None], **ROUNDING)


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
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        MedNeXt(1, 4, 3, **options)


@pytest.mark.parametrize(("size", "kernel_size"), [("s", 3), ("S", 4), ("S", 9)], ids=["case", "even", "too large"])
def test_an_unknown_size_or_kernel_is_named_with_its_alternatives(size, kernel_size):
    with pytest.raises(ValueError, match=r"is 's', expected one of S, B, M, L|is [49], expected one of 3, 5, 7"):
        create_mednext_v1(1, 3, size, kernel_size)


@pytest.mark.parametrize("norm_type", ["group", "layer"])  # a module of torch, a module of ours
@pytest.mark.parametrize("space", [(8, 6), (8, 6, 4)], ids=["2d", "3d"])
def test_each_block_works_alone(space, norm_type):
    options = {"exp_r": 2, "kernel_size": 3, "do_res": True, "norm_type": norm_type, "dim": f"{len(space)}d"}
    x = torch.randn(2, 4, *space)
    assert MedNeXtBlock(4, 4, **options)(x).shape == (2, 4, *space)
    assert MedNeXtDownBlock(4, 8, **options)(x).shape == (2, 8, *(n // 2 for n in space))
    up = MedNeXtUpBlock(4, 2, **options)(x)
    assert up.shape == (2, 2, *(2 * n for n in space))
    for axis in range(2, up.dim()):  # the plane that completes 2n is zero and on the low side
        assert not up.select(axis, 0).any()
        assert up.select(axis, -1).any()


@pytest.mark.parametrize("space", [(5, 7), (5, 7, 3)], ids=["2d, where the original mixes axes up", "3d"])
def test_layer_norm_is_over_the_channels_of_each_voxel(space):
    norm = MedNeXtBlock(6, 6, kernel_size=3, norm_type="layer", dim=f"{len(space)}d").double().norm
    x = 3 * image(2, 6, *space) + 1
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    torch.testing.assert_close(norm(x), (x - mean) / (variance + 1e-5).sqrt(), **ROUNDING)
    torch.testing.assert_close(norm(x).mean(1), torch.zeros_like(x[:, 0]), **ROUNDING)


@pytest.mark.parametrize("branches", [False, True], ids=["as deployed", "with the branches of training"])
def test_a_scripted_network_computes_the_same(branches):
    options = {"deep_supervision": True, "grn": True, "checkpoint_style": "outside_block"} if branches else {}
    net, x = perturbed(create_mednext_v1(1, 3, "S", **options)).eval(), image(1, 1, 9, 14, 30)  # to be padded
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(net)(x), net(x), **ROUNDING)


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


def test_the_norm_of_a_large_patch_is_exact_to_float32_in_channels_last():
    norm = MedNeXtBlock(4, 4, kernel_size=3).norm
    x = torch.randn(1, 4, 64, 64, 64, generator=torch.Generator().manual_seed(1)) + 3  # a mean, as images have
    y = norm(x.contiguous(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(y, norm.double()(x.double()).float())  # torch's own tolerance for float32


def test_the_factory_passes_options_on_and_refuses_contradictions():
    network = create_mednext_v1(1, 2, "S", kernel_size=None, enc_kernel_size=3, dec_kernel_size=5, n_channels=4)
    assert network.enc_block_0[0].conv1.weight.shape == (4, 1, 3, 3, 3)
    assert network.bottleneck[0].conv1.weight.shape == (64, 1, 5, 5, 5)
    with pytest.raises(ValueError, match="kernel_size 3 would override"):
        create_mednext_v1(1, 2, "S", enc_kernel_size=5)


def test_an_image_in_a_volume_network_is_named():
    with pytest.raises(ValueError, match="2 spatial axes, the network 3"):
        create_mednext_v1(1, 2, "S", n_channels=4)(torch.zeros(1, 1, 32, 32))
