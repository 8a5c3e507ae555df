"""Next-token scores without keeping logits: statistics accumulated block by block over the vocabulary.

A 200,064-word vocabulary makes 100 MB of logits for every 128 positions; here a block of words is enough.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Update(NamedTuple):
    """Some logits, exp(logits - maximum) with the largest so far, and by what sums up to here are to be rescaled."""

    logits: Tensor
    exponentials: Tensor
    rescale: Tensor


class Scores:
    """Running softmax statistics of one model at `labels` [positions]; feed it all vocabulary blocks in order.

    What stays is on the CPU, wherever logits come from.

    The running maximum and rescaled sum are those of online softmax (Milakov & Gimelshein 2018).
    """

    def __init__(self, labels: Tensor) -> None:
        count = len(labels)
        self.labels = labels
        self.maximum = torch.full((count,), -torch.inf, dtype=torch.float64, device="cpu")
        self.total = torch.zeros(count, dtype=torch.float64, device="cpu")
        self.best = torch.zeros(count, dtype=torch.int64, device="cpu")
        self.target_logit = torch.zeros(count, dtype=torch.float64, device="cpu")

    def update(self, part: slice, first_word: int, logits: Tensor) -> Update:
        """Take in `logits` [positions of part, words]."""
        block_maximum, block_best = (found.cpu() for found in logits.max(dim=1))
        old = self.maximum[part].clone()
        better = block_maximum > old
        self.best[part] = torch.where(better, first_word + block_best, self.best[part])
        self.maximum[part] = torch.where(better, block_maximum.double(), old)
        rescale = torch.exp(old - self.maximum[part])
        exponentials = torch.exp(logits - self.maximum[part, None].float().to(logits.device))
        self.total[part] = self.total[part] * rescale + exponentials.sum(dim=1).cpu().double()
        local = self.labels[part] - first_word
        rows = torch.where((local >= 0) & (local < logits.shape[1]))[0]
        found = logits[rows.to(logits.device), local[rows].to(logits.device)]
        self.target_logit[part][rows] = found.cpu().double()
        return Update(logits, exponentials, rescale)

    @property
    def log_normalizer(self) -> Tensor:
        """log(sum(exp(logits))), float64 [positions]."""
        return self.maximum + self.total.log()

    @property
    def confidence(self) -> Tensor:
        """The probability of the most probable token, float64 [positions]."""
        return 1 / self.total

    @property
    def log_probability(self) -> Tensor:
        """log p(label), float64 [positions]."""
        return self.target_logit - self.log_normalizer


class Divergence:
    """KL(reference || candidate) at every position, from the same vocabulary blocks of both models.

    With l, m the two models' logits: KL = sum(p_l * (l - m)) - log_normalizer(l) + log_normalizer(m).
    Several candidates share their reference's scores.
    """

    def __init__(self, reference: Scores) -> None:
        self.reference = reference
        self.candidate = Scores(reference.labels)
        self._difference = torch.zeros(len(reference.labels), dtype=torch.float64, device="cpu")

    def update(self, part: slice, first_word: int, reference: Update, logits: Tensor) -> None:
        """Take in the candidate's logits of a block that the reference's scores have just taken in."""
        self.candidate.update(part, first_word, logits)
        difference = (reference.exponentials * (reference.logits - logits)).sum(dim=1).cpu().double()
        self._difference[part] = self._difference[part] * reference.rescale + difference

    @property
    def kld(self) -> Tensor:
        """KL divergence in nats, float64 [positions]."""
        expected = self._difference / self.reference.total
        return expected - self.reference.log_normalizer + self.candidate.log_normalizer

    @property
    def probability_weighted_kld(self) -> Tensor:
        """The same, each position weighed by the probability that the reference gives to its label; weights mean 1.

        Where a model did not expect what it reads, its damage says little about the texts that it is good for.
        """
        probability = self.reference.log_probability.exp()
        return self.kld * probability / probability.mean()

    @property
    def root_mean_kld(self) -> float:
        """The square of the mean root of `probability_weighted_kld`.

        The divergence grows with the square of a change of the logits, so its root is the length of that change. A
        mean of lengths does not hang on the few positions where a token happened to go to another expert.
        """
        return float(self.probability_weighted_kld.clamp_min(0).sqrt().mean().square())


def chunk_parts(positions: int, chunks: int) -> list[slice]:
    """Which of all scored positions are those of each chunk."""
    size = positions // chunks
    return [slice(chunk * size, (chunk + 1) * size) for chunk in range(chunks)]


def standard_error(values: Tensor) -> float:
    """That of the mean of values [positions]."""
    return math.sqrt(float(values.var(correction=0)) / max(len(values) - 1, 1))
