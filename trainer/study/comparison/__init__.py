"""One study as a whole: what is compared, what it costs, what came out, and how sure that is.

A study is a YAML in ``conf/train/study/``; ``trainer/plugins/hydra_plugins/study_sweeper.py`` runs
it. It may import what ``trainer.study`` may.
"""
