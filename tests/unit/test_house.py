# SPDX-License-Identifier: Apache-2.0
"""scripts/house: what each measure finds and what it leaves alone, and that nothing has become worse."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from scripts.house import __main__ as command
from scripts.house import kernels, modules, templates
from scripts.house.cpp import parse, without_comments
from scripts.house.dead import dead
from scripts.house.finding import Finding
from scripts.house.limits import LIMITS
from scripts.house.measures import MEASURES

HEADERS = {
    "moegen/outer.cuh": "#include <moegen/inner.cuh>\nnamespace moegen {\nvoid start() { inner(1); }\n}\n",
    "moegen/inner.cuh": """
namespace moegen {
template <class Params>
struct WatchOf { const Params* p; };
template <class Watch>
__device__ bool inner(const Watch& watch) { return watch.p->by_header != 0; }
__device__ void never(const Params& p) { p.by_unused_header = 1; }
}  // namespace moegen
""",
}

KERNEL = """
#include <moegen/outer.cuh>
using namespace moegen;
constexpr uint32_t kUsed = 1, kUnused = 2;  // kUnused
constexpr uint32_t kOfConstant = 3;
constexpr uint32_t kRows = kOfConstant;
constexpr uint32_t kUnrolled = 4;
constexpr uint32_t kAsserted = 5;
static_assert(kAsserted == 5);
enum Phase : uint32_t { kFirst, kSecond = 7 };
struct Row { uint32_t rows() const { return kRows; } };
struct Unused { Row row; };
using Alias = Row;
struct Params {
    uint8_t* peers[2];     // never by a string: "p.dead"
    const uint32_t* dead;
    uint32_t by_header;
    uint32_t by_unused_header;
    uint32_t by_dead_function;
};
__device__ uint32_t called(Row row) { return row.rows() + kUsed; }
__device__ uint32_t passed(uint32_t x) { return x; }
template <class T>
__device__ T of_template(T x) { constexpr int kLocal = 1; constexpr int kLocalUsed = 1; return x + kLocalUsed; }
__device__ uint32_t only_by_dead(const Params& p) { return p.by_dead_function; }
__device__ uint32_t uncalled(const Params& p) { return only_by_dead(p); }
__device__ __noinline__ void shadowed() {}
extern "C" __global__ void __launch_bounds__(32) moegen_x(const __grid_constant__ Params p) {
    uint32_t shadowed = 0;
#pragma unroll kUnrolled
    for (;;) p.peers[0][kFirst] = called(Row{}) + apply(passed, 1) + of_template<int>(shadowed);
    start();
}
"""


def names(kind: str, text: str = KERNEL) -> list[str]:
    return [each.name for each in dead(text, HEADERS) if each.kind == kind]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("function", ["only_by_dead", "uncalled", "shadowed"]),
        ("member", ["dead", "by_unused_header", "by_dead_function"]),
        ("enumerator", ["kSecond"]),
        ("constant", ["kUnused", "kLocal"]),
        ("type", ["Unused", "Alias"]),
    ],
)
def test_dead_text_is_found_and_what_is_used_is_not(kind: str, expected: list[str]) -> None:
    assert names(kind) == expected


def test_dead_text_has_its_line() -> None:
    (found,) = [each for each in dead(KERNEL, HEADERS) if each.name == "uncalled"]
    assert KERNEL.splitlines()[found.line - 1].startswith("__device__ uint32_t uncalled")


def test_a_header_is_needed_to_read_a_member() -> None:
    assert "by_header" in [each.name for each in dead(KERNEL, {}) if each.kind == "member"]


@pytest.mark.parametrize(
    "use",
    [
        "x = q.dead;",
        "x = watch.p->dead;",
        "member_of(&Params::dead);",
        'asm volatile("st %0;" ::"l"(p.dead));',
    ],
)
def test_ways_to_read_a_member(use: str) -> None:
    head = "template <class P> struct Watch { const Params* p; };\n"
    body = f"__device__ void read(const Params& p, Params q, Watch<Params> watch) {{ {use} }}\n"
    text = KERNEL.replace("extern", head + body + "extern").replace("start();", "start(); read(p, p, {});")
    assert names("member", text) == ["by_unused_header", "by_dead_function"]


def test_what_a_macro_mentions_is_used() -> None:
    assert names("function", KERNEL + "#define CALL() \\\n    uncalled(p)\n") == ["shadowed"]


def test_specifiers_and_attributes_are_no_names() -> None:
    text = """
struct alignas(16) Wide { int x; };
[[nodiscard]] __device__ static inline Wide<1> make(int a);
template <> struct Wide<3> {};
extern "C" { namespace inner { __device__ int deep[2] = {1, 2}; } }
"""
    assert [(item.kind, list(item.names)) for item in parse(text)[1:]] == [
        ("type", ["Wide"]),
        ("function", ["make"]),
        ("type", ["Wide"]),
        ("constant", ["deep"]),
    ]


def test_comments_become_blanks() -> None:
    text = "a /* b\n */ c; // d\nf('\"', \"// no comment\"); g(1'000, 2'000);"
    assert without_comments(text, strings=True) == "a     \n    c;     \nf('\"', \"// no comment\"); g(1'000, 2'000);"
    assert without_comments(text).splitlines()[2].split() == ["f(", ",", ");", "g(1'000,", "2'000);"]


LONG = "x" * 121

Texts = dict[str, str]


@pytest.mark.parametrize(
    ("find", "bad", "good"),
    [
        (lambda t: kernels.long_lines(t, code_only=True), LONG, "x" * 120 + f"\n// {LONG}"),
        (lambda t: kernels.long_lines(t, code_only=False), f"// {LONG}", "x" * 120),
        (
            kernels.stray_alignment,
            "int x  = 1;",
            '  int x = 1;    // a  b\n  y == 1   ? 2\nf("  a");'.replace("  a", ""),
        ),
        (kernels.stray_comments, "int x = 1;    // one", "int x;    // one\nint ab;   // two\n\nint c;  // three"),
        (kernels.doubled_blank_lines, "a;\n\n\nb;", "a;\n\nb;\n"),
        (kernels.maybe_unused, "f([[maybe_unused]] int x)", "f(int maybe_unused)"),
        (templates.strings_in_statements, '//% set a = ", b" if s.c else ""\n', '//% set a = s.b == ", c"\n'),
        (templates.strings_in_statements, "//% set a\nint b;\n//% endset\n", '//% set a = "word" if s.c else s.d\n'),
        (templates.strings_in_expressions, '$("a + b" if s.c)', '$(s.d | join(", ")) $("word" if s.e else s.f)'),
        (templates.family_tests, '//% if s.family == "ll"\n//% endif\n', "//% if s.masked\n//% endif\n"),
        (lambda t: templates.long_files(t, 2), "1\n2\n3\n", "1\n2\n"),
    ],
)
def test_lines_and_jinja(find: Callable[[Texts], list[Finding]], bad: str, good: str) -> None:
    (found,) = find({"a.cuh.jinja": bad})
    assert found.place == "a.cuh.jinja"
    assert find({"a.cuh.jinja": good}) == []


def test_each_maybe_unused_of_a_line_counts() -> None:
    found = kernels.maybe_unused({"a": "f([[maybe_unused]] int x, [[maybe_unused]] const int& y)"})
    assert [each.name for each in found] == ["int x", "const int& y"]


def test_a_name_for_a_test_of_the_family_counts_wherever_it_is_mentioned() -> None:
    text = '//% set ht = s.family == "ht"\n//% set a = "b" if ht\n//% if ht and a\n//% endif\n'
    assert [each.name for each in templates.family_tests({"a.cuh.jinja": text})] == ["s.family", "ht", "ht"]
    assert templates.family_tests({"a.cu.jinja": text}) == []


def test_what_two_templates_define() -> None:
    text = "__device__ __forceinline__ const T& twice(int a) { once(); }\nstruct Params {};\n"
    text += "struct Twice {\n    __device__ int member() const;\n};\n__device__ int Twice::member() const {}\n"
    texts = {
        "parts/a.cuh.jinja": text + "__device__ void once() {}\n__device__ void once(int) {}\nstruct Once;\n",
        "parts/b.cuh.jinja": text + "// __device__ void once() {}\n//% set x = 1\nstruct Once {};\n",
        "host/ptx.cuh": "__device__ void once() {}\n",
    }
    files = "parts/a.cuh.jinja, parts/b.cuh.jinja"
    device = templates.for_device(texts)
    assert templates.duplicate_functions(device) == [Finding(files, 0, "twice")]
    assert templates.duplicate_structs(device) == [Finding(files, 0, "Twice")]


SOURCES = {
    "moegen": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from moegen.runtime.ll import f\n",
    "moegen.errors": "import os\n",
    "moegen.kernels": "from moegen.kernels.ll import spec\n",
    "moegen.kernels.ll": "from moegen import errors\n",
    "moegen.kernels.ht_rows": "from moegen.kernels import spec, ll\n",
    "moegen.runtime": "from .ll import f\nfrom moegen.errors import g\n",
    "moegen.runtime.ll": "if TYPE_CHECKING:\n    from moegen.runtime import memory\n",
    "moegen.runtime.memory": "def late():\n    from ..runtime.ll import f\n    import moegen.kernels.ll\n",
}


def test_cycles_count_imports_for_type_checkers_and_inside_functions() -> None:
    (cycle,) = modules.cycles(SOURCES)
    assert cycle.name == "moegen.runtime.ll <-> moegen.runtime.memory"
    assert [each.place for each in modules.in_cycles(SOURCES)] == ["moegen.runtime.ll", "moegen.runtime.memory"]
    broken = {**SOURCES, "moegen.runtime.ll": ""}
    assert modules.cycles(broken) == modules.in_cycles(broken) == []


def test_a_package_with_functions_of_its_own_is_a_module() -> None:
    package = "from moegen.runtime import ll\ndef f(): ...\n"
    sources = {"moegen.runtime": package, "moegen.runtime.ll": "from moegen.runtime import f\n"}
    assert [each.name for each in modules.cycles(sources)] == ["moegen.runtime <-> moegen.runtime.ll"]
    assert modules.cycles({**sources, "moegen.runtime": package.replace("f()", "__getattr__(name)")}) == []


def test_arrows_between_rooms() -> None:
    arrows = [each.name for each in modules.arrows(SOURCES)]
    assert arrows == ["kernels -> errors", "runtime -> errors", "runtime -> kernels"]


def test_imports_between_families() -> None:
    assert modules.family_imports(SOURCES) == [Finding("moegen.kernels.ht_rows", 1, "moegen.kernels.ll")]
    assert [modules.family_of(f"moegen.{name}") for name in ("one_sided.api", "x.ll_roles", "x.all", "llama")] == [
        "a2a",
        "ll",
        None,
        None,
    ]


def test_importers() -> None:
    found = modules.importers({"moegen.kernels.ll"}, SOURCES)
    assert [each.place for each in found] == ["moegen.kernels", "moegen.kernels.ht_rows", "moegen.runtime.memory"]
    assert modules.importers({"moegen.kernels.ht_rows"}, SOURCES) == []


def test_a_function_that_has_moved_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.HINTS, "Spec", ("moegen.no_such_module", "moegen.errors"))
    kernels.seam.cache_clear()
    try:
        assert kernels.seam("Spec").__name__ == "Spec"
    finally:
        kernels.seam.cache_clear()


def test_nothing_has_become_worse(capsys: pytest.CaptureFixture[str]) -> None:
    code = command.main(["--check"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert [line.split()[0] for line in printed.out.splitlines()[1:]] == list(MEASURES) == list(LIMITS)


def test_what_is_above_its_limit_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "MEASURES", {"long-modules": MEASURES["long-modules"]})
    monkeypatch.setattr(command, "LIMITS", {"long-modules": -1, "gone": 1})
    assert command.main(["--check"]) == 1
    complaints = capsys.readouterr().err.splitlines()
    assert complaints[0].startswith("long-modules: 0, over the limit of -1") and complaints[1].startswith("gone: ")
    monkeypatch.setattr(command, "LIMITS", {})
    assert command.main(["--check"]) == 1 and "no limit" in capsys.readouterr().err


def test_the_other_ways_to_print(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = MEASURES["duplicate-structs"]
    monkeypatch.setattr(command, "MEASURES", {"duplicate-structs": measure})
    count = len(measure.find())
    assert command.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["duplicate-structs"]["count"] == count
    assert command.main(["--markdown"]) == 0
    assert f"| duplicate-structs | {count} |" in capsys.readouterr().out
    assert command.main(["--list", "duplicate-structs"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{count} findings, ")


def test_docstrings_make_no_module_long() -> None:
    text = (
        'class A:\n    """One.\n\n    Two.\n    """\n\n    def f(self) -> None:\n        """Three."""\n        pass\n'
    )
    assert modules.code_lines(text) == 9 - 4 - 1
    assert [each.place for each in modules.long_modules({"short": "x = 1\n", "long": text}, 3)] == ["long"]
