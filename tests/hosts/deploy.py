"""A real MONAI Deploy application around MonaiBundleInferenceOperator: a scan in memory in, voxels of its mask out.

    python tests/hosts/deploy.py BUNDLE SCAN MASK

BUNDLE is the bundle's folder, SCAN a NIfTI file, MASK the mask that the command wrote of it. The scan reaches the
operator as Deploy's DICOM operators give it. docs/how-to/deploy.md has the installation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.deploy.conditions import CountCondition
from monai.deploy.core import AppContext, Application, Image, IOType, Operator
from monai.deploy.operators.monai_bundle_inference_operator import IOMapping, MonaiBundleInferenceOperator

FOUND: list[np.ndarray] = []


class Source(Operator):
    def __init__(self, fragment, *args, scan: str, **options):
        self.scan = nib.load(scan)
        super().__init__(fragment, *args, **options)

    def setup(self, spec):
        spec.output("image")

    def compute(self, _, out, __):
        spacing = dict(zip(("row", "col", "depth"), map(float, self.scan.header.get_zooms()), strict=True))
        meta = {f"{axis}_pixel_spacing": edge for axis, edge in spacing.items()}
        voxels = np.asarray(self.scan.dataobj)
        out.emit(Image(np.swapaxes(voxels, 0, 2), {**meta, "nifti_affine_transform": self.scan.affine}), "image")


class Sink(Operator):
    def setup(self, spec):
        spec.input("pred")

    def compute(self, given, _, __):
        FOUND.append(np.swapaxes(given.receive("pred").asnumpy(), 0, 2))


class App(Application):
    def __init__(self, bundle: str, scan: str):
        self.bundle, self.scan = bundle, scan
        super().__init__()

    def compose(self):
        source, sink = Source(self, CountCondition(self, 1), name="source", scan=self.scan), Sink(self, name="sink")
        operator = MonaiBundleInferenceOperator(
            self,
            name="bundle",
            app_context=AppContext({"workdir": "."}),
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
            bundle_path=self.bundle,
        )
        self.add_flow(source, operator, {("image", "image")})
        self.add_flow(operator, sink, {("pred", "pred")})


bundle, scan, mask = sys.argv[1:]
App(bundle, scan).run()
(found,), wanted = FOUND, np.asarray(nib.load(mask).dataobj)
network = "model.ts" if Path(bundle, "models/model.ts").is_file() else "model.pt"
print(f"{Path(scan).name}, {network}: {np.sum(found != wanted)} of {np.sum(wanted > 0)} foreground voxels differ")
