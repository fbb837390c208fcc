# SPDX-License-Identifier: Apache-2.0
"""Published tables and sentences are what the committed results say; no figure stands under another's label."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moegen.bench import pages
from moegen.bench.committed import Results, Run, share, us
from moegen.bench.page_readings import READINGS
from moegen.bench.page_tables import A2A_TARGETS, TABLES
from moegen.bench.pages import Reading, Table, number, over
from moegen.cli.bench import app
from moegen.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
TYPED = {"step", "file", "command", "part"}
"""First column's titles of tables that list things, or that record steps of the past."""


def test_the_pages_say_what_the_results_say() -> None:
    assert "\n".join(pages.problems(Results(ROOT), TABLES, READINGS)) == "", "run `moegen bench tables`"


@pytest.mark.parametrize(
    ("page", "section"), [("README.md", "## Measured"), ("bench/results/README.md", ""), ("docs/benchmarks.md", "")]
)
def test_no_table_of_figures_is_typed(page: str, section: str) -> None:
    text = (ROOT / page).read_text()
    below = re.split(r"\n## ", text[text.index(section) + 3 :])[0] if section else text
    typed = re.sub(r"<!-- table: .*?<!-- end -->", "", below, flags=re.DOTALL)
    heads = re.findall(r"^\| ([^|]*) \|.*\n\|[ -]*-\|", typed, re.MULTILINE)
    assert {title.split(",")[0] for title in heads} <= TYPED


# ---- what would go wrong ----


def result(uniform: float, hot: float) -> dict[str, Any]:
    def case(routing: str, us: float) -> dict[str, Any]:
        sizes = {"gbps": {"busiest": 90.0}, "us": {"p50": us}}
        return {"op": "pair", "tokens": 1, "routing": routing, **sizes}

    at = {"machine": {"name": "GPU", "gpus": 2}, "date": "2026-01-02T03", "link": {"gbps": {"push": 300.0}}}
    return {**at, "cases": [case("uniform", uniform), case("hot", hot)]}


RUN = Run("run.json")


def table(*rows: tuple[Any, ...]) -> Table:
    return Table("figures", ("us", "1"), rows)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(result(9.07, 8.5)))
    (tmp_path / "docs").mkdir()
    for page in pages.PAGES:
        (tmp_path / page).write_text("nothing\n")
    (tmp_path / "README.md").write_text(
        "# x\n\n<!-- table: figures -->\n| old |\n<!-- end -->\n\nA pair takes\n9.1 us.\n"
    )
    return tmp_path


def test_a_table_names_the_routing_that_it_was_read_with(clone: Path) -> None:
    text = table(("pair", number(us(RUN, "pair", 1)))).text(Results(clone))
    assert "| pair | 9.1 |" in text and "From `run`: 2 GPU, 2026-01-02, uniform routing" in text
    assert "link 300 GB/s" in text
    hot = table(("pair", number(us(RUN, "pair", 1, "hot")))).text(Results(clone))
    assert "| pair | 8.5 |" in hot and "hot routing" in hot and "uniform" not in hot


def test_what_is_written_is_found_right_and_a_changed_digit_is_not(clone: Path) -> None:
    tables = (table(("pair", number(us(RUN, "pair", 1)))),)
    reading = Reading("README.md", "A pair takes {:.1f} us.", (us(RUN, "pair", 1),))
    assert "-| old |" in pages.problems(Results(clone), tables, [reading])[0]
    assert pages.write(Results(clone), tables) == ["README.md"] and pages.write(Results(clone), tables) == []
    assert pages.problems(Results(clone), tables, [reading]) == []
    page = clone / "README.md"
    page.write_text(page.read_text().replace("| 9.1 |", "| 8.5 |").replace("9.1 us", "8.5 us"))
    digit, sentence = pages.problems(Results(clone), tables, [reading])
    assert "-| pair | 8.5 |\n" in digit and "+| pair | 9.1 |\n" in digit
    assert sentence == "README.md must say, by the results: A pair takes 9.1 us.\n"


def test_a_table_that_no_page_shows_and_a_marker_without_table(clone: Path) -> None:
    pages.write(Results(clone), (known := table(("pair", number(us(RUN, "pair", 1)))),))
    assert pages.problems(Results(clone), (known, Table("hidden", ("a",), ())), []) == ["no page shows table hidden\n"]
    with pytest.raises(InputError, match="must name one of other"):
        pages.write(Results(clone), (Table("other", ("a",), ()),))


@pytest.mark.parametrize(
    ("measured", "shown"), [(9.0, "met"), (9.5, "met"), (9.5001, "< 1%"), (9.56, "1%"), (10.13, "7%"), (9.46, "met")]
)
def test_met_is_what_is_met_before_rounding(measured: float, shown: str) -> None:
    assert over(lambda _: measured, 9.5)(Results(ROOT)) == shown  # type: ignore[operator]


def test_a_figure_is_of_exactly_one_case(clone: Path) -> None:
    results = Results(clone)
    with pytest.raises(InputError, match="it has 0"):
        us(RUN, "pair", 2)(results)
    with pytest.raises(InputError, match="it has 2"):
        results.case(RUN, op="pair", tokens=1)
    with pytest.raises(InputError, match="give --root the folder of a clone"):
        us(Run("none.json"), "pair", 1)(results)


def test_texts_are_read_by_section() -> None:
    results = Results(ROOT)
    shares = "sweeps/ht_h200_r4_shares.txt"
    more = {"layout": "token", "dtype": "bf16"}
    by_share = [us(Run(shares, section=f"share 0.{part}"), "dispatch", 4096, **more)(results) for part in (26, 42)]
    assert by_share == [496.5, 516.9]
    node = Run("node_h200_processes_r4_uniform.txt", "a2a")
    assert (us(node, "dispatch", 4096)(results), share(node, "dispatch", 4096)(results)) == (463.7, 1.1)
    assert results.of(node)["machine"] == {"name": "NVIDIA H200", "gpus": 4}
    with pytest.raises(InputError, match="must have rows of figures"):
        results.of(Run(shares, section="share 0.99"))


def test_targets_of_one_sided_are_judged_by_the_uniform_routing() -> None:
    results = Results(ROOT)
    for value, _ in A2A_TARGETS:
        value(results)
    assert {routing for _, routing in results.read} == {"uniform"}


def test_the_command(clone: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for page in pages.PAGES:
        (copy / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, copy / page)
    shutil.copytree(ROOT / "bench" / "results", copy / "bench" / "results", dirs_exist_ok=True)
    readme = copy / "README.md"
    readme.write_text(readme.read_text().replace("| 9.1 | 10.1 |", "| 8.5 | 9.5 |"))
    failed = CliRunner().invoke(app, ["tables", "--check", "--root", str(copy)])
    assert failed.exit_code == 1 and "+| rows of experts in symmetric memory | 9.1 | 10.1 |" in failed.output
    assert CliRunner().invoke(app, ["tables", "--root", str(copy)]).exit_code == 0
    assert readme.read_text() == (ROOT / "README.md").read_text()
