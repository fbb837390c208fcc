# SPDX-License-Identifier: Apache-2.0
"""MoE layers of published models, by name: hidden size, experts and top-k as in their configuration files."""

from __future__ import annotations

from dataclasses import dataclass

from moegen.errors import InputError


@dataclass(frozen=True)
class Preset:
    """The numbers of one MoE layer.

    Attributes:
        hidden: elements of a token.
        num_experts: routed experts.
        num_topk: experts that a token selects.
        ffn: inner size of one expert's SwiGLU, for the demo.
    """

    name: str
    hidden: int
    num_experts: int
    num_topk: int
    ffn: int


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        # hidden_size, n_routed_experts, num_experts_per_tok, moe_intermediate_size of each model's config.json
        Preset("deepseek-v3", 7168, 256, 8, 2048),
        Preset("kimi-k2", 7168, 384, 8, 2048),
        Preset("qwen3-235b", 4096, 128, 8, 1536),
        Preset("gpt-oss-120b", 2880, 128, 4, 2880),
        Preset("mixtral-8x7b", 4096, 8, 2, 14336),
        Preset("tiny", 128, 16, 4, 64),
    )
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InputError: there is none; the text lists the names.
    """
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]
