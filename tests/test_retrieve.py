"""The nearest texts, and a fixed order among equals."""

from metier.retrieve import Index


def test_nearest_first_and_versions_stay_whole() -> None:
    index = Index(["GPL version 2.0", "GPL version 3.0", "MIT license", "unrelated words here"])
    assert index.search("under the GPL 3.0", 2)[0] == 1
    assert index.search("the mit license", 1) == [2]


def test_equal_scores_keep_their_order_and_k_is_bounded() -> None:
    index = Index(["a b", "c d", "e f"])
    assert index.search("nothing known", 5) == [0, 1, 2]


def test_texts_without_words_can_be_indexed() -> None:
    assert Index(["***", "word"]).search("word", 1) == [1]
