"""Landmark attention in a Hugging Face model that was trained with landmarks: long texts through blocks that are fetched.

Mohtashami and Jaggi 2023 (NeurIPS), arXiv 2305.16300; epfml/landmark-attention (Apache-2.0), `llama/llama_mem.py`, read for what a fine-tuned
LLaMA does. The softmax and the memory are those of `regard.ops.landmark` and `regard.nn.LandmarkCache`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..._checks import bad_value, require, require_int, require_name
from ...nn.sequence.landmark_attention import LandmarkCache, LayerMemory
from ..call import AttentionCall, Method
from ..rotary import RotaryOf, query_positions
from .decoder import decoder_config, ragged_layers
from .layer import AttendingLayer
