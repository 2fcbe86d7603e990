"""Folders that are sent to a real S3 server."""

import threading
from pathlib import Path

import pytest

from tests.conftest import ObjectStore
from trainer import object_store as sending
from trainer.object_store import is_there, read, send

FILES = {"card.md": b"what it is", "data/part-0.bin": b"0" * 5000, "data/part-1.bin": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {**FILES, ".hidden": b"not sent"}.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


def test_all_of_a_folder_is_sent_and_one_file_last(
    folder: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    patiently = sending.patiently

    def note(action: object, where: str) -> object:
        order.append(where)
        return patiently(action, where)  # type: ignore[arg-type]

    monkeypatch.setattr(sending, "patiently", note)
    where = "s3://bucket/some/folder"
    assert send(folder, where, "card.md") == sum(map(len, FILES.values()))
    assert order[-1] == f"{where}/card.md"
    assert {name: read(f"{where}/{name}") for name in FILES} == FILES
    assert is_there(f"{where}/card.md")
    assert not is_there(f"{where}/.hidden")


def test_what_is_denied_is_said_at_once(folder: Path, object_store: ObjectStore) -> None:
    with pytest.raises(FileNotFoundError, match=r"s3://none/x is not there: .*404"):
        send(folder, "s3://none/x", "card.md")
    object_store.check_credentials()
    with pytest.raises(OSError, match=r"s3://bucket/x\S* is denied: .*check the credentials"):
        send(folder, "s3://bucket/x", "card.md")


@pytest.mark.slow
def test_a_server_that_is_away_is_waited_for(folder: Path, object_store: ObjectStore) -> None:
    object_store.stop()
    back = threading.Timer(2, object_store.start)
    back.start()
    send(folder, "s3://bucket/x", "card.md")
    back.join()
    assert read("s3://bucket/x/card.md") == FILES["card.md"]
