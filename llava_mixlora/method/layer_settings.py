"""What one adapter does in one layer."""

from __future__ import annotations

from dataclasses import dataclass

from .config import MixLoraConfig


@dataclass(frozen=True)
class LayerSettings:
    """What one adapter does in one layer: the fields of [`MixLoraConfig`] after `rank_pattern` and `alpha_pattern`."""

    r: int
    num_factors: int
    scaling: float
    routing: str
    straight_through: bool
    router_scope: str
    count_padding: bool
    decode_routing: str
    cfs_product: str
    unknown_prompt: str
    balance_loss_weight: float
    seed: int  # of the fixed routes that routing="random" takes in evaluation

    @classmethod
    def from_config(cls, config: MixLoraConfig, r: int, lora_alpha: float, seed: int) -> LayerSettings:
        """Settings of a layer whose rank is `r` and whose update is scaled by `lora_alpha / r`."""
        return cls(
            r=r,
            num_factors=config.num_factors,
            scaling=lora_alpha / r,
            routing=config.routing,
            straight_through=config.router_gradient == "straight_through",
            router_scope=config.router_scope,
            count_padding=config.count_padding,
            decode_routing=config.decode_routing,
            cfs_product=config.cfs_product,
            unknown_prompt=config.unknown_prompt,
            balance_loss_weight=config.balance_loss_weight,
            seed=seed,
        )
