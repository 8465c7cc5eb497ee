"""Each published format against a hand-made file of it; what is broken is counted, or one clear error."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from specdec.bench.loaders import OpenTurn, Skips, load_calls
from specdec.errors import ConfigError, LoadError

GOLDEN = Path(__file__).parent / "golden"


def shown(path, **options):
    """(trace, prompt as one text, answer) of every call of a golden file."""
    return [(c.trace, "".join(map(str, c.parts)), c.response) for c in load_calls(GOLDEN / path, **options)]


def framed(*messages: tuple[str, str]) -> str:
    return "".join(f"<|{role}|>\n{text}\n" for role, text in messages)


BASH_LS = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'


def test_swe_agent_prompts_are_what_was_sent_and_answers_have_their_tool_calls():
    first, second = shown("swe_agent.traj")
    start = (("system", "You fix code."), ("user", "Fix the bug."))
    assert first == ("swe_agent", framed(*start), f"Let me look around.\n{BASH_LS}")
    sent = framed(*start, ("assistant", first[2]), ("tool", "Old environment output: (1 lines omitted)"))
    assert second[1] == sent
    assert second[2] == 'Done, submitting.\n<tool_call>\n{"name": "submit", "arguments": {}}\n</tool_call>'


def test_swe_agent_demonstrations_are_prompt_and_never_answers():
    (call,) = shown("swe_agent_history.traj")
    assert call[2] == "I list.\n```\nls\n```"
    assert "Demo answer." in call[1]
    assert call[1].endswith(framed(("user", "ISSUE: it breaks.")))


def test_mini_swe_agent_answers_are_the_assistant_messages_and_the_exit_is_left_out():
    first, second = shown("mini_swe_agent.traj.json")
    assert first[0] == second[0] == "sqlfluff__sqlfluff-1625"
    assert first[1] == framed(("system", "You are a helpful assistant."), ("user", "Solve it.\nNow."))
    command = '{"name": "bash", "arguments": {"command": "grep -n \\"x\\" a.py"}}'
    assert first[2] == f"I start.\n<tool_call>\n{command}\n</tool_call>"
    assert second[1] == first[1] + framed(("assistant", first[2]), ("tool", "<returncode>0</returncode>"))
    assert second[2] == "```bash\necho done\n```"


def test_openhands_completion_logs_of_one_folder_are_one_episode_with_raw_tool_parameters():
    first, second = shown("openhands_completions")
    assert first[0] == second[0] == "astropy__astropy-1"
    tool = "<tool_call>\n<function=execute_bash>\n<parameter=command>\nls -R\n</parameter>\n</function>\n</tool_call>"
    assert first[2] == f"Looking.\n{tool}"
    assert second[1] == first[1] + framed(("assistant", first[2]), ("tool", "src"))
    assert second[2] == "Fixed."


def test_openhands_events_give_one_answer_per_model_response():
    first, done, old = shown("openhands_events.jsonl")
    assert first[1] == framed(("user", "Fix the view."))
    assert first[2].startswith("I look.\n<tool_call>\n<function=execute_bash>")
    assert first[2].count("<tool_call>") == 2
    assert done[1] == first[1] + framed(("assistant", first[2]), ("tool", "views.py"), ("tool", "/repo"))
    assert done[2] == "All done."
    assert old[0] == "django__django-2"
    assert old[1] == framed(("user", "Old style."))
    assert old[2].startswith("Read it.\n<tool_call>\n<function=run>\n<parameter=command>\ncat a.py")


def test_a_file_of_openhands_events_is_one_episode():
    assert shown("openhands_events.json") == [("openhands_events", framed(("user", "Hi")), "Hello")]


def test_agentic_traces_leave_the_answers_open():
    assert shown("agentic_trace.json", skips=Skips()) == []
    one, two, alone = load_calls(GOLDEN / "agentic_trace.json", needs_response=False)
    assert one.parts == ("<|system|>\nBe brief.\n", "<|user|>\nOne?\n")
    gap = two.parts[2]
    assert isinstance(gap, OpenTurn)
    assert gap.filled("Yes.") == "<|assistant|>\nYes.\n"
    assert two.parts[3] == "<|user|>\nTwo?\n"
    assert one.trace == two.trace != alone.trace
    assert not any(call.response for call in (one, two, alone))


def test_arctic_simulator_lines_are_text_or_tokens():
    text, tokens = load_calls(GOLDEN / "arctic.jsonl")
    assert (text.parts, text.response) == (("def f(",), "x):\n    return x\n")
    assert (tokens.parts, tokens.response) == (((1, 2, 3),), (4, 5))
    assert text.trace != tokens.trace


def test_columns_of_the_plain_form_can_be_named(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"question": "a", "output": "b"}\n')
    (call,) = load_calls(file, columns=("question", "output"))
    assert (call.parts, call.response) == (("a",), "b")


def test_sharegpt_gives_a_call_per_answer_and_counts_the_empty_one():
    skips = Skips()
    first, second = shown("sharegpt.json", skips=skips)
    assert first == ("QWJhYvA_0", framed(("user", "Summarize.")), "A summary.")
    assert second[2] == "Short."
    assert dict(skips.counts) == {"empty response": 1}


def test_openai_lines_honour_weights_batch_bodies_and_logged_responses():
    sorted_one, logged = shown("openai_chat.jsonl", skips=Skips())
    assert sorted_one[1:] == (framed(("system", "You sort."), ("user", "b a")), "a b")
    assert logged[1:] == (framed(("user", "3+3?")), "6")
    everything = shown("openai_chat.jsonl", needs_response=False)
    assert ("req-1", framed(("user", "2+2?")), "") in everything


def test_questions_have_a_call_per_turn_without_answers():
    calls = list(load_calls(GOLDEN / "spec_bench.jsonl", needs_response=False))
    assert [call.trace for call in calls] == ["writing/81", "writing/81", "rag/560"]
    assert [len(call.parts) for call in calls] == [1, 3, 1]


def test_our_own_forms_are_read_through_the_same_door(tmp_path):
    file = tmp_path / "own.jsonl"
    pool = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    lines = [
        {"trace": "a", "pool": pool, "calls": [{"prompt": [[0, 1]], "response": 1}]},
        {"trace": "b", "messages": pool[:1], "response": "ho"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(c.trace, c.parts, c.response) for c in load_calls(file)] == [
        (trace, ("<|user|>\nhi\n",), "ho") for trace in "ab"
    ]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_read_like_plain_ones(tmp_path, suffix):
    for name in ("sharegpt.json", "openhands_events.jsonl", "swe_agent.traj"):
        data = (GOLDEN / name).read_bytes()
        packed = tmp_path / (name + suffix)
        if suffix == ".gz":
            packed.write_bytes(gzip.compress(data))
        else:
            zstandard = pytest.importorskip("zstandard")
            half = len(data) // 2  # two frames, as tools that append write them
            packed.write_bytes(zstandard.compress(data[:half]) + zstandard.compress(data[half:]))
        assert [c.response for c in load_calls(packed, skips=Skips())] == [
            c.response for c in load_calls(GOLDEN / name, skips=Skips())
        ]


def test_malformed_lines_and_missing_fields_are_counted_and_the_rest_is_read(tmp_path):
    file = tmp_path / "bad.jsonl"
    good = '{"prompt": "a", "response": "b"}\n'
    file.write_text(
        good + "{broken\n" + '{"messages": [{"content": "no role"}]}\n[1]\n{"what": 1}\n\n'
        '{"trajectory": [{"query": [{"role": "user", "content": "x"}]}]}\n' + good
    )
    skips = Skips()
    assert len(list(load_calls(file, skips=skips))) == 2
    assert dict(skips.counts) == {"malformed line": 1, "malformed record": 3, "missing field": 1}
    assert any("line 2" in text for text in skips.examples["malformed line"])
    assert skips.examples["missing field"] == [f"{file}, line 7: missing field: 'response'"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{broken\n", "line 1: malformed line"),
        ('{"what": 1}\n', "line 1: malformed record: unknown trace format"),
        ('{"prompt": "a", "response": ""}\n', "line 1: empty response"),
        ('{"messages": [{"role": "user", "content": 7}]}\n', "must be text or a list of parts, got int"),
    ],
)
def test_strict_reading_gives_one_error_with_the_place(tmp_path, content, words):
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(LoadError, match=words):
        list(load_calls(file))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_file_gives_what_was_whole_and_is_counted(tmp_path, suffix):
    # Hashes do not pack: the cut must fall behind the first block that a reader gets to see.
    import hashlib

    text = "".join(
        json.dumps({"prompt": hashlib.sha256(str(i).encode()).hexdigest() * 20, "response": str(i)}) + "\n"
        for i in range(2000)
    ).encode()
    file = tmp_path / f"cut.jsonl{suffix}"
    packed = gzip.compress(text) if suffix == ".gz" else pytest.importorskip("zstandard").compress(text)
    file.write_bytes(packed[: 3 * len(packed) // 4])
    skips = Skips()
    calls = list(load_calls(file, skips=skips))
    assert 0 < len(calls) < 2000
    assert [call.response for call in calls] == [str(i) for i in range(len(calls))]
    assert sum(skips.counts.values()) == 1
    with pytest.raises(LoadError, match="cut.jsonl"):
        list(load_calls(file))


def test_a_document_that_breaks_off_gives_its_whole_elements(tmp_path):
    file = tmp_path / "cut.json"
    text = (GOLDEN / "sharegpt.json").read_text()
    file.write_text(text[: text.index('{"id": "i6')])
    skips = Skips()
    assert len(list(load_calls(file, skips=skips))) == 2
    assert dict(skips.counts) == {"malformed JSON": 1}


@pytest.mark.parametrize("name", ["big.json", "big.jsonl", "trace.json"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    file = tmp_path / f"{name}.gz"
    text = "word " * 2000  # 10 kB
    if name == "trace.json":
        turns = [{"messages": [{"role": "user", "content": text}]}]
        head, item, between, tail = '{"conversations": [', json.dumps(turns), ",", "]}"
    else:
        chat = json.dumps(
            {"id": "x", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]}
        )
        head, item, between, tail = ("[", chat, ",", "]") if name == "big.json" else ("", chat, "\n", "")
    with gzip.open(file, "wt", compresslevel=1) as out:
        out.write(head + item)
        for _ in range(1500):
            out.write(between + item)
        out.write(tail)
    tracemalloc.start()
    count = sum(1 for _ in load_calls(file, needs_response=False))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1501
    assert peak < 2 << 20, f"{peak} bytes for a file of {1501 * len(item)} characters"


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(LoadError, match="no trace file or folder"):
        list(load_calls(tmp_path / "none.jsonl"))
    with pytest.raises(LoadError, match="no trace files below"):
        list(load_calls(tmp_path))
    with pytest.raises(ConfigError, match="trace format must be one of auto, plain"):
        list(load_calls(GOLDEN / "arctic.jsonl", format="csv"))
