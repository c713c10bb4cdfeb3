"""`llava-mixlora plot`: which factors each layer used in training, as a picture."""

from __future__ import annotations

from pathlib import Path

import torch

from ..adapters.inspect_adapter import read_contents
from ..errors import MixLoraError
from ..lettering import literal
from ..method.config import MixLoraConfig
from ..method.routing_statistics import POOLS
from ..writing import whole_file


def plot(folder: str | Path, output: str | Path) -> None:
    """Draw into `output` which share of the choices each factor got, per layer and pool.

    With `pairing="same"` the two pools have one choice, and so one panel.

    Raises:
        MixLoraError: as [`read_contents`]; or there are no statistics, matplotlib is missing, or `output` cannot be
            written.
    """
    contents = read_contents(folder)
    if not contents.usage:
        raise MixLoraError(f"{folder} holds no routing statistics to draw; train it with this version of llava-mixlora")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MixLoraError("plot needs matplotlib; pip install 'llava-mixlora[eval]'") from error
    titles = pool_titles(contents.config)
    usage = torch.stack(list(contents.usage.values()))[:, : len(titles)].double()  # [layers, 1 or 2, E]
    shares = usage / usage.sum(dim=-1, keepdim=True)
    layers = list(contents.usage)
    figure = Figure(figsize=(2 + 4.5 * len(titles), max(3.0, 1.5 + 0.16 * len(layers))), layout="constrained")
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axis, title, share in zip(axes, titles, shares.unbind(dim=1)):
        drawn = axis.imshow(share, aspect="auto", cmap="viridis", vmin=0, vmax=float(shares.max()))
        axis.set(title=title, xlabel="factor", xticks=range(0, share.shape[1], max(1, share.shape[1] // 16)))
    axes[0].set_yticks(range(len(layers)), layers, fontsize=6)
    figure.colorbar(drawn, ax=axes, label=f"share of the choices (1/E = {1 / shares.shape[-1]:.3f})")
    figure.suptitle(f"Factors used in training: {literal(Path(folder).resolve().name)}")
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(Path(output)) as unfinished:
            figure.savefig(unfinished, dpi=150)
    except MixLoraError:
        raise
    except (OSError, ValueError) as error:  # matplotlib raises ValueError for a suffix it does not know
        raise MixLoraError(
            f"--output {output} cannot be written ({error}); choose another, such as usage.png"
        ) from error


def pool_titles(config: MixLoraConfig) -> list[str]:
    """A title for each choice of factors that there is to show: of pools A and B, or the one of both."""
    return ["pools A and B alike"] if config.pairing == "same" else [f"pool {pool}" for pool in POOLS]
