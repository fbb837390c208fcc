# SPDX-License-Identifier: Apache-2.0
"""Which kernels a benchmark needs, known without its objects: to be built before ranks wait for each other."""

from __future__ import annotations

from collections.abc import Iterator

from moegen.bench.a2a_config import OneSidedConfig
from moegen.bench.config import LowLatencyConfig
from moegen.bench.ht_config import DTYPES, HighThroughputConfig
from moegen.kernels.bench import BenchBarrier, BenchPull, BenchPush
from moegen.kernels.coll import for_exact
from moegen.kernels.ll import QUANTIZED
from moegen.kernels.problem import Problem
from moegen.kernels.spec import Spec
from moegen.select import combine_spec, dispatch_spec, open_spec, select, select_rows


def specs_of(config: LowLatencyConfig) -> list[Spec]:
    """Every kernel that a run of `config` loads, each once.

    Raises:
        SpecError: one of them cannot be; the text says what is allowed.
    """
    sizes = (config.ranks, config.link.threads, config.link.in_flight)
    link: list[Spec] = [BenchBarrier(config.ranks), BenchPush(*sizes), BenchPull(*sizes)]
    if isinstance(config, HighThroughputConfig):
        found = _high_throughput(config)
    elif isinstance(config, OneSidedConfig):
        found = _one_sided(config)
    else:
        found = _low_latency(config)
    return list(dict.fromkeys([*link, *found]))


def _low_latency(config: LowLatencyConfig) -> Iterator[Spec]:
    dtype = QUANTIZED[config.quantize] if config.quantize else "bf16"
    for tokens in config.tokens:
        capacity = config.max_tokens or tokens
        yield from select(_problem(config, capacity, dtype, "expert", hooks=config.halves > 1)).specs


def _high_throughput(config: HighThroughputConfig) -> Iterator[Spec]:
    for tokens in config.tokens:
        for dtype in config.dtypes:
            for layout in config.layouts:
                yield from select_rows(_problem(config, tokens, DTYPES[dtype], layout)).specs


def _one_sided(config: OneSidedConfig) -> Iterator[Spec]:
    for tokens in config.tokens:
        problem = _problem(config, tokens, "bf16", "rank", path=config.path)
        sends, adds = dispatch_spec(problem, config.payload_widths), combine_spec(problem, "bf16", "bf16")
        yield from (sends, adds)
        yield open_spec(problem) if config.path == "collective" else combine_spec(problem, "bf16", "bf16", pulls=True)
        if config.path == "collective" and "exact" in config.exchanges:
            yield from (*for_exact(sends), *for_exact(adds))


def _problem(
    config: LowLatencyConfig, tokens: int, dtype: str, layout: str, *, path: str = "ipc", hooks: bool = False
) -> Problem:
    shape = (config.ranks, config.num_experts, config.num_topk, config.hidden, tokens)
    return Problem(*shape, dtype, layout, path, on_host=config.device == "cpu", hooks=hooks)
