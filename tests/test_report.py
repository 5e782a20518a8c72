"""Tables of results."""

from __future__ import annotations

from ccp_ext.report import table


def test_columns_line_up_and_numbers_are_readable():
    rows = [
        {"model": "plain", "MACs": 1234567, "acc": 91.234},
        {"model": "s", "MACs": 5, "acc": None},
    ]
    assert table(rows).splitlines() == [
        "model       MACs    acc",
        "-----  ---------  -----",
        "plain  1,234,567  91.23",
        "s              5",
    ]
    assert table(rows, markdown=True).splitlines()[1] == "|-------|----------:|------:|"
    assert table([]) == ""
