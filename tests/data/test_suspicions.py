import json

import pytest

from stages.lib.data.pairs import Pair
from stages.lib.data.suspicions import count_turns, suspicious_counts

TURNS = json.dumps([{"role": "system", "content": "s"}, {"role": "user", "content": "Why?"}])


@pytest.mark.parametrize(
    ("pair", "found"),
    [
        (Pair("Why?", "So.", "No."), {}),
        (Pair("Why?", "<|im_start|>user", "No."), {"other_template"}),
        (Pair("[INST] Why? [/INST]", "So.", "No."), {"other_template"}),
        (Pair("### Instruction: x", "So.", "No."), {"other_template"}),
        (Pair("Why?", "So.", "No.\n\nHuman: and?"), {"other_template"}),
        (Pair("Human: Why?\n\nAssistant:", "So.", "No."), {"other_template"}),
        (Pair("Why?\nAssistant:", "So.", "No."), {"other_template"}),
        (Pair("User: Why?", "So.", "No."), {"other_template"}),
        (Pair("Why?", '{"role": "assistant", "content": "So."}', "No."), {"message_as_text"}),
        (Pair("Why?", '{"role": "poet", "content": "So."}', "No."), {}),
        (Pair("Why?", "nan", "No."), {"missing_value"}),
        (Pair("Why?", "So.", " None\n"), {"missing_value"}),
        (Pair("System: NaN\n\nUser: Why?", "So.", "No.", TURNS.replace('"s"', '"NaN"')), {"missing_value"}),
        (Pair("The User: a guide", "None of them.", "null and void"), {}),
        (Pair("A human: no", "The ### sign", "a < b > c | d"), {}),
        (Pair("Why?", "Why? So.", "No."), {"begins_with_prompt"}),
        (Pair("System: s\n\nUser: Why?", "So.", " Why? No.", TURNS), {"begins_with_prompt"}),
    ],
)
def test_suspicions_worked_by_hand(pair, found):
    assert {name for name, count in suspicious_counts([pair]).items() if count} == set(found)


def test_turns_are_counted():
    assert count_turns([Pair("p", "c", "r"), Pair("p", "c", "r", TURNS), Pair("q", "c", "r")]) == {"1": 2, "2": 1}
