"""A few samples of a run's data, kept beside its adapter: what merging makes a static stand-in from, and judges it by.

`calibration.json` holds the samples' texts and the names of their images, no picture; the folder that the images lie
in is named by its absolute path.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import MixLoraError
from ..inputs import read_json
from ..own_files import own_file
from ..writing import write_whole
from .conversations import Sample, Unusable, as_sample
from .drawing import drawn_evenly

KEPT = "calibration.json"
SAMPLES = 2048
"""How many a run keeps unless `--mixlora_calibration_samples` says otherwise."""
FIELDS = ("id", "image", "task", "conversations")
"""What is kept of a sample."""


def check_count(count: int) -> None:
    """Refuse a number of samples to keep that merging could do nothing with.

    Raises:
        MixLoraError: it is neither 0 nor at least 2.
    """
    if count < 0 or count == 1:
        raise MixLoraError(
            f"--mixlora_calibration_samples {count}: expected 0 (keep none) or at least 2, one of them to judge by"
        )


@dataclass(frozen=True)
class KeptCalibration:
    """What `calibration.json` holds: samples in LLaVA's form, and what the run read them with.

    `data`: the file that they were drawn from; `image_folder`: None of a run without one; `version`: the conversation
    template.
    """

    samples: list[Sample]
    data: str
    image_folder: str | None
    version: str


def keep_calibration(
    folder: str | Path,
    samples: Sequence[Sample],
    count: int,
    data: str,
    image_folder: str | None,
    version: str,
    seed: int,
) -> None:
    """Write `calibration.json` into an adapter's folder: `count` of the samples, drawn from all tasks alike.

    The other arguments are those of [`KeptCalibration`]. With a count of 0 there is no such file afterwards.
    """
    file = Path(folder) / KEPT
    if count == 0:
        file.unlink(missing_ok=True)
        return
    content = {
        "note": f"samples of the training data, for `llava-mixlora merge`; delete {KEPT} to share none of them",
        "data": str(Path(data).absolute()),
        "image_folder": None if image_folder is None else str(Path(image_folder).absolute()),
        "version": version,
        "samples": [{name: s[name] for name in FIELDS if name in s} for s in drawn_evenly(samples, count, seed)],
    }
    write_whole(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def kept_calibration(folder: str | Path) -> KeptCalibration | None:
    """What was kept beside the adapter in `folder`; None where nothing was.

    Raises:
        MixLoraError: the file is damaged, or a link out of the folder.
    """
    file = own_file(folder, KEPT)
    if file is None:
        return None
    content = read_json(file)
    samples, image_folder = content.get("samples"), content.get("image_folder")
    told = {name: content.get(name) for name in ("data", "version")}
    whole = isinstance(samples, list) and all(isinstance(value, str) for value in told.values())
    if not whole or not (image_folder is None or isinstance(image_folder, str)):
        raise MixLoraError(
            f"{file} is damaged: expected 'data', 'version', 'image_folder' and a list 'samples'; copy it again, or "
            "delete it"
        )
    read = []
    for number, entry in enumerate(samples):
        try:
            read.append(as_sample(entry)[0])
        except Unusable as error:
            raise MixLoraError(f"{file} is damaged: sample {number}: {error}; copy it again, or delete it") from error
    return KeptCalibration(read, image_folder=image_folder, **told)
