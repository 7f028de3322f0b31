from stages.lib.data.cuts import count_cut_texts, cut_warnings

MANY = {"prompts": 0.1, "answers": 0.2}


def test_cut_texts_worked_by_hand():
    system = '[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]'
    rows = [{"prompt": "u", "messages": messages} for messages in (system, system, None)]
    whole = [{f"{part}_input_ids": [1, 2, 3] for part in ("prompt", "chosen", "rejected")}] * 3
    cut = [
        whole[0] | {"prompt_input_ids": [2, 3]},
        whole[0] | {"chosen_input_ids": [1, 2]},
        {name: [3] for name in whole[0]},
    ]
    assert count_cut_texts(rows, whole, cut) == {"prompts": 2, "answers": 3, "system_messages": 1}


def test_prompts_and_answers_have_shares_of_their_own():
    def said(prompts, answers, systems):
        cut = {"prompts": prompts, "answers": answers, "system_messages": systems}
        return [sentence.split(" are cut")[0].split(", or")[0] for sentence in cut_warnings(cut, 100, MANY)]

    assert said(10, 40, 0) == []  # 10 of 100 and 40 of 200: not above
    assert said(11, 0, 0) == ["11 of the pairs' 100 prompts (11%)"]
    assert said(0, 41, 0) == ["41 of the pairs' 200 answers (20%)"]
    assert said(29, 0, 29) == ["29 of 100 pairs lost their system message", "29 of the pairs' 100 prompts (29%)"]
