"""Which positions the routers of one forward pass average, and which routes it goes on with.

An adapted layer sees only its own input x [B, S, d]. Which of the S positions are padding, prompt or answer is known
where the model is called, so that knowledge travels beside x as a [`RoutingScope`]; `forward_passes` opens one for each
forward pass of a model.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ..errors import MixLoraError
from .held_routes import HeldRoutes
from .joint_work import Share, Together, work_together
from .mixture import full_precision, pooled_input
from .recomputation import NO_BACKWARD, saving_hooks
from .router_loss import RouterLoss
from .segments import Segments, conversation_turns, routed_positions
from .training_statistics import TrainingStatistics
from .word_centre import centred, news_of, word_sums

SHORTEST_PROMPT = 2
"""Positions. Labels that leave one position unsupervised mask what starts a sequence, not a prompt."""

HOW_TO_TELL = (
    "mask the prompt in the labels with -100 (TRL: prompt-completion data, completion_only_loss or "
    "assistant_only_loss; without label smoothing or a loss function of your own, which take the labels away), or say "
    "what is prompt with llava_mixlora.known_prompt"
)

_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models of whose unknown prompts was warned."""


class Average(NamedTuple):
    """What an adapter's routers average: its `router_scope`, and whether they see words."""

    router_scope: str
    words: bool


class RoutingScope:
    """The positions of one forward pass.

    Args:
        shape: (B, S) of the sequence, or None when the model's input is not a sequence.
        attended: bool [B, S], False at padding; None when every position is attended.
        prompt: bool [B, S], the positions that routers with `router_scope="prompt"` average; None when unknown.
        held: what earlier forward passes of the same generation computed; it is used again.
    """

    def __init__(
        self,
        shape: tuple[int, int] | None = None,
        attended: Tensor | None = None,
        prompt: Tensor | None = None,
        held: HeldRoutes | None = None,
    ) -> None:
        # Apart from `computed`, so that a checkpoint that runs the forward again computes what the forward computed.
        self.held = HeldRoutes() if held is None else held
        self.computed: dict[tuple[str, str], Tensor] = {}
        self.goes_on = False  # whether it continues a cache
        self.trains = False  # whether the forward pass is a step of training, to be counted and balanced
        self.router_loss = RouterLoss()
        self.statistics = TrainingStatistics()
        self.tasks: Tensor | None = None  # int64 [B], the number of each instance's task, in training
        self._checked_tasks: set[tuple[int, int]] = set()
        self.word_news: list[tuple[Tensor, Tensor]] = []  # sums of word vectors, and what is to be added to them
        self.adapter_names: Sequence[str] | None = None  # one for each instance
        self.model: nn.Module | None = None  # whose hook opened it
        self.root: nn.Module | None = None  # the adapted model
        self.labels: Any = None  # of an encoder-decoder, for its decoder
        self.role: str | None = None  # "encoder" or "decoder" in a model of both
        self.memory: tuple[Tensor, RoutingScope] | None = None  # what an encoder made for this decoder
        self._of_memory: set[str] = set()  # layers that see it
        self.asked_by: RoutingScope | None = None  # of pictures that are attended to: the scope of the text
        self.begins: Tensor | None = None  # token ids that a generation without a cache begins with
        self.outer: RoutingScope | None = None
        self.whole: RoutingScope = self  # that this is a part of
        self.backward = NO_BACKWARD  # the backward pass within which it was opened
        self.first_node = 0  # the number of the first autograd node that its forward pass can make
        self.set_positions(shape, attended, prompt=prompt)

    def set_positions(
        self,
        shape: tuple[int, int] | None,
        attended: Tensor | None,
        answered: Tensor | None = None,
        starts: Tensor | None = None,
        prompt: Tensor | None = None,
        given: int | None = None,
        rest_is_asked: bool = False,
        images: Tensor | None = None,
        images_unknown: str | None = None,
    ) -> None:
        """Replace what the scope knows of the sequence.

        `answered`: bool [B, S], True where the model answers; `starts`: bool [B, S], True where a packed sample begins
        behind another; `given`: how many positions the caller of a generation gave, drafts follow; `rest_is_asked` as
        in [`conversation_turns`]; `images`: bool [B, S], True at image features, None where there are none, or where
        they are is unknown for the reason `images_unknown`. The others are those of the class.
        """
        # Of a tensor's sizes a compiler can leave open which they are, of numbers it does not: one without storage.
        self._extent = None if shape is None else torch.empty(shape, device="meta")
        self.attended = attended
        self.answered, self.starts, self.prompt, self.given = answered, starts, prompt, given
        self.rest_is_asked = rest_is_asked
        self.images, self.images_unknown = images, images_unknown
        self.unknown_prompt: str | None = None  # why what is averaged is no prompt
        self._without_text: str | None = None  # which instructions have no text to average
        self._divided: dict[tuple[str, bool, bool], tuple[Segments | None, Tensor | None]] = {}
        self._embeddings: Tensor | None = None
        self._words: dict[tuple[str, str], Tensor] = {}
        self._last_pooled: tuple[weakref.ref[Tensor], tuple[Any, ...], Tensor] | None = None
        self._together: dict[str, Together] = {}  # by adapter

    def sequence_of(self, x: Tensor, layer: str) -> RoutingScope:
        """The scope of what a layer is given: this one or, in attention to an encoder's states, theirs."""
        if self.memory is None:
            return self
        states, scope = self.memory
        if x is states or (scope.covers(x) and not self.covers(x)):
            self._of_memory.add(layer)  # a checkpoint may run the layer again on a copy of them
        return scope if layer in self._of_memory else self

    def by_instance(self, x: Tensor) -> Tensor:
        """x of pictures [B·n, P, d], a row for each picture or tile, as the scope's instances [B, n·P, d]."""
        if self.asked_by is None or x.ndim != 3 or x.shape[:2].numel() != self._extent.numel():
            return x
        return x.reshape(*self.shape, x.shape[-1])

    @property
    def shape(self) -> tuple[int, int] | None:
        """(B, S) of the sequence, or None when the model's input is not a sequence."""
        return None if self._extent is None else self._extent.shape

    def covers(self, x: Tensor) -> bool:
        """Whether x [B, S, d] is this scope's sequence (and not, say, the patches inside a vision tower)."""
        return self.shape is not None and x.ndim == 3 and x.shape[:2] == self.shape

    def shares_instances(self, x: Tensor) -> bool:
        """Whether x [B, S', d] holds this scope's instances: all their positions or, in a model's head, the last."""
        shape = self.shape
        return shape is not None and x.ndim == 3 and x.shape[0] == shape[0]

    def weights(self, router_scope: str, count_padding: bool) -> Tensor | None:
        """Rows in float32 that sum to one over the routed positions, [B, S], or [B, T, S] for T segments in a row;

        None where all positions count alike.
        """
        return self._division(router_scope, count_padding, router_scope == "instruction")[1]

    def segments(self, router_scope: str, count_padding: bool) -> Segments | None:
        """What of the sequence has a route of its own; None where every row has one route."""
        return self._division(router_scope, count_padding, router_scope == "instruction")[0]

    def settle(self, averages: dict[str, Average]) -> None:
        """Work out what needs values of tensors, before the layers that ask for it: what adapters' routers average."""
        if self.shape is None:
            return
        for adapter, (router_scope, words) in averages.items():
            of_text = router_scope == "instruction"
            # Segments are asked for by the scope alone, also where words are averaged.
            for text_only in {of_text, of_text or words}:
                if self.answered is not None or self.starts is not None or (text_only and self.images is not None):
                    self._division(router_scope, False, text_only)
            if words and not (self.goes_on and self.held.cores):  # which a generation goes on with, whatever is said
                self.words(adapter, router_scope)

    def see_words(self, embeddings: Tensor) -> None:
        """Take input embeddings [B, S, d_model] for the word vectors of the scope's sequence, if they are."""
        if self.covers(embeddings) and not self._words:
            self._embeddings = embeddings.detach()

    def forget_words(self) -> None:
        """Let go of the input embeddings; what layers have asked for stays, also for checkpoints."""
        self._embeddings = None

    def words(self, adapter: str, router_scope: str) -> Tensor | None:
        """u of every instance, float32 [B, d_model], or [G, d_model] of the [`segments`]; None without word vectors.

        One average for all layers; see `word_centre`. Pictures that a text attends to have the words of that text, and
        in a conversation of its first question, under which a cache keeps them.
        """
        if self.asked_by is not None:
            words = self.asked_by.words(adapter, router_scope)
            segments = self.asked_by.segments(router_scope, False)
            if words is None or segments is None:
                return words
            rows = torch.arange(self.shape[0], device=words.device)
            return words[torch.searchsorted(segments.row.to(words.device), rows)]
        key = adapter, router_scope
        if key not in self._words and self._embeddings is not None:
            segments, weights = self._division(router_scope, False, text_only=True)
            with full_precision(self._embeddings):
                mean = pooled_input(self._embeddings, weights)
            if segments is not None:
                mean = segments.on(mean.device).of_rows(mean)
            sums = word_sums(self.root, adapter).to(mean.device)
            if self.trains:
                news = news_of(mean, sums)
                self.whole.word_news.append((word_sums(self.root, adapter), news))
                sums = sums + news
            self._words[key] = centred(mean, sums)
        return self._words.get(key)

    def add_words(self) -> None:
        """Add the word vectors of a forward pass that is over to the sums, and forget them."""
        for sums, news in self.word_news:
            sums += news.to(sums.device)
        self.word_news = []

    def pooled(self, x: Tensor, router_scope: str, count_padding: bool, given: Tensor) -> Tensor:
        """h̄ of x [B, S, d_in] over the routed positions where x has them, by [`mixture.pooled_input`].

        [B, d_in], or [G, d_in] of the G [`segments`]. Layers that are `given` the same tensor in a row (q, k and v;
        gate and up) share one average of it.
        """
        text_only = router_scope == "instruction"
        segments, weights = self._division(router_scope, count_padding, text_only) if self.covers(x) else (None, None)
        # A compiler finds by itself what is computed twice, and a tensor of inference mode does not count its changes.
        shares = not (torch.compiler.is_compiling() or given.is_inference())
        if shares:
            # Within one checkpoint too, which must compute in the backward pass what it has computed before.
            kind = x.dtype, x.requires_grad, torch.is_grad_enabled(), saving_hooks()
            key = (router_scope, count_padding, given._version, *kind)
            if self._last_pooled is not None:
                of, last_key, pooled = self._last_pooled
                if of() is given and last_key == key:
                    return pooled
        pooled = pooled_input(x, weights)
        if segments is not None:
            pooled = segments.on(x.device).of_rows(pooled)
        if shares:
            self._last_pooled = weakref.ref(given), key, pooled
        return pooled

    @property
    def makes_shares(self) -> bool:
        """Whether layers may work together; a compiler, which sees all of them, finds by itself what is worth it."""
        return self.trains and not torch.compiler.is_compiling()

    def share_of(
        self,
        layer: nn.Module,
        adapter: str,
        x: Tensor,
        pooled: Tensor,
        index: Tensor | None,
        dtype: torch.dtype,
        segments: Segments | None,
    ) -> Share | None:
        """A layer's share of what is made together for it and its companions in training, of what they `pooled`.

        The arguments and the None are those of [`work_together`]. Each share can be had once.
        """
        together = self._together.get(adapter)
        if together is None or not together.is_of(pooled, dtype) or layer not in together.waiting:
            together = work_together(layer, self.root, adapter, x, pooled, index, dtype, segments)
        return None if together is None else self._share(together, layer, adapter)

    def known_share(self, layer: nn.Module, adapter: str, x: Tensor) -> tuple[Share, Segments | None] | None:
        """A layer's share of what was made before, by words, which all layers share: none of it has to be asked again.

        With the segments that it is of; None where there is none for an x like this.
        """
        together = self._together.get(adapter)
        if together is None or not together.goes_for(x) or layer not in together.waiting:
            return None
        return self._share(together, layer, adapter), together.segments

    def _share(self, together: Together, layer: nn.Module, adapter: str) -> Share:
        share = together.waiting.pop(layer)
        # What all have had is forgotten, so that nothing of a checkpoint's part is kept behind it.
        self._together[adapter] = together
        if not together.waiting:
            del self._together[adapter]
        return share

    def _division(
        self, router_scope: str, count_padding: bool, text_only: bool
    ) -> tuple[Segments | None, Tensor | None]:
        key = router_scope, count_padding, text_only
        if key not in self._divided:
            self._divided[key] = self._divide(*key)
        return self._divided[key]

    def _divide(self, router_scope: str, count_padding: bool, text_only: bool) -> tuple[Segments | None, Tensor | None]:
        """The segments, and the weights of [`weights`]; `text_only` leaves image features out."""
        prompt_only = router_scope != "sequence"
        attended = None if count_padding else self.attended
        if self.given is not None and self.given < self.shape[1]:
            places = torch.arange(self.shape[1], device=self._device()).expand(self.shape)
            attended = places < self.given if attended is None else attended & (places < self.given)
        prompt = self.prompt if prompt_only else None
        answered = self._answers() if prompt_only and prompt is None else None
        if prompt_only and prompt is None and answered is None and self.trains and self.role != "encoder":
            self.unknown_prompt = "the labels were not passed along, or are not those of the sequence"
        index = self._index(answered)
        if index is not None:
            of_turn = router_scope == "instruction"
            segments, routed = self._divide_rows(index, attended, answered, prompt, of_turn)
            routed = self._text_of(routed) if text_only else routed
            return segments, routed / routed.sum(dim=-1, keepdim=True, dtype=torch.float32)
        if answered is not None:
            prompt = answered.cumsum(dim=1) == 0
            self._check_prompt(prompt if self.attended is None else prompt & self.attended, answered)
            usable = self._usable(prompt if attended is None else prompt & attended)
            prompt = prompt | ~usable
        positions = attended if prompt is None else prompt if attended is None else attended & prompt
        if text_only and self.images is not None:
            positions = torch.ones_like(self.images) if positions is None else positions
            positions = self._text_of(positions)
        return None, None if positions is None else self._normalised(positions)

    def _text_of(self, positions: Tensor) -> Tensor:
        """`positions` [B, S], or [B, T, S] of segments, without image features; unless nothing were left."""
        if self.images is None:
            return positions
        text = positions & ~(self.images if positions.ndim == 2 else self.images.unsqueeze(1))
        lacking = positions.any(dim=-1, keepdim=True) & ~text.any(dim=-1, keepdim=True)
        if not is_fake(lacking):
            rows = lacking.flatten(1).any(dim=1).nonzero().flatten().tolist()
            if rows:
                self._without_text = f"instance {rows[0]} of the batch"
        return torch.where(lacking, positions, text)

    def _divide_rows(
        self, index: Tensor, attended: Tensor | None, answered: Tensor | None, prompt: Tensor | None, of_turn: bool
    ) -> tuple[Segments, Tensor]:
        """The segments of rows, and what routers average of each, bool [B, T, S]; `of_turn`: nothing before a turn."""
        everywhere = torch.ones_like(index, dtype=torch.bool)
        counted = everywhere if attended is None else attended
        samples = torch.zeros_like(index) if self.starts is None else self.starts.long().cumsum(dim=1)
        of_sample = routed_positions(index, None, counted, samples)
        routed = routed_positions(index, answered, counted, samples)
        if of_turn:
            turns = torch.arange(routed.shape[1], device=index.device).view(1, -1, 1)
            routed = routed & (index.unsqueeze(1) == turns)
        if prompt is not None:
            routed = routed & prompt.unsqueeze(1)
        if answered is not None:
            answers = answered.new_zeros(routed.shape[:2], dtype=torch.long).scatter_add(1, index, answered.long())
            self._check_prompt(routed, answers)
            routed = torch.where(self._usable(routed), routed, of_sample)
        # A segment without any routed position falls back to its sample, and one of nothing but padding to its row.
        routed = torch.where(routed.any(dim=-1, keepdim=True), routed, of_sample)
        return Segments(index), routed | ~routed.any(dim=-1, keepdim=True)

    def _index(self, answered: Tensor | None) -> Tensor | None:
        """The segment of every position, int64 [B, S]; None where each row is one."""
        if self.starts is None and answered is None:
            return None
        if answered is None:
            return self.starts.long().cumsum(dim=1)
        attended = torch.ones_like(answered) if self.attended is None else self.attended
        asked_again = answered[:, :-1] & ~answered[:, 1:] & attended[:, 1:]
        if self.starts is None and (is_fake(answered) or not asked_again.any()):
            return None
        starts = torch.zeros_like(answered) if self.starts is None else self.starts
        index = conversation_turns(answered, attended, starts.long().cumsum(dim=1), self.rest_is_asked)
        return index if self.starts is not None or index.any() else None

    def _answers(self) -> Tensor | None:
        """`answered` without what starts a sample: nothing predicts it, so its label says nothing."""
        if self.answered is None or self.role == "decoder":
            return self.answered
        attended = torch.ones_like(self.answered) if self.attended is None else self.attended
        first = attended & (attended.cumsum(dim=1) == 1)
        return self.answered & attended & ~(first if self.starts is None else first | self.starts)

    def _usable(self, routed: Tensor) -> Tensor:
        shortest = 1 if self.role == "decoder" else SHORTEST_PROMPT  # no more is given of what a decoder goes on with
        return routed.sum(dim=-1, keepdim=True) >= shortest

    def _check_prompt(self, routed: Tensor, answers: Tensor) -> None:
        """Note where answers follow no prompt. `answers` [B, S] or [B, T] tells what has any."""
        if not self.trains or is_fake(routed):
            return
        has_answer = answers.bool() if routed.ndim == 3 else answers.any(dim=1)
        without = has_answer & ~self._usable(routed).squeeze(-1)
        lacking, of = torch.stack([without.sum(), has_answer.sum()]).tolist()
        if lacking:
            self.unknown_prompt = f"{lacking} of {of} answers in the labels have no prompt before them"

    def _device(self) -> torch.device | None:
        return None if self.attended is None else self.attended.device

    def _normalised(self, positions: Tensor) -> Tensor:
        # An instance without any routed position falls back to what is attended, and a row of nothing but padding to
        # the whole row, rather than to a mean of nothing.
        if self.attended is not None:
            positions = torch.where(positions.any(dim=1, keepdim=True), positions, self.attended)
        positions = positions | ~positions.any(dim=1, keepdim=True)
        return positions / positions.sum(dim=1, keepdim=True, dtype=torch.float32)

    def require_prompt(self, otherwise: str) -> None:
        """Tell that a training step knows no prompt: `otherwise` "error" raises, "warn" warns once for each model.

        Raises:
            MixLoraError: `otherwise` is "error".
        """
        if self.unknown_prompt is not None:
            _tell_of_unknown_prompt(self.root, self.unknown_prompt, otherwise)

    def require_text(self, what: str) -> None:
        """Tell that the text of instructions, which the option `what` asks for, is not known, or that there is none.

        Raises:
            MixLoraError: it is so.
        """
        if self.images_unknown is not None:
            raise MixLoraError(
                f"{what} averages text without image features, but where these are is not known: "
                f"{self.images_unknown}; say which positions to average with llava_mixlora.known_prompt, or use "
                "router_scope='prompt'"
            )
        if self._without_text is not None:
            raise MixLoraError(
                f"{what} averages the text of an instruction, but that of {self._without_text} has none: it holds "
                "image features alone; give it a text, or use router_scope='prompt'"
            )

    def require_tasks(self, instances: int, tasks: int, segments: Segments | None) -> Tensor:
        """The number of the task of each instance, int64 [instances], or of each segment; in training.

        Raises:
            MixLoraError: the forward pass was not told, or they are not those of the layer's instances.
        """
        told, key = self.tasks, (instances, tasks)
        if key not in self._checked_tasks:  # once for all layers, since it waits for values
            if told is None or told.shape != (instances,) or ((told < 0) | (told >= tasks)).any():
                found = "none were given" if told is None else f"got {str(told.tolist())[:80]}"
                raise MixLoraError(
                    f"task_loss_weight: a training step needs mixlora_tasks, the numbers of the tasks (0 to "
                    f"{tasks - 1}) of its {instances} instances, but {found}; wrap the data collator in "
                    "llava_mixlora.TaskLabels, or set task_loss_weight=0"
                )
            self._checked_tasks.add(key)
        return told if segments is None else told[segments.row.to(told.device)]

    def held_core(self, key: tuple[str, str], instances: int, segments: Segments | None) -> Tensor | None:
        """The core kept for a layer, [instances, E, E], or None in the first forward of a generation.

        Raises:
            MixLoraError: the generation was begun with another number of instances, or its cache was filled without
                this layer's adapter.
        """
        core = self.held.core(key, instances, None if segments is None else len(segments))
        if core is None and self.goes_on:
            raise MixLoraError(
                f"a cache that was filled without adapter {key[1]!r} goes on with it, so nothing tells the routes of "
                "its prompt: run the whole prompt under this adapter, or use decode_routing='step'"
            )
        return core

    def hold(self, key: tuple[str, str], core: Tensor) -> None:
        """Keep a core for the rest of the generation."""
        segments = None if self.asked_by is None else self.asked_by._any_segments()
        if segments is not None:  # as those of the text's layers lie
            core = core.index_select(0, segments.row.to(core.device))
        self.computed[key] = core.detach()

    def _any_segments(self) -> Segments | None:
        return next((each for each, _ in self._divided.values() if each is not None), None)

    def routes(self) -> HeldRoutes:
        """What was held before this forward pass and what it has computed."""
        segments = self._any_segments()
        return self.held.joined(self.computed, None if segments is None else segments.last)

    def part(self) -> RoutingScope:
        """A scope of the same forward pass for a model inside of this one's, with a sequence of its own."""
        part = RoutingScope(held=self.held)
        for name in ("computed", "goes_on", "trains", "router_loss", "statistics", "adapter_names", "root", "backward"):
            setattr(part, name, getattr(self, name))
        part.tasks, part.outer, part.whole = self.tasks, self, self.whole
        return part


def _tell_of_unknown_prompt(model: nn.Module | None, why: str, otherwise: str) -> None:
    message = (
        f"MixLoRA's routers average what the model has to predict: in this training step {why}, while generation "
        f"averages the prompt alone; {HOW_TO_TELL}"
    )
    if otherwise == "error":
        raise MixLoraError(message)
    if model is not None and model not in _told:
        _told.add(model)
        warnings.warn(message, stacklevel=2)
