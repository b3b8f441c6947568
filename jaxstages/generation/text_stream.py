"""Stream of tokens -> text that can be shown: without incomplete characters, and up to a stop string."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""Decoders write it for bytes that are no character, or not yet a complete one."""


class TextStream:
    """Text of an answer while it is generated.

    text: the text that may be shown so far.
    ended: whether a stop string came; the text ends before it.
    ids: the tokens so far.

    | tokens so far        | text, stop string "\\n\\n" |
    | `Hi` `!`             | Hi!                      |
    | `Hi` `!` `\\n`        | Hi!                      |
    | `Hi` `!` `\\n` `\\nSo` | Hi! and ended            |
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), held_from: Sequence[str] = ()
    ) -> None:
        """
        Args:
            held_from: strings from which on the text is withheld until its end, such as the beginning of a tool call.
        """
        self._decode, self._stops, self._held_from = decode, stops, held_from
        self.ids: list[int] = []
        self.text = ""
        self.ended = False

    def feed(self, ids: Sequence[int], last: bool = False) -> str:
        """Add tokens, and return the new text.

        Args:
            last: no tokens follow: also return text that was withheld as a possible beginning of a stop string.
        """
        if self.ended:
            return ""
        self.ids += ids
        text = self._decode(self.ids)  # all of them: the text of a token may depend on those before it

        stop_positions = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if stop_positions:
            self.ended, text = True, text[: min(stop_positions)]
        elif not last:
            text = text.rstrip(REPLACEMENT)
            text = text[: len(text) - _partial_stop(text, (*self._stops, *self._held_from))]
            text = text[: min((at for word in self._held_from if (at := text.find(word)) >= 0), default=len(text))]

        if not (text.startswith(self.text) or last or self.ended):
            return ""  # the decoder may still change earlier text
        new_text, self.text = text[len(self.text) :], text
        return new_text

    def would_end(self, ids: Sequence[int]) -> bool:
        """Return whether a stop string comes with these tokens."""
        text = self._decode([*self.ids, *ids])
        return any(stop in text for stop in self._stops)


def _partial_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest suffix of the text that is a prefix of a stop string."""
    lengths = [length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])]
    return max(lengths, default=0)
