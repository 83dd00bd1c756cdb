"""What known licences ask of who ships a tuned model in an app. Not legal advice: it names what to read before an app is sold.

Each entry says what the licence itself says: https://spdx.org/licenses, creativecommons.org/licenses, ai.google.dev/gemma/terms,
llama.com/llama-downloads, https://www.licenses.ai.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NOTICE = "its copyright notice and text go with the app"
_NAMED = "name its authors, link the licence and say that it was changed"
_ALIKE = "what is made of it has the same licence"
_USES = "its terms with their list of forbidden uses go with the app and bind who uses it"
_LLAMA = "its agreement goes with the app, which says that it is built with Llama; from 700 million users a month Meta is asked"


@dataclass(frozen=True)
class Licence:
    """id: as the hub names it; `other` is said by name and link. asks: what shipping needs; forbids: what it does not allow."""

    id: str
    name: str
    pattern: str
    asks: str = ""
    forbids: str = ""
    free: bool = True  # nothing but notices is asked for: not worth a warning


# The first whose pattern is found stands: those that forbid more come before those whose name they contain.
_CHANGED = "to pass on changed versions, as a tuned model is"
_LLAMA_NAME = f"{_LLAMA}; the tuned model's name begins with Llama"
LICENCES = [
    Licence("cc-by-nc-nd-4.0", "CC BY-NC-ND", "by-nc-nd", _NAMED, f"{_CHANGED}, and commercial use", free=False),
    Licence("cc-by-nc-sa-4.0", "CC BY-NC-SA", "by-nc-sa", f"{_NAMED}; {_ALIKE}", "commercial use", free=False),
    Licence("cc-by-nc-4.0", "CC BY-NC", "by-nc", _NAMED, "commercial use", free=False),
    Licence("cc-by-nd-4.0", "CC BY-ND", "by-nd", _NAMED, _CHANGED, free=False),
    Licence("cc-by-sa-4.0", "CC BY-SA", "by-sa", f"{_NAMED}; {_ALIKE}", free=False),
    Licence("cc-by-4.0", "CC BY", "(cc|commons)-by", _NAMED),
    Licence("cc0-1.0", "CC0", "cc-?0|public-domain"),
    Licence("gemma", "the Gemma Terms of Use", "gemma", f"{_USES}; say that it was changed", free=False),
    Licence("llama3.3", "the Llama 3.3 licence", r"llama-?3\.3", _LLAMA_NAME, free=False),
    Licence("llama3.2", "the Llama 3.2 licence", r"llama-?3\.2", _LLAMA_NAME, free=False),
    Licence("llama3.1", "the Llama 3.1 licence", r"llama-?3\.1", _LLAMA_NAME, free=False),
    Licence("llama3", "the Llama 3 licence", "llama-?3", _LLAMA_NAME, free=False),
    Licence("llama2", "the Llama 2 licence", "llama-?2", _LLAMA, free=False),
    Licence("openrail", "OpenRAIL", "openrail|bloom-rail", _USES, free=False),
    Licence("agpl-3.0", "AGPL", "agpl|affero", "the app's source goes with it, over a network too", free=False),
    Licence("lgpl-3.0", "LGPL", "lgpl|lesser-general", "changes to it are passed on as source", free=False),
    Licence("gpl-3.0", "GPL", "gpl|general-public", "the source of what is made of it goes with it", free=False),
    Licence("apache-2.0", "Apache 2.0", "apache", f"{_NOTICE}; say that it was changed"),
    Licence("bsd-3-clause", "BSD", "bsd", _NOTICE),
    Licence("mit", "MIT", r"\bmit\b|expat", _NOTICE),
    Licence("odc-by", "ODC-BY", "odc-by", _NAMED),
]
_WORDS = {
    r"[_\s]+": "-",
    "non-?commercial": "nc",
    "share-?alike": "sa",
    "no-?deriv[a-z]*": "nd",
    "attribution": "by",
    "community-|meta-": "",
}


def licence_of(stated: str | None) -> Licence | None:
    """The licence that a package, card or file names; None if it is not known, or none is stated."""
    text = _plain(stated)
    return next((one for one in LICENCES if re.search(one.pattern, text)), None)


def hub_id(stated: str | None) -> str:
    """How the hub names it, in its stated version: `cc-by-sa-3.0`; `other` where it is not known."""
    found, version = licence_of(stated), re.search(r"(\d)(?:\.(\d))?", _plain(stated))
    if found is None:
        return "other"
    if version is None or not re.fullmatch(r"(cc-by.*|.*gpl)-\d\.\d", found.id):
        return found.id
    return f"{found.id[:-4]}-{version[1]}.{version[2] or 0}"


def asks(stated: str | None) -> str:
    """What shipping needs by a licence, in a line; of one that is not known, that it must be read."""
    found = licence_of(stated)
    if found is None:
        return "read it before you ship" if stated else "none is stated: ask who made it before you ship"
    return "; ".join(filter(None, [found.forbids and f"forbids {found.forbids}", found.asks])) or "nothing"


def warning(what: str, stated: str | None) -> str | None:
    """For `qft plan`: what stands in the way of an app, or binds it; None for licences that ask for notices alone.

    what: the base, or rows, as the recipe names them. Nothing stated is nothing to warn of: it may be one's own.
    """
    found = licence_of(stated)
    if stated is None or (found is not None and found.free):
        return None
    name = found.name if found else f"terms that qft does not know ({stated})"
    return f"{what} is under {name}: {asks(stated)}"


def _plain(stated: str | None) -> str:
    text = (stated or "").lower()
    for pattern, word in _WORDS.items():
        text = re.sub(pattern, word, text)
    return text
