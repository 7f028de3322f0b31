"""reference_logps: the numbers of the textbook, once, with the fingerprint of what they are of."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stages import reference_logps
from stages.lib.data.reference import read_reference_logps
from stages.lib.model.loading import load_causal_lm
from stages.lib.run.artefacts import read_json, write_parquet
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base
from tests.model.test_logps import textbook_logps
from tests.support import short_of_memory
from tests.support.corrupted_tables import write_negatives

BASE = Base(seed=42, precision="fp32")
PAIRS = {
    "train": [([5, 6, 7], [8, 9], [10]), ([11], [12, 13, 14], [15, 16]), ([17, 18], [19], [20, 21, 22, 23])],
    "heldout": [([30, 31], [32], [33, 34])],
}


@pytest.fixture
def project(tiny_base, monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    for split, pairs in PAIRS.items():
        columns = {"row": list(range(1, len(pairs) + 1)), "prompt_id": list(range(len(pairs)))}
        for position, name in enumerate(("prompt", "chosen", "rejected")):
            columns[f"{name}_input_ids"] = pa.array([pair[position] for pair in pairs], pa.list_(pa.int32()))
        write_parquet(tiny_base / f"data/tokenized/pairs_{split}.parquet", columns)
    write_negatives(tiny_base)
    return tiny_base


def test_log_probs_are_the_textbooks_in_float32(project):
    reference_logps.main(BASE, reference_logps.Params(micro_batch_tokens=8), project)
    model = load_causal_lm(project / "models/base")
    for split, pairs in PAIRS.items():
        prompts, chosen, rejected = zip(*pairs, strict=True)
        stored = read_reference_logps(project, split)
        assert stored["row"] == list(range(1, len(pairs) + 1))
        with torch.no_grad():
            for name, completions in (("chosen_logps", chosen), ("rejected_logps", rejected)):
                expected = textbook_logps(model, prompts, completions)
                torch.testing.assert_close(torch.tensor(stored[name]), expected, rtol=1e-5, atol=1e-5)
        schema = pq.read_schema(project / f"data/reference_logps/pairs_{split}.parquet")
        assert schema.field("chosen_logps").type == pa.float32()


def test_corrupted_copies_keep_their_pairs_chosen_log_probs_and_get_their_own(project):
    reference_logps.main(BASE, reference_logps.Params(micro_batch_tokens=8), project)
    stored, train = read_reference_logps(project, "negatives"), read_reference_logps(project, "train")
    assert stored["chosen_logps"] == train["chosen_logps"] and stored["row"] == train["row"]
    prompts, chosen, _ = zip(*PAIRS["train"], strict=True)
    backwards = [answer[::-1] for answer in chosen]
    with torch.no_grad():
        expected = textbook_logps(load_causal_lm(project / "models/base"), prompts, backwards)
    torch.testing.assert_close(torch.tensor(stored["rejected_logps"]), expected, rtol=1e-5, atol=1e-5)


def test_the_same_run_gives_the_same_bytes(project):
    names = ["pairs_train.parquet", "pairs_heldout.parquet", "fingerprint.json"]
    runs = []
    for _ in range(2):
        reference_logps.main(BASE, reference_logps.Params(micro_batch_tokens=8), project)
        runs.append([(project / "data/reference_logps" / name).read_bytes() for name in names])
    assert runs[0] == runs[1]


def test_out_of_memory_halves_the_dial_and_changes_no_result(project, monkeypatch, capsys):
    stored = []
    for _ in range(2):
        reference_logps.main(BASE, reference_logps.Params(micro_batch_tokens=1000), project)
        stored.append(read_reference_logps(project, "train")["rejected_logps"])
        short_of_memory.install(monkeypatch)
    assert stored[1] == pytest.approx(stored[0], rel=1e-5)
    assert "reference_logps: memory ran out: goes on with micro-batches of" in capsys.readouterr().out


def test_metrics_count_pairs_and_average_log_probs(project):
    reference_logps.main(BASE, reference_logps.Params(micro_batch_tokens=8), project)
    metrics = read_json(project / "reports/reference_logps/metrics.json")
    stored = read_reference_logps(project, "train")
    assert metrics["train"]["pairs"] == 3 and metrics["heldout"]["pairs"] == 1
    assert metrics["train"]["logps/chosen"] == pytest.approx(sum(stored["chosen_logps"]) / 3, rel=1e-4)


@pytest.mark.parametrize("name", ["models/base/config.json", "data/tokenized/pairs_heldout.parquet"])
def test_they_are_refused_beside_anything_else(project, name):
    reference_logps.main(BASE, reference_logps.Params(micro_batch_tokens=8), project)
    with open(project / name, "ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match=f"another {name}"):
        read_reference_logps(project, "train")
