"""MIC-DKFZ/MedNeXt's package `nnunet_mednext` by its own names, for code that was written for it.

`import mednext.nnunet_mednext` (in a clone `import scripts.nnunet_mednext`) once, before anything imports names of the
original; after that they are those of this module, whether or not the original is installed. Only the network is here:
its blocks, factories and UpKern, not the original's nnU-Net.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType

import torch

from . import mednext
from .blocks import LayerNorm, MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock, OutBlock
from .mednext import SIZES
from .weights.upkern import upkern_load_weights

NAME = "nnunet_mednext"


class MedNeXt(mednext.MedNeXt):
    """The network with the original's behaviour where this bundle's is another.

    With deep supervision it gives its five outputs in eval mode, too; it takes the original's own state dicts, with
    their `dummy_tensor`; `outside_block_checkpointing` may be set afterwards. `forward_features` and `forward_output`
    are those of PyTorch Connectomics' copy of the original.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.coarse_in_eval = True
        self.register_load_state_dict_pre_hook(_drop_dummy_tensor)

    @property
    def outside_block_checkpointing(self) -> bool:
        """Tell whether the backward pass computes whole blocks again."""
        return all(block.checkpoint_style == "block" for block in self._blocks())

    @outside_block_checkpointing.setter
    def outside_block_checkpointing(self, wanted: bool) -> None:
        for block in self._blocks():
            block.checkpoint_style = "block" if wanted else None

    def _blocks(self) -> list:
        kinds = (MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock)
        return [module for module in self.modules() if isinstance(module, kinds)]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the head of full resolution is given, (N, n_channels, [D,] H, W)."""
        found: list[torch.Tensor] = []
        with self.out_0.register_forward_pre_hook(lambda _, given: found.append(given[0])):
            self(x)
        return mednext.crop(found[0], list(x.shape[2:]))

    def forward_output(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits of full resolution for such features."""
        return self.out_0(features)


def _drop_dummy_tensor(_module: torch.nn.Module, state: dict, prefix: str, *_: object) -> None:
    state.pop(f"{prefix}dummy_tensor", None)


def create_mednext_v1(
    num_input_channels: int, num_classes: int, model_id: str, kernel_size: int = 3, deep_supervision: bool = False
) -> MedNeXt:
    """Build the paper's network "S", "B", "M" or "L".

    Raises:
        KeyError: no such `model_id`, as in the original.
    """
    size = {name: SIZES[name] for name in "SBML"}[model_id]
    return MedNeXt(
        num_input_channels,
        n_classes=num_classes,
        kernel_size=kernel_size,
        deep_supervision=deep_supervision,
        do_res=True,
        do_res_up_down=True,
        **size._asdict(),
    )


def _factory(
    model_id: str, num_input_channels: int, num_classes: int, kernel_size: int = 3, ds: bool = False
) -> MedNeXt:
    return create_mednext_v1(num_input_channels, num_classes, model_id, kernel_size, ds)


BLOCKS: dict[str, object] = {
    "MedNeXtBlock": MedNeXtBlock,
    "MedNeXtDownBlock": MedNeXtDownBlock,
    "MedNeXtUpBlock": MedNeXtUpBlock,
    "OutBlock": OutBlock,
    "LayerNorm": LayerNorm,
}
NETWORK: dict[str, object] = {"MedNeXt": MedNeXt, **BLOCKS}
FACTORIES: dict[str, object] = {
    "create_mednext_v1": create_mednext_v1,
    "create_mednextv1_small": functools.partial(_factory, "S"),
    "create_mednextv1_base": functools.partial(_factory, "B"),
    "create_mednextv1_medium": functools.partial(_factory, "M"),
    "create_mednextv1_large": functools.partial(_factory, "L"),
}
UPKERN: dict[str, object] = {"upkern_load_weights": upkern_load_weights}
MODULES: dict[str, dict[str, object]] = {  # parents come before what is in them
    NAME: {**NETWORK, "create_mednext_v1": create_mednext_v1, **UPKERN},
    f"{NAME}.mednextv1": NETWORK,  # only the original's README has it
    f"{NAME}.network_architecture": {},
    f"{NAME}.network_architecture.mednextv1": {},
    f"{NAME}.network_architecture.mednextv1.blocks": BLOCKS,
    f"{NAME}.network_architecture.mednextv1.MedNextV1": NETWORK,
    f"{NAME}.network_architecture.mednextv1.create_mednext_v1": {"MedNeXt": MedNeXt, **FACTORIES},
    f"{NAME}.run": {},
    f"{NAME}.run.load_weights": UPKERN,
}


def _register() -> None:
    if NAME in sys.modules and not hasattr(sys.modules[NAME], "__alias_of__"):
        raise ImportError(f"the original {NAME} is imported already; import {__name__} before it.")
    for name, content in MODULES.items():
        module = ModuleType(name, __doc__)
        vars(module).update(content, __alias_of__=__name__)
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent and not hasattr(sys.modules[parent], last):  # a function may have its module's name
            setattr(sys.modules[parent], last, module)


_register()
