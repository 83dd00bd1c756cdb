"""gettext catalogues (.po): the messages of an app and their translations."""

from __future__ import annotations

from collections.abc import Iterator


def read_catalogue(text: str) -> Iterator[tuple[str, str, int]]:
    """(message, its translation, line) of every message that is translated: not those that are obsolete, or fuzzy (guessed).

    Of a message with a plural both are read, the plural with the last of its forms. Raises OSError or ValueError as polib does.
    """
    import polib

    for entry in polib.pofile(text):
        if not entry.translated() or entry.obsolete:
            continue
        if not entry.msgid_plural:
            yield entry.msgid, entry.msgstr, entry.linenum
            continue
        forms = [entry.msgstr_plural[number] for number in sorted(entry.msgstr_plural)]
        if len(forms) > 1:  # otherwise the language has one form, which is that of the plural too
            yield entry.msgid, forms[0], entry.linenum
        yield entry.msgid_plural, forms[-1], entry.linenum
