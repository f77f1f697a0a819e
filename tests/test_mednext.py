"""The network: size, names of the weights, numbers against MONAI's implementation, shapes, refusals."""

import re

import pytest
import torch
from monai.networks.blocks.mednext_block import MedNeXtDownBlock as MonaiDownBlock
from monai.networks.nets.mednext import MedNeXt as MonaiMedNeXt
from monai.networks.nets.mednext import create_mednext

from scripts.mednext import SIZES, MedNeXt, MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock, create_mednext_v1

ROUNDING = {"rtol": 1e-9, "atol": 1e-9}  # MEASURED
RESIDUAL = {"do_res": True, "do_res_up_down": True}


def meta_net(size: str, **options) -> MedNeXt:
    with torch.device("meta"):
        return create_mednext_v1(1, 3, size, **options)


def small_net(**options) -> MedNeXt:
    torch.manual_seed(0)
    return perturbed(MedNeXt(1, 4, 3, **{"exp_r": 2, "kernel_size": 3, "block_counts": [1] * 9, **RESIDUAL, **options}))


def perturbed(net: MedNeXt) -> MedNeXt:
    """In float64, with no norm or GRN left at its initial zeros and ones, where an error would not show."""
    for name, parameter in net.double().named_parameters():
        if "norm" in name or "grn" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return net


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def monai_key(key: str) -> str:
    for pattern, name in (
        (r"enc_block_(\d)", lambda m: f"enc_stages.{m[1]}"),
        (r"down_(\d)", lambda m: f"down_blocks.{m[1]}"),
        (r"up_(\d)", lambda m: f"up_blocks.{3 - int(m[1])}"),
        (r"dec_block_(\d)", lambda m: f"dec_stages.{3 - int(m[1])}"),
        (r"out_([1-4])", lambda m: f"out_blocks.{4 - int(m[1])}"),
        (r"grn_", lambda m: "global_resp_"),
    ):
        key = re.sub(pattern, name, key)
    return key


def results(net: torch.nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs of a training step, and all parameter gradients of a random projection of the outputs."""
    outputs = net.train()(x)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, dtype=y.dtype, generator=generator) for y in outputs]
    torch.autograd.backward(outputs, upstream)
    return outputs, {name: parameter.grad for name, parameter in net.named_parameters()}


def assert_same_as_monai(net: MedNeXt, twin: torch.nn.Module, *shape: int) -> None:
    twin.double().load_state_dict({monai_key(key): value for key, value in net.state_dict().items()}, strict=True)
    x = torch.randn(shape, dtype=torch.float64)
    outputs, gradients = results(net, x)
    expected, expected_gradients = results(twin, x)
    assert len(outputs) == 5
    torch.testing.assert_close(outputs, expected, **ROUNDING)
    torch.testing.assert_close({monai_key(key): g for key, g in gradients.items()}, expected_gradients, **ROUNDING)


@pytest.mark.parametrize(
    ("size", "kernel_size", "expected"),  # counted on the original, less the one parameter of its dummy_tensor
    [
        ("S", 3, 5_550_947),  # one ratio for all stages
        ("S", 5, 5_980_579),
        ("B", 3, 10_526_339),  # ratios by stage: the down blocks show whose they take
        ("B", 5, 10_955_971),
        ("M", 3, 17_548_995),  # block counts by stage
        ("M", 5, 18_260_867),
        ("L", 3, 61_779_299),  # both
        ("L", 5, 62_992_931),
    ],
)
def test_parameter_count_is_that_of_the_original(size, kernel_size, expected):
    assert count(meta_net(size, kernel_size=kernel_size)) == expected


def test_deep_supervision_adds_2892_parameters_at_three_classes():
    assert count(meta_net("S", deep_supervision=True)) - count(meta_net("S")) == 2892


def test_kernel_7_builds():
    assert meta_net("S", kernel_size=7).enc_block_0[0].conv1.kernel_size == (7, 7, 7)


def test_options_override_the_table():
    assert SIZES["L"].checkpoint_style == "outside_block" and meta_net("L").bottleneck[0].checkpointed
    assert not meta_net("L", checkpoint_style=None).bottleneck[0].checkpointed


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


@pytest.mark.parametrize("grn", [False, True], ids=["as in the paper", "GRN, with its place in the down blocks"])
def test_size_b_equals_monai_once_its_down_blocks_are_rebuilt(grn):
    ratios, _, _ = SIZES["B"]
    net = small_net(exp_r=ratios, grn=grn, deep_supervision=True)
    twin = MonaiMedNeXt(3, 4, 1, 3, ratios[:4], ratios[5:], ratios[4], 3, True, True, [1] * 4, 1, [1] * 4, "group", grn)
    for i in range(4):
        w = 4 * 2**i
        twin.down_blocks[i] = MonaiDownBlock(w, 2 * w, ratios[i + 1], 3, True, global_resp_norm=grn and i > 0)
    assert_same_as_monai(net, twin, 2, 1, 32, 16, 48)


def test_monai_b_differs_in_six_tensors_of_the_first_two_down_blocks():
    ours = {monai_key(key): value.shape for key, value in meta_net("B", deep_supervision=True).state_dict().items()}
    with torch.device("meta"):
        theirs = {k: v.shape for k, v in create_mednext("B", 3, 1, 3, deep_supervision=True).state_dict().items()}
    assert ours.keys() == theirs.keys()
    tensors = ("conv2.weight", "conv2.bias", "conv3.weight")
    different = {key for key in ours if ours[key] != theirs[key]}
    assert different == {f"down_blocks.{i}.{name}" for i in (0, 1) for name in tensors}


@pytest.mark.parametrize("grn", [False, True], ids=["plain", "grn"])
def test_state_dict_keys_follow_the_grammar_of_the_original(grn):
    block = r"(conv1|norm|conv2|conv3)\.(weight|bias)" + (r"|grn_(beta|gamma)" if grn else "")
    stage, move = r"(enc_block_[0-3]|bottleneck|dec_block_[0-3])\.\d", r"(down|up)_[0-3]"
    head = r"out_[0-4]\.conv_out\.(weight|bias)"
    grammar = rf"stem\.(weight|bias)|{stage}\.({block})|{move}\.({block}|res_conv\.(weight|bias))|{head}"
    keys = list(meta_net("M", grn=grn, deep_supervision=True).state_dict())
    assert [key for key in keys if not re.fullmatch(grammar, key)] == []
    tensors = 10 if grn else 8  # of a block
    assert len(keys) == 2 + sum(SIZES["M"].block_counts) * tensors + 8 * (tensors + 2) - (2 if grn else 0) + 5 * 2


def test_grn_is_in_every_block_but_the_first_down_block():
    blocks = {name: m for name, m in meta_net("S", grn=True).named_modules() if isinstance(m, MedNeXtBlock)}
    assert [name for name, m in blocks.items() if m.grn_gamma is None or m.grn_beta is None] == ["down_0"]


@pytest.mark.parametrize(
    ("kernel_size", "encoder", "decoder"),
    [
        (None, 3, 5),  # the other two decide
        (7, 7, 7),  # a number wins over them
    ],
)
def test_each_half_has_its_kernel_and_the_bottleneck_that_of_the_decoder(kernel_size, encoder, decoder):
    with torch.device("meta"):
        net = MedNeXt(1, 4, 3, kernel_size=kernel_size, enc_kernel_size=3, dec_kernel_size=5)
    for name, module in net.named_modules():
        if isinstance(module, MedNeXtBlock):
            assert module.conv1.kernel_size[0] == (encoder if name.startswith(("enc", "down")) else decoder), name


@pytest.mark.parametrize(
    ("dim", "size"),
    [
        ("3d", (32, 16, 16)),  # fits
        ("3d", (40, 33, 20)),  # each side is padded by another amount
        ("3d", (16, 16, 17)),  # the smallest
        ("2d", (31, 50)),  # F.pad counts axes from the last
    ],
)
def test_any_size_comes_back_finest_first_and_in_eval_as_one_tensor(dim, size):
    net = small_net(dim=dim, deep_supervision=True)
    x = torch.randn(2, 1, *size, dtype=torch.float64)
    outputs = net.train()(x)
    assert isinstance(outputs, list)
    assert [y.shape for y in outputs] == [(2, 3, *(-(-n // 2**level) for n in size)) for level in range(5)]
    assert torch.equal(net.eval()(x), outputs[0])


def test_training_without_deep_supervision_returns_one_tensor():
    assert small_net(dim="2d").train()(torch.randn(1, 1, 32, 32, dtype=torch.float64)).shape == (1, 3, 32, 32)


def test_an_odd_size_equals_zero_padding_on_the_high_side_and_cropping():
    net = small_net(deep_supervision=True).train()
    x = torch.randn(1, 1, 40, 33, 20, dtype=torch.float64)
    padded = torch.zeros(1, 1, 48, 48, 32, dtype=torch.float64)
    padded[:, :, :40, :33, :20] = x
    for y, expected in zip(net(x), net(padded), strict=True):
        d, h, w = y.shape[2:]
        assert torch.equal(y, expected[:, :, :d, :h, :w])


def test_a_size_that_fits_reaches_the_stem_untouched():
    net, seen = small_net(), []
    net.stem.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    x = torch.randn(1, 1, 16, 32, 16, dtype=torch.float64)
    net(x)
    assert len(seen) == 1 and seen[0] is x


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 16), (5, 9, 1)], ids=["3d", "2d", "one that is padded"])
def test_a_single_voxel_at_the_coarsest_level_is_refused(size):
    with pytest.raises(ValueError, match=re.escape(str(list(size)))):
        small_net(dim=f"{len(size)}d")(torch.zeros(1, 1, *size, dtype=torch.float64))


def test_checkpointing_runs_each_block_twice_and_changes_nothing():
    x = torch.randn(2, 1, 32, 16, 16, dtype=torch.float64)
    found, calls = {}, []
    for style in (None, "outside_block"):
        net = small_net(checkpoint_style=style, deep_supervision=True, grn=True)
        for module in net.modules():
            if isinstance(module, MedNeXtBlock):
                module.conv1.register_forward_hook(lambda *_, style=style: calls.append(style))
        found[style] = results(net, x)
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


@pytest.mark.parametrize(
    ("size", "kernel_size", "message"),
    [
        ("s", 3, "'s', expected one of S, B, M, L"),  # wrong case
        ("S", 4, "4, expected one of 3, 5, 7"),  # even
        ("S", 9, "9, expected one of 3, 5, 7"),  # MedNeXt itself would build it
    ],
)
def test_an_unknown_size_or_kernel_is_named(size, kernel_size, message):
    with pytest.raises(ValueError, match=message):
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
        assert not up.select(axis, 0).any() and up.select(axis, 1).any() and up.select(axis, -1).any()


@pytest.mark.parametrize("space", [(5, 7), (5, 7, 3)], ids=["2d, where the original mixes axes up", "3d"])
def test_layer_norm_is_over_the_channels_of_each_voxel(space):
    norm = MedNeXtBlock(6, 6, kernel_size=3, norm_type="layer", dim=f"{len(space)}d").double().norm
    x = torch.randn(2, 6, *space, dtype=torch.float64) * 3 + 1
    y = norm(x)
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, *space, dtype=torch.float64), **ROUNDING)
    torch.testing.assert_close(y, (x - mean) / (variance + 1e-5).sqrt(), **ROUNDING)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},  # as users deploy it
        {"deep_supervision": True, "grn": True, "checkpoint_style": "outside_block"},  # all branches of the code
    ],
)
def test_a_scripted_network_computes_the_same(options):
    net = perturbed(create_mednext_v1(1, 3, "S", **options)).eval()
    x = torch.randn(1, 1, 9, 14, 30, dtype=torch.float64)  # padded to 16, 16, 32
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(net)(x), net(x), **ROUNDING)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the layout is oneDNN's")
@pytest.mark.parametrize("norm_type", ["group", "layer"])  # layer norm moves the axes there and back
def test_activations_on_a_cpu_are_channels_last(norm_type):
    net, layouts = small_net(norm_type=norm_type).float(), []
    for module in net.modules():
        if isinstance(module, MedNeXtBlock):
            module.register_forward_hook(
                lambda _, __, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last_3d))
            )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # torch leaves oneDNN, and its layout, for 1x1x1 convolutions of one thread or few voxels
    try:
        net(torch.randn(2, 1, 16, 16, 32))
    finally:
        torch.set_num_threads(threads)
    assert layouts == [True] * 17
