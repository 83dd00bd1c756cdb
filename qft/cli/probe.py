"""What multiplies fastest on this machine, tried, and the lines of a recipe that ship it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from qft.cli.options import shared
from qft.console import Screen, print_columns, print_json, print_line
from qft.errors import InputError
from qft.targets import DEFAULT_TARGET, find_target


@click.command("probe")
@click.option(
    "--like", default=DEFAULT_TARGET, show_default=True, metavar="TARGET", help="The target whose bits are tried."
)
@click.option("--width", type=click.IntRange(64, 16384), default=576, show_default=True, help="Of the model's layers.")
@click.option("--threads", type=click.IntRange(0), default=0, help="0: one a physical core.")
@click.option(
    "--by", type=click.Choice(["writing", "reading"]), default="writing", show_default=True, help="What must be fast."
)
@click.option(
    "--accept",
    type=click.FloatRange(0, 50),
    default=5.0,
    show_default=True,
    help="Percent slower than the fastest, for finer blocks.",
)
@click.option(
    "--megabytes",
    type=click.FloatRange(0.1, 1000),
    default=40.0,
    show_default=True,
    help="Weights that one row goes through: more than the processor's cache holds.",
)
@shared
def probe_command(like: str, width: int, threads: int, by: str, accept: float, megabytes: float, as_json: bool) -> None:
    """Try the blocks and accuracy levels of packed weights on this processor, and say which a target should have here.

    Writing is one row through weights that few caches hold, as every token of an answer is; reading is 64 rows at once, as a prompt
    is. What is chosen goes into a recipe before a run: what is trained is what is shipped. The device that runs the bundle is the
    one to try.
    """
    from qft.measure.products import choose, try_products

    target = find_target(like)
    if target.linear is None:
        raise InputError(f"{like} packs no weights", where="--like", hint="cpu-int4 and cpu-int8 do")
    screen = Screen(quiet=as_json)
    with screen.shown():
        tried = try_products(
            width, target.linear, threads=threads, streamed_mb=megabytes, on_progress=screen.on_progress
        )
    best = choose(tried, by=by, accept=accept / 100)
    assert best.weights is not None
    profile = {
        "like": like,
        "linear": best.weights.model_dump(exclude_defaults=True),
        "accuracy_level": best.accuracy_level,
    }
    if as_json:
        print_json({"tried": [_as_json(one) for one in tried], "by": by, "accept_percent": accept, "profile": profile})
        return
    print_columns(
        f"million weights a second, layers of {width}; the best of two medians",
        ("stored as", "bits a weight", "products", "writing, 1 row", "reading, 64 rows", ""),
        [
            (
                f"{one.weights.bits} bits, blocks of {one.weights.block}" if one.weights else "float32",
                f"{one.bits:.2f}",
                "float32 (level 0)" if one.accuracy_level == 0 else f"int8 (level {one.accuracy_level})",
                f"{one.writing / 1e6:,.0f}",
                f"{one.reading / 1e6:,.0f}",
                "chosen" if one is best else "",
            )
            for one in tried
        ],
    )
    print_line(
        f"\nThe finest blocks that cost at most {accept:g} % of the fastest {by}. In a recipe:\n\n{recipe_lines(profile)}"
    )


def recipe_lines(profile: Mapping[str, Any]) -> str:
    """What a recipe says to ship a target of its own."""
    words = ", ".join(f"{key}: {_yaml(value)}" for key, value in profile.items())
    return f"export:\n  targets: [here]\n  profiles:\n    here: {{{words}}}"


def _as_json(one: Any) -> dict[str, Any]:
    return asdict(one) | {"weights": one.weights.model_dump() if one.weights else None}


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(one)}" for key, one in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)
