"""`fastmtl doctor`: backends with reasons, extras as in pyproject.toml, data where it is."""

import json
import re
import tomllib
from pathlib import Path

from fastmtl import backend
from fastmtl.cli.doctor import EXTRAS


def test_the_report_names_for_each_op_what_runs_and_why_the_others_do_not(cli):
    code, out, _ = cli("doctor", "--json")
    assert code == 0
    report = json.loads(out)
    assert set(report["backends"]) == set(backend.TABLE)
    for op, found in report["backends"].items():
        assert found["runs"] in backend.available()
        assert set(found["others"]) == set(backend.TABLE[op]) - {found["runs"]}
        assert all(found["others"].values())
    assert report["cpu"]["threads"] >= 1
    assert bool(report["gpu"]["names"]) != bool(report["gpu"]["why_none"])
    assert report["data"]["census"] == []


def test_a_forced_backend_is_the_reason(cli, monkeypatch):
    monkeypatch.setenv("FASTMTL_BACKEND", "eager")
    report = json.loads(cli("doctor", "--json").out)
    assert {found["runs"] for found in report["backends"].values()} == {"eager"}
    assert report["environment"]["FASTMTL_BACKEND"] == "eager"


def test_the_text_says_the_same(cli, census_folder, monkeypatch):
    monkeypatch.setenv("FASTMTL_DATA", str(census_folder))
    code, out, _ = cli("doctor")
    assert code == 0
    for part in ("embedding_bag", "expert_gate", "parquet", "threads", "gpu", str(census_folder)):
        assert part in out


def test_the_extras_are_those_of_the_package():
    file = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(file.read_text())["project"]["optional-dependencies"]
    listed = {name: {re.split(r"[<>=!~\[ ]", need)[0].lower() for need in needs} for name, needs in extras.items()}
    del listed["dev"]
    assert {name: {module.lower() for module in modules} for name, (modules, _) in EXTRAS.items()} == listed
