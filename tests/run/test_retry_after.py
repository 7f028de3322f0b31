from datetime import UTC, datetime

import pytest

from stages.lib.run.retry_after import retry_after

NOON = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("after", "seconds"),
    [
        ("7", 7.0),
        (" 3600 ", 3600.0),
        ("Sun, 01 Mar 2026 12:01:30 GMT", 90.0),
        ("Sun, 01 Mar 2026 13:00:10 +0100", 10.0),
        ("Sun, 01 Mar 2026 12:00:05 -0000", 5.0),  # of no zone: UTC's
        ("Sun, 01 Mar 2026 11:59:00 GMT", 0.0),  # over
        ("soon", 0.0),
        ("-3", 0.0),
        ("1e9", 0.0),
        ("²", 0.0),
        ("", 0.0),
    ],
)
def test_numbers_and_dates_count_and_nothing_else(after, seconds):
    assert retry_after({"Retry-After": after}, NOON) == seconds


def test_without_the_header_there_is_nothing_to_wait_for():
    assert retry_after({}) == 0.0
