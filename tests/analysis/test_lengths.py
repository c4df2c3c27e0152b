import itertools

from lora_tuner.analysis.lengths import describe_lengths, find_outliers


def test_lengths_count_rows_beyond_limit():
    lengths = describe_lengths([10] * 50 + [100] * 49 + [1000], 100, tokenizer="base", truncated_rows=1)
    cuts = {cut.length: (cut.longer_rows, round(cut.share_beyond, 4)) for cut in lengths.cuts}
    assert cuts[100] == (1, round(900 / 6400, 4))
    assert cuts[512] == (1, round(488 / 6400, 4))
    assert (lengths.shortest, lengths.longest, lengths.total, lengths.chunked_rows) == (10, 1000, 6400, 0)


def test_histogram_has_every_row_once():
    for values in ([1], [0, 0], list(range(1000)), [3] * 99 + [5000], [7, 9]):
        histogram = describe_lengths(values, 512, tokenizer=None).histogram
        assert sum(bar.rows for bar in histogram) == len(values)
        assert all(bar.end == after.start for bar, after in itertools.pairwise(histogram))
        for bar in histogram:
            inside = [value for value in values if bar.start <= value and (bar.end is None or value < bar.end)]
            assert len(inside) == bar.rows


def test_outliers_are_far_from_quartiles():
    lengths = [100 + number % 40 for number in range(200)]
    lengths[17], lengths[30] = 9000, 2
    assert find_outliers(lengths) == ([17], [30])
    assert find_outliers([100 + number % 40 for number in range(200)]) == ([], [])
    assert find_outliers([5]) == ([], [])
