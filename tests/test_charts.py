"""The report's pictures and tables, read back: stages, and labels, which are confused with which."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise

from qft.bundle.classifier import Labels
from qft.measure.classification import per_label
from qft.measure.quality import Quality, RowAnswer
from qft.report.charts import confusion_chart, waterfall_chart
from qft.report.page import render
from qft.report.summary import LabelResults, TargetSize, WaterfallStep
from tests.test_words import GOOD, KNOBS

NAMES = ("ask", "book", "cancel & pay")
SAID = {  # (expected, answered): rows
    ("ask", "ask"): 6, ("ask", "book"): 2, ("book", "book"): 3, ("book", "cancel & pay"): 1, ("cancel & pay", "ask"): 3,
    ("cancel & pay", "cancel & pay"): 1,
}  # fmt: skip


def results(said: dict[tuple[str, str], int], names: tuple[str, ...]) -> LabelResults:
    """Of answers that were counted by hand."""
    answers = [
        RowAnswer("", expected, answer, expected == answer, True, 0.0)
        for (expected, answer), rows in said.items()
        for _ in range(rows)
    ]
    wrong = sorted(((*pair, rows) for pair, rows in said.items() if pair[0] != pair[1]), key=lambda one: -one[2])
    return LabelResults(per_label(answers, Labels(names, several=False)), wrong, None)


def texts(svg: str) -> list[tuple[str, float, float, bool]]:
    """Every text of a picture: what it says, where it stands, whether it is turned."""
    found = []
    for one in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        x, y = re.findall(r"(?:translate\(|rotate\(\S+ )([\d.]+) ([\d.]+)\)", one.get("transform", ""))[0]
        found.append(("".join(one.itertext()), float(x), float(y), "rotate(-90" in one.get("transform", "")))
    return found


def grid(svg: str) -> dict[tuple[str, str], str]:
    """(label down, label across) → the number nearest to where both meet."""
    shown = texts(svg)
    names = {text for text, *_ in shown if not text.isdigit()} - {"expected", "answered"}
    down = {text: y for text, _, y, turned in shown if text in names and not turned}
    across = {text: x for text, x, _, turned in shown if text in names and turned}
    assert down.keys() == across.keys()
    found = {}
    for text, x, y, _ in shown:
        if text.isdigit():
            place = min(down, key=lambda name: abs(down[name] - y)), min(across, key=lambda name: abs(across[name] - x))
            assert place not in found
            found[place] = text
    return found


def test_a_confusion_picture_has_each_rows_share_where_its_labels_meet() -> None:
    svg = confusion_chart(results(SAID, NAMES))
    assert grid(svg) == {
        ("ask", "ask"): "75", ("ask", "book"): "25", ("book", "book"): "75", ("book", "cancel & pay"): "25",
        ("cancel & pay", "ask"): "75", ("cancel & pay", "cancel & pay"): "25",
    }  # fmt: skip
    told = ET.fromstring(svg).get("aria-label")
    assert told is not None
    assert told.endswith(
        "cancel & pay answered as ask in 3, ask answered as book in 2, book answered as cancel & pay in 1"
    )


def test_of_many_labels_those_are_drawn_that_are_confused_most() -> None:
    names = tuple(f"label {number:02}" for number in range(30))
    said = {(name, name): 10 for name in names}
    said |= {(names[n], names[n + 1]): 30 - n for n in range(0, 30, 2)}  # the later a pair, the rarer
    shown = {down for down, _ in grid(confusion_chart(results(said, names)))}
    assert shown == set(names[:24])


def test_stages_of_several_targets_have_their_names_in_full_one_a_line() -> None:
    def quality(value: float) -> Quality:
        return Quality("accuracy", value, 0.5, 100, 100)

    steps = [WaterfallStep("base", quality(50)), WaterfallStep("tuned", quality(90))]
    targets = ("cpu-int4", "cuda-fp16", "web-int4")
    steps += [WaterfallStep(stage, quality(88), target) for target in targets for stage in ("rounded", "shipped")]
    lines = {text: y for text, _, y, _ in texts(waterfall_chart(steps))}
    heights = [lines[step.name] for step in steps]
    assert all(below - above > 10 for above, below in pairwise(heights))
    assert "shipped (cpu-int4)" not in {
        text for text, *_ in texts(waterfall_chart(steps[:4]))
    }  # they stand, on two lines


def test_what_a_provider_leaves_to_the_processor_and_large_activations_are_sentences() -> None:
    modules = {f"layers.{number}.down_proj": 60_000.0 - number for number in range(7)}
    one = TargetSize(1000, 16.0, modules, {"Range": 1, "MatMulNBits": 1211})
    page = " ".join(render(replace(GOOD, sizes={"cuda-fp16": one}), KNOBS, []).split())
    assert "has no kernel for Range (1 node), MatMulNBits (1,211 nodes); onnxruntime" in page
    assert "layers.0.down_proj 60,000, layers.1.down_proj 59,999" in page
    assert "layers.5.down_proj 59,995 (7 modules in all)." in page


def test_the_page_has_each_labels_figures_the_hardest_first() -> None:
    page = render(replace(GOOD, labels=results(SAID, NAMES)), KNOBS, [])
    table = page[page.index("All 3 labels, the hardest first") :]
    rows = re.findall(r"<tr>((?:<td>.*?</td>)+)</tr>", table[: table.index("</table>")])
    assert [re.findall(r"<td>(.*?)</td>", row) for row in rows] == [
        ["cancel &amp; pay", "4", "25.0 %", "50.0 %", "33.3 %"],
        ["book", "4", "75.0 %", "60.0 %", "66.7 %"],
        ["ask", "8", "75.0 %", "66.7 %", "70.6 %"],
    ]
    assert 'aria-label="Which labels are confused"' in page
    assert "cancel &amp; pay answered as ask in 3" in page


def test_labels_that_are_never_confused_need_no_picture() -> None:
    right = {pair: rows for pair, rows in SAID.items() if pair[0] == pair[1]}
    page = render(replace(GOOD, labels=results(right, NAMES)), KNOBS, [])
    assert "Which labels are confused" not in page
    assert "All 3 labels" in page
