"""Inference that goes on past a bad scan: MONAI's data set and evaluator, in which a failure is a sentence."""

from __future__ import annotations

from monai.data import Dataset
from monai.engines import SupervisedEvaluator

from ..data.scans import image_files
from ..utils.errors import UserError, first_cause


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

    def run(self) -> None:  # type: ignore[override] # as MONAI has it
        """Segment the scans; where none is left to do, do nothing."""
        if self.state.epoch_length:
            super().run()

    def raise_failures(self) -> None:
        """Raise one error that lists the scans that failed, if any did.

        Raises:
            UserError: at least one scan failed.
        """
        if self.failures:
            listed = "\n  ".join(self.failures)
            raise UserError(
                f"{len(self.failures)} of {self.state.epoch_length} scans could not be segmented:\n  {listed}"
            )


def _reason(case: dict, error: BaseException) -> str:
    """Say in one sentence which file failed, and by which first cause."""
    cause = first_cause(error)
    if isinstance(cause, UserError):
        return str(cause)
    return f"{image_files(case)[0]}: {type(cause).__name__}: {cause}".splitlines()[0]
