"""Stop strings: the text ends before them, and no part of one is ever shown."""

from collections.abc import Sequence


class StopScanner:
    """Looks for stop strings in a text that comes in pieces; how it is cut makes no difference.

    Attributes:
        matched: the stop string that ended the text; None while there is none.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`include` shows the stop string that ended the text, at its end."""
        self._stops = tuple(stops)
        self._include = include
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What of the text so far can be shown now: all but what may turn out to begin a stop string."""
        if not self._stops:
            return text
        text = self._held + text
        found = [(place + len(stop), place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            # The one that is complete first, as if the text came letter by letter; of several the longest.
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else start]
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                self._held = text[-length:]
                return text[:-length]
        self._held = ""
        return text

    def finish(self) -> str:
        """What was held back, once the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held
