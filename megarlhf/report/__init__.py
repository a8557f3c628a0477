"""`megarlhf report`: run folders as one page for people (docs/report.md)."""
