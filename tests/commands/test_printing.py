from __future__ import annotations

import json

from specdec.commands import printing


def test_results_go_to_stdout_and_everything_else_to_stderr(capsys):
    printing.note("for people")
    printing.error("for people too")
    with printing.status("busy"), printing.progress() as bar:
        task = bar.add_task("work", total=2)
        bar.advance(task)
    printing.result({"text": "é", "tokens_per_second": 1.5})
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"text": "é", "tokens_per_second": 1.5}
    assert "for people" in printed.err


def test_text_is_passed_on_as_it_is(capsys):
    printing.text("[bold]\x00 no newline")
    assert capsys.readouterr().out == "[bold]\x00 no newline"


def test_table_aligns_its_values(capsys):
    printing.table({"a": "1", "long name": "2"}, title="Title")
    assert capsys.readouterr().out == "Title\n  a          1\n  long name  2\n"
