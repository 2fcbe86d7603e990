"""Score a run or an ensemble: ``python evaluate.py runs=[runs/a,runs/b]``.

An ensemble of all sizes up to K, for the report's figure over K:
``python evaluate.py runs=[...] output=runs/ensembles/stitched.json``.
More text sets: ``sets=[arxiv_cs,data/other/streams/val]``; tasks: ``tasks=[arc_easy,piqa,sciq]``.
Of a single run both are kept in its folder, and the report draws them.
``export=FOLDER`` writes a single run in Hugging Face's Llama format instead.
"""

from trainer.config.evaluate import EvaluateConfig
from trainer.entry import program


@program("evaluate", EvaluateConfig)
def main(config: EvaluateConfig) -> float | None:
    """Return the i.i.d. loss; None where a run is exported."""
    from trainer.evaluation.command import evaluate

    return evaluate(config)


if __name__ == "__main__":
    main()
