"""MedNeXt for other projects, with the names and signatures of MIC-DKFZ/MedNeXt's package; torch is all it needs."""

from .blocks import MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock
from .mednext import MedNeXt, create_mednext, create_mednext_v1, create_mednext_v2
from .weights.upkern import upkern_load_weights

__all__ = [
    "MedNeXt",
    "MedNeXtBlock",
    "MedNeXtDownBlock",
    "MedNeXtUpBlock",
    "create_mednext",
    "create_mednext_v1",
    "create_mednext_v2",
    "upkern_load_weights",
]
