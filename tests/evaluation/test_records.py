"""Records survive whatever happens to the process that writes them."""

from pathlib import Path

import pytest

from evaluation.records import Record, Score, Sink, key_of, line_of, read_records
from turbodiffusion.errors import UserError


def record(key: str, total: float | None = 1 / 3) -> Record:
    score = None if total is None else Score(total, units=3, extras={"prompt": "Größe \u2028 \n"})
    return Record(key, "psnr", "a-0.mp4", "a", score, "bad" if total is None else None)


def write(path: Path, *records: Record) -> None:
    sink = Sink(path)
    sink.add(records)
    sink.close()


def test_records_come_back_to_the_bit(tmp_path: Path) -> None:
    records = [record("a", 0.1 + 0.2), record("b", None)]
    write(tmp_path / "new" / "log", *records)
    assert list(read_records([tmp_path / "new" / "log"]).values()) == records
    assert records[0].score.value == (0.1 + 0.2) / 3
    assert Score(0.0, units=0).value is None


def test_a_line_cut_off_anywhere_is_dropped_and_mended(tmp_path: Path) -> None:
    path, whole = tmp_path / "log", line_of(record("b")).encode()
    for cut in range(len(whole)):
        path.write_bytes(line_of(record("a")).encode() + whole[:cut])
        assert list(read_records([path])) == ["a"]
        write(path, record("c"))
        assert list(read_records([path])) == ["a", "c"]


def test_success_outlives_failure_and_the_last_failure_counts(tmp_path: Path) -> None:
    again = Record("a", "psnr", "a-0.mp4", "a", None, "worse")
    write(tmp_path / "0", record("a"), record("b", None))
    write(tmp_path / "1", record("a", None), record("b"))
    both = read_records([tmp_path / "0", tmp_path / "1"])
    assert all(each.score is not None for each in both.values())
    write(tmp_path / "2", record("a", None), again)
    assert read_records([tmp_path / "2"])["a"].failed == "worse"


@pytest.mark.parametrize("line", ["{", "[]", '{"key": "a"}', '{"key": "a", "score": {"sum": 1}}'])
def test_damage_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "log").write_text(f"{line_of(record('a'))}{line}\n")
    with pytest.raises(UserError, match="log line 2 is damaged"):
        read_records([tmp_path / "log"])


def test_no_score_that_is_no_number_is_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        line_of(record("a", float("nan")))


def test_keys_tell_values_apart() -> None:
    assert key_of("a", 1) == key_of("a", 1)
    assert len({key_of("a", 1), key_of("a", 2), key_of("a1"), key_of(["a", 1])}) == 4
