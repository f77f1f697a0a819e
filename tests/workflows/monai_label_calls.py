"""What MONAI Label 0.8.5 does with a bundle, in the words of its `tasks/infer/bundle.py` and `tasks/train/bundle.py`.

`python monai_label_calls.py BUNDLE REQUESTS`: REQUESTS is a list in JSON of `["infer", {..}]` and `["train", {..}]`;
each answer is a line of JSON. Nothing but what MONAI Label itself puts there is on the path.
"""

from __future__ import annotations

import json
import os
import sys

import monai.bundle
import numpy as np
from monai.bundle import ConfigItem, ConfigParser
from monai.data import partition_dataset
from monai.transforms import LoadImaged, SaveImaged
from monai.utils import ensure_tuple

HANDLERS, OPTIONS = "train#handlers", "displayable_configs"


def load(root: str, name: str) -> ConfigParser:
    config = ConfigParser()
    config.read_config(os.path.join(root, "configs", name))
    config.config.update({"bundle_root": root})
    return config


def unload_scripts() -> None:
    for name in [name for name in sys.modules if name == "scripts" or name.startswith("scripts.")]:
        del sys.modules[name]


class Infer:
    def __init__(self, root: str) -> None:
        self.root = root
        sys.path.insert(0, root)
        unload_scripts()
        self.config = load(root, "inference.json")
        self.config.config["use_click"] = False
        self.network = self.config.get_parsed_content("network_def", instantiate=True)
        with open(os.path.join(root, "configs", "metadata.json")) as file:
            metadata = json.load(file)["network_data_format"]
        self.image, self.pred = (next(iter(metadata[part])) for part in ("inputs", "outputs"))
        channels = metadata["outputs"][self.pred]["channel_def"]
        self.labels = {v.lower(): int(k) for k, v in channels.items() if v.lower() != "background"}
        self.options = self.config.get_parsed_content(OPTIONS, instantiate=True) if self.config.get(OPTIONS) else {}
        sys.path.remove(root)

    def parsed(self, name: str, data: dict):
        sys.path.insert(0, self.root)
        unload_scripts()
        self.config.config.update({"device": data["device"]})
        if self.config.ref_resolver.items.get("device"):
            self.config.ref_resolver.items["device"] = ConfigItem(config=data["device"], id="device")
        found = self.config.get_parsed_content(name, instantiate=True)
        sys.path.remove(self.root)
        return found

    def __call__(self, request: dict) -> dict:
        import torch

        data = {"device": "cpu", **self.options, **request}
        if self.config.get(OPTIONS):
            self.config[OPTIONS].update({name: data[name] for name in self.options})
            self.config.parse()
        before = list(self.parsed("preprocessing", data).transforms)
        for transform in before:
            if isinstance(transform, LoadImaged):
                transform._loader.image_only = False
        data["image_path"] = data[self.image]
        for transform in before:
            data = transform(data)
        self.network.load_state_dict(torch.load(f"{self.root}/models/model.pt", weights_only=True), strict=False)
        inferer = self.parsed("inferer", data)
        with torch.no_grad():
            data[self.pred] = inferer(data[self.image][None], self.network.eval())[0]
        for transform in self.parsed("postprocessing", data).transforms:
            data = data if isinstance(transform, SaveImaged) else transform(data)
        mask = np.asarray(data[self.pred])[0]
        np.save(request["output"], mask)
        return {"labels": self.labels, "values": np.unique(mask).tolist(), "options": sorted(self.options)}


class Train:
    def __init__(self, root: str) -> None:
        self.root, self.config = root, load(root, "train.json")

    def __call__(self, request: dict) -> dict:
        cases, split = [{key: case[key] for key in ("image", "label")} for case in request["cases"]], 0.2
        split = request.get("val_split", split)
        parts = partition_dataset(cases, ratios=[1 - split, split], shuffle=False) if split > 0 else (cases, [])
        handlers = self.config.get(HANDLERS, [])
        if not [handler for handler in handlers if handler.get("_target_") == "CheckpointLoader"]:
            weights, loaded = os.path.join(self.root, "models", "model.pt"), {"model": "$@network"}
            loader = {"_target_": "CheckpointLoader", "load_path": weights, "load_dict": loaded, "strict": False}
            handlers.insert(0, loader)
        overrides = {
            "bundle_root": self.root,
            "train#trainer#max_epochs": request.get("max_epochs", 50),
            "train#dataset#data": parts[0],
            "device": "cpu",
            HANDLERS: handlers,
        }
        if self.config.get(OPTIONS):
            options = self.config.get_parsed_content(OPTIONS, instantiate=True)
            overrides[OPTIONS] = {name: request[name] for name in ensure_tuple(options)}
        if split >= 0:
            overrides["validate#dataset#data"] = parts[1]
        sys.path.insert(0, self.root)
        unload_scripts()
        monai.bundle.run(
            run_id=request.get("run_id", "run"), init_id=None, final_id=None,
            meta_file=os.path.join(self.root, "configs", "metadata.json"),
            config_file=os.path.join(self.root, "configs", "train.json"), **overrides,
        )  # fmt: skip
        sys.path.remove(self.root)
        return {}


if __name__ == "__main__":
    root, requests = sys.argv[1], json.loads(sys.argv[2])
    tasks = {"infer": Infer(root), "train": Train(root)}
    for task, request in requests:
        print(f"\n{task} {json.dumps(tasks[task](request))}", flush=True)
