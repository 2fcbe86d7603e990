"""The import's benchmark at a tiny size."""

import json
from pathlib import Path

from benchmarks.importing import main


def test_it_measures_both_layouts(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    options = ["--documents", "200", "--processes", "1", "--output", str(output)]
    result = main([*options, "--scratch", str(tmp_path)])
    assert json.loads(output.read_text()) == result
    assert [row["layout"] for row in result["imports"]] == ["finephrase", "nemotron_cc"]
    for row in result["imports"]:
        assert row["generations"] == 800
        assert row["megabytes_per_cpu_second"] > 0
        assert row["peak_memory_megabytes"] > 50
    assert list(tmp_path.iterdir()) == [output]
