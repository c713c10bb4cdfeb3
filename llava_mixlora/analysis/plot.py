"""`llava-mixlora plot`: an adapter's factors and routes as pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..inference.conversation import conversation_of
from ..inference.model_flags import add_model_flags, choices_of
from ..inference.samples import SampleSource
from ..inputs import check_writable, positive
from ..method.stored_tensors import allowing_incomplete
from ..own_files import own_place
from .plot_usage import plot
from .task_routes import draw_task_routes, task_routes


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Describe the command `plot` to its parser."""
    parser.description = (
        "Draw which share of the choices each factor got in training, per layer and pool. With --data, draw for each "
        "task of the data which factors its prompts choose, a map of the routes, and how alike the tasks are. Needs "
        "matplotlib, and scikit-learn for the map."
    )
    parser.epilog = "example: llava-mixlora plot output/llava-mixlora --output usage.png"
    parser.add_argument("adapter", metavar="ADAPTER", help="folder with adapter_config.json")
    parser.add_argument(
        "--output", help="picture to write, with --data a folder (default: ADAPTER/usage.png, ADAPTER/routes)"
    )
    parser.add_argument("--data", metavar="DATA", help="LLaVA's training data with fields 'task'")
    parser.add_argument("--image-folder", metavar="DIR", help="where the images of DATA lie")
    parser.add_argument("--samples", type=positive, default=32, help="how many of each task (default: 32)")
    parser.add_argument("--version", help="conversation template (default: that of its training, or v1)")
    parser.add_argument("--model-base", metavar="BASE", help="the adapter's base (default: the one that it names)")
    add_model_flags(parser)
    parser.set_defaults(command=_plot)


def _plot(given: argparse.Namespace) -> None:
    if given.data is None:
        output = given.output or str(own_place(given.adapter, "usage.png"))
        with allowing_incomplete(given.allow_incomplete):
            plot(given.adapter, output)
        print(f"Wrote {output}")
        return
    version = conversation_of(given.adapter, given.version, "--version", otherwise="v1")
    data = SampleSource(given.data, given.image_folder, samples=given.samples, version=version)
    output = Path(given.output or own_place(given.adapter, "routes"))
    check_writable(output, "--output")
    draw_task_routes(task_routes(given.adapter, given.model_base, data, choices_of(given)), output)
    print(f"Wrote routes.json and three pictures to {output}")
