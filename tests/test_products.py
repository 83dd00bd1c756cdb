"""What multiplies fastest: tried on the real onnxruntime, and chosen from figures whose answer is known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qft.cli.probe import recipe_lines
from qft.errors import InputError
from qft.measure.products import BLOCKS, LEVELS, Tried, choose
from qft.pipeline import fingerprints
from qft.progress import silent
from qft.recipe import Recipe
from qft.runfolder import RunFolder
from qft.stages.job import Job
from qft.targets import Weights, find_target


def tried(block: int | None, level: int, writing: float, reading: float = 1.0) -> Tried:
    return Tried(None if block is None else Weights(bits=4, block=block), level, 4.5, writing, reading)


def test_the_finest_blocks_that_cost_little_are_chosen_and_of_these_the_most_exact_products() -> None:
    found = [tried(None, 0, 500.0), tried(32, 0, 97), tried(32, 4, 98), tried(64, 4, 100), tried(128, 0, 80, reading=2)]
    assert choose(found, by="writing", accept=0.05) is found[1]
    assert choose(found, by="writing", accept=0.025) is found[2]
    assert choose(found, by="writing", accept=0.0) is found[3]
    assert choose(found, by="reading", accept=0.05) is found[4]


def test_every_way_is_tried_and_what_is_printed_is_a_target_that_a_recipe_takes() -> None:
    line = [sys.executable, "-m", "qft", "probe", "--width", "512", "--megabytes", "2", "--json"]
    said = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    ways = [(one["weights"]["block"], one["accuracy_level"]) for one in said["tried"] if one["weights"]]
    assert sorted(ways) == sorted((block, level) for block in BLOCKS for level in LEVELS)
    assert all(one["writing"] > 0 and one["reading"] > 0 for one in said["tried"])
    most = max(one["writing"] for one in said["tried"] if one["weights"])
    (chosen,) = (
        one
        for one in said["tried"]
        if one["weights"]
        and one["weights"]["block"] == said["profile"]["linear"]["block"]
        and one["accuracy_level"] == said["profile"]["accuracy_level"]
    )
    assert chosen["writing"] >= 0.95 * most
    export = yaml.safe_load(recipe_lines(said["profile"]))["export"]
    (target,) = recipe(**export).export.chosen()
    assert (target.name, target.suffix) == ("here", "q4")
    assert target.linear is not None
    assert target.linear.block in BLOCKS
    assert target.finer == find_target("cpu-int4").finer


def recipe(**export: object) -> Recipe:
    return Recipe.model_validate({"name": "a", "model": "m", "data": {"train": "rows.jsonl"}, "export": export})


def test_a_profile_of_ones_own_is_a_shipped_one_but_for_what_it_says() -> None:
    own = {"phone": {"linear": {"bits": 4, "block": 32}}, "exact": {"like": "cpu-int8", "accuracy_level": 0}}
    phone, shipped, exact = recipe(targets=["phone", "cpu-int4", "exact"], profiles=own).export.chosen()
    assert phone.linear == Weights(bits=4, block=32)
    assert phone.model_dump(exclude={"name", "linear"}) == shipped.model_dump(exclude={"name", "linear"})
    assert (exact.accuracy_level, exact.linear) == (0, find_target("cpu-int8").linear)


@pytest.mark.parametrize(
    ("own", "where", "what"),
    [
        ({"here": {"like": "cpu-int5"}}, "export.targets", "no target 'cpu-int5'"),
        ({"here": {"linear": {"bits": 4, "block": 33}}}, "export.profiles.here.linear.block", "16, 32, 64 or 128"),
        ({"here": {"blocks": 32}}, "export.profiles.here.blocks", "not permitted"),
        ({"there": {}}, "export.targets", "no target 'here'"),
    ],
)
def test_a_profile_that_cannot_be_is_told_by_its_key(own: dict, where: str, what: str) -> None:
    with pytest.raises(InputError) as error:
        recipe(targets=["here"], profiles=own).export.chosen()
    (problem,) = error.value.problems
    assert problem.where == where
    assert what in str(problem)


@pytest.mark.parametrize("name", ["cpu-int4", "float", "../out", ""])
def test_a_profile_has_a_name_of_its_own(name: str) -> None:
    with pytest.raises(InputError, match="taken, or none for a folder"):
        recipe(targets=[name], profiles={name: {}}).export.chosen()


def test_what_a_profile_says_decides_its_stages(tmp_path: Path) -> None:
    def marks(own: dict) -> dict[str, str]:
        found = recipe(targets=["here"], profiles={"here": own})
        return fingerprints(Job(found, tmp_path, RunFolder(tmp_path), tmp_path, silent))

    plain, exact, finer = (marks(own) for own in ({}, {"accuracy_level": 0}, {"linear": {"bits": 4, "block": 32}}))
    assert plain["quantize"] not in (exact["quantize"], finer["quantize"])
    assert plain["fold"] != finer["fold"]
    assert plain["merge"] == exact["merge"] == finer["merge"]
