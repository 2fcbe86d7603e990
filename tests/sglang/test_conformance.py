"""What a generation server must do for us, asked of the real SGLang."""

from tests.gen.serving.test_conformance import *  # noqa: F403
