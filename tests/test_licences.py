"""Licences as packages, cards and files name them, and what they ask of who ships a tuned model."""

from __future__ import annotations

import pytest

from qft.licences import asks, hub_id, licence_of, warning


@pytest.mark.parametrize(
    ("stated", "known"),
    [
        ("MIT", "mit"),
        ("MIT License", "mit"),
        ("Apache-2.0", "apache-2.0"),
        ("Apache Software License", "apache-2.0"),
        ("apache-2.0", "apache-2.0"),
        ("BSD 3-Clause", "bsd-3-clause"),
        ("CC-BY-NC-SA-4.0", "cc-by-nc-sa-4.0"),
        ("Creative Commons Attribution Non Commercial Share Alike 4.0 International", "cc-by-nc-sa-4.0"),
        ("Creative Commons Attribution-NoDerivatives 4.0", "cc-by-nd-4.0"),
        ("cc-by-sa-3.0", "cc-by-sa-3.0"),
        ("CC BY 4.0", "cc-by-4.0"),
        ("cc-by-2.0", "cc-by-2.0"),
        ("CC0-1.0", "cc0-1.0"),
        ("Gemma terms (accepted on its page)", "gemma"),
        ("GEMMA_TERMS.html", "gemma"),
        ("llama3.2", "llama3.2"),
        ("Llama 3.1 Community License Agreement", "llama3.1"),
        ("Llama 3 Community License", "llama3"),
        ("llama2", "llama2"),
        ("GNU General Public License v2 (GPLv2)", "gpl-2.0"),
        ("GNU Affero General Public License v3", "agpl-3.0"),
        ("LGPL-2.1", "lgpl-2.1"),
        ("creativeml-openrail-m", "openrail"),
        ("LICENSE", "other"),
        ("BIG_TERMS.html", "other"),
        ("Permitted for all", "other"),
        (None, "other"),
    ],
)
def test_a_licence_is_known_by_the_names_it_goes_by(stated: str | None, known: str) -> None:
    assert hub_id(stated) == known


@pytest.mark.parametrize("stated", ["MIT", "Apache-2.0", "CC BY 4.0", "CC0-1.0", "BSD", None])
def test_what_asks_for_notices_alone_is_no_warning(stated: str | None) -> None:
    assert warning("base", stated) is None


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ("cc-by-nc-4.0", "forbids commercial use"),
        ("cc-by-nd-4.0", "forbids to pass on changed versions, as a tuned model is"),
        ("gemma", "list of forbidden uses"),
        ("llama3.2", "name begins with Llama"),
        ("GPL-3.0", "source"),
        ("WEIRD_TERMS.txt", "terms that qft does not know (WEIRD_TERMS.txt): read it before you ship"),
    ],
)
def test_what_stands_in_the_way_of_an_app_is_said(stated: str, said: str) -> None:
    found = warning("owner/name", stated)
    assert found is not None
    assert found.startswith("owner/name is under ")
    assert said in found


def test_what_is_not_stated_must_be_asked_for() -> None:
    assert licence_of(None) is None
    assert "ask who made it" in asks(None)
    assert asks("CC0") == "nothing"
