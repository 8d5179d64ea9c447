"""Families of attention patterns: each head's pattern as a small code, and heads grouped by it.

Paper: Li et al. 2023, "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt" (IEEE TVCG, arXiv 2303.13731). No code was
published; the paper names an autoencoder over attention patterns and leaves its form open. Here: a small convolutional autoencoder over
relative patterns (`relative_attention_map`), codes of 32 numbers, k-means, and a plane for pictures by principal components.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require, require_int, require_tensor
from ..losses_free import kmeans
from .record import Record
from .spatial_attention import Grid, relative_attention_map

__all__ = ["AttentionPatternAE", "PatternFamilies", "attention_patterns", "fit_patterns"]
