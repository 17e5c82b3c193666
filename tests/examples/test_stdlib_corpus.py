from stdlib_corpus import HELD_OUT_SHARE, is_held_out, load_corpus


def test_split_is_disjoint_and_the_same_every_time(corpus):
    assert corpus.train.keys().isdisjoint(corpus.held_out)
    again = load_corpus()
    assert (again.train, again.held_out, again.left_out) == (corpus.train, corpus.held_out, corpus.left_out)


def test_a_module_keeps_its_side():
    # Fixed by the hash of the path, so by nothing that a Python version changes.
    assert is_held_out("sched.py") and is_held_out("tomllib/__init__.py")
    assert not is_held_out("json/decoder.py") and not is_held_out("argparse.py")


def test_held_out_share(corpus):
    files = len(corpus.train) + len(corpus.held_out)
    expected = HELD_OUT_SHARE * files
    # The hash picks like independent draws: within four standard deviations of a binomial count.
    assert abs(len(corpus.held_out) - expected) < 4 * (expected * (1 - HELD_OUT_SHARE)) ** 0.5


def test_only_library_sources(corpus):
    paths = [*corpus.train, *corpus.held_out]
    assert "json/decoder.py" in paths
    assert not [path for path in paths if {"site-packages", "test", "tests"} & set(path.split("/"))]
    assert "encodings/cp1252.py" not in paths and "encodings/idna.py" in paths


def test_what_is_left_out_is_counted(corpus):
    assert corpus.left_out["generated table"] > 50  # the code pages of encodings/ alone are more
    assert "left out, generated table" in str(corpus)
