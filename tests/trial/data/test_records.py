"""Tests that files of every kind, saved data sets and the hub give the same records, and that errors name file and
row.

Tests of conversations: the tokenizer's template renders them, and the assistant's answers are located or refused.
"""

from __future__ import annotations

import json

import datasets
import pytest

from lorameter.errors import UsageError
from lorameter.studies.workload import DataColumns, Workload
from lorameter.trial.data.chat import ChatTemplate, read_conversation
from lorameter.trial.data.records import describe_data, read_records, recognise

SAMPLE = [
    {"prompt": "a, b", "completion": 'say "x"\nand y'},
    {"prompt": "Größe", "completion": "3"},
    {"prompt": "q", "completion": "null"},
]


def read(data, **changes):
    records, label = read_records(Workload(data=str(data), **changes))
    return list(records), label


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.csv.gz", "x.parquet"])
def test_every_kind_of_file_gives_the_same_rows(write, name):
    """Quotes, line ends in cells and all scripts are kept; no text becomes a number or null."""
    records, _ = read(write(name, SAMPLE))
    assert sorted(map(str, records)) == sorted(map(str, SAMPLE))


GOOD_LINE = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", GOOD_LINE + b'{"text": "caf\xe9"}', "line 2: cannot be read: 'utf-8' codec can't decode byte 0xe9"),
        ("x.jsonl", GOOD_LINE + b'{"text": ', "line 2: cannot be read: Expecting value"),
        ("x.jsonl.gz", GOOD_LINE, "line 1: cannot be read: Not a gzipped file"),
        ("x.json", b'[{"text": "a"},\n{"text": }]', "cannot be read: Expecting value: line 2"),
        ("x.csv", b"text,text\na,b", "row 2: cannot be read: two columns have the name 'text'"),
        ("x.csv", b"text,b\na,c\nd\n", "row 3: cannot be read: 1 cells, and the first row names 2 columns"),
        ("x.txt", b"a\nb\xff", "line 2: cannot be read: 'utf-8' codec"),
        ("x.parquet", b"PAR1 and nothing behind it", "row 1: cannot be read: Parquet magic bytes not found"),
    ],
)  # fmt: skip
def test_an_unreadable_row_is_named(tmp_path, name, content, words):
    """The error names the file and has the reader's reason."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"(?s){words}"):
        read(path)


GOOD = {"instruction": "say it", "context": "", "response": "it"}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([""], "it has no records"),
        (["{}", json.dumps(GOOD)], "no known columns. There are none"),
        (
            [json.dumps(GOOD), json.dumps({**GOOD, "instruction": None})],
            "line 2: instruction = null: a text is expected",
        ),
        ([json.dumps(GOOD), "", json.dumps({**GOOD, "response": 3})], "line 3: response = 3"),
        (["null"], "line 1: None: a record"),
    ],
    ids=lambda value: str(value)[-30:],
)
def test_an_unusable_record_is_refused_by_name(tmp_path, lines, words):
    """An empty file, a cell without text and a line that is not a record are refused, by `describe_data` before a
    run."""
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UsageError) as caught:
        read(path)
    assert words in str(caught.value)
    assert path.name in str(caught.value)
    with pytest.raises(UsageError):
        describe_data(Workload(data=str(path)))


def test_holding_out_every_record_is_refused(tmp_path):
    """At least one record must remain for training."""
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join([json.dumps(GOOD)] * 16))
    with pytest.raises(UsageError, match="16 records, and held_out_records = 16: none is left to train on"):
        describe_data(Workload(data=str(path)))
    assert describe_data(Workload(data=str(path), held_out_records=15)).startswith("mine.jsonl, 16 records")


datasets.disable_progress_bars()
ROWS = [{"prompt": f"p{number}", "completion": "c", "score": number} for number in range(600)]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_a_saved_data_set_is_read_completely(tmp_path):
    """A shuffled data set in several shards is read, with only the columns that are trained on."""
    data = datasets.Dataset.from_list(ROWS).shuffle(seed=1).select(range(500))
    data.save_to_disk(tmp_path / "mine", num_shards=3)
    records, label = read(str(tmp_path / "mine"))
    assert label == "mine, 500 records of prompt/completion" == describe_data(Workload(data=str(tmp_path / "mine")))
    expected = [{"prompt": row["prompt"], "completion": row["completion"]} for row in data]
    assert sorted(map(str, records)) == sorted(map(str, expected))


def test_a_folder_of_files_is_one_data_set(write, tmp_path):
    """The files of the split are read in the order of their names; other files are ignored."""
    for part in (1, 0):
        write(f"train-{part}.jsonl.gz", ROWS[2 * part : 2 * part + 2])
    write("test.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("about it")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert read(str(tmp_path))[1].endswith("[train], 4 records of prompt/completion")
    assert read(f"{tmp_path}[test]")[1].endswith("[test], 1 records of prompt/completion")


def test_a_data_set_of_the_hub_is_loaded_by_configuration_and_split(monkeypatch):
    """A data set that cannot be loaded gives the library's reason."""

    def load_dataset(name, config, *, split):
        if (name, config, split) != ("owner/name", "main", "test"):
            raise ConnectionError("Couldn't reach it.\nat all")
        return datasets.Dataset.from_list([{"messages": CHAT}] * 40)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    label = describe_data(Workload(data="owner/name:main"))
    assert label == "owner/name:main[train] of the hub, checked when it is downloaded"
    assert read("owner/name:main[test]")[1] == "owner/name:main[test], 40 records of messages"
    with pytest.raises(UsageError, match=r"data 'owner/missing': cannot be read: Couldn't reach it\. Give"):
        read("owner/missing")


@pytest.mark.parametrize(
    ("names", "title", "parts"),
    [
        ("instruction context response id", "instruction/context/response", {"instruction", "context", "response"}),
        ("instruction response", "instruction/response", {"instruction", "context", "response"}),
        ("instruction input output", "instruction/input/output", {"instruction", "context", "response"}),
        ("instruction input output text", "instruction/input/output", {"instruction", "context", "response"}),
        ("output instruction", "instruction/output", {"instruction", "context", "response"}),
        ("prompt completion", "prompt/completion", {"prompt", "completion"}),
        ("messages prompt prompt_id", "messages", {"messages"}),
        ("id conversations", "conversations", {"messages"}),
        ("text label", "text", {"text"}),
    ],
)  # fmt: skip
def test_common_columns_are_recognised(names, title, parts):
    """The columns of dolly, Alpaca, prompt/completion, chats, ShareGPT and plain text are recognised in any order and
    among others."""
    form = recognise(names.split(), DataColumns(), "data")
    assert (form.title, set(form.columns)) == (title, parts)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("question answer", "no known columns. There are 'question', 'answer'"),
        ("instruction context", "no column 'response'"),
        ("messages conversations", "can be read as messages and as conversations"),
        ("instruction response output", "instruction/response and as instruction/output"),
    ],
)
def test_unknown_and_ambiguous_columns_are_refused(names, words):
    """The message lists the columns and shows how to name them."""
    with pytest.raises(UsageError, match=words) as caught:
        recognise(names.split(), DataColumns(), "data 'x', line 1")
    assert "data 'x', line 1" in str(caught.value)
    assert "columns = { instruction" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "row", "words"),
    [
        (["prompt", "completion"], {"prompt": "a"}, "no column 'completion'. The first record has prompt/completion"),
        (["text"], {"instruction": "a", "response": "b"}, "no column 'text'. The first record has text"),
        (["text"], {"text": None}, "text = null: a text is expected"),
        (["text"], {"text": "\ud800"}, "text = .*: a text"),
        (["messages"], {"messages": "[]"}, r"messages = '\[\]': a list of messages is expected"),
    ],
)
def test_a_row_that_differs_from_the_first_is_refused(names, row, words):
    """A missing column and a value that is not text are refused; the context may be missing."""
    form = recognise(names, DataColumns(), "data")
    with pytest.raises(UsageError, match=f"line 9: {words}"):
        form.read(row, "line 9")
    alpaca = recognise(["instruction", "output"], DataColumns(), "data")
    record = {"instruction": "a", "output": "c"}
    assert alpaca.read(record, "line 9")["context"] == ""
    assert alpaca.read(record | {"input": "b"}, "line 9")["context"] == "b"


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of most models, which does not mark the assistant's text."""
TURNS = (
    ("system", "be kind"),
    ("user", "Größe?"),
    ("assistant", " 3 m "),
    ("user", "user"),
    ("assistant", "assistant"),
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }};"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
THINKING = (  # as Qwen3: only the last answer has a block of reasoning
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}</>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] | trim }}</>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITHOUT_TOOLS = "{% for m in messages if m['role'] != 'tool' %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"


def answers(tokenizer, template, conversation):
    tokenizer.chat_template = template
    chat = ChatTemplate(tokenizer, "mine")
    text = chat.text(conversation)
    return [text[begin:end] for begin, end in chat.answers(conversation, text)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, [" 3 m <|im_end|>", "assistant<|im_end|>"]),
        (MARKED, [" 3 m ;", "assistant;"]),
        (STRICT.replace("== 'system'", "== 'never'"), ["3 m</>", "assistant</>"]),
    ],
    ids=["found", "marked", "stripped"],
)
def test_answers_are_the_assistant_s_text_and_the_end_of_its_turn(tokenizer, chat, template, expected):
    """The header before the answer, which may contain the same word, and the whitespace after it do not count."""
    assert answers(tokenizer, template, chat(*TURNS)) == expected


def test_a_turn_that_is_rendered_differently_when_others_follow_is_refused(tokenizer, chat):
    """The generated tokens are then unknown. A single turn can be located."""
    with pytest.raises(
        UsageError, match=r"line 7: the chat template of mine writes message 3 differently.*loss = \"all\""
    ):
        answers(tokenizer, THINKING, chat(*TURNS))
    assert answers(tokenizer, THINKING, chat(("user", "a"), ("assistant", "b"))) == ["b</>"]
    tokenizer.chat_template = THINKING
    assert ChatTemplate(tokenizer, "mine").text(chat(*TURNS)).endswith("<think></think>assistant</>\n")


@pytest.mark.parametrize(
    ("template", "turns", "words"),
    [
        (STRICT, TURNS, "does not accept it: System role not supported"),
        (WITHOUT_TOOLS, (("user", "a"), ("tool", "xyz"), ("assistant", "b")), r"does not write message 2 \(tool\) as"),
        (CHATML.replace("{% endfor %}", ""), TURNS, "does not accept it: "),
        (MARKED.replace("== 'assistant'", "== 'nobody'"), TURNS, "does not mark answer 1"),
    ],
)  # fmt: skip
def test_a_record_that_the_template_does_not_accept_is_refused(tokenizer, chat, template, turns, words):
    """The error names the record and has the template's own message."""
    with pytest.raises(UsageError, match=f"line 7: the chat template of mine {words}"):
        answers(tokenizer, template, chat(*turns))


def test_a_prompt_ends_before_the_last_answer(tokenizer, chat):
    """Later messages are not part of the prompt."""
    tokenizer.chat_template = CHATML
    template = ChatTemplate(tokenizer, "mine")
    prompt, answer = template.prompt(chat(("user", "a"), ("assistant", "b"), ("user", "c")))
    assert (prompt, answer) == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "b")
    with pytest.raises(UsageError, match="line 7: the assistant begins"):
        template.prompt(chat(("assistant", "b")))


ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def read_turns(*messages):
    return read_conversation(list(messages), "line 3", "messages")


def test_both_spellings_of_message_keys_are_equivalent():
    """The keys role/content and from/value are equivalent, also with the nulls of a table."""
    expected = (ASK, ANSWER)
    shared = {"from": "gpt", "value": "b", "role": None, "content": None}
    assert read_turns(ASK, ANSWER).messages == expected
    assert read_turns({"from": "human", "value": "a"}, shared).messages == expected
    system, tool = {"role": "system", "content": "s"}, {"role": "tool", "content": "t"}
    assert read_turns(system, ASK, tool, ANSWER).messages == (system, ASK, tool, ANSWER)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "content": None}, "message 2: content = null: a text is expected"),
        ({"role": "assistant", "content": {"text": "x"}}, "message 2: content = .*: a text is expected"),
        ({"role": "narrator", "content": "x"}, "message 2: role = 'narrator': not known. Known: system"),
        ({"from": "gpt", "value": None}, "message 2: value = null"),
        ({"speaker": "a", "text": "x"}, "message 2 = .*role and content, or from and value"),
        ("b", "message 2 = 'b'"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "message 2: tool_calls: tool calls"),
        ({"role": "user", "content": "\udc00"}, "message 2: content = .*: a text"),
    ],
)  # fmt: skip
def test_a_message_without_text_or_role_is_refused(message, words):
    """The error gives the line, the number of the message and the remedy."""
    with pytest.raises(UsageError, match=f"line 3: messages, {words}"):
        read_turns(ASK, message, ANSWER)
