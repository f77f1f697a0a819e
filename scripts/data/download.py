"""Downloads a task of the Medical Segmentation Decathlon with MONAI's own downloader and checksums."""

from __future__ import annotations

from pathlib import Path

from monai.apps import DecathlonDataset, download_url, extractall

from ..utils.errors import UserError
from ..utils.files import check_writable, write_folder_whole


def download_task(
    task: str, folder: str, url: str | None = None, hash_val: str | None = None, hash_type: str = "sha256"
) -> None:
    """Put a task's folder into `folder`; an archive that is there already is only checked.

    Args:
        task: "Task04_Hippocampus", for example.
        folder: where to put it and its archive.
        url: another source than MONAI's, with its checksum.
        hash_val: checksum of the archive at `url`.
        hash_type: kind of `hash_val`.

    Raises:
        UserError: an unknown task, a `url` without a checksum, a failed download or one with another checksum.
    """
    if task not in DecathlonDataset.resource:
        raise UserError(f"task is {task!r}; expected one of {', '.join(DecathlonDataset.resource)}.")
    if url is not None and hash_val is None:
        raise UserError(f"url {url} comes without a checksum; give --hash_val (and --hash_type, sha256 by default).")
    if url is None:  # MONAI publishes MD5 sums alone
        url, hash_val, hash_type = DecathlonDataset.resource[task], DecathlonDataset.md5[task], "md5"
    archive, target = Path(folder) / f"{task}.tar", Path(folder) / task
    if target.exists():
        raise UserError(f"{target} exists and is not overwritten; use it, or give another --folder.")
    check_writable(folder)
    try:
        download_url(url, archive, hash_val, hash_type)
        write_folder_whole(target, lambda partial: _extract(archive, partial, task))
    except UserError:
        raise
    except Exception as e:  # MONAI and urllib raise network, hash and archive errors of many kinds here
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f"{task} could not be fetched from {url} ({reason}); try again, or delete {archive}.") from e
    print(f"{target} is ready: --dataset_dir {target}")


def _extract(archive: Path, partial: Path, task: str) -> None:
    extractall(archive, partial)
    if not (partial / task / "dataset.json").is_file():
        raise UserError(f"{archive} has no {task}/dataset.json in it; it is another archive than expected.")
    for file in (partial / task).iterdir():
        file.rename(partial / file.name)
    (partial / task).rmdir()
