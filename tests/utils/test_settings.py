"""Settings are accepted by the names that they had a release before, from every side, with a sentence."""

from __future__ import annotations

import json
import logging

import pytest
from conftest import ROOT
from monai.bundle import ConfigParser

from scripts.utils.settings import RENAMED, accept_old_names


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mednext"), "propagate", True)
    caplog.set_level(logging.WARNING, "mednext")
    return caplog


def parser(**given) -> ConfigParser:
    made = ConfigParser()
    made.read_config(str(ROOT / "configs/train.json"))
    made.update(given)
    return made


@pytest.mark.parametrize("old", sorted(set(RENAMED) - {"memory"}))
def test_a_renamed_setting_is_moved_and_said(old, said):
    config = parser(**{old: "given"})
    accept_old_names(config)
    assert config[RENAMED[old]] == "given"
    assert old not in config
    assert said.messages == [f"--{old} is called --{RENAMED[old]} now; the old name is understood until version 0.8."]


def test_every_new_name_is_there():
    plan = json.loads((ROOT / "configs/plan.json").read_text())
    assert all(now in parser() or now in plan for now in RENAMED.values())
    assert not any(old in parser() for old in RENAMED)


def test_a_configuration_without_old_names_stays_as_it_is(said):
    config = parser(size="B")
    before = json.dumps(config.config)
    accept_old_names(config)
    assert json.dumps(config.config) == before
    assert said.messages == []


def test_an_expression_finds_its_own_configuration(said):
    config = ConfigParser(
        {
            "imports": ["$import scripts.utils.settings as settings"],
            "upkern_from": "k3.pt",
            "init_weights": None,
            "seen": "$@init_weights",
            "initialize": ["$settings.accept_old_names()", "$@seen"],
        }
    )
    assert config.get_parsed_content("initialize")[1] == "k3.pt"
    assert len(said.messages) == 1


def test_what_belongs_to_the_weights_is_set_where_they_are_read(said):
    config = ConfigParser()
    config.read_config(str(ROOT / "configs/inference.json"))
    config.update({"spacing": [2.0, 2.0, 2.0]})
    accept_old_names(config)
    assert config["model#spacing"] == [2.0, 2.0, 2.0]
    assert said.messages == ["--spacing is called --model#spacing now; the old name is understood until version 0.8."]


def test_outside_of_a_configuration_nothing_happens():
    accept_old_names()
