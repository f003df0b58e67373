"""Folders that `datasets` saved, folders with files in them, and what in them cannot serve."""

from __future__ import annotations

import datasets
import pytest

from lorameter.errors import UsageError
from lorameter.studies.workload import Workload
from lorameter.trial.data.records import describe_data, read_records

datasets.disable_progress_bars()
ROWS = [{"prompt": f"p{number}", "completion": "c", "score": number} for number in range(600)]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def saved(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(path)


def read(data, **changes):
    found, label = read_records(Workload(data=data, **changes))
    return list(found), label


def test_a_saved_data_set_is_read_whole(tmp_path):
    """In several shards and with its order changed; only the columns that are trained on."""
    data = datasets.Dataset.from_list(ROWS).shuffle(seed=1).select(range(500))
    data.save_to_disk(tmp_path / "mine", num_shards=3)
    records, label = read(str(tmp_path / "mine"))
    assert label == "mine, 500 records of prompt/completion" == describe_data(Workload(data=str(tmp_path / "mine")))
    expected = [{"prompt": row["prompt"], "completion": row["completion"]} for row in data]
    assert sorted(map(str, records)) == sorted(map(str, expected))


@pytest.mark.parametrize("harm", ["cut", "gone", "null", "number", "empty"])
def test_a_saved_data_set_that_cannot_serve_is_refused(tmp_path, harm):
    """By its row where a row is at fault."""
    rows = [dict(row) for row in ROWS[:300]]
    if harm == "null":
        rows[270]["completion"] = None
    if harm == "number":
        rows = [row | {"prompt": 3} for row in rows]
    path = saved(tmp_path / "mine", rows)
    arrow = next((tmp_path / "mine").glob("*.arrow"))
    if harm == "cut":
        arrow.write_bytes(arrow.read_bytes()[:700])
    if harm == "gone":
        arrow.unlink()
    if harm == "empty":
        path = saved(tmp_path / "none", ROWS[:1])
        datasets.load_from_disk(path).select([]).save_to_disk(tmp_path / "empty")
        path = str(tmp_path / "empty")
    words = {
        "cut": "cannot be read: .*Save it again", "gone": "no records are in it",
        "null": "row 271: completion = null", "number": "row 1: prompt = 3", "empty": "no records are in it",
    }  # fmt: skip
    for look in (read, lambda data: describe_data(Workload(data=data))):
        with pytest.raises(UsageError, match=words[harm]):
            look(path)


def test_a_folder_of_files_is_one_data_set(write, tmp_path):
    """Of the files of the split, in the order of their names; others beside them are left alone."""
    for part in (1, 0):
        write(f"train-{part}.jsonl.gz", ROWS[2 * part : 2 * part + 2])
    write("test.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("about it")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert read(str(tmp_path))[1].endswith("[train], 4 records of prompt/completion")
    assert read(f"{tmp_path}[test]")[1].endswith("[test], 1 records of prompt/completion")


def test_a_data_set_of_the_hub_is_asked_for_by_configuration_and_split(monkeypatch):
    """It is read like a saved one; what the library says of one that cannot be had is said."""
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        if name == "owner/gone":
            raise ConnectionError("Couldn't reach it.\nat all")
        return datasets.Dataset.from_list([{"messages": CHAT}] * 40)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert (
        describe_data(Workload(data="owner/name:main"))
        == "owner/name:main[train] of the hub, looked into when it is fetched"
    )
    assert asked == []
    assert read("owner/name:main[test]")[1] == "owner/name:main[test], 40 records of messages"
    with pytest.raises(
        UsageError, match=r"data 'owner/gone': cannot be read: ConnectionError: Couldn't reach it\. Give"
    ):
        read("owner/gone")
    assert asked == [("owner/name", "main", "test"), ("owner/gone", None, "train")]
