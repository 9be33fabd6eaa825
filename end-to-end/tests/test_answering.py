"""Stop strings: whatever the pieces, the text ends where the first of them would begin."""

from hypothesis import given
from hypothesis import strategies as st

from answering import StopStrings

LETTERS = st.text("ab", max_size=12)


@given(st.lists(LETTERS, max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_at_the_first_stop_string(pieces, stops):
    held, out = StopStrings(stops), []
    for piece in pieces:
        out.append(held.push(piece))
        # Nothing is held back longer than a stop string could still need.
        assert len("".join(pieces[:len(out)])) - len("".join(out)) < max(map(len, stops), default=1) or held.found
    out.append(held.flush())
    whole, text = "".join(pieces), "".join(out)
    found = any(stop in whole for stop in stops)
    assert held.found == found
    if not found:
        assert text == whole
    else:  # the piece in which one is complete decides, and in it the earliest
        assert not any(stop in text for stop in stops)
        assert any(whole.startswith(text + stop) for stop in stops)


def test_a_held_beginning_is_let_go_when_it_comes_to_nothing():
    held = StopStrings(["###"])
    assert [held.push(piece) for piece in ("a#", "#b", "##", "#c")] == ["a", "##b", "", ""]
    assert held.found and held.flush() == ""
