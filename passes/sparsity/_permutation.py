"""Search for an order of input channels that lets an N:M mask keep more magnitude (Pool and Yu, NeurIPS 2021).

A *stripe* is a run of ``group`` consecutive columns. Exchanging two columns of different stripes changes what these
two keep and nothing else. With ``t`` the keep-th largest of a stripe's other columns in a row, a column ``v`` in the
free seat raises what the row keeps from the others' ``keep - 1`` largest by max(t, v); the sum of a maximum over rows
is half of sum + sum + L1 distance, so one distance matrix prices all exchanges at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from bitwright.ir.errors import InvalidInput
from bitwright.passes.sparsity._magnitude import floats

if TYPE_CHECKING:
    import torch

Search = Literal["swap", "pairs", "triples"]
WORK = 1 << 30
"""Rows times columns squared that one pricing of all exchanges may take; rows beyond it are sampled."""
REGROUPING = 1 << 29
"""Elements that the regrouping of stripes may look at in all."""
SUBSETS = 1000
"""Stripe sets with more choices of a stripe than this are not regrouped exhaustively."""
LEAST = 1e-6
"""A gain below this share of the total is rounding."""


@dataclass(eq=False)
class View:
    """How one consumer sees the channels.

    columns: magnitudes [rows, channels], by channel. stripes: [stripes, group] seats; a number of ``channels`` or more
    is a column of ``fixed`` [rows, others], which stays where it is.
    """

    columns: torch.Tensor
    stripes: torch.Tensor
    fixed: torch.Tensor

    def placed(self, at: torch.Tensor) -> torch.Tensor:
        """All columns when seat s holds channel ``at[s]``: [rows, channels + others]."""
        import torch

        return torch.cat([self.columns[:, at], self.fixed], 1)


def top_sum(x: torch.Tensor, keep: int) -> torch.Tensor:
    """Sum of the ``keep`` largest of the last axis."""
    import torch

    if keep == 2 and x.shape[-1] == 4:
        a, b, c, d = x.unbind(-1)
        return torch.maximum(torch.maximum(a + b, c + d), torch.maximum(a, b) + torch.maximum(c, d))
    return x.topk(keep, -1).values.sum(-1)


def kept(views: Sequence[View], at: torch.Tensor, keep: int) -> float:
    """Magnitude that the masks of all views keep in the stripes they list."""
    return sum(float(top_sum(v.placed(at)[:, v.stripes], keep).double().sum()) for v in views)


def best_permutation(
    weight: torch.Tensor, keep: int, group: int, *, search: Search = "triples", seed: int = 0, name: str = "weight"
) -> torch.Tensor:
    """An order of the columns of ``weight[out, k]`` whose ``keep:group`` mask keeps more: ``weight[:, order]``.

    int64[k], the identity where nothing better is found; k is a multiple of ``group``. ``search``: exchanges of two
    columns only, or also the best regrouping of two ("pairs") or three stripes ("triples") at a time. The same seed
    gives the same order. Raises :class:`InvalidInput` for other shapes, integers, NaN and infinities.
    """
    import torch

    if weight.dim() != 2 or not 1 <= keep <= group or weight.shape[1] % group:
        raise InvalidInput(f"{name}: {keep}:{group} needs [out, k] with k a multiple of {group}, not {weight.shape}")
    w = floats(weight, name).abs().float()
    stripes = torch.arange(w.shape[1]).reshape(-1, group)
    return best_seats([View(w, stripes, w[:, :0])], keep, search=search, seed=seed)


def best_seats(views: Sequence[View], keep: int, *, search: Search = "triples", seed: int = 0) -> torch.Tensor:
    """The channel of every seat, int64[channels], that raises what all views keep together (else the identity)."""
    import torch

    channels = views[0].columns.shape[1]
    start = torch.arange(channels)
    if all(keep >= v.stripes.shape[1] for v in views):
        return start
    generator = torch.Generator().manual_seed(seed)
    sampled = _merged([_sampled(v, views, channels, generator) for v in views])
    at = _swaps(sampled, start.clone(), keep)
    if search != "swap" and len(sampled) == 1 and sampled[0].fixed.shape[1] == 0:
        at = _regroup(sampled[0], at, keep, 2, generator)
        at = _regroup(sampled[0], at, keep, 3, generator) if search == "triples" else at
    before, after = kept(views, start, keep), kept(views, at, keep)
    return at if after - before > LEAST * before else start


def _sampled(view: View, views: Sequence[View], channels: int, generator: torch.Generator) -> View:
    """The view on so many of its rows that pricing stays within ``WORK``."""
    import torch

    rows = view.columns.shape[0]
    share = WORK / channels**2 / sum(v.columns.shape[0] for v in views)
    if share >= 1:
        return view
    few = torch.randperm(rows, generator=generator)[: max(1, int(rows * share))].sort().values
    return View(view.columns[few], view.stripes, view.fixed[few])


def _merged(views: list[View]) -> list[View]:
    """Views with the same stripes as one, row under row."""
    import torch

    out: list[View] = []
    for v in views:
        i = next((i for i, o in enumerate(out) if torch.equal(o.stripes, v.stripes)), None)
        if i is None:
            out.append(v)
        else:
            o = out[i]
            out[i] = View(torch.cat([o.columns, v.columns]), o.stripes, torch.cat([o.fixed, v.fixed]))
    return out


class _Prices:
    """What seat s of a view's stripe would gain from each channel, kept up to date stripe by stripe."""

    def __init__(self, view: View, at: torch.Tensor, keep: int) -> None:
        import torch

        n = view.columns.shape[1]
        self.view, self.keep = view, keep
        self.stripe_of = torch.full((n,), -1)
        for s, seats in enumerate(view.stripes.tolist()):
            for seat in seats:
                if seat < n:
                    self.stripe_of[seat] = s
        self.by_channel = view.columns.T.contiguous()
        self.total = self.by_channel.sum(1)
        self.price = torch.zeros((n, n))
        """What its stripe keeps more when the channel (column) takes the seat (row)."""
        self.update(at, torch.arange(len(view.stripes)))

    def update(self, at: torch.Tensor, changed: torch.Tensor) -> None:
        """Price the seats of changed stripes again."""
        import torch

        n, width = len(at), self.view.stripes.shape[1]
        placed = self.view.placed(at).T
        for part in torch.split(changed, max(1, (1 << 24) // max(1, width * placed.shape[1]))):
            seats = self.view.stripes[part]  # [stripes, width]
            here = placed[seats]
            ranked, order = here.sort(dim=1, descending=True, stable=True)  # [stripes, width, rows]
            rank = torch.empty_like(order).scatter_(1, order, torch.arange(width).reshape(1, -1, 1).expand_as(order))
            inside = rank < self.keep  # once such a column left, the next one would be kept
            last, following = ranked[:, self.keep - 1 : self.keep], ranked[:, self.keep : self.keep + 1]
            now = ranked[:, : self.keep].sum((1, 2))  # what each stripe keeps
            real = seats < n
            t = torch.where(inside, following, last)[real]
            others = (now[:, None] - torch.where(inside, here, last).sum(-1))[real]
            largest = (t.sum(1, keepdim=True) + self.total + torch.cdist(t, self.by_channel, 1.0)) / 2
            self.price[seats[real]] = (others - now[:, None].expand_as(real)[real])[:, None] + largest

    def gains(self, at: torch.Tensor) -> torch.Tensor:
        """[seats, seats]: what the view gains when two seats exchange their channels; 0 inside a stripe."""
        import torch

        one = self.price[:, at]
        both = one + one.T
        return torch.where(self.stripe_of[:, None] == self.stripe_of, torch.zeros(()), both)


def _swaps(views: list[View], at: torch.Tensor, keep: int) -> torch.Tensor:
    """Exchange pairs of channels, best first, several whose stripes do not meet at a time, until none gains."""
    import torch

    n = len(at)
    prices = [_Prices(v, at, keep) for v in views]
    least = LEAST * sum(float(v.columns.double().sum()) for v in views)
    while True:
        gain = sum((p.gains(at) for p in prices), torch.zeros((n, n))).triu(1).reshape(-1)
        best = gain.topk(min(len(gain), 8 * n))
        touched: list[set[int]] = [set() for _ in prices]
        for value, pair in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if value <= least:
                break
            i, j = divmod(pair, n)
            stripes = [{int(p.stripe_of[i]), int(p.stripe_of[j])} for p in prices]
            if any(s & t for s, t in zip(stripes, touched, strict=True)):
                continue
            at[i], at[j] = int(at[j]), int(at[i])
            touched = [s | t for s, t in zip(stripes, touched, strict=True)]
        if not any(touched):
            return at
        for p, changed in zip(prices, touched, strict=True):
            p.update(at, torch.tensor(sorted(changed)))


@lru_cache(maxsize=8)
def _partitions(count: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All subsets [s, group] of ``count * group`` columns, and all ways [p, count] to cut the columns into such."""
    import torch

    subsets = list(itertools.combinations(range(count * group), group))
    number = {s: i for i, s in enumerate(subsets)}

    def cut(left: tuple[int, ...]) -> list[list[int]]:
        if not left:
            return [[]]
        out = []
        for more in itertools.combinations(left[1:], group - 1):
            first = (left[0], *more)
            out += [[number[first], *rest] for rest in cut(tuple(c for c in left if c not in first))]
        return out

    return torch.tensor(subsets), torch.tensor(cut(tuple(range(count * group))))


def _regroup(view: View, at: torch.Tensor, keep: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Give every set of ``count`` stripes its best partition, in seeded order, until a round changes nothing."""
    import math

    group, stripes = view.stripes.shape[1], len(view.stripes)
    if stripes < count or math.comb(count * group, group) > SUBSETS:
        return at
    subsets, cuts = _partitions(count, group)
    least = LEAST * float(view.columns.double().sum())
    cost = view.columns.shape[0] * subsets.numel()
    left = REGROUPING // cost
    changed = set(range(stripes))  # a set without a stripe that changed since it was looked at needs no second look
    while changed and left > 0:
        before, changed = changed, set()
        for chosen in _sets(stripes, count, left, generator):
            if not before.intersection(chosen) and not changed.intersection(chosen):
                continue
            left -= 1
            seats = view.stripes[list(chosen)].reshape(-1)
            value = top_sum(view.columns[:, at[seats]][:, subsets], keep).sum(0)
            totals = value[cuts].sum(1)
            best = int(totals.argmax())
            if float(totals[best] - totals[0]) > least:  # the first cut is what stands there
                at[seats] = at[seats][subsets[cuts[best]].reshape(-1)]
                changed.update(chosen)
    return at


def _sets(stripes: int, count: int, most: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """All sets of stripes in random order, or at most ``most`` random ones."""
    import math

    import torch

    if math.comb(stripes, count) <= max(most, 1 << 14):
        every = list(itertools.combinations(range(stripes), count))
        return [every[i] for i in torch.randperm(len(every), generator=generator).tolist()]
    drawn = torch.rand((min(most, 1 << 14), stripes), generator=generator).topk(count).indices
    return [tuple(sorted(s)) for s in drawn.tolist()]


__all__ = ["Search", "View", "best_permutation", "best_seats", "kept", "top_sum"]
