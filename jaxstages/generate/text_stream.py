"""Tokens as they come -> text that can be shown: no half characters, nothing of a stop string, ended by one."""

from collections.abc import Callable, Sequence

HALF = "\ufffd"
"""What a decoder makes of bytes that are no character, or not yet."""


class TextStream:
    """text: what may be shown so far. ended: a stop string came; the text is cut before it. ids: tokens up to there.

    | tokens so far        | text, stop string "\\n\\n" |
    | `Hi` `!`             | Hi!                      |
    | `Hi` `!` `\\n`        | Hi!                      |
    | `Hi` `!` `\\n` `\\nSo` | Hi! and ended            |
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, stops
        self.ids: list[int] = []
        self.text = ""
        self.ended = False

    def feed(self, ids: Sequence[int], last: bool = False) -> str:
        """The text that these tokens add; with `last` also what was held back for what might have come."""
        if self.ended:
            return ""
        self.ids += ids
        whole = self._decode(self.ids)  # all of them: a token's text may depend on those before it
        ends = [place for stop in self._stops if (place := whole.find(stop)) >= 0]
        if ends:
            self.ended, whole = True, whole[: min(ends)]
        elif not last:
            whole = whole.rstrip(HALF)
            whole = whole[: len(whole) - _begun(whole, self._stops)]
        if not (whole.startswith(self.text) or last or self.ended):
            return ""  # the decoder is still of two minds about what it said
        fresh, self.text = whole[len(self.text) :], whole
        return fresh


def _begun(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of the text with which a stop string begins."""
    sizes = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
    return max(sizes, default=0)
