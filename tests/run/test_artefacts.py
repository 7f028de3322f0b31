"""Files are written whole or not at all, and the same content gives the same bytes."""

import pyarrow as pa
import pytest

from stages.lib.run.artefacts import (
    atomic_path,
    read_json,
    read_parquet,
    round_floats,
    sha256_of_file,
    write_history,
    write_json,
    write_parquet,
)


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic_path(path) as partial:
        partial.write_text("half of the n")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_round_trip_keeps_order_and_letters(tmp_path):
    write_json(tmp_path / "new/x.json", {"b": 1, "a": "ü 🙂"})
    assert (tmp_path / "new/x.json").read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "ü 🙂"\n}\n'
    assert read_json(tmp_path / "new/x.json") == {"b": 1, "a": "ü 🙂"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_nan(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": value})
    assert not list(tmp_path.iterdir())


def test_parquet_bytes_depend_on_content_alone(tmp_path):
    columns = {"row": [1, 2], "ids": pa.array([[1], [2, 3]], pa.list_(pa.int32()))}
    for name in ("a", "b"):
        write_parquet(tmp_path / name, columns)
    assert sha256_of_file(tmp_path / "a") == sha256_of_file(tmp_path / "b")
    assert read_parquet(tmp_path / "a") == {"row": [1, 2], "ids": [[1], [2, 3]]}


def test_sha256_of_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_of_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_history_keeps_full_precision_and_refuses_ragged_rows(tmp_path):
    write_history(tmp_path / "h.csv", [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-30}])
    assert (tmp_path / "h.csv").read_text() == "step,loss\n1,0.30000000000000004\n2,1e-30\n"
    with pytest.raises(ValueError, match="columns"):
        write_history(tmp_path / "h.csv", [{"step": 1}, {"stepp": 2}])


def test_round_floats_reaches_inside():
    assert round_floats({"a": [0.123456789, 7, "x"], "b": {"c": 123456789.0}}, 3) == {
        "a": [0.123, 7, "x"],
        "b": {"c": 123000000.0},
    }
