"""Reports: every report is a document of typed blocks, which any renderer can draw."""
