"""Write a folder of FinePhrase's layout with datatrove's own writer, as its recipe does.

``PYTHONPATH=.venv/datatrove python tests/gen/exchange/write_finephrase.py FOLDER [DOCUMENTS]``.
What it wrote with datatrove 0.10.1 is in ``tests/gen/exchange/finephrase``.
"""

import sys

from datatrove.data import Document
from datatrove.pipeline.writers import ParquetWriter

STYLES = ("faq", "math", "table", "tutorial")
CHUNK = 20  # documents in a file


def main(folder: str, documents: int) -> None:
    for style in STYLES:
        with ParquetWriter(
            f"{folder}/{style}",
            output_filename="${rank}_${chunk_index}.parquet",
            expand_metadata=True,
            batch_size=10,
        ) as writer:
            for number in range(documents):
                writer.write(document(style, number), rank=0, chunk_index=str(number // CHUNK))


def document(style: str, number: int) -> Document:
    """As FineWeb-Edu has it, with what InferenceRunner adds."""
    text = " ".join(f"Fact {number}.{fact} of the source is short." for fact in range(6))
    answer = f"{style} {number}: " + " ".join(f"fact {number}.{fact}" for fact in range(6))
    result = {
        "finish_reason": "length" if number % 7 == 0 else "stop",
        "text": answer,
        "usage": {
            "completion_tokens": len(answer.split()),
            "prompt_tokens": len(text.split()),
            "prompt_tokens_details": None,
            "total_tokens": len(answer.split()) + len(text.split()),
        },
    }
    return Document(
        text=text,
        id=f"<urn:uuid:00000000-0000-4000-8000-{number:012d}>",
        metadata={
            "dump": "CC-MAIN-2024-10",
            "url": f"https://example.org/{number}",
            "score": 3.5,
            "rollout_results": [result],
        },
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 40)
