"""What users give to several commands, read and checked: JSON files, conversations, images, models and folders."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .errors import MixLoraError


def read_json(file: Path) -> dict:
    """The object in a JSON file.

    Raises:
        MixLoraError: the file is missing, cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MixLoraError(f"{file} is missing; is the download complete?") from None
    except OSError as error:
        raise MixLoraError(f"{file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise MixLoraError(f"{file} is damaged: not valid JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise MixLoraError(f"{file} is damaged: expected a JSON object, got {type(content).__name__}; copy it again")
    return content


def read_conversations(path: str | Path) -> list[dict[str, Any]]:
    """Read LLaVA's training data: a JSON list of `{"id", "image"?, "conversations": [{"from", "value"}, ...]}`.

    Raises:
        MixLoraError: the file is missing, not JSON, or an entry has another form.
    """
    try:
        samples = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MixLoraError(f"{path}: no such file; expected a JSON list of conversations") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MixLoraError(f"{path}: not valid JSON ({error}); is the download complete?") from error
    except OSError as error:
        raise MixLoraError(f"{path}: cannot be read ({error.strerror}); expected a JSON file") from error
    if not isinstance(samples, list) or not samples:
        raise MixLoraError(f"{path}: expected a JSON list with at least one conversation, got {_kind(samples)}")
    for position, sample in enumerate(samples):
        turns = sample.get("conversations") if isinstance(sample, dict) else None
        well_formed = isinstance(turns, list) and all(
            isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
            for turn in turns
        )
        if not well_formed or len(turns) < 2:
            raise MixLoraError(
                f"{path}: entry {position} has no usable 'conversations'; expected a list of at least two "
                '{"from": "human" or "gpt", "value": text}'
            )
    return samples


def check_images(samples: list[dict[str, Any]], data_path: str | Path, image_folder: str | Path) -> None:
    """Refuse data that names an image which is not in `image_folder`.

    Raises:
        MixLoraError: the first missing image, and how many are missing.
    """
    names = {sample["image"]: position for position, sample in reversed(list(enumerate(samples))) if "image" in sample}
    progress = tqdm(names.items(), desc="Looking for the images", unit="file", disable=len(names) < 50_000)
    missing = [(position, name) for name, position in progress if not os.path.exists(os.path.join(image_folder, name))]
    if missing:
        position, name = min(missing)
        raise MixLoraError(
            f"{os.path.join(image_folder, name)}: no such image, but entry {position} of {data_path} names it "
            f"({len(missing)} of {len(names)} images are missing); check --image_folder"
        )


def check_model_path(flag: str, value: str | None) -> None:
    """Refuse a local path that does not exist; a hub name such as `lmsys/vicuna-7b-v1.5` passes."""
    if value and (value.startswith((".", "/", "~")) or value.count("/") > 1) and not Path(value).expanduser().exists():
        raise MixLoraError(f"{flag} {value}: no such folder; expected a local model or a hub name like owner/name")


def check_writable(folder: str | Path, flag: str = "--output_dir") -> None:
    """Create `folder`, given as `flag`, if need be, and refuse one that cannot be written.

    Raises:
        MixLoraError: with the operating system's reason.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MixLoraError(f"{folder}: cannot be written ({error.strerror}); choose another {flag}") from error


def positive(word: str) -> int:
    """A command line's word as a whole number of at least 1, for argparse.

    Raises:
        argparse.ArgumentTypeError: it is smaller.
    """
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word}: expected a whole number of at least 1")
    return number


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else type(value).__name__
