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

from moegen.bench import pages, report
from moegen.bench.committed import Results, Run, share, us
from moegen.bench.page_readings import READINGS
from moegen.bench.page_runs import FILES, HT_LARGER_SHARE, HT_SHARE, NODE_FOUR, NODE_H100
from moegen.bench.page_tables import A2A_TARGETS, TABLES
from moegen.bench.pages import Reading, Table, number, over
from moegen.cli.bench import app
from moegen.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
if not RESULTS.is_dir():
    pytest.skip("an sdist has no results", allow_module_level=True)

TYPED = {"page", "machine", "file", "command", "part"}
"""First column's titles of tables that list things."""
RECORDS = {"step", "op"}
"""Those of tables that record the past."""


def test_the_pages_say_what_the_results_say() -> None:
    assert "\n".join(pages.problems(Results(ROOT), TABLES, READINGS)) == "", "run `moegen bench tables`"


def test_every_page_of_results_is_compared() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in RESULTS.rglob("*.md")}
    assert found == {page for page in pages.PAGES if page.startswith("bench/")}


@pytest.mark.parametrize("page", [page for page in pages.PAGES if page != pages.DESIGN])
def test_no_table_of_figures_is_typed(page: str) -> None:
    text = (ROOT / page).read_text()
    if page == pages.README:
        text = re.split(r"\n## ", text[text.index("## Measured") + 3 :])[0]
    typed = re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.DOTALL)
    heads = {title.split(",")[0] for title in re.findall(r"^\| ([^|]*) \|.*\n\|[ -]*-\|", typed, re.MULTILINE)}
    assert heads <= (RECORDS if page == pages.HISTORY else TYPED)


@pytest.mark.parametrize("page", pages.PAGES)
def test_what_leads_to_a_table_names_no_other_routing(page: str) -> None:
    """The line below a table is written; the heading and the paragraph above it are not."""
    blocks = re.findall(
        r"((?:[^\n]+\n)*)\n<!-- table: \S+ -->\n(.*?)<!-- end -->", (ROOT / page).read_text(), re.DOTALL
    )
    for above, table in blocks:
        origin = table.split("\n\n")[-1]
        assert {word for word in ("uniform", "zipf") if word in above} <= set(re.findall(r"\w+", origin)), above


def test_the_index_names_every_file() -> None:
    results, index = Results(ROOT), (ROOT / pages.INDEX).read_text()
    assert len({run.file for run in FILES}) == len(FILES)
    with_json = {path.name for path in RESULTS.glob("*.json")}
    texts = {path.name for path in RESULTS.glob("*.txt") if not path.with_suffix(".json").exists()}
    assert {run.file for run in FILES} == with_json | texts
    assert all((RESULTS / run.file).with_suffix(".txt").is_file() for run in FILES)
    assert all(results.of(run)["command"].startswith("moegen bench ") for run in FILES)
    for sweep in RESULTS.glob("sweeps/*"):
        assert f"`{sweep.name}`" in index


def test_no_page_names_a_file_that_is_gone() -> None:
    stems = {path.stem for path in RESULTS.rglob("*.txt")}
    for page in pages.PAGES:
        named = re.findall(r"`(?:sweeps/)?([a-z0-9]+_h[12]00\w*)(?:\.\w+)?[`,]", (ROOT / page).read_text())
        assert set(named) <= stems, page


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.stem)
def test_results_are_laid_out_as_the_benchmark_writes_them(path: Path) -> None:
    text = path.read_text()
    assert report.text_of(json.loads(text)) == text, "a new run would change more than its figures"
    assert max(map(len, text.splitlines())) < 5_000, "a case, or another entry, is one line"


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
    more = {"layout": "token", "dtype": "bf16"}
    by_share = [us(run, "dispatch", 4096, **more)(results) for run in (HT_SHARE, HT_LARGER_SHARE)]
    assert by_share == [496.5, 516.9]
    node = Run(NODE_FOUR.file, "a2a")
    assert (us(node, "dispatch", 4096)(results), share(node, "dispatch", 4096)(results)) == (463.7, 1.1)
    assert results.of(node)["machine"] == {"name": "NVIDIA H200", "gpus": 4}
    assert results.of(NODE_FOUR)["seconds"] == 28.7 and "--ranks 4" in results.of(NODE_FOUR)["command"]
    with pytest.raises(InputError, match="must have rows of figures"):
        results.of(Run(HT_SHARE.file, section="share 0.99"))


def test_a_text_says_what_its_json_says() -> None:
    results = Results(ROOT)
    text = Run(NODE_H100.file.replace(".json", ".txt"), "a2a")
    for name in ("machine", "command", "seconds"):
        kept, printed = results.of(NODE_H100)[name], results.of(text)[name]
        if name == "machine":
            assert printed == {"name": "NVIDIA H100", "gpus": kept["gpus"]}
        else:
            assert printed == (kept if name == "command" else pytest.approx(kept, abs=0.05))
    op = {"op": "dispatch", "tokens": 4096, "routing": "hot"}
    whole = results.case(Run(NODE_H100.file, "a2a"), **op)["us"]["p50"]
    assert results.case(text, **op)["us"]["p50"] == pytest.approx(whole, abs=0.05)


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
    shutil.copytree(RESULTS, copy / "bench" / "results", dirs_exist_ok=True)
    readme = copy / "README.md"
    readme.write_text(readme.read_text().replace("| 9.1 | 10.1 |", "| 8.5 | 9.5 |"))
    failed = CliRunner().invoke(app, ["tables", "--check", "--root", str(copy)])
    assert failed.exit_code == 1 and "+| rows of experts in symmetric memory | 9.1 | 10.1 |" in failed.output
    assert CliRunner().invoke(app, ["tables", "--root", str(copy)]).exit_code == 0
    assert readme.read_text() == (ROOT / "README.md").read_text()
