"""`llava-mixlora check`: what a run would make of training data, without training."""

from __future__ import annotations

import argparse
import json

from ..adapters.config_file import config_of
from ..data.check import MAX_LOST_SHARE, check_data
from ..data.images import CHECKS, HEADERS
from ..data.token_counts import TokenCounter
from ..errors import MixLoraError
from ..inputs import positive
from ..patches import apply
from ..training.run_data import max_lost_share, token_counter
from .package_flag import add_package, use_package


def add_check(parser: argparse.ArgumentParser) -> None:
    """Describe the command `check` to its parser."""
    parser.description = (
        "Read training data as a run does before it loads the model: forms, turns, images and, with the model's "
        "tokenizer, tokens. The status is 1 where a run would refuse the data."
    )
    parser.epilog = "example: llava-mixlora check train.json --image-folder images --model-path lmsys/vicuna-7b-v1.5"
    parser.add_argument("data", nargs="+", metavar="DATA", help="a JSON list in LLaVA's format, or JSON Lines")
    parser.add_argument("--image-folder", metavar="FOLDER", help="what images' names are relative to")
    parser.add_argument("--model-path", metavar="MODEL", help="the base of the run; with it tokens are counted")
    parser.add_argument(
        "--vision-tower", metavar="TOWER", help="the run's; by default the one that the base's config.json names"
    )
    parser.add_argument("--version", default="v1", help="conversation template, as of the run (default: v1)")
    parser.add_argument("--model-max-length", type=positive, default=2048, help="tokens per sample (default: 2048)")
    parser.add_argument("--image-aspect-ratio", default="pad", help="as of the run (default: pad)")
    parser.add_argument(
        "--check-images",
        default=HEADERS,
        choices=CHECKS,
        help="headers (default) and the ends of files, full: every pixel, or none",
    )
    parser.add_argument(
        "--max-lost-share",
        default=str(MAX_LOST_SHARE),
        metavar="SHARE",
        help=f"largest share of entries that may teach nothing (default: {MAX_LOST_SHARE})",
    )
    add_package(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON, one object per file")
    parser.set_defaults(command=check)


def check(arguments: argparse.Namespace) -> None:
    """Print what each file holds.

    Raises:
        MixLoraError: a file cannot be read, the tokens cannot be counted, or a run would refuse one of the files.
    """
    use_package(arguments)
    share = max_lost_share({"max_lost_share": arguments.max_lost_share})
    counter = _counter(arguments) if arguments.model_path else None
    checked = []
    for path in arguments.data:
        found = check_data(
            path,
            arguments.image_folder,
            images=arguments.check_images,
            padded=arguments.image_aspect_ratio == "pad",
            counter=counter,
        )
        print(json.dumps(found.to_dict()) if arguments.json else found.table(), flush=True)
        checked.append(found)
    for found in checked:
        found.refuse_losses(share, "--max-lost-share")


def _counter(arguments: argparse.Namespace) -> TokenCounter:
    apply()  # LLaVA, which prepares the samples, cannot be imported before
    config = config_of(arguments.model_path) or {}
    tower = arguments.vision_tower or config.get("mm_vision_tower")
    of_base = {
        name: str(config[name]) for name in ("mm_use_im_start_end", "mm_vision_select_feature") if name in config
    }
    counter = token_counter(
        {
            **of_base,
            **({"vision_tower": tower} if tower else {}),
            "model_name_or_path": arguments.model_path,
            "version": arguments.version,
            "model_max_length": arguments.model_max_length,
        }
    )
    if counter is None:
        raise MixLoraError(
            f"--model-path {arguments.model_path}: its tokenizer, or the configuration of its vision tower {tower}, "
            "cannot be loaded; expected a LLaVA or a language model with its tokenizer, and --vision-tower"
        )
    return counter
