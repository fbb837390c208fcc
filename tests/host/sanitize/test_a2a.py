# SPDX-License-Identifier: Apache-2.0
"""The one-sided kernels under ThreadSanitizer and AddressSanitizer: clean as they are, and every order that they rest
on is missed where it is taken away.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from host.sanitize.a2a_kernels import Variant, headers, variant
from host.sanitize.build import KERNEL, Edit, kernels_of, weakened, without
from host.sanitize.edits import EPOCH, LAUNCH, REPORT, ROUTING, barrier_before, leaving, relaxed_load, relaxed_store
from host.sanitize.running import ASAN, FIXED, SEEDED, TSAN, Sanitizer, built_once, race_in, run

from moegen.codegen.spec import WarpGroups

RIGHT = [
    variant(WarpGroups(2, 1), 3),
    variant(WarpGroups(1, 2), 3, out="fp32"),
    variant(WarpGroups(2, 2), 1),
]
"""Together: each of a team's three kinds of barrier, blocks that have one role and blocks that have both; at most 576
fibers."""

APART, ONE_TEAM, TOGETHER = RIGHT
PULLED = variant(WarpGroups(2, 1), 3, rows="pulled")
BULK = variant(WarpGroups(2, 1), 3, copy="bulk")
TWO_RANKS = variant(WarpGroups(2, 1), 3, ranks=2)


WORDS = "moegen/presence.cuh"
"""Where words of progress are published and waited for."""


def no_wait(word: str, file: str = KERNEL) -> Edit:
    """Looks once, and takes whatever is there for what was waited for."""
    return Edit(file, rf"(return load_acquire_sys\({word}\));", r"\1, watch.epoch;")


def no_wait_for_packet(phase: str, place: str, packet: str) -> Edit:
    """The same for a packet."""
    pattern = rf"!await_packet\(watch, Awaited\{{{phase}, source, -1\}},\s*({place}\(.*?), {packet}\)"
    return Edit(KERNEL, pattern, rf"(({packet} = load_packet(\1)), false)")


PRESENCE = {
    "presence_store": relaxed_store(r"presence_at\(", WORDS),
    "presence_load": relaxed_load("word", file=LAUNCH),
}
"""How ranks know that what they overwrite has been read."""

CALLS = {
    "call_store": relaxed_store("to, ", WORDS),
    "call_load": relaxed_load("word", file=WORDS),
}
"""The same in combine, whose words of progress are two: one statement stores both."""

FLAGS = {
    "flag_barrier": Edit(
        KERNEL, r"__syncthreads\(\);(?=  // the chunk)", "if (begin + kWarpSize < share.end) __syncthreads();"
    ),
    "flag_store": relaxed_store(r"flag_at\("),
    "flag_load": relaxed_load("flag"),
}
"""How a block announces its rows."""

TAGS = {
    "tag_barrier": barrier_before(r"store_release_sys\(returned_tag_at\(", r"Group::sync"),
    "tag_store": relaxed_store(r"returned_tag_at\("),
    "tag_load": relaxed_load("tag"),
    "tag_vote": Edit(KERNEL, r"(wait_for\(watch, what[^}]*\}\);\s*\}\s*)Group::sync\(\);", r"\1"),
}
"""How a team announces a row of combine, and how another learns of it."""

VOTES = {
    "chunk_vote": Edit(KERNEL, r"__syncthreads_and\(peers\.ready\) != 0", "peers.ready"),
    "arrivals": Edit(KERNEL, r"(p\.counts\[source\] = [^}]*\}\s*)__syncthreads\(\);", r"\1"),
}
"""How the threads of a block learn what one warp has planned, and how many rows come."""

PLANS = {
    "next_slots": Edit(KERNEL, r"__syncwarp\(\);(?=\s*\}\s*#pragma unroll 1\s*for \(uint32_t begin = share)", ""),
    "slots": Edit(KERNEL, r"(before = next_slots\[rank\];\s*)__syncwarp\(\);", r"\1"),
    "chunk_used": Edit(KERNEL, r"__syncthreads\(\);(?=  // the chunk)", ""),
}
"""How they plan."""

LEAVING = {
    "leaving": leaving("__ATOMIC_RELAXED"),
    "leaving_release": leaving("__ATOMIC_ACQUIRE"),
    "leaving_acquire": leaving("__ATOMIC_RELEASE"),
    "leaving_barrier": Edit(EPOCH, r"__syncthreads_and\(sound\) != 0", "sound"),
}
"""How the last block to leave knows that all threads have read the epoch; and, in dispatch, how its threads learn what
each warp has counted.
"""

COPIES = {
    "settle": Edit(KERNEL, r"if \(Group::thread\(\) == 0\) bulk_wait<0>\(\);", ""),
    "stage": Edit(KERNEL, r"bulk_wait_read<0>\(\);", ""),
    "loaded": Edit(KERNEL, r"while \(!mbarrier_test\(loaded, [^)]*\)\) poll_pause\(\);", "(void)loaded;"),
}
"""Of bulk copies: that rows are written before they are announced, that a stage is read before it is filled again, and
filled before it is read. The machine's copies come as late as they may, so that results are wrong where one is missing.
Its lists of copies grow in one thread of a block and shrink in another, which ThreadSanitizer takes for a race: these
kernels are for AddressSanitizer.
"""

NO_PRESENCE = {"presence_wait": Edit(LAUNCH, r"int32_t\(seen - needed\) >= 0", "seen != needed")}
NO_CALLS = {"call_wait": no_wait("word", WORDS)}
NO_ROWS = {"counts_wait": no_wait_for_packet("kCounts", "row_count_at", "first"), "flag_wait": no_wait("flag")}
NO_PARTIALS = {
    "tag_wait": no_wait("tag"),
    "halves": Edit(KERNEL, r"parity_of\(watch\.epoch\) \* p\.half_bytes", "(0 & watch.epoch) * p.half_bytes"),
}
"""Not orders, but what they are good for: waits, and that staging has two halves."""

PULLING = {
    **{f"pulled_{name}": edit for name, edit in {**CALLS, **NO_CALLS}.items()},
    "pulled_leaving_barrier": LEAVING["leaving_barrier"],
}
"""How a block learns that others have made the rows that it reads; its barrier is that of the epoch."""

WEAKENED = [
    *without(APART, "dispatch", PRESENCE, FLAGS, VOTES),
    *without(APART, "combine", CALLS, TAGS),
]
MORE = [
    *without(APART, "dispatch", PLANS, LEAVING, NO_PRESENCE, NO_ROWS),
    *without(APART, "combine", LEAVING, NO_CALLS, NO_PARTIALS),
    *without(ONE_TEAM, "combine", {f"{name}_of_block": TAGS[name] for name in ("tag_barrier", "tag_vote")}),
    *without(PULLED, "combine", PULLING),
    *without(TOGETHER, "combine", {f"{name}_of_team": TAGS[name] for name in ("tag_barrier", "tag_vote")}),
]
"""Together all orders of these kernels but some that are no data race where they are missing:

- Numbers of rows and statistics cross in relaxed 16-byte atomics, whose epoch is all that says whether they have come.
  Without the wait for rows' numbers, ids behind rows are filled too early, which is a race; without that for statistics
  the results are wrong: EARLY.
- The compare-and-swap on the abort word chooses who reports; nobody reads behind it but the host, which looks at
  `valid` (REPORT). The word itself is loaded relaxed: what it says is all.
- Warps' votes are no order, and nothing rests on them as one.
"""

OTHERS = [ONE_TEAM, TOGETHER, PULLED]
HASTY = without(BULK, "dispatch", COPIES)

UNORDERED_REPORT = weakened(APART, "dispatch", "report", REPORT)
EARLY = weakened(
    APART,
    "dispatch",
    "stats_wait",
    Edit(
        KERNEL,
        r"!await_packet\(watch, Awaited\{kStats, source, -1\},\s*(stats_at\(.*?), packet\)(.*?)"
        r"(await_row_counts\(p, watch, arrivals\);.*?)(if \(p\.stats_words != 0\) gather_stats\(p, watch\);)",
        r"((packet = load_packet(\1)), false)\2\4\n    \3",
    ),
)
"""Statistics are told before rows, so that they are here when the rows are: they are read before those, too."""

BEYOND = weakened(APART, "dispatch", "beyond", Edit(ROUTING, r"const Id id = ids\[k\]", "const Id id = ids[k + 1]"))


slow = pytest.mark.slow


@pytest.fixture(scope="session")
def tsan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory, "a2a", TSAN, [APART, *WEAKENED])


@pytest.fixture(scope="session")
def tsan_more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory, "a2a-more", TSAN, [*OTHERS, *MORE, UNORDERED_REPORT, EARLY])


@pytest.fixture(scope="session")
def tsan_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory, "a2a-two", TSAN, [TWO_RANKS])


@pytest.fixture(scope="session")
def asan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory, "a2a", ASAN, [*RIGHT, PULLED, BEYOND])


@pytest.fixture(scope="session")
def asan_copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory, "a2a-copies", ASAN, [BULK, *HASTY])


def built(factory: pytest.TempPathFactory, name: str, sanitizer: Sanitizer, variants: list[Variant]) -> Path:
    return built_once(factory, name, "a2a_driver.cpp", sanitizer, headers(variants), kernels_of(variants))


def name_of(variant: Variant) -> str:
    return variant.name


@pytest.mark.tsan
@pytest.mark.parametrize("seed", [pytest.param(FIXED, marks=slow), SEEDED])
def test_kernels_have_no_race(tsan: Path, seed: int) -> None:
    code, output = run(tsan, APART.name, seed)
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.tsan
@pytest.mark.parametrize("seed", [FIXED, SEEDED])
@pytest.mark.parametrize("variant", OTHERS, ids=name_of)
def test_other_kernels_have_no_race(tsan_more: Path, variant: Variant, seed: int) -> None:
    code, output = run(tsan_more, variant.name, seed)
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.tsan
@pytest.mark.parametrize("seed", [FIXED, SEEDED])
def test_two_ranks_have_no_race(tsan_two: Path, seed: int) -> None:
    code, output = run(tsan_two, TWO_RANKS.name, seed)
    assert code == 0, output


@pytest.mark.tsan
def test_missing_peer_is_no_race(tsan: Path) -> None:
    code, output = run(tsan, APART.name, FIXED, "absent")
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.tsan
def test_missing_peer_of_blocks_with_both_roles_is_no_race(tsan_more: Path) -> None:
    code, output = run(tsan_more, TOGETHER.name, FIXED, "absent")
    assert code == 0, output


@pytest.mark.tsan
@pytest.mark.parametrize("variant", WEAKENED, ids=name_of)
def test_missing_order_is_a_race(tsan: Path, variant: Variant) -> None:
    assert race_in(tsan, variant.name)


@pytest.mark.slow
@pytest.mark.tsan
@pytest.mark.parametrize("variant", MORE, ids=name_of)
def test_more_of_them_are_races(tsan_more: Path, variant: Variant) -> None:
    assert race_in(tsan_more, variant.name)


@pytest.mark.slow
@pytest.mark.tsan
def test_unordered_report_is_a_race(tsan_more: Path) -> None:
    assert race_in(tsan_more, UNORDERED_REPORT.name, "absent")


@pytest.mark.slow
@pytest.mark.tsan
def test_statistics_that_are_read_early_are_wrong(tsan_more: Path) -> None:
    code, output = run(tsan_more, EARLY.name, SEEDED)
    assert code == 1, output
    assert "wrong statistics" in output


@pytest.mark.slow
@pytest.mark.asan
@pytest.mark.parametrize("seed", [FIXED, SEEDED])
def test_bulk_copies_stay_within_memory(asan_copies: Path, seed: int) -> None:
    code, output = run(asan_copies, BULK.name, seed)
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.asan
@pytest.mark.parametrize("variant", HASTY, ids=name_of)
def test_copies_that_nobody_waits_for_are_noticed(asan_copies: Path, variant: Variant) -> None:
    codes = [run(asan_copies, variant.name, seed)[0] for seed in (FIXED, SEEDED)]
    assert any(codes)


@pytest.mark.asan
@pytest.mark.parametrize("seed", [FIXED, SEEDED])
@pytest.mark.parametrize("variant", [*RIGHT, PULLED], ids=name_of)
def test_kernels_stay_within_memory(asan: Path, variant: Variant, seed: int) -> None:
    code, output = run(asan, variant.name, seed)
    assert code == 0, output


@pytest.mark.asan
def test_access_beyond_memory_is_found(asan: Path) -> None:
    code, output = run(asan, BEYOND.name, FIXED)
    assert code != 0
    assert "AddressSanitizer: heap-buffer-overflow" in output
