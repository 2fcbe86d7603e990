"""Documents -> generations -> megadocs -> MDS streams."""
