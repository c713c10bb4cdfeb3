"""Rows cut into the segments that have a route of their own: the samples of a packed row, the turns of a conversation.

A segment is a run of positions that one core applies to. In a row that holds one sample with one answer it is the whole
row. Packing puts several samples into a row; each is routed by its own positions. In a conversation every answer is
routed by all that precedes it in its sample, as if it were answered now: turn n begins where answer n - 1 ends, and its
routers average what stands before answer n, earlier questions and answers included.

Rows have different numbers of segments, so there are G of them in a batch, in order of rows, and T at most in a row.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

CHUNK = 128
"""Positions that one matrix product takes together; a segment's last chunk is filled up."""


class Segments:
    """How the positions of rows [B, S] belong to segments.

    Args:
        index: int64 [B, S], the segment of each position, counted from 0 within its row and never falling.
    """

    def __init__(self, index: Tensor) -> None:
        B, S = index.shape
        device = index.device
        lengths = _lengths(index).flatten().tolist()
        self.most = len(lengths) // B  # T
        real = [cell for cell, length in enumerate(lengths) if length]
        self.real = torch.tensor(real, device=device)  # int64 [G], b·T + t
        self.row = self.real // self.most  # int64 [G]
        self.last = torch.tensor([max(g for g, c in enumerate(real) if c // self.most == b) for b in range(B)])
        self.last = self.last.to(device)  # int64 [B], the segment that a row ends with, and that goes on after it
        chunk = min(CHUNK, max(lengths))
        begins, owners, counts = [], [], []
        begin = 0
        for segment, cell in enumerate(real):
            for offset in range(0, lengths[cell], chunk):
                begins.append(begin + offset)
                owners.append(segment)
                counts.append(min(chunk, lengths[cell] - offset))
            begin += lengths[cell]
        within = torch.arange(chunk)
        filled = within < torch.tensor(counts).unsqueeze(1)  # [N, chunk]
        positions = (torch.tensor(begins).unsqueeze(1) + within).masked_fill(~filled, 0)
        self._positions, self._filled, self._owner = positions.to(device), filled.to(device), torch.tensor(owners)
        self._owner = self._owner.to(device)
        self._place = filled.flatten().nonzero().flatten().to(device)  # int64 [B·S], where a position is in the chunks
        self._segment = self._owner.repeat_interleave(chunk)[self._place]  # int64 [B·S], of each position
        self._count, self._lengths = len(real), [lengths[cell] for cell in real]
        self._elsewhere: dict[torch.device, Segments] = {}

    def on(self, device: torch.device) -> Segments:
        """The same on the device of a layer, which in a model on several devices may be another than its inputs'."""
        if device == self.real.device:
            return self
        if device not in self._elsewhere:
            moved = copy.copy(self)
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(moved, name, value.to(device))
            self._elsewhere[device] = moved
        return self._elsewhere[device]

    def __len__(self) -> int:
        return self._count

    def of_rows(self, per_segment: Tensor) -> Tensor:
        """[B, T, ...] of all cells to [G, ...] of the segments that there are."""
        return per_segment.flatten(0, 1).index_select(0, self.real)

    def apply(self, z: Tensor, cores: Tensor) -> Tensor:
        """z C with every position's own core, [B, S, E]. `z` [B, S, E], `cores` [G, E, E], or gates [G, E]."""
        if cores.ndim == 2:
            return z * cores.index_select(0, self._segment).view(z.shape)
        chunks = z.flatten(0, 1)[self._positions]
        products = torch.bmm(chunks, cores.index_select(0, self._owner))
        return products.flatten(0, 1).index_select(0, self._place).view(z.shape)

    def grams(self, z: Tensor, attended: Tensor | None) -> Tensor:
        """Σ zᵀz over the attended positions of each segment, [..., G, E, E] in float32 at least. `z` [..., B, S, E]."""
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        chunks = z.flatten(-3, -2)[..., self._positions, :] * self._counted(attended).unsqueeze(-1)
        products = torch.matmul(chunks.mT, chunks)
        sums = products.new_zeros(*products.shape[:-3], len(self), *products.shape[-2:])
        return sums.index_add(-3, self._owner, products)

    def split(self, rows: Tensor) -> Tensor:
        """`rows` [B, S, ...] as one row for each segment, [G, longest, ...], zero behind its end."""
        parts = rows.flatten(0, 1).split(self._lengths)
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)

    def attended(self, attended: Tensor | None) -> Tensor:
        """What is no padding in the rows of [`split`], bool [G, longest]. `attended` bool [B, S] or None."""
        everywhere = torch.ones(self._place.shape, dtype=torch.bool, device=self._place.device).unsqueeze(0)
        return self.split(everywhere if attended is None else attended)

    def _counted(self, attended: Tensor | None) -> Tensor:
        return self._filled if attended is None else self._filled & attended.flatten()[self._positions]


def conversation_turns(answered: Tensor, attended: Tensor, samples: Tensor, rest_is_asked: bool = False) -> Tensor:
    """The segment of each position, int64 [B, S]: a new one where a sample begins, and behind each of its answers.

    `answered` and `attended` bool [B, S]; `samples` int64 [B, S], the sample of each position in its row. What follows
    a sample's last answer is a turn of its own if it `rest_is_asked`, a question that is to be answered now; else (a
    line break, an end token) it stays with that answer.
    """
    begins = torch.zeros_like(answered)
    same = samples[:, 1:] == samples[:, :-1]
    begins[:, 1:] = answered[:, :-1] & ~answered[:, 1:] & attended[:, 1:] & same
    if not rest_is_asked:
        begins &= _reversed_cumsum(answered) > _answered_after(answered, samples)
    begins[:, 1:] |= ~same
    return begins.long().cumsum(dim=1)


def routed_positions(index: Tensor, answered: Tensor | None, attended: Tensor, samples: Tensor) -> Tensor:
    """What the routers of each segment may average: attended, of its sample, before its answer; bool [B, T, S].

    `index` int64 [B, S] as in [`Segments`]; the rest as in [`conversation_turns`]. `answered` None: all of the sample.
    """
    B, S = index.shape
    T = int(index.max()) + 1
    sample_of = samples.new_zeros(B, T).scatter(1, index, samples)
    routed = attended.unsqueeze(1) & (samples.unsqueeze(1) == sample_of.unsqueeze(2))
    if answered is None:
        return routed
    place = torch.arange(S, device=index.device).expand(B, S)
    first = place.new_full((B, T), S).scatter_reduce(1, index, place.masked_fill(~answered, S), "amin")
    return routed & (place.unsqueeze(1) < first.unsqueeze(2))


def _lengths(index: Tensor) -> Tensor:
    T = int(index.max()) + 1
    return index.new_zeros(len(index), T).scatter_add(1, index, torch.ones_like(index))


def _reversed_cumsum(mask: Tensor) -> Tensor:
    return mask.long().flip(1).cumsum(dim=1).flip(1)


def _answered_after(answered: Tensor, samples: Tensor) -> Tensor:
    """How many positions are answered in the samples that follow each position's own, int64 [B, S]."""
    after = _reversed_cumsum(answered)
    # At a sample's last position: what is left in the row behind it.
    behind = torch.cat([after[:, 1:], torch.zeros_like(after[:, :1])], dim=1)
    T = int(samples.max()) + 1
    fewest = after.new_full((len(samples), T), after.shape[1]).scatter_reduce(1, samples, behind, "amin")
    return fewest.gather(1, samples)
