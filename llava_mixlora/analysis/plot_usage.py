"""`llava-mixlora plot`: which factors each layer used in training, as a picture."""

from __future__ import annotations

from pathlib import Path

import torch

from ..adapters.inspect_adapter import read_contents
from ..errors import MixLoraError
from ..method.routing_statistics import POOLS


def plot(folder: str | Path, output: str | Path) -> None:
    """Draw into `output` which share of the choices each factor got, per layer and pool.

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
    usage = torch.stack(list(contents.usage.values())).double()  # [layers, 2, E]
    shares = usage / usage.sum(dim=-1, keepdim=True)
    layers = list(contents.usage)
    figure = Figure(figsize=(11, max(3.0, 1.5 + 0.16 * len(layers))), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, pool, share in zip(axes, POOLS, shares.unbind(dim=1)):
        drawn = axis.imshow(share, aspect="auto", cmap="viridis", vmin=0, vmax=float(shares.max()))
        axis.set(title=f"pool {pool}", xlabel="factor", xticks=range(0, share.shape[1], max(1, share.shape[1] // 16)))
    axes[0].set_yticks(range(len(layers)), layers, fontsize=6)
    figure.colorbar(drawn, ax=axes, label=f"share of the choices (1/E = {1 / shares.shape[-1]:.3f})")
    figure.suptitle(f"Factors used in training: {Path(folder).resolve().name}")
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:  # matplotlib raises ValueError for a suffix it does not know
        raise MixLoraError(
            f"--output {output} cannot be written ({error}); choose another, such as usage.png"
        ) from error
