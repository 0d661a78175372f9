"""The command line says what is installed and what a directory holds."""

import json

from typer.testing import CliRunner

from flexheads.cli import app

runner = CliRunner(env={"COLUMNS": "160"})


def test_plugins_lists_every_table_with_its_provider():
    result = runner.invoke(app, ["plugins"])
    assert result.exit_code == 0
    for word in ("tagging", "bottleneck", "adapterhub", "architectures", "conversions"):
        assert word in result.output


def test_doctor_passes_where_every_plugin_is_in_use():
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "transformers" in result.output


def test_inspect_shows_a_configuration(tmp_path):
    (tmp_path / "head_config.json").write_text(json.dumps({"name": "mrpc", "config": None}))
    result = runner.invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 0
    assert "mrpc" in result.output


def test_inspect_says_where_it_looked_in_vain(tmp_path):
    result = runner.invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert "adapter_config.json" in result.output
