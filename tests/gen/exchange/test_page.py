"""docs/use-existing-rephrases.md: its commands, run on the few files that datatrove wrote."""

import re
import shlex
from pathlib import Path

import pytest
from datasets import load_dataset

from tests.conftest import REPOSITORY, run_script
from tests.gen.exchange.test_importing import FINEPHRASE

PAGE = REPOSITORY / "docs" / "use-existing-rephrases.md"
TINY = {
    "generate.py": ["tokenizer.vocab_size=512", "corpus.held_out=0.2"],
    "train.py": [
        *("data.context_length=64", "data.batch_size=4", "recipe.epochs=1"),
        *("runtime.num_threads=1", "tracking.num_evaluations=1", "checkpoint.count=1"),
    ],
}


@pytest.mark.slow
def test_the_commands_of_the_page_lead_from_a_folder_to_a_report(tmp_path: Path) -> None:
    first, styles, out = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    places = {
        "finephrase/": f"{FINEPHRASE}/",
        "data/fine": str(tmp_path / "root"),
        "runs/fine": str(tmp_path / "runs"),
        "fine-dataset": str(tmp_path / "dataset"),
        "model=300m": "model=tiny",
    }
    printed = []
    for line in [*first.splitlines(), styles.splitlines()[0], *out.splitlines()]:
        words = shlex.split(line)[1:]
        assert words[0] in ("generate.py", "train.py", "report.py")
        for here, there in places.items():
            words = [word.replace(here, there) for word in words]
        printed.append(run_script(*words, *TINY.get(words[0], [])).stdout)
    assert "stitched-g4-faq+math+table+tutorial: " in printed[0]
    assert [row.split()[:2] for row in printed[2].splitlines()[1:3]] == [
        ["real", "-"],
        ["stitched-faq+math+table+tutorial", "4"],
    ]
    assert "stitched-g2-faq+table: " in printed[3]
    rows = list(load_dataset(str(tmp_path / "dataset"), "table", split="train", streaming=True))
    assert all(row["generations"][0]["text"].startswith("table ") for row in rows)
    assert "megadocs-stitched-g2-faq+table: train: " in printed[4]
