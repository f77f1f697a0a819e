"""The commands that are no workflows of MONAI: `python -m scripts COMMAND --setting value`."""

from __future__ import annotations

import importlib
import logging.config
import sys
from pathlib import Path

from .utils.errors import run_command

LOGGING = Path(__file__).parents[1] / "configs/logging.conf"

COMMANDS = {  # name -> module, function, what it does
    "cross_validate": ("evaluation.cross_validation", "cross_validate", "train and score all folds, pool their scores"),
    "score_masks": ("evaluation.mask_scores", "score_masks", "score a folder of masks by a folder of references"),
    "compare_scores": ("evaluation.comparison", "compare_scores", "compare two evaluations, case by case"),
    "find_best_configuration": (
        "evaluation.best_configuration",
        "find_best_configuration",
        "rank cross-validations and their ensembles, say how to use the best",
    ),
    "package": ("publishing.package", "package", "make of a training a bundle of its own, folder and zip"),
    "ensemble_probabilities": (
        "inference.ensemble_probabilities",
        "ensemble_probabilities",
        "masks of the mean of several folders of saved probabilities",
    ),
    "convert_weights": (
        "weights.convert",
        "convert_weights",
        "weights of MIC-DKFZ/MedNeXt or MONAI to this bundle and back",
    ),
    "extend_folds": ("data.extend_folds", "extend_folds", "keep the folds of a data set that gets more cases"),
    "export_network": ("weights.programs", "export_network", "a network as TorchScript, torch.export or ONNX program"),
    "convert_dataset": ("data.convert", "convert_layout", "a Decathlon folder to an nnU-Net v2 folder and back"),
    "benchmark_cpu": ("benchmarks.cpu", "bench", "time this network beside others on this CPU"),
    "benchmark_gpu": ("benchmarks.gpu", "bench", "time this network beside others on this GPU, and tune its kernels"),
    "benchmark_memory": ("benchmarks.memory", "memory", "what a training step keeps, for each way of checkpointing"),
    "benchmark_peak": ("benchmarks.peak", "peak", "the most memory of a training step on this CPU, and its prediction"),
    "compile_triton": ("benchmarks.compile_triton", "report", "compile the Triton kernels for GPUs that are not there"),
}


def main() -> None:
    """Run the command that the first argument names; without one, or with --help, list the commands.

    The exit code is 1 where there is no such command, or where it needs the whole bundle and only the wheel is
    installed.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print("\n".join(f"{key:24}{text}" for key, (_, _, text) in COMMANDS.items()))
        sys.exit(f"error: {name!r} is no command; give one of those above." if name not in ("", "--help", "-h") else 0)
    module, function, _ = COMMANDS[name]
    try:
        found = importlib.import_module(f".{module}", __package__)
    except ModuleNotFoundError as e:
        if not (e.name or "").startswith(f"{__package__}."):
            raise
        sys.exit(f"error: {name} needs the whole bundle; clone it and run the command there.")
    if LOGGING.is_file():  # the wheel has none
        logging.config.fileConfig(LOGGING, disable_existing_loggers=False)
    sys.argv = [f"{__package__} {name}", *sys.argv[2:]]
    run_command(getattr(found, function))


if __name__ == "__main__":
    main()
