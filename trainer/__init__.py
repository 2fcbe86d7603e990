"""MDS streams -> packed windows -> model -> checkpoints -> losses, fits and figures."""
