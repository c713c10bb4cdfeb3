"""What one adapter does in one layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from .config import MixLoraConfig


@dataclass(frozen=True)
class LayerSettings:
    """What one adapter does in one layer: the fields of [`MixLoraConfig`] after `rank_pattern` and `alpha_pattern`."""

    r: int
    num_factors: int
    scaling: float
    pairing: str
    routing: str
    straight_through: bool
    router_scope: str
    router_width: int | None  # of the word vectors that routers see; None where they see the layer's input
    count_padding: bool
    decode_routing: str
    cfs: str
    cfs_temperature: float
    cfs_product: str
    unknown_prompt: str
    balance_loss_weight: float
    task_loss_weight: float
    tasks: int  # how many of them have a subset of the factors
    seed: int = field(compare=False)  # of the fixed routes that routing="random" takes in evaluation

    @classmethod
    def from_config(
        cls, config: MixLoraConfig, r: int, lora_alpha: float, seed: int, word_width: int | None = None
    ) -> LayerSettings:
        """Settings of a layer whose rank is `r` and whose update is scaled by `lora_alpha / r`.

        `word_width`: of the model's word vectors, for `router_input="words"`.
        """
        return cls(
            r=r,
            num_factors=config.num_factors,
            scaling=lora_alpha / r,
            pairing=config.pairing,
            routing=config.routing,
            straight_through=config.router_gradient == "straight_through",
            router_scope=config.router_scope,
            router_width=word_width if config.router_input == "words" else None,
            count_padding=config.count_padding,
            decode_routing=config.decode_routing,
            cfs=config.cfs,
            cfs_temperature=config.cfs_temperature,
            cfs_product=config.cfs_product,
            unknown_prompt=config.unknown_prompt,
            balance_loss_weight=config.balance_loss_weight,
            task_loss_weight=config.task_loss_weight,
            tasks=len(config.tasks or ()),
            seed=seed,
        )
