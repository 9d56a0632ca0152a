"""The fields that the guides name are fields."""

from __future__ import annotations

import dataclasses
import re

from sae_lens import LanguageModelSAERunnerConfig

import saelens_matryoshka as sm
from tests.docs.pages import ROOT

SAE = {field.name for field in dataclasses.fields(sm.MatryoshkaTrainingSkipTranscoderConfig)}
RUNNER = {field.name for field in dataclasses.fields(LanguageModelSAERunnerConfig)}


def test_the_keys_that_others_migrate_to_exist() -> None:
    text = (ROOT / "docs" / "migrating.md").read_text()
    fields = 0
    for row in re.findall(r"^\|(.*)\|$", text, flags=re.MULTILINE):
        for owner, names in re.findall(r"\b(sae|runner) ((?:`[\w=\"\"]+`(?:, | · )?)+)", row):
            for name in re.findall(r"`(\w+)", names):
                assert name in (SAE if owner == "sae" else RUNNER), f"{owner} {name}"
                fields += 1
    assert fields > 50


def test_the_settings_that_the_training_guide_lists_exist() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    table = text[text.index("| field | what it does") :].split("\n\n")[0]
    names = re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.splitlines()[2:]))
    assert len(names) > 10
    assert not set(names) - SAE - RUNNER
