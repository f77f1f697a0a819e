"""What Ignite and MONAI engines need for this bundle: devices, precision, and inference that survives a bad scan."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist
from monai.data import Dataset
from monai.engines import SupervisedEvaluator

from ..data.datasets import image_files
from ..utils.errors import UserError, first_cause

logger = logging.getLogger("mednext")


def amp_kwargs(device: str | torch.device) -> dict:
    """Arguments for autocast: bfloat16 where the GPU computes it natively, else float16 (with MONAI's GradScaler)."""
    if torch.device(device).type != "cuda":
        return {}
    return {"dtype": torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16}


def start_distributed() -> None:
    """Joins the process group that torchrun describes: nccl on GPUs, gloo on CPUs."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())


def local_device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


class ScanDataset(Dataset):
    """MONAI's Dataset, in which a scan that cannot be prepared becomes `{"failure": reason}`, not an exception."""

    def _transform(self, index: int) -> dict:
        try:
            return super()._transform(index)
        except Exception as e:
            return {"failure": _reason(self.data[index], e)}


class ScanEvaluator(SupervisedEvaluator):
    """MONAI's SupervisedEvaluator for one scan a batch that goes on past a bad scan.

    `failures` holds one sentence for each scan that could not be prepared, segmented or written.
    """

    def __init__(self, *args, **kwargs) -> None:
        self.failures: list[str] = []
        super().__init__(*args, **kwargs)

    def _iteration(self, engine, batchdata: dict) -> dict:
        if "failure" in batchdata:
            self.failures += batchdata["failure"]
            return {}
        case = {"image": batchdata["image"].meta.get("filename_or_obj")}
        try:
            return super()._iteration(engine, batchdata)
        except Exception as e:
            self.failures.append(_reason(case, e))
            return {}

    def raise_failures(self) -> None:
        """Lists the scans that failed, if any.

        Raises:
            UserError: at least one scan failed.
        """
        if self.failures:
            listed = "\n  ".join(self.failures)
            raise UserError(
                f"{len(self.failures)} of {self.state.epoch_length} scans could not be segmented:\n  {listed}"
            )


def _reason(case: dict, error: BaseException) -> str:
    """One sentence that names the scan's file and the first cause of `error`."""
    cause = first_cause(error)
    if isinstance(cause, UserError):
        return str(cause)
    return f"{image_files(case)[0]}: {type(cause).__name__}: {cause}".splitlines()[0]
